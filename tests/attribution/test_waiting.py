"""Nothing in the loops over blocks, heads and positions waits for a device.

On a GPU an operation whose result's size depends on values, or whose value Python asks for, halts
the queue. Both are seen on the CPU too: which operations reach the dispatcher, and from where.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import build
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual.attribution import read
from circuit_tracer_qk.attribution.residual.influence import Sweep
from circuit_tracer_qk.attribution.residual.qk import QK

PACKAGE = str(Path(ctqk.__file__).parent)
WAITING = (
    *("_local_scalar_dense", "nonzero", "unique", "_unique", "masked_select", "equal", "bincount"),
    *("isin", "repeat_interleave"),
)


def place() -> tuple[str, str]:
    """Module and function of the package that is at work."""
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(PACKAGE):
        if frame.f_back is None:
            return "", ""
        frame = frame.f_back
    return Path(frame.f_code.co_filename).stem, frame.f_code.co_name


class Asks(TorchFunctionMode):
    """Remembers where Python asked for values."""

    def __init__(self, found: set[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in (
            "tolist",
            "item",
            "numpy",
            "cpu",
            "__bool__",
            "__int__",
        ):
            self.found.add(place())
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Remembers where an operation's result had a size that depends on values."""

    def __init__(self, found: set[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name in ("index", "index_put_", "_index_put_impl_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or any(name.startswith(slow) for slow in WAITING):
            self.found.add(place())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["sae", "wcc"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_edges_wait_only_before_the_loop(name: str, kind: str, tmp_path: Path) -> None:
    case = build(name, tmp_path, kind, torch.float32)
    parts, heads = read(case.ids, case.model)
    directions = case.graph.record.logit_rows
    sweep = Sweep(case.model.transformer, parts, heads, directions, False, 64, False)
    weights = torch.full((len(directions),), 0.1)
    found: set[tuple[str, str]] = set()
    every = sweep.subset()
    with torch.no_grad(), Asks(found), Waits(found):
        for checkpoint in range(1, parts.run.n_layers):
            for rows in sweep.feature_rows([checkpoint], every, lambda rows: rows):
                assert rows.weights.numel()
    # runs of equal positions are counted on the CPU, where these are at hand; offsets once
    before = {("edges", "runs_of"), ("components", "offsets")}
    assert ("edges", "runs_of") in found and found <= before
    with torch.no_grad(), Asks(found), Waits(found):
        selected = sweep.select(weights, sweep.n_features // 2)
        sweep.fill(selected)
    assert found - before == {("influence", "subset")}


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_tables_wait_only_before_the_loop(name: str, tmp_path: Path) -> None:
    case = build(name, tmp_path, "sae", torch.float32)
    places = [
        Place(layer, h, q, k) for layer in (0, 1) for h in (0, 1) for q in (5, 8) for k in (0, 4)
    ]
    found: set[tuple[str, str]] = set()
    scores = QK(case.graph.record.parts, case.graph.record.heads, lambda c, f: "")
    tops = scores.tops(places)
    first = next(tops)
    with torch.no_grad(), Asks(found), Waits(found):
        assert [at for at, _ in (first, *tops)] == sorted({p[:3] for p in places})
    assert found <= {("components", "offsets")}
    assert not list(scores.tops([]))
