"""What prompts and notebooks show of tables, edges and graphs: short, and in sum what they say."""

from __future__ import annotations

import re
import sys

import pytest
import torch

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution import plot
from circuit_tracer_qk.cli import text as cli_text

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


@pytest.fixture(scope="module")
def graph() -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, ctqk.load_model())


@pytest.fixture(scope="module")
def table(graph: ctqk.ResidualGraph) -> ctqk.QKTable:
    return graph.qk(1, 2, query=14, key=6)


def test_a_table_prints_its_top_terms_which_with_the_rest_are_the_score(table) -> None:
    title, _, *terms = repr(table).splitlines()
    assert title == "QKTable L1H2, query 14, key 6: score 73.33"
    assert len(terms) == 9 and "L0/129 a title" in terms[0] and "L0/61" in terms[0]
    values = [float(line.split()[0]) for line in terms]
    assert sum(values) == pytest.approx(table.score, abs=0.05)  # each is rounded to 0.01


def test_a_graph_prints_its_kind_tokens_and_counts(graph) -> None:
    lines = repr(graph).splitlines()
    assert len(lines) == 5
    assert lines[0] == "ResidualGraph (residual) of 15 tokens"
    assert "Aunt Sally" in lines[1]
    assert re.search(r"680 of 680", lines[2])
    assert "' Sally' 0.998" in lines[4]


def test_html_is_escaped(graph, table) -> None:
    assert "&lt;bos&gt;" in graph._repr_html_() and "<bos>" not in graph._repr_html_()
    assert table._repr_html_().startswith("<table>")


def test_results_of_many_edges_and_terms_print_their_shapes(graph) -> None:
    target = graph.n_features - 1
    source = int(graph.adjacency_matrix[target].abs().argmax())
    for result in (
        graph.edge(source, target),
        graph.edges([source], [target]),
        graph.strongest([target]),
        graph.qk_top(1, 2, 14),
        graph.qk_row(1, 2, 14),
        ctqk.carriers(graph, query=14, key=6)[0],
    ):
        assert len(repr(result)) < 300 and "tensor" not in repr(result)


def test_a_figure_of_a_table_adds_up(graph, table) -> None:
    figure = graph.plot(1, 2, query=14, key=6, n=3)
    row, query, key, terms, _ = figure.axes
    assert len(row.patches) == 15
    for marginal, expected in ((query, table.query_marginal), (key, table.key_marginal)):
        widths = [bar.get_width() for bar in marginal.patches]
        assert len(widths) == 4  # three components and the sum of the others
        assert sum(widths) == pytest.approx(table.score, abs=1e-3)
        assert widths[0] == pytest.approx(float(expected[expected.abs().argmax()]), rel=1e-4)
    assert float(terms.images[0].get_array().sum()) == pytest.approx(table.score, abs=1e-3)


def test_a_figure_without_its_row_has_no_attention(table, tmp_path) -> None:
    figure = table.plot(n=200)  # more than there are
    assert len(figure.axes) == 4
    figure.savefig(tmp_path / "table.png")


def test_what_cannot_be_drawn_is_refused(table, monkeypatch) -> None:
    with pytest.raises(ctqk.UserError, match="n is 0"):
        table.plot(n=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with pytest.raises(ctqk.UserError, match=r"circuit-tracer-qk\[studies\]"):
        plot.plot_table(table)


def labelled(*labels: str) -> ctqk.QKTable:
    """A table of one feature a label on either side."""
    components = [ctqk.Component("feature", 1, 2, 0, 1.0, label) for label in labels]
    terms = torch.ones(len(labels), len(labels))
    return ctqk.QKTable(0, 0, 0, 0, 1.0, 1.0, False, components, components, terms)


def test_formulas_in_labels_are_text() -> None:
    figure = labelled("costs $5 and $6").plot()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [r"L0/2 costs \$5 and \$6"]


@pytest.mark.parametrize("label", ["\ud800", "red\x1b[31m", "two\nlines", "\u202e", "x" * 5000])
def test_labels_of_any_text_are_shown_short_and_clean(label: str, tmp_path) -> None:
    table = labelled(label)
    for text in (*repr(table).splitlines(), table._repr_html_(), repr(table.query[0])):
        assert len(text) < 500 and text.isprintable()
    assert len(repr(table).splitlines()) == 3
    tokens, row = ["a"], ctqk.QKRow(*torch.ones(3, 1))
    for line in cli_text.qk_lines(table, row, tokens):
        assert len(line) <= cli_text.WIDTH and line.isprintable()
    table.plot().savefig(tmp_path / "table.png")


def test_an_empty_table_is_shown_and_not_drawn() -> None:
    table = labelled()
    assert len(repr(table).splitlines()) == 2 and not any(table.blocks.values())
    with pytest.raises(ctqk.UserError, match="no terms, so there is nothing to draw"):
        table.plot()


def test_a_row_or_tokens_of_another_table_are_refused(graph, table) -> None:
    with pytest.raises(ctqk.UserError, match=r"row is that of query 3.*graph.qk_row\(1, 2, 14\)"):
        table.plot(graph.qk_row(1, 2, 3))
    with pytest.raises(ctqk.UserError, match="there are 14 tokens, .* stands at position 14"):
        table.plot(tokens=graph.token_strings[:14])
