"""QK attributions as they go to a graph's file: which tables, their size, Neuronpedia's form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.batches import Terms, batches
from circuit_tracer_qk.batches import rows as table_rows
from circuit_tracer_qk.components import Component
from circuit_tracer_qk.graph import ExplainedGraph
from circuit_tracer_qk.pruned import Links
from circuit_tracer_qk.qk import Place
from circuit_tracer_qk.tables import Names, Table, largest_terms, written_row, written_tables
from circuit_tracer_qk.written import rounded, rounded_all

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
    rows: dict[tuple[int, int, int], bytes]
    facts: dict[str, Any]
    outsiders: dict[str, dict[str, Any]]


def attributions(
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
    outsiders: dict[str, dict[str, Any]] = {}
    projected = _projected(links.required)
    made: dict[Place, Table] = {}
    for (layer, query), tables in _by_query(_made(graph, wanted, names, limits.terms, made)):
        results: dict[tuple[Place, ...], dict[str, Any]] = {}
        for target in projected.pop((layer, query), ()):
            some = tuple(place for place in links.required[target] if place in tables)
            if some not in results:
                results[some] = _projection([tables[p] for p in some], names, outsiders)
            nodes[target]["qk_tracing_results"] = results[some]
    rows = {at: written_row(*at, row) for at, row in table_rows(graph, (p[:3] for p in wanted))}
    written: dict[Place, bytes] = {}
    used: dict[tuple[int, int, int], bytes] = {}
    mentioned: set[tuple[int, int]] = set()
    size = 0
    for place in wanted:
        data, features = made[place]
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
    facts = {"schema_version": 1, "graph_kind": graph.kind, **_neuronpedia(graph)}
    return Attributions(written, used, facts, outsiders)


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


def _made(
    graph: ExplainedGraph,
    places: Sequence[Place],
    names: Names,
    top_terms: int,
    made: dict[Place, Table],
) -> Iterator[tuple[Place, Terms]]:
    """Tables by block and query; ``made`` gets them as they are written."""
    with tqdm(total=len(places), desc="QK attributions", delay=2, disable=None) as progress:
        for batch in batches(graph, places):
            made.update(zip(batch.places, written_tables(batch, names, top_terms), strict=True))
            yield from batch.each()
            progress.update(len(batch.places))


def _by_query(
    tables: Iterable[tuple[Place, Terms]],
) -> Iterator[tuple[tuple[int, int], dict[Place, Terms]]]:
    """By block and query: tables that share both are at hand together, and then let go."""
    for at, some in groupby(tables, key=lambda table: (table[0].layer, table[0].query)):
        yield at, dict(some)


def _projection(
    tables: Sequence[Terms], names: Names, outsiders: dict[str, dict[str, Any]]
) -> dict[str, list[list[Any]]]:
    """A node's tables summed over heads, in the form that Neuronpedia's viewer shows.

    Args:
        tables: of one layer and query, so that their query components agree.
        outsiders: gets the components that are no nodes of the graph.
    """
    queries = tables[0].query
    at = {c: i for i, c in enumerate(dict.fromkeys(c for table in tables for c in table.key))}
    keys = list(at)  # carried to several keys, one node may be a component of each
    terms = tables[0].terms
    if len(tables) > 1:
        terms = terms.new_zeros(len(queries), len(keys))
        for table in tables:
            columns = torch.tensor([at[c] for c in table.key])
            terms.index_add_(1, columns, table.terms)
    largest, n_largest = largest_terms(terms[None], PROJECTED)
    largest = largest[0, : int(n_largest)]
    pairs = zip(
        (largest // len(keys)).tolist(),
        (largest % len(keys)).tolist(),
        rounded_all(terms.flatten()[largest]),
        strict=True,
    )

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
