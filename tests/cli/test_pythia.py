"""A Pythia-shaped model with GPT-NeoX's tokenizer, whose BOS has id 0, from text to every result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.architectures import save_neox
from helpers.commands import Result
from helpers.random_dictionaries import write_sae
from helpers.random_transcoders import random_transcoders
from safetensors.torch import save_file

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.host.patching import load_local_transcoders, replacement_model
from circuit_tracer_qk.model.load import load_transformer

Run = Callable[..., Result]
PROMPT = "the cat sat on the"
pytestmark = pytest.mark.filterwarnings("ignore:.*FVU above 1")


@pytest.fixture(scope="module", params=[None, "<|padding|>"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``saes`` and ``transcoders``."""
    folder = tmp_path_factory.mktemp("pythia")
    save_neox(folder / "model", request.param)
    write_sae(folder / "saes", 32, [0, 1, 2])
    transcoders: Any = random_transcoders(3, 32, "relu", "mlp.hook_in", "mlp.hook_out")
    (folder / "transcoders").mkdir()
    for layer, one in enumerate(transcoders.transcoders):
        tensors = {name: getattr(one, name).detach().clone() for name in ("W_enc", "W_dec")}
        tensors |= {name: getattr(one, name).detach().clone() for name in ("b_enc", "b_dec")}
        save_file(tensors, folder / "transcoders" / f"layer_{layer}.safetensors")
    config = {"model_kind": "transcoder_set", "model_name": str(folder / "model"), "scan": "neox"}
    config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    (folder / "transcoders" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ctqk.ResidualModel:
    return ctqk.load_model(folder / "model", folder / "saes", device="cpu")


@pytest.fixture(scope="module")
def replacement(folder: Path) -> Any:
    transcoders, _ = load_local_transcoders(
        folder / "transcoders", device=torch.device("cpu"), dtype=torch.float32
    )
    return replacement_model(load_transformer(folder / "model", device="cpu"), transcoders)


@pytest.fixture(scope="module")
def ids(model: ctqk.ResidualModel) -> list[int]:
    """The prompt's, its BOS in front."""
    return [0, *model.tokenizer(PROMPT, add_special_tokens=False).input_ids]


def test_residual_graph_and_steering(model: ctqk.ResidualModel, ids: list[int]) -> None:
    graph = ctqk.attribute(PROMPT, model, max_n_logits=2)
    assert graph.input_tokens.tolist() == ids and graph.token_strings[0] == "<|endoftext|>"
    assert not bool((graph.active_features[:, 1] == 0).any())  # nothing is read at the BOS
    layer, position, feature = graph.active_features[0].tolist()
    edit = ctqk.QKEdit(
        ["L1H0"], "key", checkpoint=layer + 1, features=[feature], positions=position, factor=0
    )
    run = ctqk.steer(model, PROMPT, edit, controls=1)
    assert len(run.token_strings) == len(ids)
    assert ctqk.generate(model, PROMPT, edit, 2, controls=1).clean.tokens


def test_transcoder_graph(replacement: Any, ids: list[int]) -> None:
    import circuit_tracer

    graph: Any = ctqk.attribute(PROMPT, replacement, max_n_logits=2)
    assert graph.input_tokens.tolist() == ids and graph.token_strings[0] == "<|endoftext|>"
    stock = circuit_tracer.attribute(torch.tensor(ids), replacement, max_n_logits=2)
    assert torch.equal(stock.adjacency_matrix, graph.adjacency_matrix)
    assert stock.input_string == graph.input_string
    again = ctqk.explain_graph(stock, replacement)
    assert again.token_strings == graph.token_strings
    plain = ctqk.attribute(PROMPT, replacement, max_n_logits=2, qk=False)
    assert torch.equal(plain.adjacency_matrix, graph.adjacency_matrix)
    ctqk.enable()
    try:
        enabled: Any = circuit_tracer.attribute(PROMPT, replacement, max_n_logits=2, qk=True)  # type: ignore[call-arg]
    finally:
        ctqk.disable()
    assert torch.equal(enabled.adjacency_matrix, graph.adjacency_matrix)
    for alone in ("<|endoftext|>", [0]):
        with pytest.raises(ctqk.UserError, match="single token"):
            ctqk.attribute(alone, replacement)


@pytest.mark.parametrize("kind", ["-d", "-t"])
def test_commands(run: Run, folder: Path, tmp_path: Path, ids: list[int], kind: str) -> None:
    name = "saes" if kind == "-d" else "transcoders"
    named = ["-m", folder / "model", kind, folder / name]
    done = run(
        *("attribute", *named, "-p", PROMPT, "--slug", "cat", "--graph_file_dir", tmp_path),
        *("-o", tmp_path / "cat.pt", "--max_n_logits", 2),
    )
    assert done.status == cli.DONE, done.err
    assert "stands in front" not in done.err
    page = json.loads((tmp_path / "cat.json").read_bytes())
    assert page["metadata"]["prompt_tokens"][0] == "<|endoftext|>"
    assert len(page["metadata"]["prompt_tokens"]) == len(ids)
    assert host.load_graph(tmp_path / "cat.pt").input_tokens.tolist() == ids

    stock = run("attribute", *named, "-p", PROMPT, "-o", tmp_path / "stock.pt", "--no-qk")
    assert stock.status == cli.DONE, stock.err
    assert host.load_graph(tmp_path / "stock.pt").input_tokens.tolist() == ids

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT, "slug": "line"}) + "\n")
    many = run(
        *("attribute", *named, "--prompts", prompts, "--graph_file_dir", tmp_path / "many"),
        *("--max_n_logits", 2),
    )
    assert many.status == cli.DONE, many.err
    line = json.loads((tmp_path / "many" / "line.json").read_bytes())
    assert line["metadata"]["prompt_tokens"] == page["metadata"]["prompt_tokens"]


def test_steer_command(run: Run, folder: Path) -> None:
    named = ["-m", folder / "model", "-d", folder / "saes", "-p", PROMPT]
    done = run("steer", *named, "--edit", "heads=L1H0 factor=0", "--controls", 1, "--json", "-")
    assert done.status == cli.DONE, done.err
    assert json.loads(done.out)["prompt_tokens"][0] == "<|endoftext|>"


def test_a_tokenizer_without_a_bos_says_which_token_stands_there(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    import shutil

    model = shutil.copytree(folder / "model", tmp_path / "model")
    for path in (model / "tokenizer_config.json", model / "special_tokens_map.json"):
        settings = json.loads(path.read_text())
        settings = settings | {"eos_token": "<|padding|>", "pad_token": "<|padding|>"}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings = {k: v for k, v in settings.items() if k not in ("bos_token", "unk_token")}
        path.write_text(json.dumps(settings))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the {w}"}) + "\n" for w in ("cat", "dog")))
    named = ["-m", model, "-d", folder / "saes"]
    said = "the tokenizer has no BOS: `<|padding|>` (id 1) stands in front of the prompt"
    one = run("attribute", *named, "-p", PROMPT, "-o", tmp_path / "one.pt", "--max_n_logits", 2)
    assert one.status == cli.DONE, one.err
    assert one.err.count(said) == 1 and f"circuit-tracer-qk: note: {said}" in one.err
    many = run("attribute", *named, "--prompts", prompts, "--graph_file_dir", tmp_path / "many")
    assert many.status == cli.DONE, many.err
    assert many.err.count(said) == 1
