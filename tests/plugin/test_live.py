"""Tables computed on demand: what a graph file would say, for any head and pair of positions."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import UserError
from circuit_tracer_qk.attribution.pruning import edge_influence
from circuit_tracer_qk.base.package import ROOT
from circuit_tracer_qk.cli import highlights
from circuit_tracer_qk.dictionaries.features import feature_index, indexed_feature
from circuit_tracer_qk.plugin.live import LiveGraphs

SCHEMA = json.loads((ROOT / "graph.schema.json").read_bytes())
PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


@pytest.fixture(scope="module")
def graph() -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, ctqk.load_model(device="cpu"))


@pytest.fixture(scope="module")
def live(graph) -> LiveGraphs:
    return LiveGraphs({"sally": graph})


def test_an_answer_equals_what_the_file_says(graph, live, tmp_path):
    written = json.loads(ctqk.create_graph_files(graph, "sally", tmp_path).read_bytes())
    rows = {(r["layer"], r["head"], r["query"]): r for r in written["qk"]["rows"]}
    assert len(written["qk"]["attributions"]) > 10
    for table in written["qk"]["attributions"]:
        place = [table[name] for name in ("layer", "head", "query", "key")]
        answer = json.loads(live.table("sally", *place))
        assert answer["row"] == rows[tuple(place[:3])]
        for name in ("query", "key"):  # a file names only the nodes that pruning kept
            for ours, theirs in zip(
                answer["table"][f"{name}_components"], table[f"{name}_components"], strict=True
            ):
                if "node_id" not in theirs:
                    ours.pop("node_id", None)
        assert answer["table"] == table


def test_any_pair_of_positions_is_answered_and_validates(graph, live):
    table_schema = {"$defs": SCHEMA["$defs"], "$ref": "#/$defs/table"}
    for layer, head, query, key in ((0, 0, 0, 0), (3, 7, 14, 0), (2, 4, 9, 9)):
        answer = json.loads(live.table("sally", layer, head, query, key))
        table, expected = answer["table"], graph.qk(layer, head, query, key)
        jsonschema.Draft202012Validator(table_schema).validate(table)
        assert table["score"] == pytest.approx(expected.score, rel=1e-6)
        assert len(answer["row"]["scores"]) == query + 1


def test_the_grid_holds_the_terms_among_the_leading_components(graph, live):
    table = json.loads(live.table("sally", 1, 2, 14, 6))["table"]
    truth = graph.qk(1, 2, 14, 6)

    def find(components, wanted):
        return next(
            i
            for i, c in enumerate(components)
            if (c.kind, c.feature, c.label) == (wanted["kind"], wanted["feature"], wanted["label"])
        )

    assert len(table["grid"]) == min(20, len(table["query_components"]))
    assert {len(row) for row in table["grid"]} == {min(20, len(table["key_components"]))}
    for query, row in zip(table["query_components"], table["grid"], strict=False):
        for key, value in zip(table["key_components"], row, strict=False):
            expected = truth.terms[find(truth.query, query), find(truth.key, key)]
            assert value == pytest.approx(float(expected), rel=1e-5, abs=1e-9)
    for i, j, value in table["terms"]:
        if i < 20 and j < 20:
            assert table["grid"][i][j] == value


def test_what_cannot_be_answered_is_refused_with_a_sentence(live):
    with pytest.raises(UserError, match="head 8"):
        live.table("sally", 0, 8, 3, 2)
    with pytest.raises(UserError, match="key"):
        live.table("sally", 0, 0, 3, 4)


def test_examples_of_features_that_no_file_was_written_for(live):
    index = feature_index(2, 17)
    assert index is not None
    examples = live.examples("miniature-sae", index)
    assert json.loads(examples)["examples_quantiles"]
    assert live.examples("another-set", 5) is None
    assert json.loads(live.examples("miniature-sae", 10**15))["examples_quantiles"] == []


def test_indices_and_features_are_one_to_one():
    for checkpoint in (1, 2, 9, 48):
        for feature in (0, 1, 511, 2**17 - 1, 2**40):
            index = feature_index(checkpoint, feature)
            assert index is not None
            assert indexed_feature(index) == (checkpoint, feature)


def test_many_threads_get_the_same_answers(live):
    places = [(1, head, 14, key) for head in range(8) for key in (0, 6, 13)] * 4
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda place: live.table("sally", *place), places))
    for place, answer in zip(places, answers, strict=True):
        assert answer == answers[places.index(place)]
        table = json.loads(answer)["table"]
        total = math.fsum(value for *_, value in table["terms"]) + table["rest"]
        assert total == pytest.approx(table["score"], rel=1e-9)


def test_the_page_opens_at_an_edge_that_carried_the_answer(graph):
    look = highlights.first_look(graph, edge_influence(graph))
    features = graph.active_features[graph.selected_features].tolist()
    source, target = (
        features.index([int(layer), int(position), int(feature)])
        for layer, feature, position in (end.split("_") for end in look["qkEdge"].split("__"))
    )
    assert look["qkEdge"].endswith(look["clickedId"])
    edge = graph.edge(source, target)
    head = int(edge.heads.total.abs().argmax())
    assert (edge.query, edge.key) == (14, 6)  # from the last " Aunt" to " Sally"
    assert look["qk"] == f"L{edge.layer}H{head}:q14:k6"
