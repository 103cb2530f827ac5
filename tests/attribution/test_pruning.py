"""Which nodes are kept, against influence added up path by path in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers.cases import build
from helpers.errors import record_error
from helpers.schema import SCHEMA
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.pruning import error_share, prune
from circuit_tracer_qk.attribution.residual.graph import ResidualGraph

SELECTIONS = ["circuit-tracer", "explained"]


def by_paths(graph: ExplainedGraph, explained: bool) -> tuple[Tensor, Tensor]:
    """Influence of every node, and of every edge: walked down from the logits, edge by edge."""
    size = graph.adjacency_matrix.double().abs()
    n, (errors, tokens, logits, _) = len(size), graph.first_indices()
    shared = size.clone()
    if explained:
        shared[:, errors:tokens] = 0
    influence = torch.zeros(n, dtype=torch.float64)
    paths = [(i, float(p)) for i, p in enumerate(graph.logit_probabilities, logits)]
    for i, p in paths:
        influence[i] = p
    while paths:
        reached: dict[int, float] = {}
        for target, value in paths:
            total = float(shared[target].sum())
            for source in shared[target].nonzero().flatten().tolist():
                part = value * float(shared[target, source]) / total
                reached[source] = reached.get(source, 0.0) + part
        for source, value in reached.items():
            influence[source] += value
        paths = list(reached.items())
    edges = torch.zeros_like(size)
    for target in range(n):
        if float(size[target].sum()):
            edges[target] = size[target] / size[target].sum() * influence[target]
    if explained:
        influence[errors:tokens] = edges[:, errors:tokens].sum(0)
    return influence, edges


@pytest.fixture(scope="module", params=SELECTIONS)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    case = build("llama", tmp_path_factory.mktemp("case"), "sae", torch.float32)
    return ctqk.attribute(
        case.ids, case.model, max_n_logits=2, max_feature_nodes=20, select=request.param
    )


@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("kind", ["sae", "wcc"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_influence_is_that_of_all_paths(name: str, kind: str, select: str, tmp_path: Path) -> None:
    case = build(name, tmp_path, kind, torch.float64)
    whole = ctqk.attribute(case.ids, case.model, max_n_logits=2, select=select)
    influence, _ = by_paths(whole, select == "explained")
    found = prune(whole, 0.8, 0.98).influence.double()
    error = float((found - influence).abs().max() / influence.max())
    record_error("Influence = sum over all paths, float32", name, error)
    assert error < 1e-5
    n = whole.n_features
    some = ctqk.attribute(
        case.ids, case.model, max_n_logits=2, max_feature_nodes=n // 3, select=select
    )
    best = influence[:n].topk(n // 3).indices
    kept = some.active_features[some.selected_features].tolist()
    # ties between equal influences may fall either way
    assert {tuple(k) for k in kept} == {tuple(k) for k in whole.active_features[best].tolist()}


def test_errors_are_kept_by_the_share_that_they_take(graph: ResidualGraph) -> None:
    explained = graph.select == "explained"
    influence, edges = by_paths(graph, explained)
    kept = prune(graph, 0.8, 0.98)
    errors, tokens, _, _ = graph.first_indices()
    assert kept.nodes[:errors].any() and kept.nodes[tokens:].all()
    assert not kept.edges[~kept.nodes].any() and not kept.edges[:, ~kept.nodes].any()
    assert kept.edges[:, :tokens].any(0)[kept.nodes[:tokens]].all()
    if not explained:
        return
    least = influence[:errors][kept.nodes[:errors]].min() * (1 - 1e-5)
    assert (influence[errors:tokens][kept.nodes[errors:tokens]] >= least).all()
    least = edges[kept.edges].min() * (1 - 1e-5)
    here = kept.edges[:, errors:tokens]
    assert (edges[:, errors:tokens][here] >= least).all()
    assert ((kept.cumulative >= 0) & (kept.cumulative <= 1 + 1e-5)).all()


def test_the_file_tells_influence_and_error_shares(graph: ResidualGraph, tmp_path: Path) -> None:
    page = ctqk.create_graph_files(graph, "g", tmp_path)
    document = json.loads(page.read_bytes())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert document["qk"]["select"] == graph.select
    _, edges = by_paths(graph, graph.select == "explained")
    size = graph.adjacency_matrix.abs().sum(1)
    errors, tokens, logits, _ = graph.first_indices()
    for link in document["links"]:
        assert link["influence"] <= 1.00001
    largest = max(link["influence"] for link in document["links"])
    assert largest == pytest.approx(float(edges.max()), rel=1e-5)
    shares = [n["qk_error_share"] for n in document["nodes"] if n["feature_type"] == "logit"]
    expected = graph.adjacency_matrix[logits:, errors:tokens].abs().sum(1) / size[logits:]
    assert shares == pytest.approx(expected.tolist(), rel=1e-5)
    told = document["qk"]["error_share"]
    replacement = 1 - told["share"]
    stock, _ = by_paths(graph, False)
    at_errors, at_tokens = stock[errors:tokens].sum(), stock[tokens:logits].sum()
    assert replacement == pytest.approx(float(at_tokens / (at_tokens + at_errors)), abs=1e-5)
    assert sum(share for _, share in told["layers"]) == pytest.approx(told["share"], abs=1e-5)
    assert error_share(graph).share == pytest.approx(told["share"], abs=1e-6)


def test_the_rule_is_saved_and_leaves_edges_alone(graph: ResidualGraph, tmp_path: Path) -> None:
    graph.to_pt(tmp_path / "g.pt")
    assert ctqk.load_graph(tmp_path / "g.pt").select == graph.select


def test_a_file_that_says_little_says_why(tmp_path: Path) -> None:
    case = build("llama", tmp_path, "sae", torch.float32)
    for dictionary in case.model.dictionaries.by_checkpoint.values():
        for decoder in dictionary.decoders.values():
            decoder.mul_(1e-4)  # they explain next to nothing
    poor = ctqk.attribute(case.ids, case.model, max_n_logits=1, select="circuit-tracer")
    with pytest.warns(UserWarning, match=r"errors take \d+% of the influence.*--select explained"):
        ctqk.create_graph_files(poor, "poor", tmp_path / "files")


def test_a_graph_that_says_much_is_quiet(graph: ResidualGraph, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if error_share(graph).share < 0.9:
            ctqk.create_graph_files(graph, "g", tmp_path)


def test_what_is_no_rule_is_refused(tmp_path: Path) -> None:
    case = build("llama", tmp_path, "sae", torch.float32)
    with pytest.raises(ctqk.UserError, match="select is 'best': it must be one of"):
        ctqk.attribute(case.ids, case.model, select="best")
