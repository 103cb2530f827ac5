"""Frozen blocks without MLPs as linear maps, against Hugging Face's weights and autograd."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from architectures import ARCHITECTURES, prompt_ids, save_tiny
from reference import Norm, Reference, Run
from torch import Tensor

from circuit_tracer_qk import UserError
from circuit_tracer_qk.carry import Carrier
from circuit_tracer_qk.frozen import freeze
from circuit_tracer_qk.heads import Heads, read_blocks
from circuit_tracer_qk.models import load_transformer
from circuit_tracer_qk.ports import READS, WRITES, read_ports

N = 9


class Case(NamedTuple):
    """A model read twice, with the same random skips."""

    reference: Reference
    run: Run
    carrier: Carrier
    reads: str
    writes: str
    skips: list[Tensor | None]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded: dict[str, tuple] = {}

    def get(name: str, reads: str, writes: str, skip: bool) -> Case:
        if name not in loaded:
            folder = tmp_path_factory.mktemp(name) / "model"
            hf_model = save_tiny(name, folder)
            reference, ids = Reference(hf_model), prompt_ids(name, N)
            model = load_transformer(folder, dtype=torch.float64, device="cpu")
            frozen = freeze(model, torch.tensor(ids))
            loaded[name] = reference, reference.run(ids), model, frozen
        reference, run, model, frozen = loaded[name]
        generator = torch.Generator().manual_seed(7)
        d, n_layers = frozen.residual.shape[2], frozen.n_layers
        skips: list[Tensor | None] = [None] * n_layers
        if skip:
            skips = [
                torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
                for _ in range(n_layers)
            ]
        ports = read_ports(model.blocks, frozen, reads, writes, skips)
        heads = Heads(read_blocks(model, N), frozen)
        return Case(reference, run, Carrier(heads, ports), reads, writes, skips)

    return get


def linear_block(case: Case, layer: int, x: Tensor, without: int | None = None) -> Tensor:
    """What leaves the block as a function of what enters, MLP cut out: x (P, d) -> (mid, out)."""
    block, run = case.reference.blocks[layer], case.run
    if without is not None:
        W_O = block.W_O.clone()
        W_O[without] = 0
        block = replace(block, W_O=W_O)

    def attention(x: Tensor) -> Tensor:
        n = block.ln1(x, run.ln1[layer]).expand(case.reference.n_heads, -1, -1)
        return block.post1(block.heads_write(n, run.pattern[layer]), run.post1[layer])

    write = attention(x) - attention(torch.zeros_like(x))  # what biases write is no part of x
    mid = x if case.reference.parallel else x + write
    out, skip = x + write, case.skips[layer]
    if skip is not None:
        read = mid
        if case.reads != "hook_resid_mid":
            norm = block.ln2
            if case.reads == "ln2.hook_normalized":
                norm = Norm(norm.kind, torch.ones_like(norm.gain), norm.bias, norm.eps)
            read = norm.linear(mid, run.ln2[layer])
        written = read @ skip
        if case.writes == "mlp.hook_out":
            written = block.post2.linear(written, run.post2[layer])
        out = out + written
    return torch.stack([mid, out])


KINDS = [
    (reads, writes, skip)
    for reads, writes, skip in product(READS, WRITES, (True, False))
    if skip or (reads, writes) == (READS[0], WRITES[0])
]


@pytest.mark.parametrize("reads, writes, skip", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_the_linear_maps_they_should_be(cases, record_error, name, reads, writes, skip):
    if reads == "hook_resid_mid" and cases(name, READS[0], writes, skip).reference.parallel:
        pytest.skip("parallel blocks have no resid_mid")
    case = cases(name, reads, writes, skip)
    generator = torch.Generator().manual_seed(1)
    d = case.run.residual[0].shape[1]
    worst = 0.0
    for layer in range(case.reference.n_layers):
        for start in (0, 3):
            x = torch.zeros(N, d, dtype=torch.float64)
            x[start:] = torch.randn(N - start, d, generator=generator, dtype=torch.float64)
            x.requires_grad_()
            mid, out = linear_block(case, layer, x)
            carried = case.carrier.carry(layer, x.detach()[None, start:], start)
            worst = max(
                worst, error(carried.mid[0], mid[start:]), error(carried.out[0], out[start:])
            )
            assert not out[:start].detach().any()  # nothing flows back in time

            end = 7
            g = torch.zeros(N, d, dtype=torch.float64)
            g[:end] = torch.randn(end, d, generator=generator, dtype=torch.float64)
            pulled = case.carrier.pull(layer, g[None, :end])
            (expected,) = torch.autograd.grad((g * out).sum(), x, retain_graph=True)
            worst = max(worst, error(pulled.whole[0, start:], expected[start:end]))
            at_mid = case.carrier.pull_mid(layer, g[None, :end])
            (expected,) = torch.autograd.grad((g * mid).sum(), x)
            worst = max(worst, error(at_mid.whole[0, start:], expected[start:end]))

            # a head's part is what goes missing without its write
            here = slice(0, end - start)
            parts = (pulled.z[0, start:] * carried.z[0, here]).sum((0, 2))
            total = (g * out.detach()).sum()
            for head in range(case.reference.n_heads):
                less = (g * linear_block(case, layer, x.detach(), without=head)[1]).sum()
                worst = max(worst, error(parts[head], total - less, total))
            bypass = (pulled.bypass[0, start:] * x.detach()[start:end]).sum()
            worst = max(worst, error(parts.sum() + bypass, total))
    record_error("carry: heads, bypass, skip", name, worst)
    assert worst < 1e-10


def error(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    if not ours.numel():
        return 0.0
    size = theirs if scale is None else scale
    return float((ours - theirs.detach()).abs().max() / size.detach().abs().max().clamp_min(1e-12))


def test_unknown_hooks_are_refused(cases):
    case = cases("gpt2", READS[0], WRITES[0], False)
    with pytest.raises(UserError, match="hook_resid_post"):
        read_ports([], case.carrier.heads.run, "hook_resid_post", WRITES[0], [])
