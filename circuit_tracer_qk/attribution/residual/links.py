"""Links of residual graphs: residual part, MLP part and the heads of the one block crossed."""

from __future__ import annotations

import torch

from circuit_tracer_qk.attribution.links import (
    HEADS_EXPLAINED,
    Kept,
    Links,
    largest_places,
    required_places,
)
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual.edges import EdgeParts
from circuit_tracer_qk.base.json_text import (
    Encoded,
    not_finite,
    rest,
    rounded_all,
    to_bytes,
    to_text,
)

HEADS_LISTED, SHARE_LISTED = 8, 0.98  # a link's heads: the largest, up to this share of sum |total|

_LINK = (
    '{"source":%s,"target":%s,"weight":%.7g,"influence":%.7g,"layer":%s,"residual":%.7g,"mlp":%.7g,'
    '"head_loadings":[HEADS],"head_loadings_rest":%.12g}'
)
_HEAD = "[%d,%.7g,%.7g,%.7g]"  # head, total, direct, pattern


def residual_links(edges: EdgeParts, kept: Kept) -> Links:
    """The links with what carried them, and the tables that they want.

    Args:
        edges: the parts of the links kept.
        kept: what pruning left of the graph.

    Raises:
        UserError: a link holds NaN or infinite numbers.
    """
    return Links(_links_json(edges, kept), *_places(edges, kept))


def _links_json(edges: EdgeParts, kept: Kept) -> Encoded:
    """Links with what carried them.

    Identity: weight = residual + mlp + the listed heads' totals + head_loadings_rest, as written.
    """
    total = edges.parts.total.double().cpu()
    size, order = total.abs().sort(dim=1, descending=True, stable=True)
    reached = size.cumsum(1)
    n_listed = (reached < SHARE_LISTED * reached[:, -1:]).sum(1) + 1
    n_listed = n_listed.clamp(HEADS_EXPLAINED, HEADS_LISTED).minimum((size > 0).sum(1))
    order = order[:, :HEADS_LISTED]
    head_parts = total, edges.parts.direct.cpu(), edges.parts.pattern.cpu()
    by_head = torch.stack([order.double(), *(part.gather(1, order) for part in head_parts)], 2)
    sums = torch.stack([kept.weights, edges.parts.residual.cpu(), edges.parts.mlp.cpu()], 1)
    if not bool(by_head.isfinite().all() and sums.isfinite().all()):
        raise not_finite()
    columns = zip(
        kept.sources.tolist(),
        kept.targets.tolist(),
        edges.layer.tolist(),
        rounded_all(sums),
        kept.influence.tolist(),
        rounded_all(by_head[:, :, 1]),
        by_head.flatten(1).tolist(),
        n_listed.tolist(),
        strict=True,
    )
    ids = {i: to_text(node.node_id) for i, node in kept.nodes.items()}
    most = by_head.shape[1]
    texts = [_LINK.replace("HEADS", ",".join([_HEAD] * n)) for n in range(most + 1)]
    links = []
    for source, target, layer, (weight, *block_parts), influence, totals, heads, n in columns:
        missing = rest(weight, (*block_parts, *totals[:n]))
        block = "null" if layer < 0 else layer
        numbers = weight, influence, block, *block_parts, *heads[: 4 * n], missing
        links.append(texts[n] % (ids[source], ids[target], *numbers))
    return Encoded(to_bytes(f"[{','.join(links)}]"))


def _places(edges: EdgeParts, kept: Kept) -> tuple[dict[int, list[Place]], list[Place]]:
    """Which tables are wanted.

    Returns:
        By target, the places of its strongest links' largest heads; and every place that a kept
        cross-position link's head carried over, by its largest |total|.
    """
    layer, query, key = edges.layer, edges.query, edges.key
    size = edges.parts.total.abs()
    n_heads = size.shape[1]
    crossing = ((query != key) & (layer >= 0)).nonzero().flatten()
    strongest = crossing[kept.weights.to(size.device)[crossing].abs().argsort(descending=True)]
    largest = size.topk(min(HEADS_EXPLAINED, n_heads), dim=1)
    heads, sizes = largest.indices.tolist(), largest.values.tolist()
    where = list(zip(layer.tolist(), query.tolist(), key.tolist(), strict=True))

    def places_of(link: int) -> list[Place]:
        at, *positions = where[link]
        sized = zip(heads[link], sizes[link], strict=True)
        return [Place(at, head, *positions) for head, head_size in sized if head_size > 0]

    required = required_places(strongest.tolist(), kept.targets.tolist(), places_of)
    head = torch.arange(n_heads, device=size.device)
    ends = query[crossing, None], key[crossing, None]
    return required, largest_places(layer[crossing, None], head, *ends, size[crossing])
