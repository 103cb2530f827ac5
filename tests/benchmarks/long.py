"""Long prompts: what grows with the context, and how.

- gpt2-small shapes, 50 active features a position: the forward pass, head loadings of as many kept
  edges and as many QK tables at every length. Neither may grow faster than the forward pass.
- The bounded search for the strongest head loadings, on the trained miniature (random weights attend
  nearly evenly, which no bound can profit from): how much it skips, and how much it lists with a
  budget, beside brute force.
- ``whole``: a graph of 2,048 tokens from prompt to adjacency, time and peak memory. Minutes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
from measuring import Ceilings, Row
from shapes import GPT2, VOCAB, random_dictionaries, random_model
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual.influence import Sweep
from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.model.run import freeze

LENGTHS = (128, 512, 2048)
ACTIVE, D_DICT = 50, 4096
SELECTED, EDGES, TABLES = 2000, 20_000, 256
LAYERS = 3  # of twelve: every layer costs the same
STORY = (
    "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt Sally would bake me a "
    "cake. One day, we went to the park. We saw a big dog and a small cat. The dog was happy, but "
    "the cat was sad. "
)


def _model(n_pos: int, n_layers: int) -> ResidualModel:
    torch.manual_seed(0)
    transformer = random_model(n_pos, n_layers, **GPT2)
    known = random_dictionaries(transformer, ACTIVE, D_DICT, list(range(1, n_layers + 1)))
    return ResidualModel(transformer, known, slice(0, 1))


def measure(ceilings: Ceilings, repeats: int) -> list[Row]:
    """Forward pass, head loadings and tables at every length; then the search."""
    if ceilings.device != "cpu":
        return []
    at = [_at(n_pos, ceilings, repeats) for n_pos in LENGTHS]
    rows = [row for some in at for row in some]
    note = f"{LENGTHS[0]} to {LENGTHS[-1]} tokens"
    for first, last in zip(at[0], at[-1], strict=True):
        what = first.name.split(": ")[1]
        rows.append(Row(f"long: growth of {what}", [last.middle / first.middle], "x", note=note))
    return rows + _search(ceilings, repeats)


def _at(n_pos: int, ceilings: Ceilings, repeats: int) -> list[Row]:
    model = _model(n_pos, LAYERS)
    tokens = torch.randint(VOCAB, (n_pos,))

    def evenly(self: Sweep, weights: Tensor, most: int | None) -> Tensor:
        return torch.linspace(0, self.n_features - 1, SELECTED).long()

    with patch.object(Sweep, "select", evenly):  # the choice of nodes is not what is measured
        graph = ctqk.attribute(tokens, model, max_n_logits=5)
    A = graph.adjacency_matrix
    features = torch.arange(graph.n_features)
    columns = A[: graph.n_features].abs().sum(0).topk(2000).indices.sort().values
    strongest = A[: graph.n_features][:, columns].abs().flatten().topk(EDGES).indices
    targets = features[strongest // len(columns)]
    sources = columns[strongest % len(columns)]
    heads = torch.arange(TABLES) % 12
    found = graph.edges(sources[:TABLES], targets[:TABLES])
    places = [
        Place(max(layer, 0), head, query, key)
        for layer, head, query, key in zip(
            found.layer.tolist(),
            heads.tolist(),
            found.query.tolist(),
            found.key.tolist(),
            strict=True,
        )
    ]

    def tables() -> object:
        vars(graph).pop("scores", None)
        return list(graph.qk_tops(places))

    cfg: Any = model.cfg
    weights = sum(
        p.numel() for n, p in model.transformer.named_parameters() if n.startswith("blocks.")
    )
    operations = 2.0 * weights * n_pos + 2 * LAYERS * cfg.n_heads * n_pos**2 * cfg.d_head
    run = model.transformer
    title = f"long, {n_pos} tokens, {LAYERS} layers"
    loadings = 4.0 * len(targets.unique()) * cfg.d_model**2
    loadings += 2.0 * len(sources.unique()) * cfg.d_model**2 + 4.0 * EDGES * cfg.d_model
    terms = 2.0 * (ACTIVE + 2) * cfg.d_head * TABLES * (ACTIVE + 2 + 2 * cfg.d_model)
    return [
        ceilings.stage(f"{title}: forward", lambda: freeze(run, tokens), repeats, operations),
        ceilings.stage(
            f"{title}: head loadings",
            lambda: graph.edges(sources, targets),
            repeats,
            loadings,
            12.0 * EDGES * cfg.d_model,
            note=f"{EDGES} edges",
        ),
        ceilings.stage(f"{title}: tables", tables, repeats, terms, note=f"{TABLES} tables"),
    ]


def _search(ceilings: Ceilings, repeats: int) -> list[Row]:
    model = ctqk.load_model()
    rows = []
    ids = model.ensure_tokenized(STORY * 20)
    for n_pos in (64, 128, model.cfg.n_ctx):
        graph = ctqk.attribute(ids[:n_pos], model, max_feature_nodes=2000)
        targets = torch.linspace(0, graph.n_features - 1, 200).long()
        exact = graph.strongest(targets, 20)
        title = f"search, trained miniature, {n_pos} tokens"
        found = ceilings.stage(
            f"{title}: 20 of 200 targets each",
            lambda graph=graph, targets=targets: graph.strongest(targets, 20),
            repeats,
            0.0,
        )
        found.floor = None
        assert bool(exact.exact.all())
        rows += [found, Row(f"{title}: not computed", [exact.skipped], "%", note="same result")]
        everything = graph.strongest(targets, len(graph.adjacency_matrix) * model.cfg.n_heads)
        whole = everything.loading.abs().sum(1)
        listed = exact.loading.abs().sum(1)
        rows.append(
            Row(f"{title}: share of |loading| listed", [float((listed / whole).mean())], "%")
        )
        for budget in (8, 32):
            cut = graph.strongest(targets, 20, budget)
            kept = float((cut.loading.abs().sum(1) / listed).mean())
            rows.append(
                Row(
                    f"{title}: budget {budget}: of the exact list's",
                    [kept],
                    "%",
                    note=f"{cut.skipped:.1%} not computed, {float(cut.exact.float().mean()):.0%} of "
                    f"targets exact; share of all promised {float(cut.share.mean()):.0%}, true "
                    f"{float((cut.loading.abs().sum(1) / whole).mean()):.0%}",
                )
            )
    return rows


def whole(n_pos: int = 2048, n_layers: int = 12, nodes: int = 7500) -> list[Row]:
    """One graph of a long prompt, in a process of its own."""
    model = _model(n_pos, n_layers)
    start, busy = time.perf_counter(), time.process_time()
    graph = ctqk.attribute(
        torch.randint(VOCAB, (n_pos,)), model, max_feature_nodes=nodes, max_n_logits=5
    )
    took, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    title = f"whole graph, gpt2-small, {n_pos} tokens"
    active = len(graph.active_features)
    return [
        Row(title, [took], "s", note=f"{active} active features, {graph.n_features} kept"),
        Row(f"{title}: processor time", [busy], "s"),
        Row(f"{title}: peak memory", [peak], "GB", goal="goal: at most 16 GB"),
    ]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps([asdict(row) for row in whole(*map(int, sys.argv[2:]))]))
