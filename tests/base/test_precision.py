"""Products in float32 are products in float32, whatever torch is set to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.batches import Batch
from circuit_tracer_qk.attribution.residual import influence, qk
from circuit_tracer_qk.attribution.residual.edges import PositionRun, Targets
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.graph_files import select_tables as attributions
from circuit_tracer_qk.graph_files.tables import Names, Table

SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


def reduced() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)


@pytest.fixture(autouse=True)
def fast_and_loose() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    assert torch.get_float32_matmul_precision() == "high"  # as the user left it
    torch.set_float32_matmul_precision(before)


def test_contractions_are_exact_and_the_setting_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, bool] = {}

    class Watched(influence.BlockEdges):
        def rows(self, targets: Targets, runs: list[PositionRun]) -> torch.Tensor:
            seen["edges"] = reduced()
            return super().rows(targets, runs)

    largest = qk.largest

    def watched(rows: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen["terms"] = reduced()
        return largest(rows, n)

    monkeypatch.setattr(influence, "BlockEdges", Watched)
    monkeypatch.setattr(qk, "largest", watched)
    graph = ctqk.attribute(SALLY, ctqk.load_model())
    for _ in graph.qk_tops([qk.Place(1, 2, 14, 6), qk.Place(1, 2, 14, 5)]):
        assert reduced()  # not between the tables, where the caller is at work
    assert seen == {"edges": False, "terms": False}
    with ctqk.tf32():
        ctqk.attribute(SALLY, ctqk.load_model())
    assert seen["edges"]


def test_files_are_exact_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whose tables are contracted on a way of their own."""
    seen: set[bool] = set()
    written = attributions.written_tables

    def watched(batch: Batch, names: Names, top_terms: int) -> list[Table]:
        seen.add(reduced())
        return written(batch, names, top_terms)

    monkeypatch.setattr(attributions, "written_tables", watched)
    ctqk.create_graph_files(ctqk.attribute(SALLY, ctqk.load_model()), "sally", tmp_path)
    assert seen == {False}


def test_after_an_error_too() -> None:
    with pytest.raises(ctqk.UserError):
        ctqk.attribute("", ctqk.load_model())


def test_two_threads_at_once() -> None:
    inside, outside = Barrier(2, timeout=10), Barrier(2, timeout=10)
    found: list[bool] = []

    def first() -> None:
        with exactly:
            inside.wait()
            outside.wait()
            found.append(reduced())

    def second() -> None:
        inside.wait()
        with exactly:
            pass
        found.append(reduced())
        outside.wait()

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False, False]


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch's older interface"
)
def test_a_setting_made_with_the_newer_interface() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the older one cannot be read from here on
    with exactly:
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.set_float32_matmul_precision("high")


SETTINGS = {
    "nothing": "",
    "older": "torch.set_float32_matmul_precision('medium')",
    "cuda alone": "torch.backends.cuda.matmul.allow_tf32 = True",
    "newer": "torch.backends.mkldnn.matmul.fp32_precision = 'tf32'",
    "mixture": "torch.set_float32_matmul_precision('high')\n"
    "torch.backends.mkldnn.matmul.fp32_precision = 'ieee'",
    "general": "torch.backends.fp32_precision = 'tf32'",
}


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch's older interface"
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_switch_is_as_it_was(setting: str) -> None:
    """Each in a process of its own: torch's interfaces refuse one another."""
    program = f"""
import torch
from circuit_tracer_qk.base.precision import exactly
cuda, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
{SETTINGS[setting]}
before = cuda.fp32_precision, mkldnn.fp32_precision
with exactly:
    assert {{cuda.fp32_precision, mkldnn.fp32_precision}} <= {{"ieee", "none"}}
assert (cuda.fp32_precision, mkldnn.fp32_precision) == before, (before, cuda.fp32_precision)
if {setting == "nothing"}:
    torch.backends.fp32_precision = "tf32"
    assert cuda.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_question_that_ends_inside() -> None:
    asked = ctqk.tf32()
    with asked, exactly:
        assert reduced()
    with exactly:
        assert not reduced()
