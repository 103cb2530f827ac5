"""QK tables and attention rows as they are written to graph files and sent to the page.

``graph.schema.json`` describes both (``table`` and ``row``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from circuit_tracer_qk.components import Component
from circuit_tracer_qk.dictionaries import feature_index
from circuit_tracer_qk.qk import QKRow, QKTable
from circuit_tracer_qk.written import rest, rounded, rounded_all

MARGINALS_LISTED = 20  # a table's largest marginals on either side, all of whose terms are written
TOP_TERMS = 50


@dataclass(frozen=True)
class Names:
    """Ids of components as nodes, and every feature that was mentioned.

    Attributes:
        tokens: the prompt's token ids.
        nodes: ids of the nodes written; None where every component may be one.
        features: (checkpoint, feature) by Cantor index; grows.
    """

    tokens: Sequence[int]
    nodes: Collection[str] | None = None
    features: dict[int, tuple[int, int]] = field(default_factory=dict)

    def mention(self, checkpoint: int, feature: int) -> int | None:
        """The Cantor index of a feature, which is noted."""
        index = feature_index(checkpoint, feature)
        if index is not None:
            self.features[index] = checkpoint, feature
        return index

    def node_id(self, c: Component) -> str:
        """The id that a component has, or would have, as a node."""
        layer = c.checkpoint - 1
        if c.kind == "feature":
            return f"{layer}_{c.feature}_{c.position}"
        if c.kind == "error" and c.label == "error":
            return f"{layer}_-1_{c.position}"
        if c.kind == "embedding":
            return f"E_{self.tokens[c.position]}_{c.position}"
        if c.kind == "position":
            return f"E_position_{c.position}"
        return f"{layer}_{c.kind}_{c.label.split()[0]}_{c.position}"

    def is_node(self, c: Component) -> bool:
        """Whether a component is a node of the graph, or may be one where that is not known."""
        if self.nodes is None:
            return c.kind in ("feature", "embedding") or (c.kind, c.label) == ("error", "error")
        return self.node_id(c) in self.nodes


def table_document(
    table: QKTable, pattern: float, names: Names, top_terms: int = TOP_TERMS
) -> dict[str, Any]:
    """A table's largest terms and marginals.

    Identities, as written: score = the listed terms + rest = the listed marginals of either side
    + that side's rest. ``grid`` holds every term between the first components of either list.

    Args:
        table: of a key that is not masked.
        pattern: the attention that the key got.
        names: gets the features mentioned.
        top_terms: how many terms to list, by absolute value.
    """
    terms = table.terms.cpu()
    score = rounded(table.score)
    rows, columns = largest_terms(terms, top_terms, -(-top_terms // 5))
    values = rounded_all(terms[rows, columns])
    rows, columns = rows.tolist(), columns.tolist()
    marginals = [terms.sum(dim, dtype=torch.float64) for dim in (1, 0)]
    row_order, column_order = (
        _listed(side, of_side, used, position)
        for side, of_side, used, position in zip(
            (table.query, table.key),
            marginals,
            (rows, columns),
            (table.query_position, table.key_position),
            strict=True,
        )
    )
    at_row = {i: at for at, i in enumerate(row_order)}
    at_column = {i: at for at, i in enumerate(column_order)}
    grid = terms[row_order[:MARGINALS_LISTED]][:, column_order[:MARGINALS_LISTED]]
    return {
        "layer": table.layer,
        "head": table.head,
        "query": table.query_position,
        "key": table.key_position,
        "score": score,
        "score_capped": rounded(table.score_capped),
        "pattern": rounded(pattern),
        **_side("query", table.query, marginals[0], row_order, names, score),
        **_side("key", table.key, marginals[1], column_order, names, score),
        "terms": [
            [at_row[i], at_column[j], value]
            for i, j, value in zip(rows, columns, values, strict=True)
        ],
        "rest": rest(score, values),
        "grid": rounded_all(grid),
        "blocks": {f"{a}|{b}": rounded(value) for (a, b), value in table.blocks.items()},
    }


def row_document(layer: int, head: int, query: int, row: QKRow) -> dict[str, Any]:
    """One head's attention from one query; masked scores are None."""
    scores = [rounded(s) if math.isfinite(s) else None for s in row.scores.tolist()]
    pattern = [rounded(p) for p in row.pattern.tolist()]
    return {"layer": layer, "head": head, "query": query, "scores": scores, "pattern": pattern}


def largest_terms(terms: Tensor, n: int, of_sign: int = 0) -> tuple[Tensor, Tensor]:
    """Rows and columns of the ``n`` largest terms by absolute value, largest first; none is 0.

    They lie in the rows with the largest extremes, so that most of a large table is only skimmed.

    Args:
        terms: (n_rows, n_columns)
        n: how many.
        of_sign: as many of either sign are there too.
    """
    low, high = terms.amin(1), terms.amax(1)
    wanted = (torch.maximum(high, -low), n), (high, of_sign), (-low, of_sign)
    rows = torch.cat([e.topk(min(k, len(e))).indices for e, k in wanted]).unique()
    values = terms[rows].flatten()
    few = min(of_sign, len(values))
    either = torch.cat([(sign * values).topk(few).indices for sign in (1, -1)])
    right = torch.cat([values[either[:few]] > 0, values[either[few:]] < 0])
    chosen = torch.cat([values.abs().topk(min(n, len(values))).indices, either[right]]).unique()
    chosen = chosen[values[chosen] != 0]
    chosen = chosen[values[chosen].abs().argsort(descending=True, stable=True)]
    return rows[chosen // terms.shape[1]], chosen % terms.shape[1]


def _listed(
    components: list[Component], marginals: Tensor, used: list[int], position: int
) -> list[int]:
    """The components to list, by |marginal|: those used, the largest, and all but features.

    In transcoder graphs errors and tokens are nodes at every earlier position too; of those that
    were carried to this one, too, only the used and the largest are listed.
    """
    most = min(MARGINALS_LISTED, len(components))
    others = [i for i, c in enumerate(components) if c.kind != "feature" and c.position == position]
    chosen = {*used, *others, *marginals.abs().topk(most).indices.tolist()}
    values = marginals.tolist()
    return sorted(chosen, key=lambda i: (-abs(values[i]), i))


def _side(
    name: str,
    components: list[Component],
    marginals: Tensor,
    order: list[int],
    names: Names,
    score: float,
) -> dict[str, Any]:
    """One side's listed components, and the sum of the marginals left out."""
    listed = [_component(components[i], float(marginals[i]), names) for i in order]
    missing = rest(score, [entry["marginal"] for entry in listed])
    return {f"{name}_components": listed, f"{name}_rest": missing}


def _component(c: Component, marginal: float, names: Names) -> dict[str, Any]:
    out: dict[str, Any] = {
        "kind": c.kind,
        "checkpoint": c.checkpoint,
        "feature": c.feature,
        "position": c.position,
        "activation": None if c.activation is None else rounded(c.activation),
        "label": c.label,
        "marginal": rounded(marginal),
    }
    if names.is_node(c):
        out["node_id"] = names.node_id(c)
    index = None if c.feature is None else feature_index(c.checkpoint, c.feature)
    if index is not None:
        out["id"] = index
    return out
