"""The Python of the room's page runs as it stands, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from circuit_tracer_qk.attribution import residual

PAGE = Path(residual.__file__).with_name("README.md")


def test_every_block_runs_after_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert (tmp_path / "sally.pt").is_file()
