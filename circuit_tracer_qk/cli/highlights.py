"""What the demo picks out of a graph: predictions, strongest edges, the heads that carried."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from circuit_tracer_qk.attribution.residual.graph import Edge, ResidualGraph

CANDIDATES = 64  # the strongest edges among which the page's first one is looked for


class StrongEdge(NamedTuple):
    """An edge and its influence, the share of what reaches the logits that runs through it."""

    source: int
    target: int
    influence: float
    edge: Edge


def predictions(graph: ResidualGraph, n: int = 5) -> list[tuple[int, float]]:
    """The ``n`` likeliest next tokens, (id, probability)."""
    probabilities = graph.record.heads.run.logits.softmax(0)
    top = probabilities.topk(min(n, len(probabilities)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def strongest_edges(
    graph: ResidualGraph, influence: Tensor, n: int, *, across: bool
) -> list[StrongEdge]:
    """The ``n`` edges of the largest influence, across positions or within one."""
    position = graph.positions
    crosses = position[:, None] != position[None]
    kept = influence * (crosses if across else ~crosses)
    top = kept.flatten().topk(min(n, int((kept > 0).sum())))
    width = len(position)
    return [
        StrongEdge(i % width, i // width, value, graph.edge(i % width, i // width))
        for i, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def source_position(graph: ResidualGraph, influence: Tensor) -> int | None:
    """Where the prediction may have been copied from, or what the last position hangs on most.

    Of the earlier positions that hold the likeliest next token (without one, of all but the
    first), the one whose edges into the last position have the largest influence. None if no edge
    reaches the last position from any of them.
    """
    earlier = graph.input_tokens[1:-1]
    said = earlier == predictions(graph, 1)[0][0]
    position = graph.positions
    last = influence[position == graph.n_pos - 1].sum(0)
    reached = last.new_zeros(graph.n_pos).index_add_(0, position, last)[1:-1]
    if bool(said.any()):
        reached = reached * said
    return 1 + int(reached.argmax()) if bool((reached > 0).any()) else None


def first_look(graph: ResidualGraph, influence: Tensor) -> dict[str, str]:
    """What the page should open at: the strongest feature that carried the answer, and its head.

    Returns:
        The page's parameters ``clickedId``, ``qkEdge`` and ``qk``; empty where no edge between
        features crosses to the last position from where the answer stands.
    """
    key = source_position(graph, influence)
    features = graph.active_features[graph.selected_features].tolist()
    node_ids = [f"{layer}_{feature}_{position}" for layer, position, feature in features]
    for source, target, _, edge in strongest_edges(graph, influence, CANDIDATES, across=True):
        if max(source, target) < len(node_ids) and (edge.query, edge.key) == (graph.n_pos - 1, key):
            head = int(edge.heads.total.abs().argmax())
            return {
                "clickedId": node_ids[target],
                "qkEdge": f"{node_ids[source]}__{node_ids[target]}",
                "qk": f"L{edge.layer}H{head}:q{edge.query}:k{edge.key}",
            }
    return {}


def first_transcoder_look(document: dict[str, Any]) -> dict[str, str]:
    """As :func:`first_look`, of a transcoder graph's file: the strongest edge that reaches the
    answer from another position, and the head that moved most of it from one to another.
    """
    nodes = {node["node_id"]: node for node in document["nodes"]}
    most = document["metadata"]["node_threshold"]
    answer = next((i for i, node in nodes.items() if node.get("is_target_logit")), None)

    def reaches(link: dict[str, Any]) -> bool:
        source = nodes[link["source"]]
        return (
            link["target"] == answer
            and source["ctx_idx"] != nodes[answer]["ctx_idx"]
            and source["feature_type"] != "mlp reconstruction error"
            and (source["influence"] or 0) <= most  # the page shows no others
        )

    links = [link for link in document["links"] if reaches(link)]
    if answer is None or not links:
        return {}
    link = max(links, key=lambda link: abs(link["weight"]))
    moved = [
        (abs(part), f"L{block['layer']}H{head}:q{pairs[0][0]}:k{pairs[0][1]}")
        for block in link["head_loadings"]
        for head, part, pairs in block["heads"]
        if pairs and pairs[0][0] != pairs[0][1]
    ]
    look = {"clickedId": answer, "qkEdge": f"{link['source']}__{link['target']}"}
    return look | ({"qk": max(moved)[1]} if moved else {})
