"""The notebook runs from top to bottom, quickly, and prints what it says."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "demos" / "tour.ipynb"


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))  # also where nothing is installed
    start = time.perf_counter()
    client.NotebookClient(
        notebook, timeout=170, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert time.perf_counter() - start < 180
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    for line in ("L1H2", "p(' Sally') 0.998 ->", "other features, same token", "steered  "):
        assert line in printed
    measured = next(x for x in printed.splitlines() if x.startswith("measured")).split()
    assert abs(float(measured[1]) - float(measured[3])) < 1e-3
