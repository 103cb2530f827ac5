"""The residual attribution graph: a ``circuit_tracer.Graph`` that knows its heads.

An edge crosses exactly one block, so every part of it can be named (attribution/README.md, section 3), and any
head's score can be taken apart at the block's checkpoint (section 2).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.batches import Batch
from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.links import Kept, Links
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual.batches import ResidualBatches
from circuit_tracer_qk.attribution.residual.edges import (
    BlockEdges,
    EdgeParts,
    Parts,
    edge_parts,
    runs_of,
)
from circuit_tracer_qk.attribution.residual.links import residual_links
from circuit_tracer_qk.attribution.residual.nodes import Nodes
from circuit_tracer_qk.attribution.residual.qk import QK, TopTerms
from circuit_tracer_qk.attribution.residual.store import Record, load_record, record_bytes
from circuit_tracer_qk.attribution.residual.topk_loadings import strongest
from circuit_tracer_qk.attribution.text import heads_text, shapes
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import beside, companion_of, write_pair
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.base.rules import check
from circuit_tracer_qk.host import graph as host


class HeadLoadings(NamedTuple):
    """How much each head of the block carried an edge, each (n_heads,).

    Units are those of the edge (paper, "Head loadings"; attribution/README.md, section 3).

    Attributes:
        total: the head's part of the edge; its write also passes through the block's MLP.
        direct: the paper's printed formula, which leaves that path out.
        pattern: attention from the target's position to the source's.

    >>> heads = graph.edge(source=61, target=313).heads
    >>> int(heads.total.argmax()), round(float(heads.total[7]), -1)
    (7, 7000.0)
    """

    total: Float[Tensor, " n_heads"]
    direct: Float[Tensor, " n_heads"]
    pattern: Float[Tensor, " n_heads"]


@dataclass(frozen=True, eq=False, repr=False)
class Edge:
    """One edge and what carried it. ``weight == residual + mlp + heads.total.sum()``.

    An edge into a feature is the source's part of the residual stream along the gradient
    ``activation * decoder vector`` of the target; into a logit, along the logit's direction.

    Attributes:
        weight: effect of the source on the target, attention and norms frozen.
        residual: part through the residual stream (same position only).
        mlp: part through the block's MLP alone (same position only).
        layer: the block crossed; None where a logit reads its own checkpoint.
        query, key: positions of the target and of the source.
        heads: what each head of the block carried.

    >>> edge = graph.edge(source=61, target=313)
    >>> edge.layer, edge.query, edge.key, edge.residual
    (1, 14, 6, 0.0)
    """

    weight: float
    residual: float
    mlp: float
    layer: int | None
    query: int
    key: int
    heads: HeadLoadings

    def __repr__(self) -> str:
        if self.layer is None:
            return f"Edge({self.weight:+.4f}, at position {self.query}, crosses no block)"
        return (
            f"Edge({self.weight:+.4f} across block {self.layer}, position {self.key} to "
            f"{self.query}: residual {self.residual:+.4f}, mlp {self.mlp:+.4f}, "
            f"{heads_text(self.heads.total)})"
        )


class StrongestLoadings(NamedTuple):
    """The largest head loadings of some targets: which heads carried what from where.

    Attributes:
        layer: (n_targets,) the block crossed.
        loading: (n_targets, n) head loadings (total), largest by absolute value first; 0 beyond
            the last.
        head, key: (n_targets, n) the head and the source's position; -1 beyond the last.
        source: (n_targets, n) the source's node; -1 where it is none of the graph: decoder biases,
            learned positions, features that the graph left out.
        exact: (n_targets,) no loading left out is larger than one listed; False only where a
            budget cut the search.
        share: (n_targets,) the listed have at least this share of the target's sum of |loadings|.
        skipped: share of all the targets' loadings that were not computed.

    >>> best = graph.strongest([313], n=2)
    >>> best.head.tolist(), best.key.tolist(), best.source.tolist(), bool(best.exact)
    ([[7, 7]], [[6, 6]], [[61, -1]], True)
    """

    layer: Int[Tensor, " n_targets"]
    loading: Float[Tensor, "n_targets n"]
    head: Int[Tensor, "n_targets n"]
    key: Int[Tensor, "n_targets n"]
    source: Int[Tensor, "n_targets n"]
    exact: Bool[Tensor, " n_targets"]
    share: Float[Tensor, " n_targets"]
    skipped: float

    __repr__ = shapes


class ResidualGraph(ExplainedGraph):
    """A ``circuit_tracer.Graph`` between residual-stream features of neighbouring checkpoints.

    Nodes, their order and the adjacency matrix are circuit-tracer's (rows are targets), so its
    pruning and scores work unchanged. ``active_features[:, 0]`` is the checkpoint minus one.
    :func:`circuit_tracer_qk.attribute` makes one from a prompt, :func:`load_graph` brings one back.

    Args:
        record: what explains edges and scores.
        **arguments: of ``circuit_tracer.Graph``.

    Attributes:
        bias_edges: (n_targets, n_pos) by feature or logit, and position: edges from ``b_dec``, which
            has no node of its own.
        position_edges: the same from learned positions; None without them.

    >>> graph
    ResidualGraph (residual) of 15 tokens
      prompt    '<bos>I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt'
      features  680 of 680 active ones
      edges     53268 between 756 nodes
      logits    1: ' Sally' 0.998
    """

    kind = "residual"
    writes_examples = True

    def __init__(self, record: Record, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.record = record
        self.token_strings = record.token_strings
        self.dictionary_folder = record.dictionary_folder
        self.neuronpedia = record.neuronpedia
        # error slot 0 stands for checkpoint 1, or 0 in resid_pre sets; a node's layer is one less
        self.first_error_layer = -1 if record.resid_pre else 0
        self.feature_hook = "resid_pre" if record.resid_pre else None
        self.select = record.select
        self.bias_edges, self.position_edges = record.bias_edges, record.position_edges

    @cached_property
    def scores(self) -> QK:
        return QK(self.record.parts, self.record.heads, self.record.names)

    @cached_property
    def _nodes(self) -> Nodes:
        """What the nodes stand for."""
        return Nodes(self)

    def label(self, checkpoint: int, feature: int) -> str:
        return self.record.names(checkpoint, feature)

    def to_pt(self, path: str | Path) -> None:
        """Save the graph, and beside it what explains its edges and scores.

        The ``.pt`` stays loadable by circuit-tracer; :func:`circuit_tracer_qk.load_graph` brings
        everything back.

        Raises:
            UserError: a file that cannot be written.

        >>> graph.to_pt(f"{tmp}/aunt.pt")
        >>> ctqk.load_graph(f"{tmp}/aunt.pt").n_features
        680
        """
        stock = io.BytesIO()
        host.save_stock(self, stock)
        record = record_bytes(self.record, host.graph_digest(self))

        def write(companion: Path) -> memoryview:
            companion.write_bytes(record)
            return stock.getbuffer()

        write_pair(Path(path), beside(path), write)

    def batches(self, places: Iterable[Place]) -> Iterator[Batch]:
        return ResidualBatches(self.scores).batches(places)

    def links(self, kept: Kept) -> Links:
        return residual_links(self.edges(kept.sources, kept.targets), kept)

    def qk_top(self, layer: int, head: int, query: int, n: int = 50) -> TopTerms:
        """The ``n`` largest terms for every visible key of a query, in one product.

        Raises:
            UserError: an index out of range.

        >>> top = graph.qk_top(layer=1, head=2, query=14, n=5)
        >>> tuple(top.values.shape), round(float(top.values[6, 0]), 1)
        ((15, 5), 22.5)
        """
        return self.scores.top(layer, head, query, n)

    def qk_tops(
        self, places: Iterable[Sequence[int]], n: int = 50
    ) -> Iterator[tuple[tuple[int, int, int], TopTerms]]:
        """The ``n`` largest terms of many (layer, head, query, key), by (layer, head, query).

        Yields:
            (layer, head, query) and the terms at those of its keys that were asked for.

        Raises:
            UserError: an index out of range, or key > query.

        >>> [(place, top)] = graph.qk_tops([(1, 2, 14, 5), (1, 2, 14, 6)], n=5)
        >>> place, top.keys.tolist()
        ((1, 2, 14), [5, 6])
        """
        return self.scores.tops(places, n)

    def edge(self, source: int, target: int) -> Edge:
        """One edge and what carried it (paper, "Head loadings").

        Args:
            source, target: node indices in adjacency order.

        Raises:
            UserError: a node out of range, or two that no edge can join.

        >>> edge = graph.edge(source=61, target=313)
        >>> parts = edge.residual + edge.mlp + float(edge.heads.total.sum())
        >>> edge.weight == parts
        True
        """
        layer, query, key, parts = self.edges([source], [target])
        residual, mlp = float(parts.residual), float(parts.mlp)
        heads = HeadLoadings(parts.total[0], parts.direct[0], parts.pattern[0])
        weight = residual + mlp + float(heads.total.sum())
        block = None if int(layer) < 0 else int(layer)
        return Edge(weight, residual, mlp, block, int(query), int(key), heads)

    @exactly
    def edges(self, sources: Sequence[int] | Tensor, targets: Sequence[int] | Tensor) -> EdgeParts:
        """What carried each of many edges, batched by block.

        Args:
            sources, targets: (n,) node indices in adjacency order, pairwise.

        Raises:
            UserError: a node out of range, or two that no edge can join.

        >>> edges = graph.edges(sources=[61, 68], targets=[313, 314])
        >>> edges.layer.tolist(), tuple(edges.parts.total.shape)
        ([1, 1], (2, 8))
        """
        heads, nodes = self.record.heads, self._nodes
        target, source = self.target_nodes(targets), self.source_nodes(sources)
        own, writes = nodes.read_own(target), nodes.checkpoint[target]
        read = torch.where(own, writes, writes - 1)  # the checkpoint whose components are sources
        for i in (~nodes.are_components(source, read)).nonzero().flatten().tolist():
            raise UserError(
                f"no edge can join node {int(source[i])} to node {int(target[i])}: the target's "
                f"sources are the components of checkpoint {int(read[i])}, and this source has "
                f"none there (it stands at checkpoint {int(nodes.checkpoint[source[i]])})."
            )
        layer = torch.where(own, -1, read)
        n, n_heads = len(source), heads.blocks[0].n_heads
        empty = heads.run.residual.new_zeros
        out = Parts(empty(n), empty(n), *(empty(n, n_heads) for _ in range(3)))
        for block in layer.unique().tolist():
            of_block = (layer == block).nonzero().squeeze(1)
            distinct_targets, t = target[of_block].unique(return_inverse=True)
            distinct_sources, s = source[of_block].unique(return_inverse=True)
            checkpoint = block if block >= 0 else heads.run.n_layers
            vectors = nodes.vectors(distinct_sources, checkpoint)
            positions, rows = nodes.position[distinct_sources], nodes.targets(distinct_targets)
            if block < 0:
                same = (rows.positions[t] == positions[s]).to(vectors.dtype)
                out.residual[of_block] = same * (rows.y[t] * vectors[s]).sum(1)
                continue
            parts_here = edge_parts(heads, block, rows, t, vectors, positions, s)
            for whole, part in zip(out, parts_here, strict=True):
                whole[of_block] = part
        return EdgeParts(layer, nodes.position[target], nodes.position[source], out)

    @exactly
    def strongest(
        self, targets: Sequence[int] | Tensor, n: int = 20, budget: int | None = None
    ) -> StrongestLoadings:
        """The ``n`` largest head loadings of every target, over all heads and all components.

        Most are never computed: pairs of head and key position are searched in the order of an
        upper bound on what they carried, until none is left that could matter
        (:mod:`circuit_tracer_qk.attribution.residual.topk_loadings`). What is listed is what
        computing everything would list.

        Args:
            targets: node indices in adjacency order.
            n: how many of each.
            budget: most pairs of head and key position to look into, for the targets of one
                block and position; ``exact`` and ``share`` tell what it cut.

        Raises:
            UserError: a node that is no target, or a logit that reads its own checkpoint; ``n`` or
                ``budget`` below one.

        >>> best = graph.strongest([313, 314], n=3)
        >>> best.head[0, 0].item(), best.source[0, 0].item(), round(best.loading[0, 0].item(), -1)
        (7, 61, 7000.0)
        """
        check(n=n, budget=budget)
        heads, parts = self.record.heads, self.record.parts
        nodes, target = self._nodes, self.target_nodes(targets)
        for node in target[nodes.read_own(target)].tolist():
            raise UserError(
                f"node {node} is a logit that reads its own checkpoint: no head is in between; ask "
                "for the features that it reads."
            )
        layer = nodes.checkpoint[target] - 1
        empty = layer.new_full((len(target), n), -1)
        listing = StrongestLoadings(
            layer,
            heads.run.residual.new_zeros(len(target), n),
            *(empty.clone() for _ in range(3)),
            exact=torch.ones_like(target, dtype=torch.bool),
            share=heads.run.residual.new_zeros(len(target)),
            skipped=0.0,
        )
        computed = of = 0
        for at in layer.unique().tolist():
            of_block = (layer == at).nonzero().squeeze(1)
            of_block = of_block[nodes.position[target[of_block]].argsort(stable=True)]
            block, rows = BlockEdges(parts, heads, at), nodes.targets(target[of_block])
            best = strongest(block, rows, runs_of(rows.positions.cpu()), n, budget)
            listed, source = best.source >= 0, best.source.clamp_min(0)
            listing.loading[of_block], listing.head[of_block] = best.loading, best.head
            listing.key[of_block] = torch.where(listed, block.sources.position[source], -1)
            listing.source[of_block] = torch.where(listed, nodes.of(block.sources)[source], -1)
            listing.exact[of_block], listing.share[of_block] = best.exact, best.share
            computed, of = computed + best.computed, of + best.of
        return listing._replace(skipped=1 - computed / of if of else 0.0)


@fitting("this graph", "load it on a machine with more memory, or make a smaller one")
def load_graph(
    path: str | Path, device: str | torch.device = "cpu", *, trust: bool = False
) -> ResidualGraph:
    """Bring a saved graph back, head loadings and QK attributions included, bit for bit.

    Args:
        path: the ``.pt`` that ``graph.to_pt`` wrote; its companion must lie beside it.
        device: where its tensors go.
        trust: also read objects of classes that are no part of a graph; the ``.pt`` can then run
            code.

    Raises:
        UserError: a file that is missing, damaged, of another kind or of another graph.

    >>> graph.to_pt(f"{tmp}/aunt.pt")
    >>> back = ctqk.load_graph(f"{tmp}/aunt.pt")
    >>> back.qk(1, 2, 14, 6).score == graph.qk(1, 2, 14, 6).score
    True
    """
    path = Path(check(path=path)["path"])
    if not os.path.isfile(path):
        raise UserError(f"there is no graph file {path}: give the .pt that was saved.")
    record, facts = load_record(companion_of(path, beside(path)), device)
    graph = ResidualGraph(record, **host.load_stock(path, device, trust))
    if facts.checked:
        same = host.graph_digest(graph) == facts.graph
    else:
        same = _fingerprint(graph) == facts.fingerprint
    if not same or not _fits(graph):
        raise UserError(
            f"{path} and {beside(path).name} belong to different graphs, or one has changed: make "
            "the graph again, or put the right pair together."
        )
    return graph


def _fits(graph: ResidualGraph) -> bool:
    """Whether a graph's fields and its record name the same tokens, features and targets."""
    record, run, active = graph.record, graph.record.parts.run, graph.record.parts.features
    nodes = torch.stack([active.checkpoint - 1, active.position, active.feature], 1)
    kept = active.checkpoint > 0  # checkpoint 0 has no nodes
    values = graph.activation_values.to(active.activation)
    n_targets, n_logits = len(record.target_pulls), len(record.logit_rows)
    return (
        torch.equal(run.tokens, graph.input_tokens.to(run.tokens))
        and torch.equal(nodes[kept], graph.active_features.to(nodes))
        and torch.equal(
            active.activation[kept].to(graph.activation_values.dtype).to(values), values
        )
        and n_targets - n_logits == len(graph.selected_features)
        and n_logits == len(graph.logit_targets)
        and graph.cfg.n_layers == run.n_layers
    )


def _fingerprint(graph: ResidualGraph) -> list[int]:
    """What files without digests hold of a graph, to notice that two do not belong together.

    Sums of whole numbers: those of floating-point ones depend on how many threads add them.
    """
    rows = graph.adjacency_matrix.float().contiguous().view(torch.int32).sum(1)
    places = torch.arange(1, len(rows) + 1, device=rows.device)
    return [len(rows), int(rows.sum()), int((rows * places).sum()), graph.n_pos]
