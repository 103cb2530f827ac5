"""What circuit-tracer's pruning leaves of a graph, as the nodes and links of its page."""

from __future__ import annotations

import math

import torch

from circuit_tracer_qk.attribution import pruning
from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.links import Kept
from circuit_tracer_qk.base.json_text import rounded
from circuit_tracer_qk.graph_files.tables import Names
from circuit_tracer_qk.host import graph as host


def prune(graph: ExplainedGraph, node_threshold: float, edge_threshold: float) -> Kept:
    """The graph's rule of pruning; unlinked features and errors and links of weight 0 are left out."""
    pruned = pruning.prune(graph, node_threshold, edge_threshold)
    node_mask, edge_mask = pruned.nodes, pruned.edges
    edge_mask = edge_mask & (graph.adjacency_matrix != 0) & node_mask & node_mask[:, None]
    targets, sources = edge_mask.nonzero(as_tuple=True)
    n_always = graph.n_pos + len(graph.logit_targets)  # tokens and logits stay without links too
    used = torch.zeros_like(node_mask)
    used[targets] = used[sources] = used[-n_always:] = True
    weights = graph.adjacency_matrix[targets, sources].double()
    errors = graph.adjacency_matrix[:, slice(*graph.first_indices()[:2])]
    per_size = (pruned.influence / pruned.size.clamp_min(1e-10)).double()
    return Kept(
        nodes=_nodes(graph, used.nonzero().flatten().tolist(), pruned.cumulative.tolist()),
        sources=sources,
        targets=targets,
        weights=weights.cpu(),
        influence=(weights.abs() * per_size[targets]).cpu(),
        error_share=(errors.abs().sum(1) / pruned.size.clamp_min(1e-10)).cpu(),
    )


def _nodes(
    graph: ExplainedGraph, indices: list[int], influence: list[float]
) -> dict[int, host.Node]:
    """circuit-tracer's nodes. Errors have upstream's newer ids, which no feature's can equal."""
    n_pos, n_layers = graph.n_pos, graph.run.n_layers
    _, tokens, logits, _ = graph.first_indices()
    selected = graph.active_features[graph.selected_features].tolist()
    activations = graph.activation_values[graph.selected_features].tolist()
    input_tokens = graph.input_tokens.tolist()
    logit_texts = host.logit_texts(graph)
    probabilities = graph.logit_probabilities.tolist()

    def node(i: int) -> host.Node:
        rounded_influence = rounded(influence[i]) if math.isfinite(influence[i]) else None
        if i < graph.n_features:
            layer, position, feature = selected[i]
            created = host.Node.feature_node(
                layer=layer,
                pos=position,
                feat_idx=feature,
                influence=rounded_influence,
                activation=rounded(activations[i]),
            )
            return created.model_copy(update={"clerp": graph.label(layer + 1, feature)})
        if i < tokens:
            slot, position = divmod(i - graph.n_features, n_pos)
            layer = slot + graph.first_error_layer
            created = host.Node.error_node(layer=layer, pos=position, influence=rounded_influence)
            ids = {"node_id": f"{layer}_-1_{position}", "jsNodeId": f"{layer}_-1-{position}"}
            return created.model_copy(update=ids)
        if i < logits:
            position = i - tokens
            return host.Node.token_node(
                pos=position, vocab_idx=input_tokens[position], influence=rounded_influence
            )
        token, vocab_idx = logit_texts[i - logits]
        return host.Node.logit_node(
            pos=n_pos - 1,
            vocab_idx=vocab_idx,
            token=token,
            target_logit=i == logits,
            token_prob=rounded(probabilities[i - logits]),
            num_layers=n_layers,
        )

    return {i: node(i) for i in indices}


def mention_nodes(graph: ExplainedGraph, kept: Kept, names: Names) -> None:
    """Note the features that are nodes."""
    selected = graph.active_features[graph.selected_features].tolist()
    for i in kept.nodes:
        if i < graph.n_features:
            layer, _, feature = selected[i]
            names.mention(layer + 1, feature)
