"""The command line: flags, exit status, last lines on stderr, and printouts that add up."""

from __future__ import annotations

import argparse
import json
import logging
import re
import resource
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from circuit_tracer import __main__ as stock
from helpers.stock_command import replace_command

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import UserError
from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.qk import QKRow, QKTable
from circuit_tracer_qk.cli import arguments, qk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli import text as report
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT
from circuit_tracer_qk.frontend.server import next_free_port
from circuit_tracer_qk.host import cli as host_cli

MINIATURE = Path(ctqk.__file__).parent / "miniature"
DEMO_HEADINGS = (
    "the model's next token",
    "strongest edges across positions",
    "name-copying heads",
    "why it looked there",
)


@pytest.fixture(scope="session")
def place() -> dict[str, Path]:
    """Model and dictionaries: the bundled ones."""
    return {"model": MINIATURE / "model", "sae": MINIATURE / "sae"}


@pytest.fixture(scope="session")
def saved(place, tmp_path_factory) -> Path:
    """A graph as `attribute -o` saves it."""
    path = tmp_path_factory.mktemp("saved") / "new" / "graph.pt"
    argv = ["-m", place["model"], "-d", place["sae"], "-p", DEMO_PROMPT, "-o", path]
    assert cli.main(["attribute", *map(str, argv)]) == cli.DONE
    return path


# Arguments ----------------------------------------------------------------------------------------


def test_help_is_quick_and_loads_no_torch():
    program = (
        "import sys\nfrom circuit_tracer_qk.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    times = []
    for _ in range(3):  # processor time: other tests run beside this one
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(times) < 0.3


def test_parsing_attribute_loads_no_torch():
    program = (
        "import sys\nfrom circuit_tracer_qk.cli.main import main\n"
        "assert main(['attribute', '-p', 'x', '-t', 'y']) == 2\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {flag: action for action in parser._actions for flag in action.option_strings}


@pytest.fixture
def only_installed(monkeypatch):
    """What is known of circuit-tracer's flags is not there to fall back on."""
    monkeypatch.setattr(host_cli, "known_parser", None)


def flags_of(command: str) -> dict[str, argparse.Action]:
    """A command's arguments by flag."""
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    cli.COMMANDS[command].add_arguments(parser)
    return flags(parser)


@pytest.mark.parametrize("command", ["attribute", "start-server"])
def test_every_flag_of_the_installed_command_is_taken_with_its_default(only_installed, command):
    stock, ours = flags(host_cli.command_parser(command)), flags_of(command)
    assert set(stock) <= set(ours)
    for flag, action in stock.items():
        assert ours[flag].default == action.default, flag
        more = ["float64"] if flag == "--dtype" else []  # with -d alone
        assert [*(ours[flag].choices or ())] == [*(action.choices or ()), *more], flag
        kind = arguments.dtype_name if flag == "--dtype" else action.type
        assert ours[flag].type == kind, flag
        assert ours[flag].nargs == action.nargs, flag


def test_all_installed_flags_are_accepted_together(run, only_installed):
    values = {"--port": "1", "--slug": "s", "--transcoder_set": None, "--help": None}
    argv = ["attribute"]
    for action in host_cli.command_parser("attribute")._actions:
        flag = action.option_strings[-1]
        value = values.get(flag, "1" if action.type in (int, float) else "x")
        if value is None:
            continue
        argv.append(flag)
        if action.nargs != 0:
            argv.append(str(list(action.choices)[0]) if action.choices else value)
    assert "-d/--dictionaries is missing" in run(*argv).refusal


@pytest.mark.parametrize("command", ["attribute", "start-server"])
def test_flags_are_known_where_the_installed_parser_cannot_be_read(command, monkeypatch):
    installed = flags(host_cli.command_parser(command))

    def unreadable() -> None:
        raise LookupError(command)

    monkeypatch.setattr(stock, "main", unreadable)
    known = flags(host_cli.command_parser(command))
    assert "--port" in known
    for flag in set(known) & set(installed):
        assert known[flag].default == installed[flag].default, flag
        assert known[flag].required == installed[flag].required, flag


def test_reading_the_installed_parser_leaves_no_trace():
    handlers, level = logging.root.handlers[:], logging.root.level
    parse = argparse.ArgumentParser.parse_known_args
    host_cli.command_parser("attribute")
    assert (logging.root.handlers, logging.root.level) == (handlers, level)
    assert argparse.ArgumentParser.parse_known_args is parse


# Mistakes that need no model ----------------------------------------------------------------------

OUT = ("-d", "dictionaries", "-p", "x")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "COMMAND; see `circuit-tracer-qk --help`"),
        (("explain",), "invalid choice: 'explain'"),
        (("attribute",), "required: -p/--prompt"),
        (("attribute", "-p", "x"), "-d/--dictionaries is missing"),
        (("attribute", "-p", "x", "-t", "gemma", "-d", "x"), "-t and -d make different graphs"),
        (("attribute", "-p", "x", "-t", "gemma"), "no output is named"),
        (
            ("attribute", "-p", "x", "-t", "gemma", "-o", "x.pt", "--backend", "nnsight"),
            "--backend nnsight: heads are explained with transformerlens",
        ),
        (
            ("attribute", "-p", "x", "-t", "g", "-o", "x.pt", "--no-qk", "--np-model", "x"),
            "--np-model names files that --no-qk leaves",
        ),
        (("attribute", *OUT), "give both --slug and --graph_file_dir"),
        (("attribute", *OUT, "--server", "-o", "g.pt"), "--server needs both --slug"),
        (("attribute", *OUT, "--slug", "a/b", "--graph_file_dir", "g"), "the slug 'a/b'"),
        (("attribute", *OUT, "--slug", "", "--graph_file_dir", "g"), "--slug is ''"),
        (("attribute", *OUT, "--slug", "graph-metadata", "--graph_file_dir", "g"), "not '.', '..' or"),
        (("attribute", *OUT, "--slug", "a", "--graph_file_dir", "g", "--np-model", "a/b"), "'a/b'"),
        (("attribute", *OUT, "-o", "."), "is a folder"),
        (("attribute", *OUT, "-o", "file/graph.pt"), "file cannot be written to (Not a directory)"),
        (("attribute", *OUT, "-o", "/dev/null"), "/dev/null cannot be written to (it is no regular file)"),
        (("attribute", *OUT, "--slug", "a", "--graph_file_dir", "file/g"), "file/g cannot be written to"),
        (("attribute", *OUT, "-o", "g.pt", "--node_threshold", "2"), "--node_threshold is 2.0"),
        (("attribute", *OUT, "-o", "g.pt", "--dtype", "int8"), "invalid choice: 'int8'"),
        (("attribute", "-d", "d", "-p", "", "-o", "g.pt"), "the prompt is empty"),
        (("attribute", *OUT, "-o", "new/g.pt"), "the dictionary folder dictionaries does not exist"),
        (("qk",), "--head is missing: give --layer 3 --head 5"),
        (("qk", "--head", "3"), "--layer is missing"),
        (("qk", "--head", "five", "--layer", "1"), "--head 'five' is not understood"),
        (("qk", "--head", "L3H5", "--layer", "2"), "--layer 2 disagree"),
        (("qk", "--head", "L3H5", "--top", "0"), "--top is 0"),
        (("qk", "--head", "L3H5", "-m", "model"), "-m is given without -d"),
        (("qk", "--head", "L3H5", "-d", "dictionaries"), "-p/--prompt is missing"),
        (("qk", "--head", "L3H5", "-p", ""), "the prompt is empty"),
        (("qk", "g.pt", "--head", "L3H5", "-p", "x"), "leave out -m, -d and -p"),
        (("qk", "absent.pt", "--head", "L3H5"), "no graph file absent.pt"),
        (("qk", "absent.pt", "--head", "L3H5", "--dtype", "fp32"), "no graph file absent.pt"),
        (("qk", "--head", "L\u0663H5"), "is not understood"),
        (("qk", "--head", "L" + "9" * 5000 + "H5"), "is not understood"),
        (("qk", "g.pt", "--head", "L3H5", "--dtype", "bf16"), "leave out -m, -d and -p, and --dtype"),
        (("attribute", "-t", "x", "-p", "x", "-o", "g.pt", "--dtype", "float64"), "float64 is for -d"),
        (("demo", "-d", "miniature"), "invalid choice: 'miniature'"),
        (("demo", "-o", "file"), "file cannot be written to"),
        (("demo", "-p", ""), "the prompt is empty"),
        (("demo", "--port", "70000"), "70000"),
        (("start-server",), "required: --graph_file_dir"),
        (("start-server", "--graph_file_dir", "absent"), "absent holds no graph files"),
    ],
)  # fmt: skip
def test_mistake(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert message in run(*argv).refusal
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_taken_port(run, tmp_path):
    port = next_free_port(18041)
    server = ctqk.serve(tmp_path, port=port)
    try:
        argv = [*OUT, "--slug", "a", "--graph_file_dir", tmp_path / "g", "--server", "--port", port]
        assert f"port {port} is in use" in run("attribute", *argv).refusal
        (tmp_path / "graph-metadata.json").write_text("{}")
        argv = ["--graph_file_dir", tmp_path, "--port", port]
        assert f"port {port} is in use" in run("start-server", *argv).refusal
    finally:
        server.stop()
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("command", ["demo", "attribute"])
def test_page_and_host_are_checked_before_the_model(run, tmp_path, monkeypatch, command):
    def changed() -> Path:
        raise UserError("circuit-tracer's page has changed")

    monkeypatch.setattr(ctqk, "load_model", None)
    argv = ["demo", "-o", tmp_path / "g", "--port", next_free_port(18341)]
    if command == "attribute":
        argv = ["attribute", *OUT, "--slug", "a", "--graph_file_dir", tmp_path / "g", "--server"]
        argv += ["--port", next_free_port(18341)]
    assert "'192.0.2.1' is no address" in run(*argv, "--host", "192.0.2.1").refusal
    monkeypatch.setattr(host_cli, "assets", changed)
    assert "page has changed" in run(*argv).refusal
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("flags", "public", "online"),
    [
        ([], False, False),
        (["--online"], False, True),
        (["--host", "127.0.0.1"], False, False),
        (["--host", "0.0.0.0", "--online"], True, True),
    ],
)
def test_start_server(run, tmp_path, monkeypatch, flags, public, online):
    (tmp_path / "graph-metadata.json").write_text('{"graphs": []}')
    port, configs = next_free_port(18241), []
    monkeypatch.setattr(time, "sleep", asking(port, configs))
    result = run("start-server", "--graph_file_dir", tmp_path, "--port", port, *flags)
    assert result.status == cli.DONE
    assert result.out == f"open http://127.0.0.1:{port}   (Ctrl+C ends)\n"
    known = {"live": {}, "steerable": []}
    assert configs == [{**known, "online": online, "version": ctqk.__version__}]
    warning = f"warning: everyone who reaches port {port} of this machine can read and save"
    assert result.err.startswith(warning) if public else result.err == ""
    assert len(result.err.splitlines()) == public


def asking(port: int, configs: list[object]) -> Callable[[float], None]:
    """Reads the server's configuration and interrupts, in place of ``time.sleep``."""

    def ask(seconds: float) -> None:
        url = f"http://127.0.0.1:{port}/qk/config.json"
        with urllib.request.urlopen(url, timeout=10) as answer:
            configs.append(json.loads(answer.read()))
        raise KeyboardInterrupt

    return ask


@pytest.mark.parametrize("command", ["attribute", "start-server"])
def test_flags_of_newer_and_other_hosts(run, tmp_path, monkeypatch, command):
    """A host with flags of our names gives way to ours; its folder of features is taken."""
    replace_command(monkeypatch, command, features_dir={}, host={"type": int, "default": 5})
    (tmp_path / "graph-metadata.json").write_text('{"graphs": []}')
    port, configs = next_free_port(18291), []
    monkeypatch.setattr(time, "sleep", asking(port, configs))
    argv = ["--features_dir", tmp_path, "--host", "localhost", "--port", port]
    if command == "start-server":
        assert run(command, "--graph_file_dir", tmp_path, *argv).status == cli.DONE
        assert configs
        argv[1] = tmp_path / "absent"
        assert "absent does not exist" in run(command, "--graph_file_dir", tmp_path, *argv).refusal
    else:
        assert "-d/--dictionaries is missing" in run(command, "-p", "x", *argv).refusal


def test_interrupt_is_quiet(run, monkeypatch):
    def interrupted(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qk, "run", interrupted)
    result = run("qk")
    assert (result.status, result.out, result.err) == (cli.INTERRUPTED, "", "")


# With a model -------------------------------------------------------------------------------------


def test_prompt_beyond_the_context(run, place, tmp_path):
    argv = ["-d", place["sae"], "-m", place["model"], "-p", "I " * 5000, "-o", tmp_path / "n" / "g"]
    assert "context is" in run("attribute", *argv).refusal
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--head", "L99H0"), "layer 99 is out of range"),
        (("--head", "L1H99"), "head 99 is out of range"),
        (("--head", "L1H0", "--query", "999"), "--query 999 is out of range"),
        (("--head", "L1H0", "--key", "-99"), "--key -99 is out of range"),
        (("--head", "L1H0:q3:k5"), "key position 5 is after query position 3"),
    ],
)
def test_head_and_positions_that_do_not_exist(run, saved, argv, message):
    assert message in run("qk", saved, *argv).refusal


def numbers(lines: list[str], heading: str) -> list[float]:
    """The values of one list of a QK printout, its sum last."""
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    values = []
    for line in lines[start + 2 :]:
        if not line:
            break
        values.append(float(line.split()[0]))
    return values


@pytest.mark.parametrize("top", [1, 3, 20, 10_000])
@pytest.mark.parametrize("head", ["L0H1", "L1H0:q9:k5", "L2H1:q-1"])
def test_qk_printout_adds_up(run, saved, head, top):
    result = run("qk", saved, "--head", head, "--top", top)
    assert (result.status, result.err) == (cli.DONE, "")
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 100
    found = re.search(r"score +([+-][\d.]+)", result.out)
    assert found is not None
    score = float(found[1])
    for heading in ("query side", "key side", "pairs"):
        *shown, total = numbers(lines, heading)
        assert total == score
        assert sum(shown) == pytest.approx(score, abs=0.0006 * (len(shown) + 1))
    for line in ("b_dec", "error") if not head.startswith("L0") else ("embedding",):
        assert line in result.out[result.out.index("query side") : result.out.index("pairs")]
    start = next(i for i, line in enumerate(lines) if line.startswith("block totals"))
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("  sum "))
    rows = [[float(v) for v in line.split()[1:]] for line in lines[start + 2 : end + 1]]
    assert rows[-1][-1] == pytest.approx(score, abs=0.001)
    for row in rows:
        assert sum(row[:-1]) == pytest.approx(row[-1], abs=0.003)


def table(terms: list[list[float]], **given: object) -> QKTable:
    """A small table between two features and a bias on either side."""
    side = [
        Component("feature", 2, 17, 1, 1.5, "a label " * 20),
        Component("feature", 2, 4, 1, 0.5, ""),
        Component("bias", 2, None, 1, None, "b_dec"),
    ]
    score = sum(map(sum, terms))
    fields = dict(score=score, score_capped=score, masked=False, query=side, key=side)
    return QKTable(2, 0, 2, 1, **(fields | {"terms": torch.tensor(terms)} | given))  # type: ignore


TOKENS = ["<bos>", " a\n", " b"]
ROW = QKRow(*torch.tensor([[-torch.inf, 2.0, 1.0], [0.0, 0.73, 0.27], [5.0, 2.0, 1.0]]))


def test_masked_key_is_shown_without_terms():
    lines = report.qk_lines(table([[1.0] * 3] * 3, masked=True), ROW, TOKENS)
    assert any("masked: key 1 lies outside" in line for line in lines)
    assert any("masked  1 earlier key" in line for line in lines)
    assert not any("side:" in line or "pairs" in line for line in lines)


def test_score_before_and_after_the_soft_cap():
    row = ROW._replace(scores=torch.tensor([-torch.inf, 1.5, 0.9]))
    text = "\n".join(report.qk_lines(table([[1.0] * 3] * 3, score_capped=8.1), row, TOKENS))
    assert "+9.000 before the soft-cap, +8.100 after it (x 0.900)" in text
    assert "capped  key" in text


def test_shares_of_a_score_that_nearly_cancels_are_left_out():
    cancelling = table([[9.0, 0.0, 0.0], [0.0, -9.1, 0.0], [0.0, 0.0, 0.2]])
    text = "\n".join(report.qk_lines(cancelling, ROW, TOKENS))
    assert "the terms cancel" in text and "%" not in text
    assert "%" in "\n".join(report.qk_lines(table([[1.0] * 3] * 3), ROW, TOKENS))


def test_qk_of_a_prompt_is_that_of_its_graph(run, place, saved):
    argv = ["--layer", "1", "--head", "0", "--query", "-1", "--key", "4"]
    model = ["-m", place["model"], "-d", place["sae"], "-p", DEMO_PROMPT]
    assert run("qk", *model, *argv).out == run("qk", saved, *argv).out


def test_attribute_keeps_stdout_to_what_was_written(run, place, tmp_path):
    argv = ["-m", place["model"], "-d", place["sae"], "-p", DEMO_PROMPT, "--slug", "sally"]
    argv += ["--graph_file_dir", tmp_path / "graphs", "--max_n_logits", 2, "--no-qk"]
    result = run("attribute", *argv)
    assert (result.status, result.err) == (cli.DONE, "")
    assert len(result.out.splitlines()) == 1 and "graphs" in result.out
    assert json.loads((tmp_path / "graphs" / "sally.json").read_bytes())["metadata"]


def test_half_of_the_graph_file_flags_warns_and_still_saves(run, place, tmp_path):
    argv = ["-m", place["model"], "-d", place["sae"], "-p", DEMO_PROMPT, "--slug", "sally"]
    result = run("attribute", *argv, "-o", tmp_path / "graph.pt")
    assert result.status == cli.DONE
    assert result.err == "warning: graph files need both --slug and --graph_file_dir\n"
    assert (tmp_path / "graph.pt").is_file()


def test_demo_writes_and_explains(run, place, tmp_path):
    result = run("demo", "--no-serve", "--output", tmp_path / "demo")
    assert (result.status, result.err) == (cli.DONE, "")
    for heading in DEMO_HEADINGS:
        assert heading in result.out
    assert max(map(len, result.out.splitlines()[:-1])) <= 100
    assert (tmp_path / "demo" / "graph-metadata.json").is_file()


@pytest.mark.parametrize("name", ["sae", "wcc"])
def test_demo_takes_either_name_of_its_dictionaries(run, tmp_path, name):
    short, long = tmp_path / "short", tmp_path / "long"
    prompt = ("-p", "I met Aunt Sally. I like Aunt", "--no-serve")
    first = run("demo", "-d", name, "-o", short, *prompt)
    second = run("demo", "-d", f"miniature-{name}", "-o", long, *prompt)
    assert (first.status, first.out) == (cli.DONE, second.out.replace(str(long), str(short)))
    assert (short / f"demo-{name}.json").read_bytes() == (long / f"demo-{name}.json").read_bytes()


@pytest.mark.parametrize("command", ["demo", "augment", "steer", "features"])
def test_shared_arguments_are_the_same_everywhere(command):
    ours, others = flags_of(command), flags_of("augment") | flags_of("qk")
    assert "--dtype" in ours
    for flag in ("-m", "-d", "-t", "-p", "--dtype", "--host", "--online"):
        if flag in ours and (command, flag) not in (("demo", "-d"), ("demo", "-p")):
            a, b = ours[flag], others[flag]
            assert (a.choices, a.default, a.help) == (b.choices, b.default, b.help), flag


def test_every_name_of_a_dtype_is_taken(run):
    argv = ("qk", "--head", "L1H0", "--key", "2", "-p", "I met Aunt Sally. I like Aunt", "--dtype")
    scores = {}
    for name in arguments.DTYPE_NAMES:
        result = run(*argv, name)
        assert (result.status, result.err) == (cli.DONE, ""), name
        scores[name] = result.out
    assert scores["bf16"] == scores["bfloat16"] != scores["float64"]


def test_attribute_in_float64(run, place, tmp_path):
    argv = ["-m", place["model"], "-d", place["sae"], "-p", "I met Aunt Sally. I like Aunt"]
    path = tmp_path / "graph.pt"
    result = run("attribute", *argv, "--dtype", "float64", "-o", path)
    assert (result.status, result.err) == (cli.DONE, "")
    assert ctqk.load_graph(path).scores.heads.run.logits.dtype == torch.float64


def test_demo_serves_on_the_next_free_port_until_interrupted(run, place, tmp_path, monkeypatch):
    port = next_free_port(18141)
    other = ctqk.serve(tmp_path, port=port)
    served, digests = [], []

    def look(seconds: float) -> None:
        graph = json.loads((tmp_path / "demo" / "demo-wcc.json").read_bytes())
        digests.append(graph["metadata"]["info"]["digest"])
        of = f"demo-wcc?digest={digests[0]}"
        table = f"qk/table/{of}&layer=1&head=0&query=9&key=5"
        steered = f"qk/steer/{of}&heads=L1H0&factor=0&controls=1"
        for path in ("data/graph-metadata.json", "qk/config.json", table, steered):
            url = f"http://127.0.0.1:{next_port}/{path}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                served.append(json.loads(answer.read()))
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", look)
    try:
        next_port = next_free_port(port)
        argv = ["--port", port, "--output", tmp_path / "demo", "-d", "wcc", "-p", DEMO_PROMPT]
        result = run("demo", *argv)
    finally:
        other.stop()
    assert result.status == cli.DONE
    listing, config, table, steered = served
    [digest] = digests
    assert listing["graphs"] and config["live"] == {"demo-wcc": digest}
    assert config["steerable"] == ["demo-wcc"]
    assert table["row"] and steered["outputs"]
    assert f"open http://127.0.0.1:{next_port}/index.html?slug=demo-wcc" in result.out


def test_real_model(run, shared):
    folder = shared / "stories260K"
    prompt = (
        "Once upon a time, there was a little boy named Bob. He was very happy. One day, a man "
    )
    argv = ["-m", folder / "model", "-d", folder / "sae", "-p", f'{prompt}said, "Hello, B']
    result = run("qk", *argv, "--head", "L4H1")
    assert result.status == cli.DONE
    assert "L4H1: query 37 'B' -> key 15 'o'   (most attended key but the first)" in result.out
    assert torch.tensor(float(result.out.split("attention  ")[1].split()[0])) > 0.9
