"""Which nodes and edges of a graph go into its file, and how much of the influence errors take.

By circuit-tracer's rule a target's influence is shared out over all its sources, so that over
many checkpoints errors take nearly all of it. Explained influence is shared out over features and
tokens only; errors are then kept by the true share that they take of each target
(attribution/README.md, "Which nodes").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuit_tracer_qk.base.selection import EXPLAINED
from circuit_tracer_qk.host import graph as host

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.graph import ExplainedGraph


class Pruned(NamedTuple):
    """What is kept of a graph.

    Attributes:
        nodes: those kept.
        edges: those kept, rows are targets.
        cumulative: share of all influence that lies in nodes of at least a node's own.
        influence: of every node on the logits, by the graph's rule.
        size: sum of |edges| into every node.
    """

    nodes: Bool[Tensor, " n_nodes"]
    edges: Bool[Tensor, "n_nodes n_nodes"]
    cumulative: Float[Tensor, " n_nodes"]
    influence: Float[Tensor, " n_nodes"]
    size: Float[Tensor, " n_nodes"]


class ErrorShare(NamedTuple):
    """How much of the influence errors take, and where.

    Attributes:
        share: of the influence that ends at errors or tokens, what ends at errors.
        by_layer: (layer as nodes have it, its part of ``share``), the largest first.
    """

    share: float
    by_layer: list[tuple[int, float]]


def prune(graph: ExplainedGraph, node_threshold: float, edge_threshold: float) -> Pruned:
    """Keep what the graph's rule of selection finds influential.

    Args:
        graph: any kind.
        node_threshold, edge_threshold: share of influence kept, as in circuit-tracer.
    """
    size = graph.adjacency_matrix.abs().sum(1)
    without = _without_errors(graph)
    kept = host.prune(graph, node_threshold, edge_threshold, without)
    influence = host.node_influence(graph, without)
    if graph.select == EXPLAINED:
        return _with_errors(graph, kept, influence, size)
    return Pruned(*kept, influence, size)


def edge_influence(graph: ExplainedGraph) -> Float[Tensor, "n_nodes n_nodes"]:
    """What runs through each edge of the influence on the logits, by the graph's rule.

    An edge's share of all |edges| into its target, times the target's influence.
    """
    size = graph.adjacency_matrix.abs()
    influence = host.node_influence(graph, _without_errors(graph))
    return size * (influence / size.sum(1).clamp_min(1e-10))[:, None]


def _without_errors(graph: ExplainedGraph) -> Tensor | None:
    """The adjacency without errors as sources, where the graph's rule is explained influence."""
    if graph.select != EXPLAINED:
        return None
    without = graph.adjacency_matrix.clone()
    without[:, slice(*graph.first_indices()[:2])] = 0
    return without


def _with_errors(
    graph: ExplainedGraph, kept: host.PruneResult, influence: Tensor, size: Tensor
) -> Pruned:
    """The pruned graph without its errors, and the errors by their size."""
    whole, errors = graph.adjacency_matrix, slice(*graph.first_indices()[:2])
    nodes, edges, cumulative = kept
    per_size = influence / size.clamp_min(1e-10)  # influence of an edge of size 1 into each target
    of_errors = whole[:, errors].abs() * per_size[:, None]
    influence[errors] = of_errors.sum(0)

    features = slice(0, errors.start)
    likely = influence[features][nodes[features]]
    targets, sources = edges.nonzero(as_tuple=True)
    links = whole[targets, sources].abs() * per_size[targets]
    if len(likely) and len(links):
        edges[:, errors] = (of_errors >= links.min()) & (of_errors > 0)
        edges[:, errors] &= (influence[errors] >= likely.min()) & nodes[:, None]
        nodes[errors] = edges[:, errors].any(0)
    ranked = torch.cat([influence[features], influence[errors.stop : -len(graph.logit_targets)]])
    cumulative[errors] = _share_from(ranked, influence[errors])
    return Pruned(nodes, edges, cumulative, influence, size)


def _share_from(values: Float[Tensor, " n"], least: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """The share that the values of at least each of some sizes have of their sum."""
    ordered = values.sort().values
    below = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    at = torch.searchsorted(ordered, least)
    return 1 - below[at] / below[-1].clamp_min(1e-10)


def error_share(graph: ExplainedGraph) -> ErrorShare:
    """How much of the influence on the logits ends at errors, whatever the rule of selection.

    ``1 - share`` is circuit-tracer's replacement score.
    """
    influence = host.node_influence(graph).double()
    errors, tokens, logits, _ = graph.first_indices()
    total = float(influence[errors:logits].sum())
    if not total:
        return ErrorShare(0.0, [])
    by_slot = influence[errors:tokens].view(-1, graph.n_pos).sum(1) / total
    layers = [
        (slot + graph.first_error_layer, share) for slot, share in enumerate(by_slot.tolist())
    ]
    return ErrorShare(sum(by_slot.tolist()), sorted(layers, key=lambda layer: -layer[1]))
