"""stories260K: a small real model with real dictionaries, beside the repository where it exists."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import circuit_tracer_qk as ctqk

PROMPT = (
    "Once upon a time, there was a little boy named Bob. He was very happy. "
    'One day, a man said, "Hello, B'
)


@pytest.fixture(scope="module", params=["sae", "wcc"])
def model(request: pytest.FixtureRequest, shared: Path) -> ctqk.ResidualModel:
    folder = shared / "stories260K"
    if not folder.is_dir():
        pytest.skip("needs shared/stories260K")
    return ctqk.load_model(folder / "model", dictionaries=folder / request.param, device="cpu")


def test_a_real_graph_adds_up_and_is_fast(model: ctqk.ResidualModel) -> None:
    """All features kept: every edge and a score of every head, within 10 s."""
    tokens = model.ensure_tokenized(PROMPT + "ob and I am very happy")[:40]
    assert len(tokens) == 40
    start = time.perf_counter()
    graph = ctqk.attribute(tokens, model)
    A = graph.adjacency_matrix
    assert graph.n_features == len(graph.active_features)
    targets, sources = A.nonzero(as_tuple=True)
    layer, query, key, parts = graph.edges(sources, targets)
    weight = parts.residual + parts.mlp + parts.total.sum(1)
    scale = A.abs().max(1).values[targets]
    assert float(((weight - A[targets, sources]).abs() / scale).max()) < 1e-5
    across = (query != key) & (layer >= 0)
    assert not parts.residual[across].any() and not parts.mlp[across].any()
    for block in range(5):
        for head in range(8):
            for q, k in ((39, 15), (39, 38), (20, 20), (39, 0)):
                table = graph.qk(block, head, q, k)
                error = abs(float(table.terms.sum()) - table.score)
                assert error < 1e-5 * float(table.terms.abs().sum())
            row = graph.qk_row(block, head, 39)
            assert torch.allclose(row.scores.softmax(0), row.pattern, atol=1e-5)
    assert time.perf_counter() - start < 10


def test_bobs_first_letter_is_copied_by_the_heads_that_look_at_it(
    model: ctqk.ResidualModel,
) -> None:
    """shared/stories260K/README.md: L4H0 and L4H1 attend to the first name's "o"."""
    graph = ctqk.attribute(PROMPT, model)
    assert graph.logit_targets[0].token_str == "o"
    assert float(graph.logit_probabilities[0]) == pytest.approx(0.959, abs=2e-3)
    for head, attention in ((0, 0.93), (1, 0.96)):
        row = graph.qk_row(4, head, graph.n_pos - 1)
        assert int(row.pattern.argmax()) == 15
        assert float(row.pattern[15]) == pytest.approx(attention, abs=6e-3)
    if model.dictionaries.kind == "residual_sae_set":
        table = graph.qk(4, 1, graph.n_pos - 1, 15)
        top = sorted(zip(table.key_marginal.tolist(), table.key, strict=True), reverse=True)
        named = {c.feature for _, c in top[:8]}
        assert {444, 344} & named, "the key features that carry the effect rank high"


def test_two_key_features_carry_bobs_copy_and_others_do_not(model: ctqk.ResidualModel) -> None:
    """shared/stories260K/README.md: .959 to .187 without 444 and 344; no other pair below .770."""
    if model.dictionaries.kind != "residual_sae_set":
        pytest.skip("the features are the SAEs'")
    edit = ctqk.QKEdit([(4, 0), (4, 1)], "key", 4, [444, 344], positions=15, factor=0.0)
    run = ctqk.steer(model, PROMPT, [edit], norms="frozen", controls=20, seed=0)
    assert run.clean.probability("o") == pytest.approx(0.959, abs=1e-3)
    assert run.probability("o") == pytest.approx(0.187, abs=1e-3)
    assert len(run.controls) == 20
    assert min(control.probability("o") for control in run.controls) >= 0.770
    assert min(control.probability("o") for control in run.head_controls) >= 0.95
