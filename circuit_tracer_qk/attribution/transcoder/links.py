"""Links of transcoder graphs: every block on the way by its heads, and the heads that delivered."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.links import (
    HEADS_EXPLAINED,
    Kept,
    Links,
    largest_places,
    required_places,
)
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.transcoder.cuts import Pairs, Splits
from circuit_tracer_qk.base.json_text import Encoded, encode, rest, rounded_all

DELIVERED = 8  # heads listed as having delivered an edge, or more while the file stays small:
DELIVERED_IN_ALL = 500_000
NOISE = 1e-6  # of what a part is the difference of: float32 rounding, which is no part
NOTHING = 1e-8  # of the sum of |part|: too little to list


def transcoder_links(splits: Splits, kept: Kept, positions: Tensor) -> Links:
    """The links with what carried them past every block, and the tables that they want.

    Args:
        splits: of the links kept, with the pairs of positions of the largest heads.
        kept: what pruning left of the graph.
        positions: (n_nodes,) token position of every node.
    """
    assert splits.pairs is not None
    pairs = Pairs(*(part.cpu() for part in splits.pairs))
    splits = Splits(*(part.cpu() for part in splits[:-1]), pairs=None)
    pairs = _in_order(splits, pairs)
    data = Encoded(encode(_documents(kept, splits, pairs)))
    return Links(data, *_places(positions.cpu(), kept, splits, pairs))


def _in_order(splits: Splits, pairs: Pairs) -> Pairs:
    """The listed heads by edge, block and |part|."""
    part = splits.through[pairs.edge, pairs.layer, pairs.head]
    order = part.abs().argsort(descending=True)
    code = pairs.edge[order] * splits.through.shape[1] + pairs.layer[order]
    return Pairs(*(field[order[code.argsort(stable=True)]] for field in pairs))


def _documents(kept: Kept, splits: Splits, pairs: Pairs) -> list[dict[str, Any]]:
    """Links.

    Identities, as written: weight = bypass + the listed heads' parts + rest at every block; and
    attention_free + the values in delivered_by, whose last entry is [null, null, value] where some
    were left out (or where the host rounded, in half precision).
    """
    columns = zip(
        kept.sources.tolist(),
        kept.targets.tolist(),
        rounded_all(kept.weights),
        rounded_all(kept.influence),
        _blocks(kept, splits, pairs),
        _delivered(splits),
        rounded_all(splits.attention_free),
        strict=True,
    )
    links = []
    for source, target, weight, influence, cuts, deliveries, free in columns:
        for block in cuts:
            block["rest"] = rest(weight, [block["bypass"], *(h[1] for h in block["heads"])])
        values = [value for *_, value in deliveries]
        left = rest(weight, [free, *values])
        if abs(left) > 10 * NOISE * (abs(weight) + sum(map(abs, values))):
            deliveries.append([None, None, left])
        links.append(
            {
                "source": kept.nodes[source].node_id,
                "target": kept.nodes[target].node_id,
                "weight": weight,
                "influence": influence,
                "head_loadings": cuts,
                "delivered_by": deliveries,
                "attention_free": free,
            }
        )
    return links


def _blocks(kept: Kept, splits: Splits, pairs: Pairs) -> list[list[dict[str, Any]]]:
    """By link, every block between its ends with its listed heads and its bypass."""
    through = splits.through.double()
    weights = splits.weight.double()[:, None]
    bypass = weights - through.sum(2)
    size = through.abs().sum(2) + weights.abs()
    bypass = torch.where(bypass.abs() < NOISE * size, 0.0, bypass)
    heads = _heads(through[pairs.edge, pairs.layer, pairs.head], pairs)
    # pairs and blocks are both in the order of links, then of blocks
    link, layer = splits.between.nonzero(as_tuple=True)
    n_listed = torch.zeros_like(splits.between, dtype=torch.long)
    listed = torch.ones_like(pairs.edge)
    n_listed.index_put_((pairs.edge, pairs.layer), listed, accumulate=True)
    ends = n_listed[link, layer].cumsum(0).tolist()
    blocks: list[list[dict[str, Any]]] = [[] for _ in kept.sources]
    start = 0
    values = rounded_all(bypass[link, layer])
    for i, block, value, end in zip(link.tolist(), layer.tolist(), values, ends, strict=True):
        blocks[i].append({"layer": block, "heads": heads[start:end], "bypass": value})
        start = end
    return blocks


def _heads(parts: Tensor, pairs: Pairs) -> list[list[Any]]:
    """[head, part, [[query, key, value], ...]] of every listed head."""
    n = pairs.value.shape[1]
    columns = [pairs.query.flatten().tolist(), pairs.key.flatten().tolist()]
    columns.append(rounded_all(pairs.value.flatten()))
    triples = [*map(list, zip(*columns, strict=True))]
    listed = pairs.value.abs() > NOTHING * parts.abs()[:, None]
    ends = (n * torch.arange(len(parts)) + listed.sum(1)).tolist()
    heads = zip(pairs.head.tolist(), rounded_all(parts), ends, strict=True)
    return [[head, part, triples[i * n : end]] for i, (head, part, end) in enumerate(heads)]


def _delivered(splits: Splits) -> list[list[list[int | float | None]]]:
    """By link, [layer, head, value] by |value|, the largest of them."""
    last = splits.last.flatten(1)
    n_links, n_heads = len(last), splits.last.shape[2]
    most = max(DELIVERED, DELIVERED_IN_ALL // max(n_links, 1))
    delivered = []
    for part in last.split(1 << 14):
        order = part.abs().argsort(dim=1, descending=True, stable=True)[:, :most]
        values = part.gather(1, order)
        n_listed = (values.abs() > NOTHING * part.abs().sum(1, keepdim=True)).sum(1).tolist()
        columns = [(order // n_heads).flatten().tolist(), (order % n_heads).flatten().tolist()]
        columns.append(rounded_all(values.flatten()))
        entries = [*map(list, zip(*columns, strict=True))]
        width = order.shape[1]
        delivered += [entries[i * width : i * width + n] for i, n in enumerate(n_listed)]
    return delivered


def _places(
    position: Tensor, kept: Kept, splits: Splits, pairs: Pairs
) -> tuple[dict[int, list[Place]], list[Place]]:
    """Which tables are wanted: heads at the positions between which they carried most.

    Returns:
        By target, the places of its strongest cross-position links' largest heads of any block;
        and every place listed for a cross-position link, by the largest |value| there.
    """
    across = position[kept.sources.cpu()] != position[kept.targets.cpu()]
    part = splits.through[pairs.edge, pairs.layer, pairs.head].abs()
    value = pairs.value.abs()
    rows = (across[pairs.edge] & (value[:, 0] > 0)).nonzero().flatten()
    rows = rows[part[rows].argsort(descending=True, stable=True)]

    strength = kept.weights.abs()
    by_link: dict[int, list[int]] = defaultdict(list)  # a link's largest heads
    for row, link in zip(rows.tolist(), pairs.edge[rows].tolist(), strict=True):
        if len(by_link[link]) < HEADS_EXPLAINED:
            by_link[link].append(row)
    links = sorted(by_link, key=lambda link: -float(strength[link]))
    largest = torch.stack([pairs.layer, pairs.head, pairs.query[:, 0], pairs.key[:, 0]], 1).tolist()
    required = required_places(
        links, kept.targets.tolist(), lambda link: [Place(*largest[row]) for row in by_link[link]]
    )
    heads = pairs.layer[rows, None], pairs.head[rows, None]
    return required, largest_places(*heads, pairs.query[rows], pairs.key[rows], value[rows])
