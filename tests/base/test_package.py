"""The package as a whole: importing it is cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import circuit_tracer_qk as ctqk

HEAVY = {"torch", "transformers", "transformer_lens", "pydantic", "jaxtyping"}
PROGRAM = f"""
import sys, time
start = time.perf_counter()
import circuit_tracer_qk
elapsed = time.perf_counter() - start
heavy = {HEAVY | {"circuit_tracer"}} & set(sys.modules)
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


@pytest.mark.parametrize("argv", [["--help"], ["attribute", "-p", "x", "-t", "y"], ["qk"]])
def test_help_and_refusals_load_nothing_heavy(argv):
    program = (
        f"import sys\nfrom circuit_tracer_qk.cli.main import main\n"
        f"try: main({argv})\nexcept SystemExit: pass\n"
        f"print(*{HEAVY} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not run.stdout.splitlines()[-1]
    assert argv == ["--help"] or "circuit-tracer-qk: error: " in run.stderr


def test_no_public_name_is_hidden_by_a_module() -> None:
    """Importing ``circuit_tracer_qk.x`` sets the package's attribute ``x`` to the module."""
    modules = {path.stem for path in Path(ctqk.__file__).parent.glob("*.py")}
    assert not modules & set(ctqk.__all__)
