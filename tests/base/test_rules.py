"""Wrong values are refused alike in Python, on the command line, in lines of prompts, by a server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import Result

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.rules import RULES, Rule, read_number, read_whole
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli.prompts.lines import read_prompts
from circuit_tracer_qk.steering.parse import read_edit

PROMPT = "I met Aunt Sally. I like Aunt"
NAN, INF = float("nan"), float("inf")
NO_COUNT = [0, -1, True, 2.5, "5", None, [3], NAN, 10**30 + 0.5, torch.tensor(2.5)]
NO_SHARE = [-0.1, 2, NAN, INF, -INF, True, "0.5", None, [0.5]]
NO_FLAG = [1, "yes", None, 0.0]
NO_TEXT = [5, "", b"a", ["a"], True]


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    return ctqk.attribute(prompt, model)


ATTRIBUTE: dict[str, list[Any]] = {
    "max_n_logits": NO_COUNT,
    "batch_size": NO_COUNT,
    "max_feature_nodes": [-1, True, 2.5, "5", [3], NAN],
    "desired_logit_prob": NO_SHARE,
    "verbose": NO_FLAG,
    "qk": NO_FLAG,
    "select": ["best", 5, ["explained"]],
}
FILES: dict[str, list[Any]] = {
    "node_threshold": NO_SHARE,
    "edge_threshold": NO_SHARE,
    "qk": NO_FLAG,
    "max_tables": [-1, True, 2.5, "5", None],
    "max_bytes": [-1, True, 2.5, "5", None],
    "top_terms": NO_COUNT,
    "max_file_bytes": [-1, True, "5", None],
    "np_model": NO_TEXT,
    "slug": NO_TEXT,
    "output_path": [5, "", True, ["a"]],
}
SERVE: dict[str, list[Any]] = {
    "port": [-1, 65536, "8041", 1.5, True, None, NAN],
    "host": NO_TEXT + [None],
    "online": NO_FLAG,
    "data_dir": [5, "", None, ["a"]],
    "features_dir": [5, "", ["a"]],
}
LOAD: dict[str, list[Any]] = {
    "model": NO_TEXT,
    "dictionaries": NO_TEXT,
    "dtype": ["float32", 5, torch.int32],
    "device": ["gpu", 2.5, ["cpu"]],
}
STEER: dict[str, list[Any]] = {
    "controls": [-1, 2.5, "5", True, None],
    "seed": [2.5, "5", True, None, NAN],
    "norms": ["hot", None, 1],
    "freeze": ["all", None, 1],
}
EDIT: dict[str, list[Any]] = {
    "factor": [NAN, INF, "0", True, [0], 10**400],
    "heads": ["L\u0663H2", "L3H\u0662", "3,2", [], None, (True, 0), 5],
    "features": ["L0/\u0661", [], None, [2.5], [True]],
    "positions": [2.5, "6", [True], [NAN]],
    "side": ["keys", None, 1],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{value!r:.20}")
        for name, values in table.items()
        for value in values
    ]


def refused(name: str, call: Callable[[], Any]) -> None:
    """One sentence, which names the option or what is wrong with it."""
    with pytest.raises(ctqk.UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    assert name.rstrip("s") in message or name in ("heads", "features"), message


@pytest.mark.parametrize(("name", "value"), cases(ATTRIBUTE))
def test_attribute(name: str, value: Any, model: ctqk.ResidualModel) -> None:
    refused(name, lambda: ctqk.attribute(PROMPT, model, **{name: value}))


@pytest.mark.parametrize(("name", "value"), cases(FILES))
def test_graph_files(name: str, value: Any, graph: ctqk.ResidualGraph, tmp_path: Path) -> None:
    arguments = {"slug": "s", "output_path": tmp_path / "g"} | {name: value}
    refused(name, lambda: ctqk.create_graph_files(graph, **arguments))
    assert not (tmp_path / "g").exists() or not list((tmp_path / "g").iterdir())


@pytest.mark.parametrize(("name", "value"), cases(SERVE))
def test_serve(name: str, value: Any, tmp_path: Path) -> None:
    refused(name, lambda: ctqk.serve(**{"data_dir": tmp_path, "port": 0} | {name: value}))


@pytest.mark.parametrize(("name", "value"), cases(LOAD))
def test_load_model(name: str, value: Any) -> None:
    refused(name, lambda: ctqk.load_model(**{name: value}))


@pytest.mark.parametrize(("name", "value"), cases(STEER))
def test_steer(name: str, value: Any, model: ctqk.ResidualModel) -> None:
    edit = ctqk.QKEdit("L1H2", "key", features="L0/61", factor=0)
    refused(name, lambda: ctqk.steer(model, PROMPT, edit, **{name: value}))


@pytest.mark.parametrize(("name", "value"), cases(EDIT))
def test_edits(name: str, value: Any) -> None:
    given: dict[str, Any] = {"heads": "L1H2", "side": "key", "features": "L0/61", "factor": 0}
    refused(name, lambda: ctqk.QKEdit(**given | {name: value}))


@pytest.mark.parametrize("factors", [[], [NAN], ["0.5"], "0.5", 0.5, None, [True]], ids=repr)
def test_sweeps(factors: Any, model: ctqk.ResidualModel) -> None:
    edit = ctqk.QKEdit("L1H2", "key", features="L0/61", factor=0)
    refused("factor", lambda: ctqk.sweep(model, PROMPT, edit, factors))


@pytest.mark.parametrize("edits", [None, 5, "L1H2", [5], []], ids=repr)
def test_what_is_no_edit(edits: Any, model: ctqk.ResidualModel) -> None:
    refused("", lambda: ctqk.steer(model, PROMPT, edits))


@pytest.mark.parametrize(
    "place", [(True, 0, 1, 0), (0, "1", 1, 0), (0, 0, 1.0, 0), (0, 0, 1, None)]
)
def test_places(place: Any, graph: ctqk.ResidualGraph) -> None:
    if place[3] is None:
        with pytest.raises((ctqk.UserError, TypeError)):
            graph.qk(*place)
    else:
        refused("", lambda: graph.qk(*place))


@pytest.mark.parametrize("n", NO_COUNT[:-2], ids=repr)
def test_counts(n: Any, graph: ctqk.ResidualGraph) -> None:
    refused("n", lambda: graph.qk(1, 2, 14, 6).top(n))
    refused("n", lambda: graph.strongest([313], n=n))
    if n is not None:
        refused("count", lambda: ctqk.select_heads(graph, query=14, key=6, count=n))


def test_numbers_of_other_libraries_are_numbers(graph: ctqk.ResidualGraph) -> None:
    table = graph.qk(np.int64(1), torch.tensor(2), np.int32(14), 6)  # type: ignore[arg-type]
    assert table.score == graph.qk(1, 2, 14, 6).score
    heads: Any = (np.int64(1), 2)
    nothing: Any = np.float32(0)
    edit = ctqk.QKEdit(heads, "key", features=np.array([61]), checkpoint=1, factor=0)
    assert edit == ctqk.QKEdit("L1H2", "key", 1, [61], factor=nothing)
    assert Rule(float, 0, 1).checked(torch.tensor(0.5), "x") == 0.5


@pytest.mark.parametrize(
    "nodes", [[[]], [""], [None], [2.5], [True], [[1, 2]], "12", None, object()]
)
def test_node_indices(nodes: Any, graph: ctqk.ResidualGraph) -> None:
    refused("", lambda: graph.edges(nodes, [313]))
    refused("", lambda: graph.edges([61], nodes))
    refused("", lambda: graph.strongest(nodes))
    if isinstance(nodes, list):
        refused("", lambda: graph.edge(nodes[0], 313))


@pytest.mark.parametrize("path", [b"", None, "", 5, object(), ["a"]])
def test_paths(path: Any) -> None:
    refused("path", lambda: ctqk.load_graph(path))
    refused("ref", lambda: ctqk.load_dictionaries(path))


def test_long_texts_are_cut_in_what_is_said_of_them() -> None:
    for part in ({"features": "[" * 2000}, {"heads": "[" * 2000}, {"side": "[" * 2000}):
        given: dict[str, Any] = {"heads": "L1H2", "side": "key", "features": "L0/61", "factor": 0}
        given |= part
        refused("", partial(ctqk.QKEdit, **given))
    refused("", lambda: read_edit({"[" * 2000: 1, "heads": "L1H2"}))


def test_a_list_of_graphs_whose_slugs_are_no_texts(
    graph: ctqk.ResidualGraph, tmp_path: Path
) -> None:
    (tmp_path / "graph-metadata.json").write_text('{"graphs": [{"slug": {}}]}')
    refused("", lambda: ctqk.create_graph_files(graph, "s", tmp_path))
    assert not (tmp_path / "s.json").exists()


# The command line ---------------------------------------------------------------------------------

OUT = ("-d", "miniature-sae", "-p", PROMPT, "-o", "g.pt")
FLAGS: dict[str, list[str]] = {
    "--max_n_logits": ["0", "-1", "2.5", "x", "\u0663", "1_0", " 3", "nan", ""],
    "--batch_size": ["0", "\u0663", "1e3"],
    "--max_feature_nodes": ["-1", "2.5", "\u0663"],
    "--desired_logit_prob": ["nan", "inf", "2", "-0.1", "\u0660.5", "1_0", ""],
    "--node_threshold": ["nan", "2", "-1", "x"],
    "--edge_threshold": ["nan", "1.5"],
    "--port": ["-1", "65536", "\u0668\u0660", "80.0"],
    "--graph_file_dir": [""],
    "--slug": [""],
    "--np-model": [""],
    "--host": [""],
    "--model": [""],
    "--dictionaries": [""],
    "--graph_output_path": [""],
}


@pytest.mark.parametrize(
    ("flag", "value"),
    [pytest.param(f, v, id=f"{f}-{v!a:.12}") for f, values in FLAGS.items() for v in values],
)
def test_flags(flag: str, value: str, run: Callable[..., Result]) -> None:
    done = run("attribute", *OUT, f"{flag}={value}")
    assert done.status == cli.MISTAKE and done.out == ""
    [line] = done.err.splitlines()
    assert flag.lstrip("-") in line.replace("-", "_") or flag in line


@pytest.mark.parametrize(
    "command",
    [
        ("qk", "--head", "L\u0661H2"),
        ("qk", "--head", "L1H2", "--query", "\u0661"),
        ("qk", "--head", "L1H2", "--top", "0"),
        ("qk", "--head", "L1H2", "-d", ""),
        ("steer", "--edit", "heads=L1H2 factor=\u0660"),
        ("steer", "--edit", "heads=L1H2 factor=nan"),
        ("steer", "--edit", "heads=L1H2 factor=0", "--sweep", "1,\u0660"),
        ("steer", "--edit", "heads=L1H2 factor=0", "--controls", "-1"),
        ("steer", "--edit", "heads=L1H2 factor=0", "--generate", "0"),
        ("features", "-d", "", "--texts", "t.txt"),
        ("convert", "", "folder"),
        ("demo", "-o", ""),
        ("start-server", "--graph_file_dir", ""),
        ("augment", "g.pt", "-t", "", "--slug", "s", "--graph_file_dir", "g"),
    ],
    ids=" ".join,
)
def test_commands(command: tuple[str, ...], run: Callable[..., Result]) -> None:
    done = run(*command)
    assert done.status == cli.MISTAKE and done.out == ""
    assert len(done.err.splitlines()) == 1


# Lines of prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("max_n_logits", "max_feature_nodes", "node_threshold", "desired_logit_prob")
        for value in (-1, True, "1", None, [1], 1e400 if "_n" in name else 2)
        if not (name == "max_feature_nodes" and value == 2)
    ],
)
def test_lines(name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": PROMPT, name: value}) + "\n" + json.dumps(PROMPT))
    [request], [bad] = read_prompts(path)
    assert request.line == 2 and bad.line == 1
    assert bad.problem.startswith(f"{name} should be {RULES[name].words}")


@pytest.mark.parametrize("text", ["\u0663", "1_0", "", " 1", "0x1", "1.0", "\uff11", "1e2"])
def test_what_is_typed_for_whole_numbers(text: str) -> None:
    with pytest.raises(ValueError):
        read_whole(text)


@pytest.mark.parametrize("text", ["nan", "inf", "\u0663", "1_0", "", "0x1", ".", "1e999"])
def test_what_is_typed_for_numbers(text: str) -> None:
    with pytest.raises(ValueError):
        read_number(text)


def test_what_may_be_typed() -> None:
    assert [read_whole(t) for t in ("3", "-1", "+0")] == [3, -1, 0]
    assert [read_number(t) for t in ("3", "-1.5", ".5", "1e-3", "2.")] == [3, -1.5, 0.5, 1e-3, 2]


def test_every_flag_that_is_a_number_has_a_rule() -> None:
    """Options of ours that are numbers, but for positions, which the prompt decides."""
    free = {"layer", "query", "key", "seed", "controls", "examples", "context", "batch"}
    for command in cli.COMMANDS:
        parser = cli.command_line(command)
        [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in commands.choices[command]._actions:
            if action.type in (read_whole, read_number):
                assert action.dest in RULES or action.dest in free, (command, action.dest)
