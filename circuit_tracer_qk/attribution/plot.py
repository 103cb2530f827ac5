"""A QK table as a figure. matplotlib is loaded when the first one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.qk import QKRow, QKTable
from circuit_tracer_qk.attribution.text import component_name, component_text
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.rules import check

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_table(
    table: QKTable, row: QKRow | None = None, tokens: Sequence[str] | None = None, n: int = 8
) -> Figure:
    """A table's marginals and a heatmap of its terms; above them the attention row, if given.

    Args:
        table: what to draw.
        row: the attention row of its head and query.
        tokens: the prompt's tokens as text.
        n: how many components of either side are named; the others are drawn as one sum.

    Returns:
        The figure, closed for pyplot: ``figure.savefig(...)`` writes it, a notebook shows it.

    Raises:
        UserError: matplotlib is not installed, ``n`` is below one, the table has no terms, or the
            row or the tokens are not the table's.
    """
    check(n=n)
    _check(table, row, tokens)
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise UserError(
            "figures are drawn with matplotlib, which is not installed: pip install "
            "'circuit-tracer-qk[studies]'."
        ) from error
    query = _leading(table.query, table.query_marginal, table.query_position, n)
    key = _leading(table.key, table.key_marginal, table.key_position, n)
    terms = query.members @ table.terms.cpu().double() @ key.members.T
    figure = pyplot.figure(figsize=(13, 4 if row is None else 6.5), layout="constrained")
    pyplot.close(figure)  # a notebook would show it twice
    title = f"L{table.layer}H{table.head}, query {_place(table.query_position, tokens)}, "
    title += f"key {_place(table.key_position, tokens)}: score {table.score:.2f}"
    figure.suptitle(_plain(title))
    heights = (1,) if row is None else (1, 2)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights, width_ratios=(1, 1, 2))
    if row is not None:
        _draw_row(figure.add_subplot(grid[0, :]), row, table.key_position, tokens)
    _draw_marginal(figure.add_subplot(grid[-1, 0]), terms.sum(1), query.texts, "query")
    _draw_marginal(figure.add_subplot(grid[-1, 1]), terms.sum(0), key.texts, "key")
    _draw_terms(figure.add_subplot(grid[-1, 2]), terms, query.names, key.names)
    return figure


def _check(table: QKTable, row: QKRow | None, tokens: Sequence[str] | None) -> None:
    """Refuse a table without terms, and a row or tokens that are not the table's."""
    if not table.terms.numel():
        raise UserError("the table has no terms, so there is nothing to draw.")
    query = table.query_position
    if row is not None and len(row.pattern) != query + 1:
        raise UserError(
            f"the row is that of query {len(row.pattern) - 1}, and the table's query is {query}: "
            f"give graph.qk_row({table.layer}, {table.head}, {query})."
        )
    if tokens is not None and len(tokens) <= query:
        raise UserError(
            f"there are {len(tokens)} tokens, and the table's query stands at position {query}: "
            "give one a position, graph.token_strings."
        )


class _Leading(NamedTuple):
    """The components with the largest marginals, and the sum of the others as one more.

    Attributes:
        members: (n_rows, n_components) ones where a component belongs to a row.
        names, texts: of each row, without and with what a feature stands for.
    """

    members: Tensor
    names: list[str]
    texts: list[str]


def _leading(components: list[Component], marginal: Tensor, position: int, n: int) -> _Leading:
    order = marginal.abs().cpu().argsort(descending=True, stable=True)
    leading = [components[i] for i in order[:n].tolist()]
    names = [component_name(component) for component in leading]
    texts = [component_text(component, position) for component in leading]
    left_out = len(components) - len(leading)
    if left_out:
        names.append("others")
        texts.append(f"the sum of {left_out} more")
    members = torch.zeros(len(names), len(components), dtype=torch.float64)
    members[torch.arange(len(components)).clamp_max(n), order] = 1
    return _Leading(members, [*map(_plain, names)], [*map(_plain, texts)])


def _draw_row(axes: Axes, row: QKRow, key: int, tokens: Sequence[str] | None) -> None:
    pattern = row.pattern.cpu().tolist()
    bars: Any = axes.bar(range(len(pattern)), pattern, color="tab:grey")
    bars[key].set_color("tab:red")
    axes.set_xticks(range(len(pattern)))
    labels = [_plain(_place(p, tokens)) for p in range(len(pattern))]
    axes.set_xticklabels(labels, rotation=90 if tokens else 0, fontsize="small")
    axes.set_ylabel("attention")


def _draw_marginal(axes: Axes, values: Tensor, names: list[str], side: str) -> None:
    colors = ["tab:red" if value > 0 else "tab:blue" for value in values.tolist()]
    axes.barh(range(len(names)), values.tolist(), color=colors)
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set_title(f"{side} components", fontsize="medium")
    axes.set_xlabel("part of the score")


def _draw_terms(axes: Axes, terms: Tensor, query: list[str], key: list[str]) -> None:
    limit = float(terms.abs().max()) or 1.0
    image = axes.imshow(terms.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(key)), key, rotation=90, fontsize="small")
    axes.set_yticks(range(len(query)), query, fontsize="small")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.figure.colorbar(image, ax=axes, label="term")


def _place(position: int, tokens: Sequence[str] | None) -> str:
    return str(position) if tokens is None else f"{position} {tokens[position]!r}"


def _plain(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")
