"""The package as a whole: importing it is cheap."""

from __future__ import annotations

import subprocess
import sys

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
