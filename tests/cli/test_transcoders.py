"""``attribute -t`` and ``augment`` on the tiny transcoders that tests make: the README's demo."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import Result
from helpers.stock_command import replace_command
from tiny_transcoders import make_clt, make_set

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT
from circuit_tracer_qk.host import cli as host_cli
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.plugin import host_command as explaining

Run = Callable[..., Result]


@pytest.fixture(scope="module", params=["set", "clt"])
def transcoders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = make_set if request.param == "set" else make_clt
    return make(tmp_path_factory.mktemp("transcoders") / request.param)


def test_attribute_and_augment(run: Run, transcoders: Path, tmp_path: Path):
    saved, graphs = tmp_path / "graph.pt", tmp_path / "graphs"
    named = ["-t", transcoders, "-p", DEMO_PROMPT]
    files = ["--slug", "sally", "--graph_file_dir", graphs]
    done = run("attribute", *named, *files, "-o", saved, "--qk", "--max_n_logits", 3)
    assert done.status == cli.DONE, done.err
    assert done.out.splitlines() == [
        f"graph written to {saved}",
        f"graph files written to {graphs / 'sally.json'}",
    ]
    document = json.loads((graphs / "sally.json").read_bytes())
    assert document["qk"]["graph_kind"] == "transcoder"
    assert document["metadata"]["scan"] == transcoders.name
    # the two steps of induction: L0 from " Aunt" to the token after it, L1 from there to the end
    steps = {
        (block["layer"], *pairs[0][:2])
        for link in document["links"]
        if link["source"].startswith("E_") and link["source"].endswith("_5")
        for block in link["head_loadings"]
        for _, _, pairs in block["heads"][:1]
    }
    assert {(0, 6, 5), (1, 14, 6)} <= steps

    asked = run("qk", saved, "-t", transcoders, "--head", "L1H2", "--key", 6)
    assert asked.status == cli.DONE, asked.err
    assert "from 5" in asked.out and "layer 1's transcoder" in asked.out

    later = run("augment", saved, "-t", transcoders, "--slug", "later", *files[2:])
    assert later.status == cli.DONE, later.err
    again = json.loads((graphs / "later.json").read_bytes())
    assert again["links"] == document["links"] and again["qk"] == document["qk"]

    plain = run("attribute", *named, "-o", tmp_path / "plain.pt", "--no-qk", "--max_n_logits", 3)
    assert plain.status == cli.DONE, plain.err
    stock, ours = host.load_graph(tmp_path / "plain.pt"), host.load_graph(saved)
    assert torch.equal(stock.adjacency_matrix, ours.adjacency_matrix)


def test_a_pt_alone_says_where_heads_go(run: Run, transcoders: Path, tmp_path: Path):
    done = run("attribute", "-t", transcoders, "-p", "I met Aunt Sally", "-o", tmp_path / "g.pt")
    assert done.status == cli.DONE and "augment" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["g.pt"]


def test_augment_of_a_residual_graph(run: Run, tmp_path: Path):
    saved = tmp_path / "residual.pt"
    graph = ctqk.attribute("I met Aunt Sally. I like Aunt", ctqk.load_model(), max_feature_nodes=80)
    graph.to_pt(saved)
    done = run("augment", saved, "--slug", "r", "--graph_file_dir", tmp_path / "graphs")
    assert done.status == cli.DONE, done.err
    document = json.loads((tmp_path / "graphs" / "r.json").read_bytes())
    assert document["qk"]["graph_kind"] == "residual"


def test_mistakes(run: Run, transcoders: Path, tmp_path: Path):
    files = ["--slug", "s", "--graph_file_dir", tmp_path / "graphs"]
    attribute = ["attribute", "-p", "I met Aunt Sally", *files]
    assert "cannot be loaded" in run(*attribute, "-t", "nobody/nothing").refusal
    (tmp_path / "empty").mkdir()
    assert "is no transcoder config" in run(*attribute, "-t", tmp_path / "empty").refusal
    assert "not-a-model" in run(*attribute, "-t", transcoders, "-m", "not-a-model").refusal
    assert "no graph file" in run("augment", tmp_path / "none.pt", *files).refusal
    (tmp_path / "broken.pt").write_bytes(b"nonsense")
    broken = run("augment", tmp_path / "broken.pt", "-t", transcoders, *files)
    assert "broken.pt is no graph" in broken.refusal
    assert not (tmp_path / "graphs").exists() or not any((tmp_path / "graphs").iterdir())


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_layer_that_is_missing_is_named(run: Run, transcoders: Path, tmp_path: Path, layer: int):
    copy = shutil.copytree(transcoders, tmp_path / "copy")
    stem = "layer" if (copy / "layer_0.safetensors").exists() else "W_dec"
    (copy / f"{stem}_{layer}.safetensors").unlink()
    said = run("attribute", "-t", copy, "-p", "I met Aunt Sally", "-o", tmp_path / "g.pt").refusal
    if layer == 3 and stem == "layer":  # the last: what is left looks whole
        assert "transcoders are of 3 layers and the model has 4: layer 3 has none" in said
    else:
        assert f"{stem}_{layer}.safetensors, layer {layer} of the transcoders, is missing" in said
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("feature_input_hook: 3", "feature_input_hook should be a name, found 3"),
        ("feature_output_hook:", "feature_output_hook should be a name, found None"),
        ("model_kind: [a]", "model_kind should be a name"),
        ("scan: 5", "scan should be a name, found 5"),
        ("transcoders: layer_0.safetensors", "transcoders should be a list of files"),
        ("transcoders: [layer_0.safetensors, none.safetensors]", "none.safetensors, layer 1 of"),
    ],
)
def test_a_config_of_transcoders_that_is_none(run: Run, tmp_path: Path, lines: str, message: str):
    folder = tmp_path / "set"
    folder.mkdir()
    config = {"model_kind": "transcoder_set", "feature_input_hook": "a", "feature_output_hook": "b"}
    (folder / "layer_0.safetensors").touch()
    named = "\n".join(f"{k}: {v}" for k, v in config.items() if k not in lines)
    (folder / "config.yaml").write_text(f"{named}\n{lines}\n")
    said = run("attribute", "-t", folder, "-p", "I met Aunt Sally", "-o", tmp_path / "g.pt").refusal
    assert message in said


def test_augment_with_other_transcoders_is_refused(run: Run, tmp_path: Path):
    one, other = make_set(tmp_path / "one"), make_set(tmp_path / "other")
    saved = tmp_path / "g.pt"
    assert run("attribute", "-t", one, "-p", "I met Aunt Sally", "-o", saved).status == cli.DONE
    files = ["--slug", "s", "--graph_file_dir", tmp_path / "graphs"]
    assert "-t/--transcoder_set is missing" in run("augment", saved, *files).refusal
    from safetensors.torch import load_file, save_file

    tensors = load_file(other / "layer_1.safetensors")
    save_file(tensors | {"b_enc": tensors["b_enc"] + 1}, other / "layer_1.safetensors")
    assert "another model or other" in run("augment", saved, "-t", other, *files).refusal
    assert not (tmp_path / "graphs").exists()


def test_what_cannot_be_explained_afterwards_leaves_the_stock_files(
    run: Run, transcoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(graph: object, model: object) -> None:
        raise ctqk.UserError("our sweeps give other edges")

    monkeypatch.setattr(explaining.transcoder, "explain_graph", refuse)
    files = ["--slug", "s", "--graph_file_dir", tmp_path / "graphs", "-o", tmp_path / "g.pt"]
    done = run("attribute", "-t", transcoders, "-p", "I met Aunt Sally", *files)
    assert done.status == cli.MISTAKE
    assert "circuit-tracer's own, without heads: our sweeps" in done.err.splitlines()[-1]
    assert "qk" not in json.loads((tmp_path / "graphs" / "s.json").read_bytes())
    assert (tmp_path / "g.pt").is_file()


def test_flags_go_to_the_host_as_they_were_given():
    argv = ["-t", "a/b", "-p", "-x y", "--max_n_logits", "3", "--verbose", "--lazy-encoder"]
    args = host_cli.command_parser("attribute").parse_args(argv)
    passed = host_cli.flags_of("attribute", args)
    again = host_cli.command_parser("attribute").parse_args(passed)
    assert vars(args) == vars(again) and "--prompt=-x y" in passed


def test_flags_of_newer_hosts_go_through(monkeypatch: pytest.MonkeyPatch):
    chunked = {"action": argparse.BooleanOptionalAction, "default": True}
    replace_command(monkeypatch, "attribute", sparsification={"nargs": "+"}, chunked=chunked)
    argv = ["-t", "a", "-p", "b", "--sparsification", "x", "2", "--no-chunked", "--port", "1"]
    args = host_cli.command_parser("attribute").parse_args(argv)
    passed = host_cli.flags_of("attribute", args, leave_out=("port",))
    expected = ["--transcoder_set=a", "--prompt=b", "--sparsification", "x", "2", "--no-chunked"]
    assert sorted(passed) == sorted(expected)
