"""Gemma-3 270M: tables, edges of both kinds of graph and steering, against Hugging Face's weights in float64.

Under `make test-all` only, where its packages are (`tests/helpers/gemma3.py`). Two kinds of attention
with two rotary bases, windows, QK-norm and a vocabulary of 262,144.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from helpers.errors import record_error
from helpers.gemma3 import gguf_file
from helpers.random_dictionaries import write_sae
from helpers.random_transcoders import random_transcoders
from helpers.reference import Reference, Run
from helpers.transcoder_reference import adjacency
from transformers import AutoModelForCausalLM

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.host.patching import replacement_model
from circuit_tracer_qk.model.load import load_transformer

PROMPT = "I met Aunt Sally. I like Aunt"
IDS = [2, 236777, 1645, 74749, 48795, 236761, 564, 1133, 74749]
LOCAL, GLOBAL = (0, 4, 12), (5, 11, 17)
PLACE = ("mlp.hook_in", "hook_mlp_out")
pytestmark = pytest.mark.filterwarnings("ignore:.*FVU above 1")


class Real(NamedTuple):
    """The model as Hugging Face runs it, in plain tensors, and as this package reads it."""

    theirs: Any
    reference: Reference
    run: Run
    model: ctqk.ResidualModel
    file: Any


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    if not request.config.getoption("--all"):
        pytest.skip("takes minutes and 10 GB: make test-all")
    folder = tmp_path_factory.mktemp("gemma3")
    file = gguf_file(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    write_sae(folder / "saes", 640, list(range(18)))
    model = ctqk.load_model(file, folder / "saes", device="cpu")
    reference = Reference(theirs)
    return Real(theirs, reference, reference.run(IDS), model, file)


@pytest.fixture(scope="module")
def graph(real: Real) -> ctqk.ResidualGraph:
    return ctqk.attribute(PROMPT, real.model, max_feature_nodes=200, max_n_logits=2)


def test_text_becomes_its_own_tokens_and_the_answer_follows(real: Real) -> None:
    assert real.model.ensure_tokenized(PROMPT).tolist() == IDS
    assert real.model.zero_positions == slice(0, 1)
    probabilities = real.run.logits[-1].softmax(0)
    answer = real.model.tokenizer(" Sally", add_special_tokens=False).input_ids
    assert float(probabilities[answer[0]]) == pytest.approx(0.99, abs=0.01)


def test_scores_are_those_of_an_independent_pass(real: Real, graph: ctqk.ResidualGraph) -> None:
    worst, last = 0.0, len(IDS) - 1
    for layer in (*LOCAL, *GLOBAL):
        for head, query, key in ((0, last, 4), (3, last, 0), (1, 6, 3)):
            table = graph.qk(layer, head, query, key)
            size = float(table.terms.abs().sum())
            expected = float(real.run.scores[layer][head, query, key])
            worst = max(worst, abs(float(table.terms.double().sum()) - expected) / size)
            worst = max(worst, abs(table.score - expected) / size)
    record_error("Gemma-3 270M: scores (float32)", "gemma3", worst)
    assert worst < 1e-5


def test_edges_are_those_of_a_frozen_block(real: Real, graph: ctqk.ResidualGraph) -> None:
    worst, seen = 0.0, set()
    features = graph.adjacency_matrix[: graph.n_features, : graph.n_features]
    active = graph.active_features[graph.selected_features]
    acts = graph.activation_values[graph.selected_features].double()
    known = real.model.dictionaries.by_checkpoint

    def written(node: int) -> tuple[int, int, torch.Tensor]:
        layer, position, feature = active[node].tolist()
        row = known[layer + 1].vectors(layer + 1, torch.tensor([feature]))[0].double()
        return layer + 1, position, acts[node] * row

    for i in features.abs().flatten().topk(1000).indices.tolist():
        target, source = divmod(i, graph.n_features)
        (layer, at, v), (_, to, y) = written(source), written(target)
        if (layer, at == to) in seen:
            continue
        seen.add((layer, at == to))
        with torch.enable_grad():
            paths = real.reference.path_gradients(real.run, layer, y, to)
        total = paths.residual + paths.mlp + paths.heads.sum(0)
        parts = (paths.residual[at] @ v, paths.mlp[at] @ v, *(paths.heads[:, at] @ v))
        size = sum(abs(float(part)) for part in parts)
        worst = max(worst, abs(float(features[target, source]) - float(total[at] @ v)) / size)
    record_error("Gemma-3 270M: edges (float32)", "gemma3", worst)
    assert len(seen) >= 8 and worst < 1e-5


@contextmanager
def without_head(theirs: Any, layer: int, head: int) -> Iterator[None]:
    """Hugging Face's model while one head writes nothing."""
    d_head = theirs.config.head_dim

    def cut(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., head * d_head : (head + 1) * d_head] = 0
        return (z,)

    hook = theirs.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


def test_steering_a_head_is_the_model_without_it(real: Real) -> None:
    worst = 0.0
    for layer, head in ((4, 1), (11, 2)):
        run = ctqk.steer(real.model, PROMPT, [ctqk.HeadEdit((layer, head), 0.0)], controls=0)
        with without_head(real.theirs, layer, head), torch.no_grad():
            expected = real.theirs(torch.tensor([IDS])).logits[0, -1]
        spread = float(expected.max() - expected.min())
        worst = max(worst, float((run.logits - expected).abs().max()) / spread)
        assert float((run.logits - run.clean.logits).abs().max()) > 1e-3 * spread
    record_error("Gemma-3 270M: steered logits (float32)", "gemma3", worst)
    assert worst < 1e-5


def test_transcoder_edges_are_those_of_an_independent_frozen_pass(real: Real) -> None:
    transcoders = random_transcoders(18, 640, "relu", *PLACE, d_dict=64)
    model = replacement_model(load_transformer(real.file, device="cpu"), transcoders)
    graph = ctqk.attribute(PROMPT, model, max_n_logits=2, max_feature_nodes=120, batch_size=32)
    assert isinstance(graph, ctqk.TranscoderGraph)
    edges = graph.adjacency_matrix.double()
    expected = adjacency(real.reference, real.run, graph, transcoders, IDS)
    worst = float((edges - expected).abs().max() / expected.abs().max())
    n_tokens = slice(len(edges) - 2 - len(IDS), len(edges) - 2)
    tokens = float((edges - expected)[:, n_tokens].abs().max() / expected[:, n_tokens].abs().max())
    record_error("Gemma-3 270M: transcoder edges (float32)", "gemma3", max(worst, tokens))
    assert worst < 1e-5 and tokens < 1e-5
