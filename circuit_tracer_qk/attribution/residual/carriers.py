"""Which heads to steer: those that carried a graph's edges between two tokens, or into a node.

Loadings of different targets have different scales, so a head counts by influence: the share of
what reaches the logits that ran through an edge, times the head's part of that edge (paper,
"Induction": "a set of heads with high head loadings between the two tokens").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.head import Head
from circuit_tracer_qk.attribution.pruning import edge_influence
from circuit_tracer_qk.attribution.residual.graph import ResidualGraph
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.rules import check, finite, whole


class Carrier(NamedTuple):
    """A head that carried edges.

    Attributes:
        influence: the edges' influence, each times |the head's part| / |the edge|: where heads
            work against one another it exceeds what arrives.
        along: the share of ``influence`` in which the head's part has the sign of the edge.
        attention: the head's pattern, summed over the pairs of positions of these edges.

    >>> ctqk.carriers(graph, query=14, key=6)[0]
    Carrier(L1H2: influence 0.127, along 0.85, attention 1.000)
    """

    layer: int
    head: int
    influence: float
    along: float
    attention: float

    def __repr__(self) -> str:
        return (
            f"Carrier(L{self.layer}H{self.head}: influence {self.influence:.3f}, along "
            f"{self.along:.2f}, attention {self.attention:.3f})"
        )


def carriers(
    graph: ResidualGraph,
    influence: Tensor | None = None,
    *,
    query: int | None = None,
    key: int | None = None,
    node: int | None = None,
) -> list[Carrier]:
    """The heads that carried edges across positions, largest influence first (paper, "Head
    loadings").

    Args:
        graph: a residual graph.
        influence: (n_nodes, n_nodes) of :func:`circuit_tracer_qk.attribution.pruning.edge_influence`,
            if known.
        query, key: only edges into this position, from this position; negative ones from the end.
        node: only edges into this node (index in adjacency order).

    Raises:
        UserError: nothing to choose by, an index that does not exist, or a graph of transcoders.

    >>> [(c.layer, c.head, round(c.influence, 2)) for c in ctqk.carriers(graph, query=14, key=6)[:2]]
    [(1, 2, 0.13), (1, 7, 0.12)]
    """
    if not isinstance(graph, ResidualGraph):
        raise UserError(
            "heads are chosen from residual graphs, whose edges cross one block: attribute with "
            "residual dictionaries."
        )
    query = _index("query position", query, graph.n_pos, negative=True)
    key = _index("key position", key, graph.n_pos, negative=True)
    node = _index("node", node, len(graph.adjacency_matrix), negative=False)
    if query is None and key is None and node is None:
        raise UserError("name a query or key position, or a node, whose edges' heads are wanted.")
    influence = edge_influence(graph) if influence is None else influence
    position = graph.positions
    wanted = influence > 0
    if query is None or query != key:  # a position's own edges are not attention's alone
        wanted = wanted & (position[:, None] != position[None])
    if query is not None:
        wanted = wanted & (position[:, None] == query)
    if key is not None:
        wanted = wanted & (position[None] == key)
    if node is not None:
        wanted = wanted & (torch.arange(len(wanted), device=wanted.device) == node)[:, None]
    target, source = wanted.nonzero(as_tuple=True)
    edges = graph.edges(source, target)
    weight = graph.adjacency_matrix[target, source].to(edges.parts.total)[:, None]
    through = influence[target, source].to(weight)[:, None] * edges.parts.total / weight
    out = []
    # a logit that reads its own checkpoint crosses no block: layer -1
    for layer in edges.layer[edges.layer >= 0].unique().tolist():
        crossing = edges.layer == layer
        sizes, along = through[crossing].abs().sum(0), through[crossing].clamp(min=0).sum(0)
        # each pair of positions once
        pairs = (edges.query[crossing] * graph.n_pos + edges.key[crossing]).unique()
        pattern = graph.run.pattern[layer][:, pairs // graph.n_pos, pairs % graph.n_pos].sum(1)
        for head, size in enumerate(sizes.tolist()):
            if size > 0:
                share = float(along[head]) / size
                out.append(Carrier(layer, head, size, share, float(pattern[head])))
    return sorted(out, key=lambda carrier: -carrier.influence)


def select_heads(
    graph: ResidualGraph,
    *,
    query: int | None = None,
    key: int | None = None,
    node: int | None = None,
    count: int | None = None,
    share: float | None = None,
) -> list[Head]:
    """The heads that carried most of a graph's edges, for :func:`circuit_tracer_qk.steer`.

    Args:
        graph: a residual graph.
        query, key: edges into this position, from this position; negative ones from the end.
        node: edges into this node.
        count: how many heads; or
        share: as many as carry this share of the influence.

    Returns:
        (layer, head), largest first; fewer than ``count`` if no others carried anything.

    Raises:
        UserError: both or neither of count and share, a number out of range, or what
            :func:`carriers` refuses.

    >>> ctqk.select_heads(graph, query=14, key=6, count=3)
    [(1, 2), (1, 7), (1, 6)]
    """
    if (count is None) == (share is None):
        raise UserError("give either count= (how many heads) or share= (of the influence).")
    check(count=count)
    if share is not None and not 0 < (finite(share) or 0) <= 1:
        raise UserError(f"share is {share!r}: it must be above 0 and at most 1.")
    ranked = carriers(graph, query=query, key=key, node=node)
    if count is not None:
        return [(c.layer, c.head) for c in ranked[:count]]
    chosen: list[Head] = []
    left = (share or 0.0) * sum(c.influence for c in ranked) * (1 - 1e-9)
    for carrier in ranked:
        if left <= 0:
            break
        chosen.append((carrier.layer, carrier.head))
        left -= carrier.influence
    return chosen


def _index(name: str, value: int | None, limit: int, *, negative: bool) -> int | None:
    """An index that exists, counted from the start."""
    if value is None:
        return None
    low = -limit if negative else 0
    number = whole(value)
    if number is None or not low <= number < limit:
        raise UserError(f"{name} {value} is out of range: it must be from {low} to {limit - 1}.")
    return number % limit
