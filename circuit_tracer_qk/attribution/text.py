"""Tables, rows, edges and graphs as short text, for ``repr``, and as small HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from circuit_tracer_qk.attribution.component import LABEL_WIDTH, Component
from circuit_tracer_qk.base.feature_names import feature_name
from circuit_tracer_qk.base.one_line import one_line
from circuit_tracer_qk.host import graph as host

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.graph import ExplainedGraph
    from circuit_tracer_qk.attribution.qk import QKRow, QKTable

TOP_TERMS = 8
PROMPT_WIDTH = 88


class Summary(NamedTuple):
    """A title and a few rows of cells, from which text and HTML are made alike."""

    title: str
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in self.rows
        ]
        return "\n".join([self.title, *lines])

    def html(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><caption>{escape(self.title)}</caption>{rows}</table>"


def component_name(component: Component) -> str:
    """``L0/61``, or what a component that is no feature is called."""
    if component.feature is None:
        return one_line(component.label, LABEL_WIDTH) or component.kind
    return feature_name(component.checkpoint, component.feature)


def component_text(component: Component, position: int) -> str:
    """A component's name, its own position where it came from another, and its label."""
    name = component_name(component)
    if component.position != position:
        name += f" at {component.position}"
    if component.feature is not None and component.label:
        name += f" {component.label}"
    return one_line(name, LABEL_WIDTH)


def summarize_table(table: QKTable, n: int = TOP_TERMS) -> Summary:
    """The largest terms of a table and the sum of the rest: what is listed sums to the score."""
    title = (
        f"QKTable L{table.layer}H{table.head}, query {table.query_position}, "
        f"key {table.key_position}: score {table.score:.2f}"
    )
    if table.score_capped != table.score:
        title += f" ({table.score_capped:.2f} after the soft-cap)"
    if table.masked:
        title += " (masked)"
    rows, listed = [("term", "query", "key")], 0.0
    for query, key, value in table.top(n):
        of_query = component_text(query, table.query_position)
        rows.append((f"{value:+.2f}", of_query, component_text(key, table.key_position)))
        listed += value
    left_out = table.terms.numel() - (len(rows) - 1)
    if left_out:
        rows.append((f"{table.score - listed:+.2f}", f"the other {left_out} terms", ""))
    return Summary(title, rows)


def row_text(row: QKRow) -> str:
    """Where a row's attention went."""
    values, keys = row.pattern.topk(min(3, len(row.pattern)))
    pairs = zip(values.tolist(), keys.tolist(), strict=True)
    places = ", ".join(f"{value:.3f} at key {key}" for value, key in pairs)
    return f"QKRow(query {len(row.pattern) - 1}: attention {places})"


def summarize_graph(graph: ExplainedGraph) -> Summary:
    """A graph's prompt, and how much is in it."""
    logits = zip(host.logit_texts(graph), graph.logit_probabilities.tolist(), strict=True)
    likeliest = ", ".join(f"{text!r} {p:.3f}" for (text, _), p in list(logits)[:3])
    features, active = graph.n_features, len(graph.active_features)
    edges = int(graph.adjacency_matrix.count_nonzero())
    return Summary(
        f"{type(graph).__name__} ({graph.kind}) of {graph.n_pos} tokens",
        [
            ("prompt", one_line(repr("".join(graph.token_strings)), PROMPT_WIDTH)),
            ("features", f"{features} of {active} active ones"),
            ("edges", f"{edges} between {len(graph.adjacency_matrix)} nodes"),
            ("logits", f"{len(graph.logit_targets)}: {likeliest}"),
        ],
    )


def heads_text(total: Tensor, n: int = 3) -> str:
    """The heads with the largest parts of an edge, and the sum of the others' parts."""
    heads = total.abs().topk(min(n, len(total))).indices
    parts = [f"H{head} {float(total[head]):+.4f}" for head in heads.tolist()]
    if len(total) > n:
        parts.append(f"others {float(total.sum() - total[heads].sum()):+.4f}")
    return ", ".join(parts)


def shapes(self: Any) -> str:
    """A method, the ``repr`` of a named tuple of tensors: shapes, and other values as they are."""
    fields = (
        f"{name}={list(value.shape) if isinstance(value, Tensor) else value}"
        for name, value in self._asdict().items()
    )
    return f"{type(self).__name__}({', '.join(fields)})"
