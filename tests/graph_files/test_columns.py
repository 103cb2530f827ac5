"""The columns of a table's lists: one definition, which schema, page, JSON and terminal follow."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
from helpers.schema import SCHEMA, strict
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution import columns
from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.cli import text
from circuit_tracer_qk.frontend.page import panel_folder

PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


@pytest.fixture(scope="module")
def graph() -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, ctqk.load_model(device="cpu"))


def test_schema_and_page_have_the_columns():
    component = SCHEMA["$defs"]["component"]
    for name in columns.COLUMNS:
        assert component["properties"][name]["type"] == ["number", "null"]
        assert name in component["required"]
    script = (panel_folder() / "format.js").read_text("utf-8")
    [listed] = re.findall(r"var columns = (\[.*?\])\n", script, re.S)
    assert re.findall(r"name: '(\w+)'", listed) == list(columns.COLUMNS)


def largest_term(components: list[Component], terms: Tensor) -> list[float]:
    return terms.abs().amax(1).tolist()


def test_a_new_column_is_in_json_and_terminal(
    graph: ctqk.ResidualGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = strict(ctqk.create_graph_files(graph, "a", tmp_path).read_bytes())
    monkeypatch.setitem(columns.COLUMNS, "largest_term", largest_term)
    path = ctqk.create_graph_files(graph, "a", tmp_path)
    document = strict(path.read_bytes())
    schema = copy.deepcopy(SCHEMA)
    schema["$defs"]["component"]["properties"]["largest_term"] = {"type": ["number", "null"]}
    jsonschema.Draft202012Validator(schema).validate(document)
    for written in document["qk"]["attributions"]:
        table = graph.qk(*(written[name] for name in ("layer", "head", "query", "key")))
        for side, terms in (("query", table.terms), ("key", table.terms.T)):
            components = getattr(table, side)
            largest = {
                (c.kind, c.feature, c.label): float(row.abs().max())
                for c, row in zip(components, terms, strict=True)
            }
            for c in written[f"{side}_components"]:
                at = c["kind"], c["feature"], c["label"]
                assert c.pop("largest_term") == pytest.approx(largest[at], rel=1e-4, abs=1e-4)
    assert document == before, "nothing else changed"
    table = graph.qk(1, 2, 14, 6)
    lines = text.marginal_lines(table, 0, 3)
    assert lines[1].split()[-3:] == ["activation", "largest_term", "label"]
    [line] = [line for line in lines if "L0/502" in line]
    [row] = [i for i, c in enumerate(table.query) if c.feature == 502]
    assert f"{float(table.terms[row].abs().max()):.3f}" in line.split()


def test_block_totals_are_the_tables_own(graph: ctqk.ResidualGraph, tmp_path: Path):
    document = json.loads(ctqk.create_graph_files(graph, "a", tmp_path).read_bytes())
    for written in document["qk"]["attributions"][::20]:
        table = graph.qk(*(written[name] for name in ("layer", "head", "query", "key")))
        size = float(table.terms.abs().sum())
        assert written["blocks"] == pytest.approx(
            {f"{a}|{b}": total for (a, b), total in table.blocks.items()}, abs=1e-6 * size
        )
        assert sum(table.blocks.values()) == pytest.approx(table.score, abs=1e-5 * size)


@pytest.mark.parametrize(
    "component, name, shown",
    [
        (("feature", 1, 61, 6, 3.25, "a name"), "L0/61", 'Component(L0/61 @6 "a name" 3.25)'),
        (("feature", 0, 61, 6, 3.25, ""), "in/61", "Component(in/61 @6 3.25)"),
        (("error", 4, None, 2, None, "error"), "L3 error", "Component(L3 error @2)"),
        (("bias", 1, None, 2, None, "b_dec"), "L0 bias", 'Component(L0 bias @2 "b_dec")'),
        (("embedding", 0, None, 2, None, " a"), "in embedding", 'Component(in embedding @2 " a")'),
    ],
)
def test_components_have_short_names(component: tuple, name: str, shown: str):
    assert Component(*component).name == name
    assert repr(Component(*component)) == shown
