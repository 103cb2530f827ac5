"""Explained transcoder graphs: heads without output, other dtypes, hosts that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import circuit_tracer
import pytest
import torch
from helpers.architectures import ARCHITECTURES, prompt_ids, save_tiny
from helpers.random_transcoders import KINDS, PLACES, replacement_model

import circuit_tracer_qk as ctqk

OPTIONS: dict[str, Any] = {"max_n_logits": 2, "max_feature_nodes": 30, "batch_size": 16}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_that_writes_nothing_has_no_part(tmp_path: Path, name: str):
    save_tiny(name, tmp_path)
    kind = KINDS[list(ARCHITECTURES).index(name) % len(KINDS)]
    model = replacement_model(tmp_path, kind, *PLACES["mlp.hook_in"])
    layer, head = 1, model.cfg.n_heads - 1
    with torch.no_grad():
        model.blocks[layer].attn.W_O[head] = 0
    graph = ctqk.attribute(prompt_ids(name, 9), model, **OPTIONS)
    assert isinstance(graph, ctqk.TranscoderGraph)
    target, source = graph.adjacency_matrix.nonzero(as_tuple=True)
    found = graph.split(source, target)
    assert not found.through[:, layer, head].any() and not found.last[:, layer, head].any()
    assert found.through[:, layer].any() and found.last[:, layer].any()


def test_in_inference_mode_too(tmp_path: Path):
    """Where circuit-tracer's backward passes alone would fail."""
    save_tiny("gpt2", tmp_path)
    model = replacement_model(tmp_path, KINDS[0], *PLACES["mlp.hook_in"])
    ids, place = prompt_ids("gpt2", 9), (1, 0, 5, 3)
    expected = ctqk.attribute(ids, model, qk=True, **OPTIONS)
    with torch.inference_mode():
        graph = ctqk.attribute(ids, model, qk=True, **OPTIONS)
        assert isinstance(graph, ctqk.TranscoderGraph)
        terms = graph.qk(*place).terms
    assert isinstance(expected, ctqk.TranscoderGraph)
    assert torch.equal(graph.adjacency_matrix, expected.adjacency_matrix)
    assert torch.equal(terms, expected.qk(*place).terms)


def test_a_model_in_float64(tmp_path: Path):
    save_tiny("qwen2", tmp_path)
    model = replacement_model(tmp_path, "clt-skip", *PLACES["mlp.hook_in"], dtype=torch.float64)
    graph = ctqk.attribute(prompt_ids("qwen2", 9), model, **OPTIONS)
    assert isinstance(graph, ctqk.TranscoderGraph)
    target, source = graph.adjacency_matrix.nonzero(as_tuple=True)
    found = graph.split(source, target)
    scale = float(graph.adjacency_matrix.abs().max())
    total = found.attention_free + found.last.sum((1, 2))
    assert found.weight.dtype == torch.float64
    assert float((total - found.weight).abs().max()) < 1e-10 * scale
    edges = graph.adjacency_matrix[target, source].double()
    assert float((found.weight - edges).abs().max()) < 1e-5 * scale
    table = graph.qk(2, 1, 8, 4)
    size = float(table.terms.abs().sum())
    assert abs(float(table.terms.sum()) - table.score) < 1e-10 * size


def test_half_precision_rounds_and_says_so(tmp_path: Path):
    save_tiny("llama", tmp_path)
    model = replacement_model(tmp_path, "relu", *PLACES["mlp.hook_in"], dtype=torch.bfloat16)
    graph = ctqk.attribute(prompt_ids("llama", 9), model, **OPTIONS)
    assert isinstance(graph, ctqk.TranscoderGraph)
    for place in ((0, 0, 4, 2), (2, 3, 8, 5)):
        table = graph.qk(*place)
        size = float(table.terms.abs().sum())
        assert abs(float(table.terms.sum()) - table.score) < 1e-5 * size  # also here
        rounding = [i for i, c in enumerate(table.query) if "rounding" in c.label]
        assert len(rounding) == 1 and table.query[rounding[0]].kind == "error"
        assert float(table.query_marginal[rounding[0]].abs()) < 0.05 * size
    path = ctqk.create_graph_files(graph, "half", tmp_path / "graphs")
    for link in json.loads(path.read_bytes())["links"]:
        values = [value for *_, value in link["delivered_by"]]
        total = link["attention_free"] + sum(values)
        assert total == pytest.approx(link["weight"], abs=1e-5 * (1 + sum(map(abs, values))))


def test_what_the_host_does_wrongly_is_refused(tmp_path: Path):
    save_tiny("gemma3", tmp_path)
    model = replacement_model(tmp_path, "relu", *PLACES["mlp.hook_in"])
    blocks = {block.attn.attn_type: block.attn for block in model.blocks}
    local, everywhere = blocks["local"], blocks["global"]
    graph = circuit_tracer.attribute(prompt_ids("gemma3", 9), model, **OPTIONS)
    for attn in (block.attn for block in model.blocks):  # as circuit-tracer's own loading leaves it
        attn.rotary_cos, attn.rotary_sin = everywhere.rotary_cos, everywhere.rotary_sin
    assert local is not everywhere
    with pytest.raises(ctqk.UserError, match="one rotary table for its local and global"):
        ctqk.explain_graph(graph, model)


def test_backends_without_blocks_are_refused():
    class NNSight:
        transcoders = object()

    with pytest.raises(ctqk.UserError, match="TransformerLens"):
        ctqk.explain_graph(object(), NNSight())  # type: ignore[arg-type]
