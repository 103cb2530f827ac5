"""QK attributions as they go to a graph's file: which tables, their size, Neuronpedia's form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.attribution.batches import BATCH_TERMS, Terms
from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.links import Links
from circuit_tracer_qk.attribution.qk import Place, RowPlace
from circuit_tracer_qk.base.json_text import rounded, rounded_all
from circuit_tracer_qk.graph_files.tables import (
    Names,
    Table,
    largest_terms,
    written_rows,
    written_tables,
)

PROJECTED = 10  # entries of each of a node's lists for Neuronpedia


class Limits(NamedTuple):
    """How much is written beyond what links require.

    Attributes:
        tables: how many tables in all.
        size: how many bytes they may take.
        terms: how many terms of a table are listed.
    """

    tables: int
    size: int
    terms: int


class Attributions(NamedTuple):
    """What a graph's files say about its heads' scores.

    Attributes:
        tables: JSON of the tables to write, the most wanted first.
        rows: JSON of the attention rows that they belong to, by (layer, head, query).
        facts: what else the document's ``qk`` holds.
        outsiders: the document's ``qk_only_nodes``.
    """

    tables: dict[Place, bytes]
    rows: dict[RowPlace, bytes]
    facts: dict[str, Any]
    outsiders: dict[str, dict[str, Any]]


def select_tables(
    graph: ExplainedGraph,
    links: Links,
    nodes: dict[int, dict[str, Any]],
    names: Names,
    limits: Limits,
) -> Attributions:
    """The tables to write; ``nodes`` get their ``qk_tracing_results``.

    All tables that links require are written, then others in their order while limits allow.
    """
    required = dict.fromkeys(place for places in links.required.values() for place in places)
    others = [place for place in links.others if place not in required]
    others = others[: max(limits.tables - len(required), 0)]
    wanted = [*required, *others]
    encoded: dict[Place, Table] = {}
    rows: dict[RowPlace, bytes] = {}
    traced = _Traced(names)
    each = _each(graph, wanted, names, limits.terms, encoded, rows)
    # targets by the block and query of their first place, whose tables they show summed
    projected: dict[tuple[int, int], list[int]] = defaultdict(list)
    for target, (first, *_) in links.required.items():
        projected[first.layer, first.query].append(target)
    for at, tables_here in groupby(
        each, key=lambda t: (t[0].layer, t[0].query)
    ):  # those that share both are at hand together, and then let go
        tables = dict(tables_here)
        for target in projected.pop(at, ()):
            traced.add(target, {p: tables[p] for p in links.required[target] if p in tables})
    traced.finish()
    for target, results in traced.results.items():
        nodes[target]["qk_tracing_results"] = results
    written: dict[Place, bytes] = {}
    used: dict[RowPlace, bytes] = {}
    mentioned: set[tuple[int, int]] = set()
    size = 0
    for place in wanted:
        data, features = encoded[place]
        if place not in required and size + len(data) > limits.size:
            break
        if place[:3] not in used:
            used[place[:3]] = rows[place[:3]]
            size += len(rows[place[:3]])
        written[place] = data
        size += len(data)
        mentioned.update(features)
    for feature in mentioned:
        names.mention(*feature)
    return Attributions(written, used, _facts(graph), traced.outsiders)


def _facts(graph: ExplainedGraph) -> dict[str, Any]:
    """What the document's ``qk`` says of all tables: what is not known is left out."""
    facts: dict[str, Any] = {
        "schema_version": 1,
        "graph_kind": graph.kind,
        "select": graph.select,
    }
    if graph.feature_hook is not None:
        facts["feature_hook"] = graph.feature_hook
    if graph.neuronpedia:
        ids = sorted(graph.neuronpedia.items())
        facts["neuronpedia"] = {str(checkpoint): name for checkpoint, name in ids}
    return facts


def _each(
    graph: ExplainedGraph,
    places: Sequence[Place],
    names: Names,
    top_terms: int,
    encoded: dict[Place, Table],
    rows: dict[RowPlace, bytes],
) -> Iterator[tuple[Place, Terms]]:
    """Tables one by one, by block and query; ``encoded`` and ``rows`` get their JSON."""
    with tqdm(total=len(places), desc="QK attributions", delay=2, disable=None) as progress:
        for batch in graph.batches(places):
            tables = written_tables(batch, names, top_terms)
            encoded.update(zip(batch.places, tables, strict=True))
            rows.update(written_rows(batch.rows))
            yield from batch.each()
            progress.update(len(batch.places))


class _Traced:
    """Nodes' tables summed over heads, in the form that Neuronpedia's viewer shows.

    Attributes:
        results: by target node.
        outsiders: the components in them that are no nodes of the graph.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.results: dict[int, dict[str, list[list[Any]]]] = {}
        self.outsiders: dict[str, dict[str, Any]] = {}
        self._waiting: dict[tuple[Place, ...], tuple[Terms, list[int]]] = {}
        self._size = 0

    def add(self, target: int, tables: dict[Place, Terms]) -> None:
        """A target's tables, of one layer and query, so that their query components agree."""
        places = tuple(tables)
        if places in self._waiting:
            self._waiting[places][1].append(target)
            return
        size = sum(table.terms.numel() for table in tables.values())
        if self._waiting and self._size + size > BATCH_TERMS:
            self.finish()
        self._waiting[places] = _summed(list(tables.values())), [target]
        self._size += size

    def finish(self) -> None:
        """Make what is waiting."""
        if not self._waiting:
            return
        sums = [summed for summed, _ in self._waiting.values()]
        shape = [max(s.terms.shape[side] for s in sums) for side in (0, 1)]
        terms = sums[0].terms.new_zeros(len(sums), *shape)
        for i, summed in enumerate(sums):
            terms[i, : len(summed.query), : len(summed.key)] = summed.terms
        largest, n_largest = largest_terms(terms, PROJECTED)
        values = rounded_all(terms.flatten(1).gather(1, largest))
        rows, columns = (largest // shape[1]).tolist(), (largest % shape[1]).tolist()
        tops = [
            _top(terms.sum(2 - side, dtype=torch.float64), [len(s[side]) for s in sums])
            for side in (0, 1)
        ]
        for i, (summed, targets) in enumerate(self._waiting.values()):
            pairs = list(zip(rows[i], columns[i], values[i], strict=True))[: int(n_largest[i])]
            of_query, of_key = self._ids(summed.query), self._ids(summed.key)
            result = {
                "pair_wise_contributors": [[of_query(q), of_key(k), v] for q, k, v in pairs],
                "top_q_marginal_contributors": [[of_query(q), value] for q, value in tops[0][i]],
                "top_k_marginal_contributors": [[of_key(k), value] for k, value in tops[1][i]],
            }
            self.results |= dict.fromkeys(targets, result)
        self._waiting, self._size = {}, 0

    def _ids(self, components: Sequence[Component]) -> Callable[[int], str]:
        """The id of a component by its index; those that are no nodes are noted."""

        def known(i: int) -> str:
            c = components[i]
            node_id = self.names.node_id(c)
            if node_id not in self.outsiders and not self.names.is_node(c):
                self.outsiders[node_id] = _outsider(c, self.names)
            return node_id

        return known


def _summed(tables: Sequence[Terms]) -> Terms:
    """The sum of some tables of one query."""
    sides = {id(table.key): table.key for table in tables}  # heads share a key's list
    column: dict[Component, int] = {}  # carried to several keys, one node may be in several lists
    for side in sides.values():
        for c in side:
            column.setdefault(c, len(column))
    columns = {i: torch.tensor([column[c] for c in side]) for i, side in sides.items()}
    terms = tables[0].terms.new_zeros(len(tables[0].query), len(column))
    for table in tables:
        terms.index_add_(1, columns[id(table.key)], table.terms)
    return Terms(tables[0].query, list(column), terms)


def _top(marginals: Tensor, lengths: Sequence[int]) -> list[list[tuple[int, float]]]:
    """The largest marginals of each table, with their components' indices.

    Args:
        marginals: (n_tables, n_components).
        lengths: how many components each table has.
    """
    exists = torch.arange(marginals.shape[1]) < torch.tensor(lengths)[:, None]
    most = min(PROJECTED, marginals.shape[1])
    index = marginals.abs().masked_fill(~exists, -1).topk(most).indices
    columns = zip(index.tolist(), rounded_all(marginals.gather(1, index)), lengths, strict=True)
    return [list(zip(at[:n], values[:n], strict=True)) for at, values, n in columns]


def _outsider(c: Component, names: Names) -> dict[str, Any]:
    """A component that is no node of the graph, in the form of one, for Neuronpedia."""
    types = {"feature": "cross layer transcoder", "error": "mlp reconstruction error"}
    index = {"error": -1}.get(c.kind)
    if c.feature is not None:
        index = names.mention(c.checkpoint, c.feature)
    node_id = names.node_id(c)
    node = {
        "node_id": node_id,
        "jsNodeId": node_id,
        "feature": index,
        "feature_type": types.get(c.kind, "bias"),
        "layer": "E" if c.kind == "position" else str(c.checkpoint - 1),
        "ctx_idx": c.position,
        "clerp": c.label,
    }
    if c.activation is not None:
        node["activation"] = rounded(c.activation)
    return node
