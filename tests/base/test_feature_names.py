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


@pytest.mark.parametrize("text", ["", "61", "L0", "L0/", "c1/61", "L-1/61", "L0/61/2", "L0/x"])
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
