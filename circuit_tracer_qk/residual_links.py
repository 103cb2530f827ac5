"""Links of residual graphs: residual part, MLP part and the heads of the one block crossed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from circuit_tracer_qk.graph import EdgeParts, ResidualGraph
from circuit_tracer_qk.pruned import Kept, Links
from circuit_tracer_qk.qk import Place
from circuit_tracer_qk.written import rest, rounded_all

HEADS_LISTED, SHARE_LISTED = 8, 0.98  # a link's heads: the largest, up to this share of sum |total|
LINKS_EXPLAINED, HEADS_EXPLAINED = 3, 2  # every node's strongest links, their largest heads


def residual_links(graph: ResidualGraph, kept: Kept) -> Links:
    """The links with what carried them, and the tables that they want."""
    found = graph.edges(kept.sources, kept.targets)
    return Links(_documents(kept, found), *_places(kept, found))


def _documents(kept: Kept, found: EdgeParts) -> list[dict[str, Any]]:
    """Links with what carried them.

    Identity: weight = residual + mlp + the listed heads' totals + head_loadings_rest, as written.
    """
    total = found.parts.total.double().cpu()
    size, order = total.abs().sort(dim=1, descending=True, stable=True)
    reached = size.cumsum(1)
    n_listed = (reached < SHARE_LISTED * reached[:, -1:]).sum(1) + 1
    n_listed = n_listed.clamp(HEADS_EXPLAINED, HEADS_LISTED).minimum((size > 0).sum(1))
    order = order[:, :HEADS_LISTED]
    of_head = total, found.parts.direct.cpu(), found.parts.pattern.cpu()
    by_head = (rounded_all(part.gather(1, order)) for part in of_head)
    columns = zip(
        kept.sources.tolist(),
        kept.targets.tolist(),
        rounded_all(kept.weights),
        found.layer.tolist(),
        rounded_all(found.parts.residual),
        rounded_all(found.parts.mlp),
        n_listed.tolist(),
        order.tolist(),
        *by_head,
        strict=True,
    )
    ids = {i: node.node_id for i, node in kept.nodes.items()}
    links = []
    for source, target, weight, layer, residual, mlp, n, *carried in columns:
        loadings = list(zip(*carried, strict=True))[:n]
        links.append(
            {
                "source": ids[source],
                "target": ids[target],
                "weight": weight,
                "layer": None if layer < 0 else layer,
                "residual": residual,
                "mlp": mlp,
                "head_loadings": loadings,
                "head_loadings_rest": rest(weight, [residual, mlp, *(t for _, t, *_ in loadings)]),
            }
        )
    return links


def _places(kept: Kept, found: EdgeParts) -> tuple[dict[int, list[Place]], list[Place]]:
    """Which tables are wanted.

    Returns:
        By target, the places of its strongest links' largest heads; and every place that a kept
        cross-position link's head carried over, by its largest |total|.
    """
    layer, query, key = found.layer, found.query, found.key
    size = found.parts.total.abs()
    n_heads = size.shape[1]
    crossing = ((query != key) & (layer >= 0)).nonzero().flatten()
    strongest = crossing[kept.weights.to(size.device)[crossing].abs().argsort(descending=True)]
    largest = size.topk(min(HEADS_EXPLAINED, n_heads), dim=1)
    heads, sizes = largest.indices.tolist(), largest.values.tolist()
    where = list(zip(layer.tolist(), query.tolist(), key.tolist(), strict=True))
    targets = kept.targets.tolist()

    links: dict[int, list[int]] = defaultdict(list)
    for link in strongest.tolist():
        if len(links[targets[link]]) < LINKS_EXPLAINED:
            links[targets[link]].append(link)
    required: dict[int, list[Place]] = {}
    for target, some in links.items():
        places = []
        for link in some:
            at_layer, at_query, at_key = where[link]
            for head, head_size in zip(heads[link], sizes[link], strict=True):
                if head_size > 0:
                    places.append(Place(at_layer, head, at_query, at_key))
        if places:
            required[target] = list(dict.fromkeys(places))

    # every (link, head) as one number, so that the largest |total| of each place is one reduction
    n_pos = int(query.max()) + 1 if len(query) else 1
    head = torch.arange(n_heads, device=size.device)
    flat = (layer[crossing, None] * n_heads + head) * n_pos + query[crossing, None]
    flat = (flat * n_pos + key[crossing, None]).flatten()
    codes, at = flat.unique(return_inverse=True)
    best = size.new_zeros(len(codes)).scatter_reduce(0, at, size[crossing].flatten(), "amax")
    codes = codes[best.argsort(descending=True, stable=True)[: int((best > 0).sum())]]
    others = []
    for code in codes.tolist():
        code, at_key = divmod(code, n_pos)
        code, at_query = divmod(code, n_pos)
        at_layer, at_head = divmod(code, n_heads)
        others.append(Place(at_layer, at_head, at_query, at_key))
    return required, others
