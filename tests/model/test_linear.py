"""One law for every linear map: <g, f(x)> = <f.vjp(g), x>; and autograd as a second opinion."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.linear_blocks import READS, WRITES, Cases
from torch import Tensor

from circuit_tracer_qk.model.linear import LinearMap, Matrix, Mix, Shared, Split

Example = tuple[str, LinearMap, tuple[int, ...]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("models"))


def maps(cases: Cases, name: str) -> Iterator[Example]:
    """(what it is, the map, the shape of its input) of every kind of map, on one architecture."""
    case = cases(name, READS[0], WRITES[0], True)
    blocks = case.blocks
    heads, run = blocks.heads, blocks.heads.run
    block, n_pos, d_model = heads.block(1), run.n_pos, run.residual.shape[2]
    d_head = block.W_O.shape[1]
    place = torch.tensor([0, 3, n_pos - 1])
    yield "ln1", block.ln1.at(run.scale("ln1", 1)), (2, n_pos, d_model)
    yield "post-norm", block.post.at(run.scale("ln1_post", 1)), (2, n_pos, d_model)
    yield "value path", heads.value_path(1, place), (2, 3, d_model)
    yield "value path, undivided", heads.value_path(1, None), (5, d_model)
    yield "output path", heads.output_path(1, place), (2, 3, block.n_heads, d_head)
    yield "shared values", block.shared, (3, block.n_kv, d_head)
    point = blocks.hook_points[1]
    skip = point.skipping(place)
    assert skip is not None
    yield "read of a hook point", point.reading(place), (2, 3, d_model)
    yield "write of a hook point", point.writing(place), (2, 3, d_model)
    yield "skip", skip, (2, 3, d_model)
    yield "whole block", blocks.block(1), (2, n_pos, d_model)
    yield "whole block from a position on", blocks.block(1, 2), (2, n_pos - 2, d_model)
    yield "attention", Mix(run.pattern[1]), (2, n_pos, block.n_heads, d_head)
    matrix = Matrix(torch.randn(d_model, 6, dtype=torch.float64))
    yield "matrix", matrix, (4, d_model)
    yield "composition", Split(2) @ matrix, (4, d_model)
    yield "transpose", (Split(2) @ matrix).T, (4, 2, 3)
    yield "grouped heads", Shared(3), (4, 2, d_head)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_map_and_its_transpose(cases, record_error, name: str):
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...] | torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for what, f, shape in maps(cases, name):
        x = random(shape).requires_grad_()
        y = f(x)
        g = random(y.shape)
        (by_autograd,) = torch.autograd.grad((g * y).sum(), x)
        with torch.no_grad():
            back = f.vjp(g)
            size = (g * y).abs().sum()
            error = float(((g * y).sum() - (back * x).sum()).abs() / size)
            error = max(error, float((back - by_autograd).abs().max() / back.abs().max()))
            # linear: no constant, and twice as much gives twice as much
            error = max(error, float((f(2 * x) - 2 * y).abs().max() / y.abs().max()))
        record_error("linear maps both ways", name, error)
        assert error < 1e-10, (what, error)
