"""The links of a pruned graph as every kind of graph gives them, and the tables that they want."""

from __future__ import annotations

from typing import NamedTuple

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
    """

    nodes: dict[int, host.Node]
    sources: Tensor
    targets: Tensor
    weights: Tensor


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
