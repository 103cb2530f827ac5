"""A prompt from the forward pass to its tables, stage by stage, at the shapes of real models.

Random weights, TopK SAEs at every layer. The floor of a stage is what its matrix products take at
the machine's measured rate, or what it has to move at its measured bandwidth, whichever is more.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from edges import edge_operations
from measuring import Ceilings, Row, ratios, timed
from shapes import SHAPES, VOCAB, random_dictionaries, random_model

from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.attribution.residual.attribution import read
from circuit_tracer_qk.attribution.residual.decompose import decompose
from circuit_tracer_qk.attribution.residual.influence import Sweep
from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.graph_files.nodes import prune
from circuit_tracer_qk.model.run import freeze
from circuit_tracer_qk.plugin.attribute import attribute

D_DICT = 4096
TABLES = 512  # as many as a graph file holds
LOADINGS_GOAL = 0.3  # of the edge stage


def measure(
    name: str, ceilings: Ceilings, repeats: int, n_pos: int = 32, active: int = 32
) -> list[Row]:
    """Every stage of one model's run."""
    torch.manual_seed(0)
    device, (n_layers, shape) = ceilings.device, SHAPES[name]
    transformer = random_model(n_pos, n_layers, device, **shape)
    cfg: Any = transformer.cfg
    known = random_dictionaries(transformer, active, D_DICT, list(range(1, n_layers + 1)))
    model = ResidualModel(transformer, known, slice(0, 1))
    tokens = torch.randint(VOCAB, (n_pos,), device=device)
    run = freeze(transformer, tokens)
    parts, heads = read(tokens, model)
    graph = attribute(tokens, model, max_n_logits=5)
    directions, selected = graph.record.logit_rows, graph.selected_features

    kept = prune(graph, 0.8, 0.98)
    sources, targets = kept.sources, kept.targets
    some = torch.linspace(0, len(sources) - 1, min(TABLES, len(sources))).long().tolist()
    places = [_place(graph, int(sources[i]), int(targets[i]), at) for at, i in enumerate(some)]

    weights = sum(p.numel() for n, p in transformer.named_parameters() if n.startswith("blocks."))
    attention = 2 * n_layers * cfg.n_heads * n_pos**2 * cfg.d_head
    encoding = 2.0 * n_layers * n_pos * D_DICT * cfg.d_model
    edges = sum(edge_operations(parts, transformer, layer) for layer in range(n_layers))
    z = cfg.n_heads * cfg.d_head
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    loadings = 2.0 * len(set(targets.tolist())) * 2 * cfg.d_model * z
    loadings += 2.0 * len(set(sources.tolist())) * cfg.d_model * n_kv * cfg.d_head
    loadings += 4.0 * len(sources) * z
    terms = 2.0 * (active + 2) * cfg.d_head * len(places) * (active + 2 + 2 * cfg.d_model)

    @torch.no_grad()
    def fill() -> object:
        return Sweep(transformer, parts, heads, directions, False, 512, False).fill(selected)

    @torch.no_grad()
    def only_edges() -> None:
        sweep = Sweep(transformer, parts, heads, directions, False, 512, False)
        some = sweep.subset(selected)
        deque(sweep.feature_rows(range(n_layers, 0, -1), some, lambda rows: None), 0)

    def tables() -> object:
        vars(graph).pop("scores", None)  # nothing projected is kept from the last time
        return list(graph.qk_tops(places))

    title = f"{name}, {n_pos} tokens"
    about = f"{graph.n_features} features, {n_layers} layers"
    forward_floor = 2.0 * weights * n_pos + attention
    stage = ceilings.stage
    rows = [
        stage(f"{title}: forward", lambda: freeze(transformer, tokens), repeats, forward_floor),
        stage(
            f"{title}: features",
            lambda: decompose(run, known, slice(0, 1)),
            repeats,
            encoding,
            8.0 * n_layers * D_DICT * cfg.d_model,
        ),
        stage(f"{title}: edges", fill, repeats, edges, goal="goal: 65 %", note=about),
        stage(f"{title}: edges, in no adjacency", only_edges, repeats, edges),
        stage(
            f"{title}: head loadings",
            lambda: graph.edges(sources, targets),
            repeats,
            loadings,
            12.0 * len(sources) * z,
            note=f"{len(sources)} kept edges x {cfg.n_heads} heads",
        ),
        stage(f"{title}: {len(places)} tables", tables, repeats, terms),
    ]
    found, beside = timed({"": lambda: graph.edges(sources, targets)}, fill, repeats, device)
    share = ratios(found[""], beside[""])
    return [*rows, Row(f"{title}: loadings / edges", share, "%", goal="goal: at most 30 %")]


def _place(graph: Any, source: int, target: int, at: int) -> Place:
    """A head of the block that an edge crosses, at its positions."""
    edge = graph.edge(source, target)
    head = at % graph.record.heads.blocks[0].n_heads
    return Place(max(edge.layer or 0, 0), head, edge.query, edge.key)
