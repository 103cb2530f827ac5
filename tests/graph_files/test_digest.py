"""Which graph a file is of: the same for the same content, in any process and under any name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.host.graph import graph_digest

PROMPT = "I met Aunt Sally. I like Aunt"
PRINT_DIGEST = """
import sys
import circuit_tracer_qk as ctqk
from circuit_tracer_qk.host.graph import graph_digest
print(graph_digest(ctqk.load_graph(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, model, max_feature_nodes=60)


def digest_of(path: Path) -> str:
    return json.loads(path.read_bytes())["metadata"]["info"]["digest"]


def test_a_file_says_which_graph_it_is_of(graph, tmp_path):
    """Whatever its name and thresholds, and with or without tables."""
    files = [
        ctqk.create_graph_files(graph, "a", tmp_path),
        ctqk.create_graph_files(graph, "b", tmp_path, node_threshold=0.5, max_file_bytes=0),
        ctqk.create_graph_files(graph, "c", tmp_path, qk=False),
        ctqk.create_graph_files(graph, "d", tmp_path, np_model="model"),
    ]
    assert {digest_of(path) for path in files} == {graph_digest(graph)}


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_saved_graph_is_the_same_one_in_another_process(graph, tmp_path, threads):
    graph.to_pt(tmp_path / "graph.pt")
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST, str(tmp_path / "graph.pt")],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": threads},
    )
    assert printed.stdout.strip() == graph_digest(graph)


def test_other_graphs_have_other_digests(graph, model):
    others = [
        ctqk.attribute(PROMPT.replace("Sally", "Annie"), model, max_feature_nodes=60),
        ctqk.attribute(PROMPT, model, max_feature_nodes=59),
        ctqk.attribute(PROMPT, model, max_feature_nodes=60, attribution_targets=torch.tensor([5])),
    ]
    assert len({graph_digest(other) for other in [graph, *others]}) == 4


def test_one_edge_makes_another_graph(graph):
    before = graph_digest(graph)
    target, source = graph.adjacency_matrix.nonzero()[0].tolist()
    value = float(graph.adjacency_matrix[target, source])
    graph.adjacency_matrix[target, source] = value * (1 + 1e-6)
    assert graph_digest(graph) != before
    graph.adjacency_matrix[target, source] = value
    assert graph_digest(graph) == before
