"""How long a user waits for the command line: help, and the demo up to its written graph."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import Row, seconds

CALL = "import sys; from circuit_tracer_qk.cli.main import main; sys.exit(main(sys.argv[1:]))"


def _run(*arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", CALL, *arguments], check=True, env=environment, capture_output=True
    )


def measure(repeats: int) -> list[Row]:
    """Processes from start to end; the first of each warms the disk's cache and is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        demo = ("demo", "--no-serve", "-o", folder)
        found = {
            "--help": [seconds(lambda: _run("--help")) for _ in range(repeats + 1)][1:],
            "demo --no-serve": [seconds(lambda: _run(*demo)) for _ in range(repeats + 1)][1:],
        }
    return [
        Row("command line: --help", found["--help"], "s", goal="goal: 0.3 s"),
        Row("command line: demo --no-serve", found["demo --no-serve"], "s", goal="goal: 15 s"),
    ]
