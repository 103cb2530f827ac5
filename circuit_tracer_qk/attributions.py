"""QK attributions as they go to a graph's file: which tables, their size, Neuronpedia's form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.components import Component
from circuit_tracer_qk.graph import ExplainedGraph
from circuit_tracer_qk.pruned import Links
from circuit_tracer_qk.qk import Place, QKTable
from circuit_tracer_qk.tables import Names, largest_terms, row_document, table_document
from circuit_tracer_qk.written import encode, rounded, rounded_all

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


def attributions(
    graph: ExplainedGraph,
    links: Links,
    nodes: dict[int, dict[str, Any]],
    names: Names,
    limits: Limits,
) -> dict[str, Any]:
    """The document's ``qk`` and ``qk_only_nodes``; ``nodes`` get their ``qk_tracing_results``.

    All tables that links require are written, then others in their order while limits allow.
    """
    required = dict.fromkeys(place for places in links.required.values() for place in places)
    others = [place for place in links.others if place not in required]
    others = others[: max(limits.tables - len(required), 0)]
    written = _Written(graph, names, limits.terms)
    outsiders: dict[str, dict[str, Any]] = {}
    projected = _projected(links.required)
    drafts: dict[Place, _Draft] = {}
    for (layer, query), tables in _by_query(graph, [*required, *others]):
        for place, table in tables.items():
            drafts[place] = written.draft(place, table)
        results: dict[tuple[Place, ...], dict[str, Any]] = {}
        for target in projected.pop((layer, query), ()):
            some = tuple(place for place in links.required[target] if place in tables)
            if some not in results:
                results[some] = _projection([tables[p] for p in some], names, outsiders)
            nodes[target]["qk_tracing_results"] = results[some]
    for place in required:
        written.add(place, drafts[place])
    for place in others:
        if written.size + drafts[place].size > limits.size:
            break
        written.add(place, drafts[place])
    return {
        "qk": {
            "schema_version": 1,
            "graph_kind": graph.kind,
            **_neuronpedia(graph),
            "attributions": [written.tables[place] for place in sorted(written.tables)],
            "rows": [written.rows[place] for place in sorted(written.rows)],
        },
        "qk_only_nodes": outsiders,
    }


def _neuronpedia(graph: ExplainedGraph) -> dict[str, dict[str, str]]:
    """Where Neuronpedia has these features: ids by checkpoint, if it has any."""
    ids = {str(checkpoint): name for checkpoint, name in sorted(graph.neuronpedia.items())}
    return {"neuronpedia": ids} if ids else {}


def _projected(required: dict[int, list[Place]]) -> dict[tuple[int, int], list[int]]:
    """Targets by the block and query of their first place, whose tables they show summed."""
    out: dict[tuple[int, int], list[int]] = defaultdict(list)
    for target, places in required.items():
        out[places[0].layer, places[0].query].append(target)
    return out


def _by_query(
    graph: ExplainedGraph, places: Sequence[Place]
) -> Iterator[tuple[tuple[int, int], dict[Place, QKTable]]]:
    """Tables by block and query: those that share both are at hand together, and then let go."""
    made = tqdm(
        graph.scores.tables(places),
        total=len(places),
        desc="QK attributions",
        delay=2,
        disable=None,
    )
    for at, tables in groupby(made, key=lambda t: (t.layer, t.query_position)):
        yield at, {Place(t.layer, t.head, t.query_position, t.key_position): t for t in tables}


class _Draft(NamedTuple):
    """A table that may be written, and its size."""

    table: dict[str, Any]
    size: int


@dataclass
class _Written:
    """Tables and rows as they go to the file.

    Attributes:
        graph, names: what they are about.
        top_terms: terms listed per table.
        tables: by place.
        rows: by (layer, head, query).
        size: their bytes.
    """

    graph: ExplainedGraph
    names: Names
    top_terms: int
    tables: dict[Place, dict[str, Any]] = field(default_factory=dict)
    rows: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)
    size: int = 0

    def draft(self, place: Place, table: QKTable) -> _Draft:
        """A table as it is written, and the bytes that it takes."""
        pattern = float(self.graph.run.pattern[place])
        made = table_document(table, pattern, self.names, self.top_terms)
        return _Draft(made, len(encode(made)))

    def add(self, place: Place, draft: _Draft) -> None:
        """Write a table and its row of scores, and note the features that it mentions."""
        self.tables[place] = draft.table
        self.size += draft.size
        if place[:3] not in self.rows:
            row = row_document(*place[:3], self.graph.qk_row(*place[:3]))
            self.rows[place[:3]] = row
            self.size += len(encode(row))
        for listed in (*draft.table["query_components"], *draft.table["key_components"]):
            if listed["kind"] == "feature":
                self.names.mention(listed["checkpoint"], listed["feature"])


def _projection(
    tables: Sequence[QKTable], names: Names, outsiders: dict[str, dict[str, Any]]
) -> dict[str, list[list[Any]]]:
    """A node's tables summed over heads, in the form that Neuronpedia's viewer shows.

    Args:
        tables: of one layer and query, so that their query components agree.
        outsiders: gets the components that are no nodes of the graph.
    """
    queries = tables[0].query
    at = {c: i for i, c in enumerate(dict.fromkeys(c for table in tables for c in table.key))}
    keys = list(at)  # carried to several keys, one node may be a component of each
    terms = tables[0].terms.cpu()
    if len(tables) > 1:
        terms = terms.new_zeros(len(queries), len(keys))
        for table in tables:
            columns = torch.tensor([at[c] for c in table.key])
            terms.index_add_(1, columns, table.terms.cpu())
    row, column = largest_terms(terms, PROJECTED)
    pairs = zip(row.tolist(), column.tolist(), rounded_all(terms[row, column]), strict=True)

    def top(values: Tensor) -> list[tuple[int, float]]:
        at = values.abs().topk(min(PROJECTED, len(values))).indices
        return list(zip(at.tolist(), rounded_all(values[at]), strict=True))

    def known(c: Component) -> str:
        node_id = names.node_id(c)
        if not names.is_node(c) and node_id not in outsiders:
            outsiders[node_id] = _outsider(c, names)
        return node_id

    return {
        "pair_wise_contributors": [
            [known(queries[i]), known(keys[j]), value] for i, j, value in pairs
        ],
        "top_q_marginal_contributors": [
            [known(queries[i]), value] for i, value in top(terms.sum(1, dtype=torch.float64))
        ],
        "top_k_marginal_contributors": [
            [known(keys[i]), value] for i, value in top(terms.sum(0, dtype=torch.float64))
        ],
    }


def _outsider(c: Component, names: Names) -> dict[str, Any]:
    """A component that is no node of the graph, in the form of one, for Neuronpedia."""
    types = {"feature": "cross layer transcoder", "error": "mlp reconstruction error"}
    index = {"error": -1}.get(c.kind)
    if c.feature is not None:
        index = names.mention(c.checkpoint, c.feature)
    node_id = names.node_id(c)
    out = {
        "node_id": node_id,
        "jsNodeId": node_id,
        "feature": index,
        "feature_type": types.get(c.kind, "bias"),
        "layer": "E" if c.kind == "position" else str(c.checkpoint - 1),
        "ctx_idx": c.position,
        "clerp": c.label,
    }
    if c.activation is not None:
        out["activation"] = rounded(c.activation)
    return out
