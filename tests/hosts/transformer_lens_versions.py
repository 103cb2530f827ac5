"""The tests of models, identities, dictionaries and steering under several TransformerLens.

    python tests/hosts/transformer_lens_versions.py [VERSION ...]      # default: 2.16.1 and 3.2.1

Each version is installed into a temporary folder, without its dependencies, in front of this
environment's; everything else stays. TransformerLens before 3 has one rotary base, so that Gemma-3
is left out there (a test of its own holds that it is refused by name).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
FILES = (
    "model/test_models.py",
    "model/test_hub_models.py",
    "attribution/test_identities.py",
    "attribution/residual/test_graph.py",
    "attribution/transcoder/test_qk.py",
    "dictionaries/test_layouts.py",
    "steering/test_steer.py",
)
VERSIONS = ("2.16.1", "3.2.1")
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")


def run(version: str) -> tuple[int, str]:
    """Exit status and summary line of the tests under one version."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"transformer-lens=={version}"], check=True)
        paths = [folder, str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        check = "import transformer_lens as t; print(t.__file__)"
        where = subprocess.run(
            [sys.executable, "-c", check], env=environment, capture_output=True, text=True
        ).stdout
        if not where.startswith(folder):
            raise SystemExit(f"TransformerLens {version} is not the one that is imported: {where}")
        tests = [str(TESTS / name) for name in FILES]
        leave = [] if int(version.split(".")[0]) > 2 else ["-k", "not gemma3"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-o",
            "addopts=--import-mode=importlib",
            "-q",
            *tests,
            *leave,
        ]
        done = subprocess.run(
            command, cwd=TESTS.parent, env=environment, capture_output=True, text=True
        )
        lines = [line for line in done.stdout.splitlines() if COUNTS.search(line)]
        if done.returncode:
            print("\n".join(line for line in done.stdout.splitlines() if "FAILED" in line))
        return done.returncode, lines[-1] if lines else done.stderr.strip()[-200:]


def main() -> int:
    worst = 0
    for version in sys.argv[1:] or VERSIONS:
        start = time.perf_counter()
        status, summary = run(version)
        worst = max(worst, status)
        counts = {word: int(number) for number, word in COUNTS.findall(summary)}
        shown = ", ".join(f"{number} {word}" for word, number in counts.items()) or summary
        print(f"transformer-lens {version:8} {shown} ({time.perf_counter() - start:.0f} s)")
    return worst


if __name__ == "__main__":
    sys.exit(main())
