"""Scores as sums over a transcoder graph's sources, against sources carried by Hugging Face's
weights and projected there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import circuit_tracer
import pytest
import torch
from helpers.architectures import ARCHITECTURES, prompt_ids, save_tiny
from helpers.linear_blocks import Case, linear_block
from helpers.random_transcoders import KINDS, PLACES, columns_of, replacement_model
from helpers.reference import Reference
from torch import Tensor

from circuit_tracer_qk import UserError
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.transcoder.nodes import TranscoderRun, read_transcoder_graph
from circuit_tracer_qk.attribution.transcoder.qk import UNSELECTED, TranscoderQK
from circuit_tracer_qk.host import graph as host

N = 9


def build(folder: Path, name: str, kind: str) -> tuple[TranscoderQK, Case]:
    hf_model = save_tiny(name, folder)
    place = list(PLACES)[(2 + KINDS.index(kind)) % 3]
    reads, writes = PLACES["mlp.hook_in" if name == "neox" and "mid" in place else place]
    model: Any = replacement_model(folder, kind, reads, writes)
    ids = prompt_ids(name, N)
    graph = circuit_tracer.attribute(
        ids, model, max_n_logits=2, max_feature_nodes=25, batch_size=16
    )
    run = read_transcoder_graph(model, graph, columns_of(model, graph))
    reference = Reference(hf_model)
    skips = [None if s is None else s.double() for s in host.skip_weights(model)]
    case = Case(reference, reference.run(ids), run.blocks, reads, writes, skips)
    return TranscoderQK(run, lambda checkpoint, feature: f"{checkpoint}:{feature}"), case


def carried(case: Case, run: TranscoderRun, sources: list[int], layer: int) -> Tensor:
    """(P, d) float64: some sources carried to a block by the independent forward pass."""
    x = torch.zeros_like(case.run.residual[0])
    for at in range(-1, layer):
        if at >= 0:
            x = linear_block(case, at, x)[1]
        here = torch.isin(run.writes.source, torch.tensor(sources)) & (run.writes.layer == at)
        x = x.index_add(0, run.writes.position[here], run.writes.vector[here].double())
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_sums_over_sources(tmp_path, record_error, name, kind):
    qk, case = build(tmp_path, name, kind)
    run, reference = qk.parts, case.reference
    worst = 0.0
    by_row: dict[int, list[int]] = {}
    for source, row in enumerate(qk.row_of.tolist()):
        by_row.setdefault(row, []).append(source)
    for layer, query, key in ((0, 5, 2), (1, 8, 8), (reference.n_layers - 1, 8, 3)):
        head = reference.n_heads - 1
        table = qk.table(layer, head, query, key)
        scale = float(table.terms.abs().sum())
        expected = float(case.run.scores[layer][head, query, key])
        worst = max(worst, abs(table.score - expected) / scale)
        worst = max(worst, abs(float(table.terms.double().sum()) - expected) / scale)
        rows = qk.rows_reaching(layer, query).tolist(), qk.rows_reaching(layer, key).tolist()
        assert len(table.query) == len(rows[0]) + qk.heads.has_constants(layer)
        for i in range(0, len(rows[0]), 7):  # some rows, by another way
            x = carried(case, run, by_row[rows[0][i]], layer)[query]
            q = reference.q_vector(case.run, layer, head, query, x)
            for j in range(0, len(rows[1]), 11):
                y = carried(case, run, by_row[rows[1][j]], layer)[key]
                k = reference.k_vector(case.run, layer, head, key, y)
                term = float(q @ k) / reference.attn_scale
                worst = max(worst, abs(float(table.terms[i, j]) - term) / scale)
    record_error("transcoder QK terms (float32)", name, worst)
    worst_batched, n_heads = 0.0, reference.n_heads
    places = [
        Place(layer, head, query, key)
        for layer in range(reference.n_layers)
        for head, query, key in ((0, 0, 0), (n_heads - 1, 8, 5), (1, 6, 6), (0, 8, 5))
    ]
    batched = list(qk.tables(places))
    assert {(t.layer, t.head, t.query_position, t.key_position) for t in batched} == set(places)
    for table in batched:
        single = qk.table(table.layer, table.head, table.query_position, table.key_position)
        assert (table.query, table.key, table.score) == (single.query, single.key, single.score)
        scale = float(single.terms.abs().sum())
        off = float((table.terms - single.terms).abs().max()) / max(scale, 1e-30)
        worst_batched = max(worst_batched, off)
    record_error("transcoder QK tables, batched (float32)", name, worst_batched)
    worst = max(worst, worst_batched)
    assert worst < 1e-5


def test_components_name_what_they_are(tmp_path):
    qk, _ = build(tmp_path, "gpt2", "clt")
    table = qk.table(2, 1, 7, 4)
    names = [(c.kind, c.checkpoint, c.feature, c.position, c.label) for c in table.query]
    assert len(set(names)) == len(names)
    labels = {c.label for c in table.query if c.kind in ("bias", "error", "position")}
    assert labels >= {"b_dec", "attention biases", "position", UNSELECTED, "b_Q + b_ln W_Q"}
    features = [c for c in table.query if c.kind == "feature"]
    assert {c.position for c in features} > {7}  # sources at earlier positions too
    assert all(c.label == f"{c.checkpoint}:{c.feature}" and c.activation for c in features)
    assert all(c.position <= 4 for c in table.key)
    assert sum(table.blocks.values()) == pytest.approx(table.score, rel=1e-4)
    row = qk.row(2, 1, 7)
    assert float(row.scores_raw[4]) == pytest.approx(table.score, rel=1e-5)
    with pytest.raises(UserError, match="key position 8"):
        qk.table(2, 1, 7, 8)
