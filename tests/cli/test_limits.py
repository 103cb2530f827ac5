"""What is too long for a name, and disks that are full: one sentence, and nothing half written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import Result

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.files import LONGEST_SLUG
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT

Run = Callable[..., Result]
LONG = "n" * 256
OUT = ("-d", "miniature-sae", "-p", DEMO_PROMPT)
WRONG = {
    "slug": ("attribute", *OUT, "--slug", LONG, "--graph_file_dir", "g"),
    "slug by one": ("attribute", *OUT, "--slug", LONG[: LONGEST_SLUG + 1], "--graph_file_dir", "g"),
    "folder": ("attribute", *OUT, "--slug", "s", "--graph_file_dir", LONG),
    "graph": ("attribute", *OUT, "-o", f"{LONG}.pt"),
    "companion": ("attribute", *OUT, "-o", LONG[:250] + ".pt"),
    "letters": ("attribute", *OUT, "-o", "\N{GREEK SMALL LETTER ALPHA}" * 130),
    "model": ("attribute", *OUT, "-o", "g.pt", "-m", LONG),
    "model's path": ("attribute", *OUT, "-o", "g.pt", "-m", f"./{LONG}/model"),
    "dictionaries": ("attribute", "-d", f"./{LONG}", "-p", "x", "-o", "g.pt"),
    "transcoders": ("attribute", "-t", f"./{LONG}", "-p", "x y", "-o", "g.pt"),
    "prompts": ("attribute", "-d", "miniature-sae", "--prompts", LONG, "--graph_file_dir", "g"),
    "np-model": ("attribute", *OUT, "--slug", "s", "--graph_file_dir", "g", "--np-model", LONG),
    "saved": ("qk", f"{LONG}.pt", "--head", "L1H2"),
    "augmented": ("augment", f"{LONG}.pt", "--slug", "s", "--graph_file_dir", "g"),
    "json": ("steer", "--edit", "heads=L1H2 factor=0", "--json", f"{LONG}.json"),
    "edits": ("steer", "--edits", LONG),
    "demo": ("demo", "--no-serve", "-o", LONG),
    "from": ("convert", LONG, "new"),
    "to": ("convert", "miniature-sae", LONG),
    "texts": ("features", "-d", "miniature-sae", "--texts", LONG),
    "served": ("start-server", "--graph_file_dir", LONG),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_name_that_is_too_long(run: Run, tmp_path: Path, monkeypatch: Any, what: str):
    monkeypatch.chdir(tmp_path)
    assert "nnnnn" in (said := run(*WRONG[what]).refusal) or what == "letters", said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "what", [ctqk.serve, ctqk.load_graph, ctqk.load_model, ctqk.load_dictionaries]
)
def test_a_name_that_is_too_long_in_python(what: Callable[[str], object]):
    given = {"dictionaries": "miniature-sae"} if what is ctqk.load_model else {}
    with pytest.raises(ctqk.UserError, match="nnn"):
        what(f"/tmp/{LONG}", **given)


def test_the_longest_slug_names_every_file(run: Run, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    slug = LONG[:LONGEST_SLUG]
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "I met Aunt Sally", "slug": slug}))
    argv = ["-d", "miniature-sae", "--prompts", "prompts.jsonl", "--graph_file_dir", "g", "-o", "s"]
    done = run("attribute", *argv, "--max_feature_nodes", 50)
    assert done.status == cli.DONE, done.err
    assert Path("g", f"{slug}.json").is_file()
    assert ctqk.load_graph(Path("s", f"{slug}.pt")).n_features == 50


def test_prompts_in_a_file_with_the_longest_name(run: Run, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    Path(LONG[:255]).write_text('"I met Aunt Sally"')
    argv = ["-d", "miniature-sae", "--prompts", LONG[:255], "--graph_file_dir", "g"]
    done = run("attribute", *argv, "--max_feature_nodes", 50)
    assert done.status == cli.DONE, done.err


# Full disks ---------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from circuit_tracer_qk.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
sys.exit(main(sys.argv[2:]))
"""
COMMANDS = {
    "convert": ("convert", "miniature-sae", "new"),
    "convert crosscoder": ("convert", "miniature-wcc", "below/new"),
    "graph": ("attribute", *OUT, "-o", "graph.pt", "--max_feature_nodes", "50"),
    "json": ("steer", "--edit", "heads=L1H2 factor=0", "--controls", "0", "--json", "run.json"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
@pytest.mark.parametrize("limit", [0, 100, 1000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(tmp_path: Path, command: str, limit: int):
    """No file may be longer than the limit: what is written first fails, or what comes later."""
    argv = [sys.executable, "-c", FULL, str(limit), *COMMANDS[command]]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stdout) == (cli.MISTAKE, ""), done.stderr
    [line] = done.stderr.splitlines()
    expected = "cannot be written" if limit else "a temporary file cannot be used"
    assert expected in line and ("File too large" in line or not limit)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is always full")
def test_a_full_disk_where_the_output_goes():
    argv = [sys.executable, "-m", "circuit_tracer_qk", "dictionaries"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == cli.MISTAKE
    [line] = done.stderr.splitlines()
    assert "what is printed cannot be written (No space left on device)" in line
