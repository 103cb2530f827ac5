"""Gemma-3 through circuit-tracer's doors: rotary tables, chat prefixes, the nnsight backend's graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import circuit_tracer
import pytest
import torch
from helpers.architectures import (
    ARCHITECTURES,
    GLOBAL,
    LOCAL,
    prompt_ids,
    save_tiny,
    save_tokenizer,
)
from helpers.commands import Result
from helpers.hub_cache import HubCache
from helpers.random_dictionaries import write_sae
from helpers.random_transcoders import PLACES, random_transcoders, replacement_model
from helpers.reference import Reference
from helpers.transcoder_reference import adjacency
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.host import patching
from circuit_tracer_qk.plugin.host_command import explaining

OPTIONS: dict[str, Any] = {"max_n_logits": 2, "max_feature_nodes": 30, "batch_size": 16}
MLP, NAME = PLACES["mlp.hook_in"][0], "google/gemma-3-270m"
PREFIX = [2, 105, 2364, 107]  # <bos><start_of_turn>user\n
pytestmark = pytest.mark.filterwarnings("ignore:.*FVU above 1")


def transcoders(reads: str = MLP) -> Any:
    return random_transcoders(4, 24, "relu", reads, "hook_mlp_out")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt_ids("gemma3", 12)]))


def explained(ids: list[int], model: Any) -> ctqk.TranscoderGraph:
    graph = ctqk.attribute(ids, model, **OPTIONS)
    assert isinstance(graph, ctqk.TranscoderGraph)
    return graph


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if not n.startswith("neox")])
def test_edges_are_those_of_an_independent_frozen_pass(
    tmp_path: Path, record_error: Any, name: str
) -> None:
    hf_model = save_tiny(name, tmp_path)
    model = replacement_model(tmp_path, "relu", MLP, "hook_mlp_out")
    ids = prompt_ids(name, 12)
    graph = explained(ids, model)
    reference = Reference(hf_model)
    expected = adjacency(reference, reference.run(ids), graph, model.transcoders, ids)
    edges = graph.adjacency_matrix.double()
    worst = float((edges - expected).abs().max() / expected.abs().max())
    record_error("transcoder edges = independent frozen pass (float32)", name, worst)
    assert worst < 1e-5


def test_by_folder_and_by_name_and_only_while_enabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a name that TransformerLens knows the size and the weights are those of the cache."""
    from circuit_tracer import ReplacementModel

    folder = tmp_path / "mine"
    hf_model = save_tiny("gemma3", folder)
    save_tokenizer(folder)
    with torch.no_grad():
        expected = hf_model(torch.tensor([prompt_ids("gemma3", 12)])).logits
    cache = HubCache(tmp_path / "cache")
    cache.add(NAME, folder)
    cache.use(monkeypatch)
    ids = prompt_ids("gemma3", 9)
    edges = []

    def load(name: str) -> Any:
        return ReplacementModel.from_pretrained_and_transcoders(name, transcoders())

    ctqk.enable()
    try:
        for name in (str(folder), NAME, "gemma-3-270m"):
            model = load(name)
            assert float((logits(model) - expected).abs().max()) < 1e-4
            tables = {id(block.attn.rotary_cos): block.attn.attn_type for block in model.blocks}
            assert sorted(tables.values()) == ["global", "local"]  # one for each kind
            edges.append(explained(ids, model).adjacency_matrix)
    finally:
        ctqk.disable()
    assert torch.equal(edges[0], edges[1]) and torch.equal(edges[0], edges[2])
    with explaining(qk=False):
        assert float((logits(load(NAME)) - expected).abs().max()) < 1e-4
    stock = replacement_model(folder, "relu", MLP, "hook_mlp_out", stock=True)
    assert float((logits(stock) - expected).abs().max()) > 1e-2
    with pytest.raises(ctqk.UserError, match=r"one rotary table .* after circuit_tracer_qk.enable"):
        ctqk.attribute(ids, stock, **OPTIONS)


def save_chat(folder: Path, template: bool) -> Path:
    """A tiny Gemma-3 whose vocabulary has the chat prefix, with or without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    size, special = 2400, {2: "<bos>", 1: "<eos>", 3: "<unk>", 105: "<start_of_turn>", 107: "<nl>"}
    changes = {"vocab_size": size, "bos_token_id": 2, "eos_token_id": 1}
    save_tiny("gemma3", folder, **changes, layer_types=[LOCAL, GLOBAL, LOCAL, GLOBAL])
    words = {special.get(i, f"w{i}"): i for i in range(size)} | {"user": 2364}
    del words["w2364"]
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    return folder


CHAT = "<bos> <start_of_turn> user <nl> w7 w300 w9 w41"


@pytest.mark.parametrize("name", ["mine", "gemma-3-270m", "gemma-3-270m-it"])
def test_instruction_tuned_is_told_by_the_chat_template(tmp_path: Path, name: str) -> None:
    folder = save_chat(tmp_path / name, template=True)
    saes = write_sae(tmp_path / "saes", 24, [0, 1, 2, 3])
    residual = ctqk.load_model(folder, saes)
    assert residual.zero_positions == slice(0, 4)
    with explaining(qk=False):
        load = patching.entry_point("from_pretrained_and_transcoders")
        model = load(model_name=str(folder), transcoders=transcoders())
    assert model.zero_positions == slice(0, 4)
    for one in (residual, model):
        graph = ctqk.attribute(CHAT, one, **OPTIONS)
        assert graph.input_tokens[:4].tolist() == PREFIX
        assert int(graph.active_features[:, 1].min()) >= 4
        with pytest.raises(ctqk.UserError, match=rf"does not suit {name}.*start_of_turn"):
            ctqk.attribute("w7 w300 w9", one, **OPTIONS)


@pytest.mark.parametrize("name", ["mine", "gemma-3-of-mine-it"])
def test_a_pretrained_one_is_not_whatever_its_folder_is_called(tmp_path: Path, name: str) -> None:
    folder = save_chat(tmp_path / name, template=False)
    saes = write_sae(tmp_path / "saes", 24, [0, 1, 2, 3])
    with explaining(qk=False):
        load = patching.entry_point("from_pretrained_and_transcoders")
        model = load(model_name=str(folder), transcoders=transcoders())
    for one in (ctqk.load_model(folder, saes), model):
        assert one.zero_positions == slice(0, 1)
        graph = ctqk.attribute("w7 w300 w9 w41 w5", one, **OPTIONS)
        assert graph.input_tokens.tolist() == [2, 7, 300, 9, 41, 5]
        assert int(graph.active_features[:, 1].min()) == 1


# Graphs of the nnsight backend --------------------------------------------------------------------


def nnsight_graph(folder: Path, ids: list[int]) -> Any:
    """A graph that circuit-tracer's nnsight backend makes, of transcoders that read resid_mid."""
    from circuit_tracer import ReplacementModel

    model = ReplacementModel.from_pretrained_and_transcoders(
        str(folder), transcoders("hook_resid_mid"), backend="nnsight", device=torch.device("cpu")
    )
    return circuit_tracer.attribute(ids, model, **OPTIONS)


def test_token_edges_of_nnsight_get_the_embeddings_factor(
    tmp_path: Path, record_error: Any
) -> None:
    save_tiny("gemma3", tmp_path)
    save_tokenizer(tmp_path)
    ids = prompt_ids("gemma3", 9)
    theirs = nnsight_graph(tmp_path, ids)
    before = theirs.adjacency_matrix.clone()
    model = replacement_model(tmp_path, "relu", "hook_resid_mid", "hook_mlp_out")
    expected = explained(ids, model).adjacency_matrix
    scale = float(expected.abs().max())
    assert float((before - expected).abs().max()) > 0.1 * scale
    with pytest.warns(UserWarning, match=r"token edges lack .* multiplied by 4.899 here"):
        graph = ctqk.explain_graph(theirs, model)
    assert torch.equal(theirs.adjacency_matrix, before)
    worst = float((graph.adjacency_matrix - expected).abs().max()) / scale
    record_error("transcoder edges, nnsight = TransformerLens (float32)", "gemma3", worst)
    assert worst < 3e-6
    target, source = graph.adjacency_matrix.nonzero(as_tuple=True)
    ours = graph.split(source, target).weight
    assert float((ours - graph.adjacency_matrix[target, source]).abs().max()) < 1e-5 * scale
    graph.to_pt(str(tmp_path / "right.pt"))
    again = ctqk.explain_graph(circuit_tracer.Graph.from_pt(str(tmp_path / "right.pt")), model)
    assert torch.equal(again.adjacency_matrix, graph.adjacency_matrix)


def test_augment_says_that_it_put_them_right(tmp_path: Path, run: Any) -> None:
    folder = tmp_path / "model"
    save_tiny("gemma3", folder)
    save_tokenizer(folder)
    nnsight_graph(folder, prompt_ids("gemma3", 9)).to_pt(str(tmp_path / "theirs.pt"))
    made: Any = transcoders("hook_resid_mid")
    (tmp_path / "set").mkdir()
    for layer, one in enumerate(made.transcoders):
        tensors = {name: value.detach().clone() for name, value in one.named_parameters()}
        save_file(tensors, tmp_path / "set" / f"layer_{layer}.safetensors")
    (tmp_path / "set" / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: hook_resid_mid\n"
        "feature_output_hook: hook_mlp_out\n"
    )
    named = ["-m", folder, "-t", tmp_path / "set", "--slug", "s"]
    done: Result = run(
        "augment", tmp_path / "theirs.pt", *named, "--graph_file_dir", tmp_path / "graphs"
    )
    assert done.status == 0, done.err
    assert "note: the graph's token edges lack the factor of Gemma-3's embeddings" in done.err
    assert (tmp_path / "graphs" / "s.json").is_file()
