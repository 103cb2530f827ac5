"""The links of a pruned graph as every kind of graph gives them, and the tables that they want."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.base.json_text import Encoded
from circuit_tracer_qk.host import graph as host

LINKS_EXPLAINED, HEADS_EXPLAINED = 3, 2  # every node's strongest links, their largest heads


class Kept(NamedTuple):
    """What pruning left of a graph.

    Attributes:
        nodes: by index in adjacency order.
        sources, targets: (n_links,) node indices, links in the adjacency's row order.
        weights: (n_links,) float64.
        influence: (n_links,) float64, the influence on the logits that runs through each: its
            share of all |edges| into its target, times the target's influence.
        error_share: (n_nodes,) of all |edges| into each node of the whole graph, errors' share.
    """

    nodes: dict[int, host.Node]
    sources: Tensor
    targets: Tensor
    weights: Tensor
    influence: Tensor
    error_share: Tensor


class Links(NamedTuple):
    """Links as they are written, and which tables they want.

    Attributes:
        data: a list in JSON, in the order of the links kept.
        required: by target node, the places of its strongest cross-position links' largest heads.
        others: every place that a cross-position link's head carried over, largest part first.
    """

    data: Encoded
    required: dict[int, list[Place]]
    others: list[Place]


def required_places(
    links: Iterable[int], targets: Sequence[int], places_of: Callable[[int], list[Place]]
) -> dict[int, list[Place]]:
    """By target, the places of its strongest links.

    Args:
        links: cross-position links, the strongest first.
        targets: the target of every link.
        places_of: the places of a link's largest heads.
    """
    by_target: dict[int, list[list[Place]]] = defaultdict(list)
    for link in links:
        if len(by_target[targets[link]]) < LINKS_EXPLAINED:
            by_target[targets[link]].append(places_of(link))
    required = {target: list(dict.fromkeys(chain(*each))) for target, each in by_target.items()}
    return {target: places for target, places in required.items() if places}


def largest_places(
    layer: Tensor, head: Tensor, query: Tensor, key: Tensor, size: Tensor
) -> list[Place]:
    """Every place once, by the largest size that it has; without those of size 0.

    Args:
        layer, head, query, key: the places, in shapes that fit ``size``; key <= query.
        size: how large each is.
    """
    n_heads, n_pos = (1 + int(part.max()) if part.numel() else 1 for part in (head, query))
    # a place as one number, so that the largest size of each is one reduction
    code = ((layer * n_heads + head) * n_pos + query) * n_pos + key
    codes, at = code.flatten().unique(return_inverse=True)
    best = size.new_zeros(len(codes)).scatter_reduce(0, at, size.flatten(), "amax")
    codes = codes[best.argsort(descending=True, stable=True)[: int((best > 0).sum())]]
    of_head, of_query = codes // n_pos**2, codes // n_pos
    parts = of_head // n_heads, of_head % n_heads, of_query % n_pos, codes % n_pos
    return [Place(*place) for place in torch.stack(parts, 1).tolist()]
