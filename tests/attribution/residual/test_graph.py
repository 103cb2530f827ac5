"""The graph as its users meet it: bad input, gaps, folded norms, half precision, saving."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import circuit_tracer
import psutil
import pytest
import torch
from helpers.architectures import prompt_ids, save_tiny
from helpers.cases import Case, build
from helpers.random_dictionaries import POST, PRE, write_sae, write_wcc

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual.nodes import Nodes
from circuit_tracer_qk.attribution.residual.qk import QK


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return build("llama", tmp_path_factory.mktemp("case"), "sae", torch.float32)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_tiny("gpt2", folder)
    return folder


# What a prompt can be


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([1], "1 token after"),
        ([1] * 65, "65 tokens and the model's context is 64"),
        ([1, 97], "id 97 is out of range.*0 to 96"),
        ([1, -3], "id -3 is out of range"),
        ("some words", "no tokenizer"),
        (torch.zeros(2, 3, dtype=torch.long), r"one sequence.*\[2, 3\]"),
        ([0.5, 1.0], "integer token ids"),
        ([True, False], "integer token ids"),
        (None, "text or integer token ids, not NoneType"),
        ([1, "a"], "text or integer token ids, not list"),
    ],
)
def test_a_bad_prompt_is_one_sentence(case: Case, prompt: object, message: str) -> None:
    with pytest.raises(ctqk.UserError, match=message):
        ctqk.attribute(prompt, case.model)  # type: ignore[arg-type]


def test_a_prompt_is_ids_a_list_or_a_tensor(case: Case) -> None:
    for prompt in (case.ids, torch.tensor(case.ids), torch.tensor([case.ids])):
        assert ctqk.explain(prompt, case.model).heads.run.n_pos == len(case.ids)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((0, 0, 3, 4), "key position 4 is after query position 3"),
        ((3, 0, 3, 2), "layer 3 is out of range.*0 to 2"),
        ((-1, 0, 3, 2), "layer -1"),
        ((0, 4, 3, 2), "head 4 is out of range"),
        ((0, 0, 12, 2), "query position 12 is out of range"),
        ((0, 0, 3, -1), "key position -1"),
    ],
)
def test_indices_that_do_not_exist(case: Case, indices: tuple, message: str) -> None:
    with pytest.raises(ctqk.UserError, match=message):
        case.graph.qk(*indices)


def test_edges_that_cannot_be(case: Case) -> None:
    last = len(case.graph.adjacency_matrix) - 1
    with pytest.raises(ctqk.UserError, match="is no source"):
        case.graph.edge(last, last)
    with pytest.raises(ctqk.UserError, match="is no target"):
        case.graph.edge(0, case.graph.n_features)
    with pytest.raises(ctqk.UserError, match="no edge can join"):
        case.graph.edge(0, last)
    later = case.graph.edge(case.graph.n_features + case.n_layers * case.graph.n_pos + 11, 0)
    assert later.weight == 0, "a source after its target carries nothing"


def test_options_out_of_range(case: Case) -> None:
    options: dict[str, Any]
    for options in ({"batch_size": 0}, {"max_feature_nodes": -1}, {"max_n_logits": 0}):
        with pytest.raises(ctqk.UserError, match="it must be a whole number from [01] on"):
            ctqk.attribute(case.ids, case.model, **options)
    targets: Any
    for targets in (
        torch.tensor([400]),
        torch.tensor([5.0]),
        torch.tensor([[5, 6]]),
        torch.tensor([], dtype=torch.long),
        [("x", 0.5, torch.randn(7))],
    ):
        with pytest.raises(ctqk.UserError, match="attribution_targets"):
            ctqk.attribute(case.ids, case.model, attribution_targets=targets)
    with pytest.raises(ctqk.UserError, match="load_model"):
        ctqk.attribute(case.ids, object())  # type: ignore[arg-type]


def test_the_tokenizer_decides_what_a_prompt_is() -> None:
    """On the miniature, which has one: a single id gets its BOS; what is no text is refused."""
    model = ctqk.load_model(device="cpu")
    for prompt in ([7], torch.tensor(7)[None], torch.tensor([[7]])):
        assert model.ensure_tokenized(prompt).tolist() == [1, 7]
    with pytest.raises(ctqk.UserError, match="1 token after"):
        ctqk.attribute([1], model)
    with pytest.raises(ctqk.UserError, match="not valid Unicode"):
        ctqk.attribute("\ud83d", model)


def test_sharing_decoder_vectors_changes_nothing(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that recur are projected and go back through the MLP once, or each time."""
    from circuit_tracer_qk.attribution.residual import edges

    monkeypatch.setattr(edges, "SHARED_BYTES", 0)
    graph = ctqk.attribute(case.ids, case.model, max_n_logits=3)
    scale = case.graph.adjacency_matrix.abs().max()
    difference = (graph.adjacency_matrix - case.graph.adjacency_matrix).abs().max()
    assert 0 < float(difference) < 1e-6 * float(scale)


def test_a_default_dtype_changes_nothing(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        graph = ctqk.attribute(case.ids, case.model, max_n_logits=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(graph.adjacency_matrix, case.graph.adjacency_matrix)


def test_a_device_that_is_not_there() -> None:
    for device in ("xyz", "cuda:7"):
        with pytest.raises(ctqk.UserError, match="cannot be used here"):
            ctqk.load_model(device=device)


# Which dictionaries make a graph


def test_a_set_without_the_last_checkpoint_makes_logits_cross_the_last_block(
    gpt2: Path, tmp_path: Path
) -> None:
    model = ctqk.load_model(gpt2, dictionaries=write_sae(tmp_path / "d", 24, [0, 1]))
    graph = ctqk.attribute(prompt_ids("gpt2"), model)
    logit = len(graph.adjacency_matrix) - 1
    source = int(graph.adjacency_matrix[logit].abs().argmax())
    edge = graph.edge(source, logit)
    assert edge.layer == 2
    assert edge.weight == pytest.approx(float(graph.adjacency_matrix[logit, source]), rel=1e-4)
    assert edge.heads.total.any()


def test_checkpoints_from_0_to_the_last_have_their_slots(gpt2: Path, tmp_path: Path) -> None:
    """With a dictionary at n_layers, error slots are counted from checkpoint 1; 0 needs none."""
    folder = write_sae(tmp_path / "d", 24, [0, 1, 2, 3], hook=PRE)
    graph = ctqk.attribute(prompt_ids("gpt2"), ctqk.load_model(gpt2, dictionaries=folder))
    logit, last = len(graph.adjacency_matrix) - 1, graph.n_pos - 1
    tokens = graph.n_features + 3 * graph.n_pos
    assert not graph.adjacency_matrix[logit, tokens : tokens + graph.n_pos].any()
    error = graph.n_features + 2 * graph.n_pos + last  # of checkpoint 3
    weight = float(graph.adjacency_matrix[logit, error])
    assert weight != 0 and graph.edge(error, logit).weight == pytest.approx(weight, rel=1e-5)


def test_a_vocabulary_as_wide_as_the_model(tmp_path: Path) -> None:
    """circuit-tracer tells the unembedding's orientation by its shape; a square one has none."""
    from helpers.reference import Reference
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=24,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=3,
        tie_word_embeddings=False,
    )
    hf_model = AutoModelForCausalLM.from_config(config).eval()
    hf_model.save_pretrained(tmp_path / "model")
    folder = write_sae(tmp_path / "d", 24, [0])
    model = ctqk.load_model(tmp_path / "model", dictionaries=folder, dtype=torch.float64)
    graph = ctqk.attribute([1, 5, 7], model, max_n_logits=1)
    reference = Reference(hf_model)
    theirs = reference.logit_direction(reference.run([1, 5, 7]), graph.logit_targets[0].vocab_idx)
    assert torch.allclose(graph.record.logit_rows[0], theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layers", [[0, 2], [1, 2], [2]])
def test_another_gap_is_refused_and_qk_still_works(
    gpt2: Path, tmp_path: Path, layers: list[int]
) -> None:
    model = ctqk.load_model(gpt2, dictionaries=write_sae(tmp_path / "d", 24, layers))
    with pytest.raises(ctqk.UserError, match="none at checkpoint"):
        ctqk.attribute(prompt_ids("gpt2"), model)
    qk = ctqk.explain(prompt_ids("gpt2"), model)
    for layer in range(3):
        table = qk.table(layer, 0, 5, 3)
        assert float(table.terms.sum()) == pytest.approx(table.score, abs=1e-4)
        has = any(c.kind == "feature" for c in table.query)
        assert has == (layer - 1 in layers)


def test_a_dictionary_at_checkpoint_0_serves_qk_only(gpt2: Path, tmp_path: Path) -> None:
    model = ctqk.load_model(gpt2, dictionaries=write_sae(tmp_path / "d", 24, [0, 1, 2], hook=PRE))
    graph = ctqk.attribute(prompt_ids("gpt2"), model)
    assert int(graph.active_features[:, 0].min()) == 0  # checkpoint 1
    assert any(c.kind == "feature" for c in graph.qk(0, 0, 5, 3).query)
    slot_0 = graph.adjacency_matrix[:, graph.n_features : graph.n_features + graph.n_pos]
    assert not slot_0.any(), "error slot 0 stands for checkpoint 0, whose node is the token"


def test_a_crosscoder_at_checkpoint_0_is_refused_for_graphs(gpt2: Path, tmp_path: Path) -> None:
    folder = write_wcc(tmp_path / "d", 24, [0, 1, 2])
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(POST, PRE))
    model = ctqk.load_model(gpt2, dictionaries=folder)
    with pytest.raises(ctqk.UserError, match="reads checkpoint 0"):
        ctqk.attribute(prompt_ids("gpt2"), model)
    assert ctqk.explain(prompt_ids("gpt2"), model).table(1, 0, 5, 3).terms.numel() > 4


def test_dictionaries_of_another_model(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ctqk.UserError, match="32"):
        ctqk.load_model(gpt2, dictionaries=write_sae(tmp_path / "wide", 32, [0, 1, 2]))
    with pytest.raises(ctqk.UserError, match="n_layers"):
        ctqk.load_model(gpt2, dictionaries=write_sae(tmp_path / "deep", 24, [0, 1, 2, 3]))
    with pytest.raises(ctqk.UserError, match="dictionaries"):
        ctqk.load_model(gpt2)


def test_zero_positions_can_be_kept(gpt2: Path, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "d", 24, [0, 1, 2])
    kept = ctqk.load_model(gpt2, dictionaries=folder, zero_positions=slice(0, 0))
    graph = ctqk.attribute(prompt_ids("gpt2"), kept)
    assert bool((graph.active_features[:, 1] == 0).any())


# What a model can be


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2"])
def test_folded_norms_give_the_same_graph(name: str, tmp_path: Path) -> None:
    """Folding moves gains and biases into the weights; edges and scores stay.

    TransformerLens folds in float32 whatever the dtype (its own logits move by 1e-7), hence 1e-6.
    """
    plain = build(name, tmp_path, "sae", torch.float64)
    from circuit_tracer_qk.model.load import load_transformer

    folded = load_transformer(tmp_path / "model", dtype=torch.float64, device="cpu")
    folded.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    model = ctqk.load_model(folded, dictionaries=plain.model.dictionaries)
    graph = ctqk.attribute(plain.ids, model, max_n_logits=3)
    assert torch.equal(graph.active_features, plain.graph.active_features)
    scale = plain.graph.adjacency_matrix.abs().max()
    difference = (graph.adjacency_matrix - plain.graph.adjacency_matrix).abs().max()
    assert float(difference / scale) < 1e-6
    ours, theirs = graph.qk(1, 1, 7, 3), plain.graph.qk(1, 1, 7, 3)
    n = len([c for c in theirs.query if c.label[:4] not in ("b_Q ", "b_K ")])
    m = len([c for c in theirs.key if c.label[:4] not in ("b_Q ", "b_K ")])
    limit = 1e-6 * float(theirs.terms.abs().sum())
    assert torch.allclose(ours.terms[:n, :m], theirs.terms[:n, :m], atol=limit, rtol=0)
    assert ours.score == pytest.approx(theirs.score, abs=limit)
    row = graph.qk_row(1, 1, 7)
    assert torch.allclose(row.scores.softmax(0), row.pattern, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_bfloat16_is_contracted_in_float32(name: str, tmp_path: Path) -> None:
    """Parts still sum to the edge and terms to the score at float32's accuracy."""
    case = build(name, tmp_path, "sae", torch.bfloat16)
    assert case.model.transformer.W_E.dtype == torch.bfloat16
    graph = case.graph
    targets, sources = graph.adjacency_matrix.nonzero(as_tuple=True)
    _, _, _, parts = graph.edges(sources, targets)
    weight = parts.residual + parts.mlp + parts.total.sum(1)
    error = (weight - graph.adjacency_matrix[targets, sources]).abs().max()
    assert float(error / graph.adjacency_matrix.abs().max()) < 1e-5
    for layer in range(case.n_layers):
        table = graph.qk(layer, 1, 9, 4)
        assert table.terms.dtype == torch.float32
        error = abs(float(table.terms.sum()) - table.score)
        assert error < 1e-5 * float(table.terms.abs().sum())


# The strongest head loadings


@pytest.mark.parametrize(
    "name, kind", [("gpt2", "pre"), ("neox", "sae"), ("gemma2", "wcc"), ("qwen3", "sae")]
)
def test_the_strongest_head_loadings_are_those_of_all(name: str, kind: str, tmp_path: Path) -> None:
    """Against every loading, one pair of nodes at a time; what is no node is left to the rest."""
    graph = build(name, tmp_path, kind, torch.float64).graph
    n_features, n_pos = graph.n_features, graph.n_pos
    logits = len(graph.adjacency_matrix) - len(graph.logit_targets)
    targets = [*range(0, n_features, 7)]
    if graph.run.n_layers not in graph.record.parts.biases:
        targets.append(logits)
    found = graph.strongest(targets, 12)
    assert bool(found.exact.all()) and 0 <= found.skipped < 1
    assert bool((found.loading.abs().diff(dim=1) <= 0).all())
    for i, target in enumerate(targets):
        at, layer = graph.record.parts, int(found.layer[i])
        sources = at.tokens if layer == 0 else at.at(layer)
        nodes = Nodes(graph).of(sources)
        known = [
            n for n in nodes.tolist() if n >= 0 and graph.positions[n] <= graph.positions[target]
        ]
        every = graph.edges(known, [target] * len(known)).parts.total
        sizes = every.abs().flatten().sort(descending=True).values
        real = found.source[i] >= 0
        assert len(sizes) >= int(real.sum())
        for node, head, key, loading in zip(
            found.source[i][real].tolist(),
            found.head[i][real].tolist(),
            found.key[i][real].tolist(),
            found.loading[i][real].tolist(),
            strict=True,
        ):
            assert abs(every[known.index(node), head] - loading) <= 1e-10 * float(sizes[0])
            assert int(graph.positions[node]) == key
        mine = found.loading[i][real].abs()
        assert torch.allclose(mine, sizes[: len(mine)], rtol=1e-10, atol=1e-14)  # none is missing
        least = found.loading[i, -1].abs()
        assert int((sizes > least * (1 + 1e-9)).sum()) <= len(mine)
    assert n_pos > 0


def test_both_ways_of_weighing_give_the_same_edges(tmp_path: Path) -> None:
    """Targets weighted and added up over a group's heads (CPU), or sources weighted (GPU)."""
    from circuit_tracer_qk.attribution.residual import edges

    case = build("mistral", tmp_path, "wcc", torch.float64)  # groups, and a window
    record = case.graph.record
    y = torch.randn(9, case.model.cfg.d_model, dtype=torch.float64)
    positions = torch.tensor([1, 1, 2, 5, 5, 5, 8, 9, 9])
    targets, runs = edges.Targets(positions, y, y.flip(0)), edges.runs_of(positions)
    block = edges.BlockEdges(record.parts, record.heads, 1)
    assert block.by_target
    ours = block.rows(targets, runs)
    block.by_target = False
    theirs = block.rows(targets, runs)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))
    assert bool((ours == 0).any()) and bool(theirs.any())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
def test_an_adjacency_takes_the_memory_of_what_is_written() -> None:
    from circuit_tracer_qk.attribution.residual.influence import unwritten_zeros

    n, process = 20_000, psutil.Process()
    before = process.memory_info().rss
    adjacency = unwritten_zeros(n, torch.device("cpu"))  # 1.6 GB
    for row in range(0, n, 20):
        adjacency[row, row // 2 : row // 2 + 100] = 1.0
    assert process.memory_info().rss - before < 50e6
    assert adjacency.shape == (n, n) and float(adjacency[:, ::10].sum()) == n / 20 * 10


def test_in_inference_mode_too(case: Case) -> None:
    options: dict[str, Any] = {"max_n_logits": 2, "max_feature_nodes": 30}
    expected = ctqk.attribute(case.ids, case.model, **options)
    with torch.inference_mode():
        graph = ctqk.attribute(case.ids, case.model, **options)
        found, table = graph.strongest([0, 5], 3), graph.qk(1, 0, 5, 3)
    assert torch.equal(graph.adjacency_matrix, expected.adjacency_matrix)
    assert torch.equal(found.loading, expected.strongest([0, 5], 3).loading)
    assert torch.equal(table.terms, expected.qk(1, 0, 5, 3).terms)


def test_results_need_no_gradients(case: Case) -> None:
    """Also those of a model of the user's own, whose weights do."""
    model = case.model
    before = [p.requires_grad for p in model.transformer.parameters()]
    try:
        model.transformer.requires_grad_(True)
        graph = ctqk.attribute(case.ids, model, max_n_logits=2)
        found = graph.strongest([0, 5], 3)
        edge = graph.edge(int(found.source[1, 0]), 5)
        [(_, top)] = graph.qk_tops([Place(1, 0, 5, 3)])
        for tensor in (found.loading, found.share, edge.heads.total, top.values, top.scores):
            assert not tensor.requires_grad
        assert not graph.qk(1, 0, 5, 3).terms.requires_grad
    finally:
        for parameter, needs in zip(model.transformer.parameters(), before, strict=True):
            parameter.requires_grad_(needs)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda g: list(g.qk_tops([(1, 0, 5, 3)], 0)), "n is 0"),
        (lambda g: g.qk_top(1, 0, 5, -1), "n is -1"),
        (lambda g: g.qk(1, 0, 5, 3).top(0), "n is 0"),
        (lambda g: list(g.qk_tops([(1, 0, 5)])), "no place"),
        (lambda g: list(g.qk_tops(Place(1, 0, 5, 3))), "no place"),
        (lambda g: list(g.qk_tops([(1, 0, 5, 3.5)])), "no place"),
        (lambda g: g.strongest([5], 2.5), "n is 2.5"),
        (lambda g: g.strongest([5], 2, 1.5), "budget is 1.5"),
        (lambda g: g.strongest(5), "no targets"),
        (lambda g: g.strongest([[1, 2]]), "no targets"),
        (lambda g: g.strongest([0.7]), "no targets"),
        (lambda g: g.strongest([True, False]), "no targets"),
        (lambda g: g.strongest("ab"), "no targets"),
    ],
)
def test_mistakes_of_many(case: Case, call: Callable[[Any], object], words: str) -> None:
    with pytest.raises(ctqk.UserError, match=words):
        call(case.graph)


def test_places_and_targets_however_they_are_written(case: Case) -> None:
    graph = case.graph
    places = [Place(1, 0, 5, 3), Place(1, 0, 5, 2), Place(0, 1, 4, 4)]
    expected = [at for at, _ in graph.qk_tops(places)]
    for same in (torch.tensor(places), [list(p) for p in places], [*places, *places]):
        assert [at for at, _ in graph.qk_tops(same)] == expected  # type: ignore[arg-type]
    assert graph.strongest([]).loading.shape == (0, 20)
    twice = graph.strongest([5, 0, 5], 4)
    assert torch.equal(twice.loading[0], twice.loading[2])


def test_threads_share_what_is_projected(case: Case) -> None:
    record = case.graph.record
    scores = QK(record.parts, record.heads, lambda c, f: "", keep_bytes=3000)
    expected = {q: scores.top(1, 0, q, 5).values for q in range(2, 9)}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda q: (q, scores.top(1, 0, q, 5).values), [*expected] * 12))
    assert all(torch.equal(values, expected[q]) for q, values in found)
    kept = sum(image.nbytes for image in scores.projected.values())
    assert kept == scores.kept_bytes


def test_a_deep_crosscoder_comes_back_in_its_order(tmp_path: Path) -> None:
    """In a file's order of names checkpoint 10 stands before 2."""
    save_tiny("gpt2", tmp_path / "model", n_layer=12)
    write_wcc(tmp_path / "wcc", 24, list(range(12)))
    model = ctqk.load_model(tmp_path / "model", dictionaries=tmp_path / "wcc", device="cpu")
    graph = ctqk.attribute(prompt_ids("gpt2", 8), model, max_n_logits=2)
    graph.to_pt(tmp_path / "deep.pt")
    back = ctqk.load_graph(tmp_path / "deep.pt")
    for layer in (9, 11):
        ours, theirs = back.qk(layer, 0, 5, 3), graph.qk(layer, 0, 5, 3)
        assert ours.query == theirs.query and torch.equal(ours.terms, theirs.terms)
        reads = [c.checkpoint for c in ours.query if c.kind == "feature"]
        assert reads == sorted(reads)


def test_a_budget_says_what_it_cut(case: Case) -> None:
    graph, targets = case.graph, range(0, case.graph.n_features, 5)
    whole = graph.strongest(targets, 10)
    for budget in (1, 5, 20):
        some = graph.strongest(targets, 10, budget)
        assert some.skipped > whole.skipped or bool(some.exact.all())
        size = some.loading.abs().sum(1)
        assert bool((size <= whole.loading.abs().sum(1) * (1 + 1e-6)).all())
        same = torch.isclose(some.loading, whole.loading, rtol=1e-5).all(1)
        assert bool(same[some.exact].all())
        # the share is a lower bound: of the true sum, it is at most what the listed have
        everything = graph.strongest(targets, 4000).loading.abs().sum(1)
        assert bool((some.share * everything <= size * (1 + 1e-5)).all())
    with pytest.raises(ctqk.UserError, match="n is 0"):
        graph.strongest(targets, 0)
    with pytest.raises(ctqk.UserError, match="no target"):
        graph.strongest([graph.n_features], 3)


# Saving


def test_a_saved_graph_comes_back_bit_for_bit(tmp_path: Path) -> None:
    case = build("gemma2", tmp_path, "wcc", torch.float32)
    path = tmp_path / "graph.pt"
    case.graph.to_pt(str(path))
    back = ctqk.load_graph(path)
    assert torch.equal(back.adjacency_matrix, case.graph.adjacency_matrix)
    for layer in range(case.n_layers):
        ours, theirs = back.qk(layer, 1, 9, 7), case.graph.qk(layer, 1, 9, 7)
        assert torch.equal(ours.terms, theirs.terms) and ours.score == theirs.score
        assert ours.query == theirs.query and ours.key == theirs.key
        rows = back.qk_row(layer, 0, 9), case.graph.qk_row(layer, 0, 9)
        assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    targets, sources = back.adjacency_matrix.nonzero(as_tuple=True)
    for a, b in zip(
        back.edges(sources, targets).parts, case.graph.edges(sources, targets).parts, strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(back.bias_edges, case.graph.bias_edges)
    blocks = zip(back.scores.heads.blocks, case.graph.scores.heads.blocks, strict=True)
    for ours, theirs in blocks:
        assert ours.ln1.eps == theirs.ln1.eps > 0 and ours.post.eps == theirs.post.eps
    stock = circuit_tracer.Graph.from_pt(str(path))
    assert type(stock) is circuit_tracer.Graph
    assert torch.equal(stock.adjacency_matrix, back.adjacency_matrix)


def test_saved_files_that_cannot_be_read(case: Case, tmp_path: Path) -> None:
    path, second = tmp_path / "g.pt", tmp_path / "g.pt.qk.safetensors"
    with pytest.raises(ctqk.UserError, match="no graph file"):
        ctqk.load_graph(path)
    case.graph.to_pt(str(path))
    whole, record = path.read_bytes(), second.read_bytes()

    second.unlink()
    with pytest.raises(ctqk.UserError, match="beside the .pt"):
        ctqk.load_graph(path)
    second.write_bytes(record[: len(record) // 2])
    with pytest.raises(ctqk.UserError, match="damaged"):
        ctqk.load_graph(path)
    second.write_bytes(record)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ctqk.UserError, match="damaged"):
        ctqk.load_graph(path)

    ctqk.attribute([*case.ids, 5], case.model).to_pt(str(path))
    second.write_bytes(record)
    with pytest.raises(ctqk.UserError, match="different graphs"):
        ctqk.load_graph(path)


def test_a_graph_is_known_again_on_another_number_of_cores(tmp_path: Path):
    """Sums over many edges round in another way there."""
    graph = ctqk.attribute("I always loved visiting Aunt Sally. I like Aunt", ctqk.load_model())
    graph.to_pt(tmp_path / "graph.pt")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ctqk.load_graph(tmp_path / "graph.pt")
    finally:
        torch.set_num_threads(before)


def test_a_graph_that_cannot_be_written(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ctqk.UserError, match="nowhere"):
        case.graph.to_pt(tmp_path / "nowhere" / "g.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ctqk.UserError, match="it is a folder"):
        case.graph.to_pt(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_leaves_both_old_files(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two files does not fit, neither is replaced."""
    path = tmp_path / "g.pt"
    case.graph.to_pt(path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    other = ctqk.attribute([*case.ids, 5], case.model)
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ctqk.UserError, match="No space left"):
        other.to_pt(path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    ctqk.load_graph(path)


def test_graphs_side_by_side_keep_their_own_records(case: Case, tmp_path: Path) -> None:
    other = ctqk.attribute([*case.ids, 5], case.model)
    for a, b in (("h.1", "h.2"), ("k", "k.pt"), ("x.bin", "x.pt")):
        case.graph.to_pt(tmp_path / a)
        other.to_pt(tmp_path / b)
        assert ctqk.load_graph(tmp_path / a).n_pos == len(case.ids)
        assert ctqk.load_graph(tmp_path / b).n_pos == len(case.ids) + 1
