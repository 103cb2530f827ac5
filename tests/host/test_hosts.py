"""The installed circuit-tracer: what we rely on is there, and its command makes the same graph."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from hosts import check

HOSTS = Path(check.__file__).parent


def test_signatures_relied_on():
    assert check.check_signatures() == []


def test_stock_command_and_ours_make_the_same_graph(tmp_path: Path):
    assert check.check_runs(tmp_path, None) == []


def test_no_script_hides_a_library():
    """The folder of a script that is run comes first where Python looks for modules."""
    scripts = {path.stem for path in HOSTS.glob("*.py")}
    assert not scripts & importlib.metadata.packages_distributions().keys()


def test_the_check_of_a_tree_starts(tmp_path: Path):
    command = [sys.executable, str(HOSTS / "check.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "has no circuit_tracer" in done.stderr.splitlines()[-1]
