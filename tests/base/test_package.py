"""The package as a whole: importing it is cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import circuit_tracer_qk as ctqk

PROGRAM = """
import sys, time
start = time.perf_counter()
import circuit_tracer_qk
elapsed = time.perf_counter() - start
heavy = {"torch", "transformers", "transformer_lens", "circuit_tracer"} & set(sys.modules)
print(elapsed, *sorted(heavy))
"""


def test_import_is_fast_and_loads_nothing_heavy():
    times = []
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
        )
        elapsed, *heavy = run.stdout.split()
        assert not heavy
        times.append(float(elapsed))
    assert min(times) < 0.3


def test_no_public_name_is_hidden_by_a_module() -> None:
    """Importing ``circuit_tracer_qk.x`` sets the package's attribute ``x`` to the module."""
    modules = {path.stem for path in Path(ctqk.__file__).parent.glob("*.py")}
    assert not modules & set(ctqk.__all__)
