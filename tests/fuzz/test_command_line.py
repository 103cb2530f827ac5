"""Command lines of any kind: status 0, or 2 with one sentence; nothing is left half written."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzzing import TEXTS, leftovers, run_cases
from hypothesis import strategies as st

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import attribute, demo, start_server
from circuit_tracer_qk.cli import main as cli

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = "I met Aunt Sally. I like Aunt"
WORDS = TEXTS.filter(lambda text: "\x00" not in text)  # no program can be given one
NUMBER = st.sampled_from(["0", "1", "3", "-1", "nan", "1e9", "0.5", "2.5", "x", "\u0663", ""])
SMALL = st.sampled_from(["1", "2", "0", "-1", "x"])
FILE = st.sampled_from(
    ["g.pt", "new.pt", "folder", "fifo", "missing/x.pt", "link.pt", "/dev/null", ""]
)
FOLDER = st.sampled_from(["graphs", "new", "g.pt", "missing/deep", "/proc/x", "fifo", ""])
SLUG = st.sampled_from(["a", "b.c", "A", "con", "..", ".", "a/b", "graph-metadata", ""]) | WORDS
SETS = st.sampled_from(["miniature-sae", "miniature-wcc", "folder", "no/such", "x:y", ""]) | WORDS
PROMPTS = st.sampled_from([PROMPT, "Aunt", "", "\u65e5\u672c", "<bos>"]) | WORDS
HEAD = (
    st.sampled_from(["L1H2", "L9H9", "H2", "2", "L1H2:q3:k1", "L1H2:q9:k12", "L\u0661H2"]) | WORDS
)
EDITS = (
    st.sampled_from(
        [
            "heads=L1H2 factor=0",
            "side=key heads=L1H2 features=L0/61 factor=0",
            "side=key heads=2@q6:k3 features=L0/61,in/3 positions=3 inject=1",
            "side=query heads=L1H2 checkpoint=1 features=61 factor=nan",
            "heads=L1H2",
            "side=key",
            "=",
        ]
    )
    | WORDS
)
COMMON = [
    ("--node_threshold", NUMBER),
    ("--edge_threshold", NUMBER),
    ("--max_n_logits", SMALL),
    ("--desired_logit_prob", NUMBER),
    ("--batch_size", SMALL),
    ("--dtype", st.sampled_from(["float32", "fp32", "bfloat16", "int8", ""])),
    ("--np-model", SLUG),
    ("--select", st.sampled_from(["explained", "circuit-tracer", "best"])),
    ("--no-qk", None),
    ("--verbose", None),
    ("--unknown", None),
]
COMMANDS: dict[str, tuple[list[Any], list[tuple[str, Any]]]] = {
    "attribute": (
        [],
        [
            ("-d", SETS),
            ("-p", PROMPTS),
            ("-o", FILE),
            ("--slug", SLUG),
            ("--graph_file_dir", FOLDER),
            ("--max_feature_nodes", st.sampled_from(["20", "0", "-1", "x"])),
            ("--prompts", st.sampled_from(["prompts.jsonl", "bad.jsonl", "g.pt", "folder", "no"])),
            ("-t", st.sampled_from(["folder", "no/such", "g.pt", ""])),
            *COMMON,
        ],
    ),
    "demo": (["--no-serve"], [("-p", PROMPTS), ("-o", FOLDER), ("-d", SETS), *COMMON]),
    "qk": (
        [],
        [
            ("--head", HEAD),
            ("--query", NUMBER),
            ("--key", NUMBER),
            ("--layer", NUMBER),
            ("--top", SMALL),
            ("-p", PROMPTS),
            ("-d", SETS),
            ("", FILE),
        ],
    ),
    "steer": (
        [],
        [
            ("--edit", EDITS),
            ("--edits", st.sampled_from(["edits.json", "g.pt", "no", ""])),
            ("--controls", st.sampled_from(["0", "1", "-1", "99999", "x"])),
            ("--seed", NUMBER),
            ("--norms", st.sampled_from(["live", "frozen", "x"])),
            ("--freeze", st.sampled_from(["none", "patterns", "x"])),
            ("--sweep", st.sampled_from(["1,0", "x", "", "nan"])),
            ("--generate", SMALL),
            ("--token", WORDS | st.sampled_from([" Sally", "<3>", "<99999>"])),
            ("--json", st.sampled_from(["run.json", "-", "folder", "fifo", ""])),
            ("-p", PROMPTS),
        ],
    ),
    "augment": ([], [("", FILE), ("-t", SETS), ("--slug", SLUG), ("--graph_file_dir", FOLDER)]),
    "dictionaries": ([], [("", WORDS), ("-v", None)]),
    "convert": ([], [("", SETS), ("", FOLDER), ("--dtype", st.just("float16"))]),
    "features": (
        ["--max-texts", "1"],
        [
            ("-d", SETS),
            ("--texts", st.sampled_from(["texts.txt", "prompts.jsonl", "g.pt", "folder", "no"])),
            ("-o", FOLDER),
            ("--examples", SMALL),
            ("--context", SMALL),
            ("--checkpoints", st.sampled_from(["1", "1,2", "9", "x", ""])),
            ("--force", None),
        ],
    ),
    "start-server": ([], [("--graph_file_dir", FOLDER), ("--port", NUMBER), ("--host", WORDS)]),
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    always, flags = COMMANDS[command]
    given = list(always)
    usual = draw(st.integers(0, 3))  # those at the front are what a run needs
    chosen = flags[: 3 + usual] if usual else []
    chosen = chosen + draw(st.lists(st.sampled_from(flags), max_size=4))
    for flag, values in chosen:
        value = [] if values is None else [draw(values)]
        given += [*([flag] if flag else []), *value]
    return [command, *given]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what commands may meet, in which nothing is served."""
    graph = ctqk.attribute(PROMPT, ctqk.load_model(device="cpu"), max_feature_nodes=20)
    graph.to_pt(tmp_path / "g.pt")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link.pt").symlink_to("linked.pt")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(PROMPT) + "\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n"I like Aunt"\n')
    (tmp_path / "texts.txt").write_text(PROMPT)
    (tmp_path / "edits.json").write_text('[{"heads": ["L1H2"], "factor": 0}]')
    monkeypatch.chdir(tmp_path)
    for module in (attribute, demo, start_server):
        monkeypatch.setattr(module, "serve", lambda *_, **__: None)
    return tmp_path


def test_command_lines(desk: Path, request: pytest.FixtureRequest) -> None:
    whole = {name: (desk / name).read_bytes() for name in ("prompts.jsonl", "edits.json")}

    def check(argv: list[str]) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(argv)
        assert status in (cli.DONE, cli.MISTAKE), status
        assert "Traceback" not in err.getvalue() + out.getvalue()
        if status == cli.MISTAKE:
            last = err.getvalue().splitlines()[-1]
            assert last.startswith("circuit-tracer-qk: error: ") and len(last) > 40, last
        assert not leftovers(desk)
        assert (desk / "fifo").is_fifo() and Path("/dev/null").is_char_device()
        ctqk.load_graph(desk / "g.pt")  # whole, whatever was written in its place
        assert whole == {name: (desk / name).read_bytes() for name in whole}
        for page in desk.glob("*/*.json"):
            json.loads(page.read_bytes())

    run_cases(request.config, command_lines(), check)
