"""The installed circuit-tracer: what we rely on is there, and its command makes the same graph."""

from __future__ import annotations

from pathlib import Path

from hosts import check


def test_signatures_relied_on():
    assert check.check_signatures() == []


def test_stock_command_and_ours_make_the_same_graph(tmp_path: Path):
    assert check.check_runs(tmp_path, None) == []
