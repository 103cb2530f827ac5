"""Tables made many at once are those made one by one, over architectures, windows and sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.architectures import prompt_ids, save_tiny
from helpers.random_dictionaries import write_sae, write_wcc

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual import batches as made
from circuit_tracer_qk.graph_files.tables import largest_terms

N_POS = 9


@pytest.fixture(scope="module", params=["gpt2", "mistral", "gemma2", "qwen3", "neox", "wcc"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name = "gpt2" if request.param == "wcc" else request.param
    folder = tmp_path_factory.mktemp(request.param)
    config = save_tiny(name, folder / "model").config
    write = write_wcc if request.param == "wcc" else write_sae
    write(folder / "set", config.hidden_size, list(range(config.num_hidden_layers)))
    model = ctqk.load_model(folder / "model", dictionaries=folder / "set", device="cpu")
    return ctqk.attribute(prompt_ids(name, N_POS), model, max_n_logits=3)


def visible(graph: ctqk.ResidualGraph) -> list[Place]:
    n_layers, n_heads = graph.run.pattern.shape[:2]
    return [
        Place(layer, head, query, key)
        for layer in range(n_layers)
        for head in range(n_heads)
        for query in range(N_POS)
        for key in range(graph.scores.heads.block(layer).first_key(query), query + 1)
    ]


@pytest.mark.parametrize("wide", [None, 150], ids=["narrow", "some wide"])
@pytest.mark.parametrize("size", [made.BATCH_TERMS, 1], ids=["together", "alone"])
def test_batches_are_the_single_tables(
    graph: ctqk.ResidualGraph, monkeypatch: pytest.MonkeyPatch, wide: int | None, size: int
):
    places = visible(graph)[:: 1 if size > 1 else 7]
    monkeypatch.setattr(made, "BATCH_TERMS", size)
    if wide is not None:
        monkeypatch.setattr(made, "WIDE_TERMS", wide)
    found, rows, worst = {}, {}, 0.0
    for batch in graph.batches(reversed(places)):
        assert size > 1 or len(batch.places) == 1
        assert not set(rows) & set(batch.rows)
        rows |= batch.rows
        numbers = zip(batch.score, batch.score_capped, batch.pattern, strict=True)
        for (place, table), some in zip(batch.each(), numbers, strict=True):
            found[place] = table, *map(float, some)
    assert sorted(found) == sorted(places)
    for place, (table, score, capped, pattern) in found.items():
        expected = graph.qk(*place)
        assert list(table.query) == expected.query and list(table.key) == expected.key
        size_of = float(expected.terms.abs().sum())
        worst = max(worst, float((table.terms - expected.terms).abs().max()) / size_of)
        assert score == pytest.approx(expected.score, rel=1e-12, abs=1e-12 * size_of)
        assert capped == pytest.approx(expected.score_capped, rel=1e-12, abs=1e-12 * size_of)
        assert pattern == float(graph.run.pattern[place])
        assert abs(float(table.terms.double().sum()) - score) < 1e-5 * size_of
    assert worst < 1e-6
    assert set(rows) == {place[:3] for place in places}
    for at, row in rows.items():
        for ours, theirs in zip(row, graph.qk_row(*at), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_places_in_order_of_query(graph: ctqk.ResidualGraph):
    order = [place for batch in graph.batches(visible(graph)) for place in batch.places]
    assert order == sorted(order, key=lambda p: (p.layer, p.query, p.key, p.head))


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 400, 7), (1, 1, 1), (4, 90, 90)])
@pytest.mark.parametrize("of_sign", [0, 4])
def test_the_largest_terms(shape: tuple[int, int, int], of_sign: int):
    terms = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    terms[terms.abs() < 0.3] = 0
    terms[0] = terms[0].abs()
    index, count = largest_terms(terms, 20, of_sign)
    for some, at, n in zip(terms.flatten(1), index, count.tolist(), strict=True):
        by_size = [i for i in some.abs().argsort(descending=True).tolist() if some[i]]
        expected = set(by_size[:20])
        for sign in (1, -1):
            expected |= set([i for i in by_size if sign * some[i] > 0][:of_sign])
        assert at[:n].tolist() == [i for i in by_size if i in expected]


def test_no_places(graph: ctqk.ResidualGraph, tmp_path: Path):
    assert list(graph.batches([])) == []
