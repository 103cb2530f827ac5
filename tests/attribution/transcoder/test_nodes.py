"""Graphs that circuit-tracer made: our parts sum to the edges in its adjacency."""

from __future__ import annotations

import circuit_tracer
import pytest
import torch
from helpers.architectures import ARCHITECTURES, prompt_ids, save_tiny
from helpers.random_transcoders import KINDS, PLACES, columns_of, replacement_model

from circuit_tracer_qk import UserError
from circuit_tracer_qk.attribution.transcoder.graph import explain_graph
from circuit_tracer_qk.attribution.transcoder.nodes import read_transcoder_graph


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_sum_to_circuit_tracers_edges(tmp_path, record_error, name, kind):
    save_tiny(name, tmp_path)
    place = list(PLACES)[KINDS.index(kind) % 3]
    parallel = name == "neox"
    reads, writes = PLACES["mlp.hook_in" if parallel and place == "hook_resid_mid" else place]
    model = replacement_model(tmp_path, kind, reads, writes)
    graph = circuit_tracer.attribute(
        prompt_ids(name, 10), model, max_n_logits=3, max_feature_nodes=40, batch_size=16
    )
    run = read_transcoder_graph(model, graph, columns_of(model, graph))
    target, source = graph.adjacency_matrix.nonzero(as_tuple=True)
    found = run.split(source, target)
    edges = graph.adjacency_matrix[target, source]
    scale = float(edges.abs().max())
    worst = float((found.weight - edges).abs().max()) / scale
    total = found.attention_free + found.last.sum((1, 2))
    worst = max(worst, float((total - edges).abs().max()) / scale)
    record_error("transcoder edges = adjacency (float32)", name, worst)
    assert worst < 1e-5
    assert len(edges) > 500
    assert bool((found.through != 0).any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sources_sum_to_the_residual_stream(tmp_path, record_error, name, kind):
    """Nodes and what is no node, carried: the model's own residual stream, at every checkpoint."""
    save_tiny(name, tmp_path)
    place = list(PLACES)[(1 + KINDS.index(kind)) % 3]
    reads, writes = PLACES["mlp.hook_in" if name == "neox" and "mid" in place else place]
    model = replacement_model(tmp_path, kind, reads, writes)
    graph = circuit_tracer.attribute(
        prompt_ids(name, 10), model, max_n_logits=2, max_feature_nodes=30, batch_size=16
    )
    run = read_transcoder_graph(model, graph, columns_of(model, graph))
    x = torch.zeros_like(run.run.residual[0])
    worst = 0.0
    for layer in range(-1, run.run.n_layers):
        if layer >= 0:
            x = run.blocks.carry(layer, x[None]).out[0]
        now = run.writes.layer == layer
        x = x.index_add(0, run.writes.position[now], run.writes.vector[now])
        expected = run.run.residual[layer + 1]
        worst = max(worst, float((x - expected).abs().max() / expected.abs().max()))
    record_error("transcoder sources = residual stream (float32)", name, worst)
    assert worst < 1e-5
    kinds = {source.kind for source in run.sources if source is not None}
    assert kinds >= {"feature", "error", "embedding", "bias"}
    assert len(run.sources) == int(run.writes.source.max()) + 1


def test_gemma3_is_refused_where_the_host_is_wrong(tmp_path):
    save_tiny("gemma3", tmp_path)
    ids = prompt_ids("gemma3", 8)
    stock = replacement_model(tmp_path, "relu", stock=True)
    graph = circuit_tracer.attribute(ids, stock, max_n_logits=2, batch_size=16)
    with pytest.raises(UserError, match=r"one rotary table .* after circuit_tracer_qk.enable\(\)"):
        explain_graph(graph, stock)
    right = replacement_model(tmp_path, "relu")
    with pytest.raises(UserError, match=r"or make it again here: .* one rotary table"):
        explain_graph(graph, right)


def test_a_graph_of_other_transcoders_is_refused(tmp_path):
    save_tiny("llama", tmp_path)
    ids = prompt_ids("llama", 8)
    first = replacement_model(tmp_path, "relu")
    graph = circuit_tracer.attribute(ids, first, max_n_logits=2, batch_size=16)
    other = replacement_model(tmp_path, "clt")
    with pytest.raises(UserError, match="other transcoders"):
        read_transcoder_graph(other, graph, columns_of(other, graph))
    with pytest.raises(UserError, match='backend="transformerlens"'):
        explain_graph(graph, torch.nn.Module())
