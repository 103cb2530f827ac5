"""One name for a feature, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuit_tracer_qk import UserError
from circuit_tracer_qk.base.feature_names import (
    checkpoint_name,
    feature_name,
    is_feature_name,
    parse_feature_name,
)


@pytest.mark.parametrize("checkpoint", [0, 1, 2, 30])
def test_a_name_says_checkpoint_and_index(checkpoint: int):
    name = feature_name(checkpoint, 61)
    assert is_feature_name(name) and parse_feature_name(name) == (checkpoint, 61)
    assert name == f"{checkpoint_name(checkpoint)}/61"


def test_names_are_those_of_circuit_tracers_node_ids():
    layer, feature, _position = "3_17_5".split("_")  # a node id: layer, feature, position
    assert feature_name(int(layer) + 1, int(feature)) == "L3/17"
    assert parse_feature_name(" l3/17 ") == (4, 17)


def test_the_case_of_the_letters_does_not_matter():
    assert parse_feature_name("l0/61") == (1, 61) and parse_feature_name("IN/61") == (0, 61)


NO_NAMES = ["", "61", "L0", "L0/", "c1/61", "L-1/61", "L0/61/2", "L0/x", "\u0131n/61"]
OTHER_DIGITS = [
    "L0/\u0666\u0661",
    "L\u0664/61",
    "L0/\uff16\uff11",
    "L\uff10/61",
    "L0/\u2460",
    "in/\u00b2",
]


@pytest.mark.parametrize("text", [*NO_NAMES, *OTHER_DIGITS])
def test_what_is_no_name_is_refused(text: str):
    assert not is_feature_name(text)
    with pytest.raises(UserError, match="is no feature: write its name, such as L0/61"):
        parse_feature_name(text)


def test_features_of_attention_graphs_are_known_and_refused():
    with pytest.raises(UserError, match="'L5attn/61' names a feature of an attention graph"):
        parse_feature_name("L5attn/61")


@given(st.integers(0, 10**8), st.integers(0, 10**8))
def test_a_name_comes_back(checkpoint: int, feature: int) -> None:
    name = feature_name(checkpoint, feature)
    assert is_feature_name(name)
    assert (
        parse_feature_name(name)
        == parse_feature_name(f" {name.lower()} ")
        == (
            checkpoint,
            feature,
        )
    )
