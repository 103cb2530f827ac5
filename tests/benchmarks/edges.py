"""Edges across one gpt2-small block, against autograd and against the machine.

Every target x every source of one block (checkpoint 1 to 2), residual SAEs with 50 active features a
position. The reference is autograd through that block alone with attention patterns and norm
denominators frozen, no gradients for weights, a batched backward and the best of several batch
sizes; its forward pass is not counted, and it is timed on a sample of targets spread over all
positions. It runs at the machine's full rate, so that its ratio to ours is bounded by the ratio of
operations; both are printed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Ceilings, Row, ratios, timed
from shapes import GPT2, random_decomposition, random_model
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.attribution.residual.edges import recurs
from circuit_tracer_qk.attribution.residual.influence import Sweep

LAYER = 1  # the block measured, of two
BATCH_SIZES = (32, 64, 128, 256)  # of the reference's backward
OUR_BATCH = 512  # the default of circuit_tracer_qk.attribute
AGREEMENT = 1e-4  # largest difference allowed, of the largest value
GOALS = {32: "goal: at least 40x", 128: "goal: at least 120x"}


def edge_operations(parts: Decomposition, model: HookedTransformer, layer: int) -> float:
    """Floating-point operations of all edges across a block that causality leaves.

    Of a multiplication and an addition each counts one. Decoder vectors that recur are projected
    and read back once, as they are; elementwise work counts nothing.
    """
    cfg, features = model.cfg, parts.features
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    z, kv, d_mlp = cfg.n_heads * cfg.d_head, n_kv * cfg.d_head, cfg.d_mlp or 0
    readers = 2 if cfg.gated_mlp else 1
    sources = parts.sources(layer)
    offsets = parts.offsets[layer + 1]
    per_position = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    n_targets, n_sources = sum(per_position), len(sources.kind)

    def distinct(checkpoint: int, n: int, width: int) -> int:
        known = len(features.decoders.get((checkpoint, checkpoint), ()))
        return known if known and recurs(known, n, 4 * width) else n

    n_values = n_sources
    if layer:
        n_features = parts.offsets[layer][-1] - parts.offsets[layer][0]
        n_values += distinct(layer, n_features, kv) - n_features
    products = (
        n_targets * readers * cfg.d_model * d_mlp  # through the MLP
        + distinct(layer + 1, n_targets, d_mlp) * cfg.d_model * d_mlp  # back to its hidden layer
        + parts.run.n_pos * readers * cfg.d_model * d_mlp  # its slopes
        + n_targets * cfg.d_model * z
        + n_values * cfg.d_model * kv
    )
    grouped = n_kv < cfg.n_heads and parts.run.residual.device.type == "cpu"
    for p, n in enumerate(per_position):
        products += n * sources.starts[p + 1] * (kv if grouped else z)
        products += n * (p + 1) * z if grouped else 0  # targets weighted and added up
        products += n * (sources.starts[p + 1] - sources.starts[p]) * cfg.d_model
    return 2.0 * products


class AutogradBlock:
    """The reference: one block as plain torch, patterns and norm denominators frozen."""

    def __init__(self, model: HookedTransformer, parts: Decomposition, batch: int) -> None:
        block: Any = model.blocks[LAYER]
        run = parts.run
        pattern = run.pattern[LAYER]
        ln1, ln2 = run.scale("ln1", LAYER)[:, None], run.scale("ln2", LAYER)[:, None]
        heads, d_model, d_head = block.attn.W_V.shape
        # all heads in one matrix, as Hugging Face's GPT-2 has them
        W_V = block.attn.W_V.transpose(0, 1).reshape(d_model, heads * d_head)
        W_O = block.attn.W_O.reshape(heads * d_head, d_model)

        def norm(x: Tensor, scale: Tensor, module: Any) -> Tensor:
            return (x - x.mean(-1, keepdim=True)) / scale * module.w + module.b

        self.x = run.residual[LAYER].expand(batch, -1, -1).clone().requires_grad_()
        v = norm(self.x, ln1, block.ln1) @ W_V + block.attn.b_V.flatten()
        z = pattern @ v.unflatten(-1, (heads, d_head)).transpose(1, 2)
        mid = self.x + z.transpose(1, 2).flatten(2) @ W_O + block.attn.b_O
        pre = norm(mid, ln2, block.ln2) @ block.mlp.W_in + block.mlp.b_in
        self.out = mid + F.gelu(pre, approximate="tanh") @ block.mlp.W_out + block.mlp.b_out
        self.parts = parts
        self.sources = parts.at(LAYER)
        self.vectors = self.sources.vectors()

    def rows(self, features: Tensor) -> Iterator[Tensor]:
        """(batch, n_sources) edges of feature targets, by full batches."""
        batch = len(self.x)
        for chunk in features.split(batch):
            n = len(chunk)
            gradient = torch.zeros_like(self.out)
            position = self.parts.features.position[chunk]
            gradient[torch.arange(n), position] = self.parts.features.vectors(chunk, LAYER + 1)
            (pulled,) = torch.autograd.grad(self.out, self.x, gradient, retain_graph=True)
            edges = pulled.new_empty(n, len(self.vectors))
            for p in range(pulled.shape[1]):
                here = self.sources.at(p)
                edges[:, here] = pulled[:n, p] @ self.vectors[here].T
            yield edges


def measure(n_pos: int, ceilings: Ceilings, repeats: int, sample: int = 256) -> list[Row]:
    """Our rows of all targets, against the floor and against the reference's."""
    torch.manual_seed(0)
    device = ceilings.device
    model = random_model(n_pos, device=device, **GPT2)
    parts, heads = random_decomposition(model, n_pos, active=50, d_dict=4096)
    directions = torch.empty(0, model.cfg.d_model, device=device)
    sweep = Sweep(model, parts, heads, directions, False, OUR_BATCH, False)
    every = sweep.subset()
    targets = (parts.features.checkpoint == LAYER + 1).nonzero().squeeze(1)
    sampled = targets[torch.linspace(0, len(targets) - 1, sample).long()]

    def ours() -> None:
        nothing = sweep.feature_rows([LAYER + 1], every, lambda rows: None)
        deque(nothing, 0)  # is kept, as where rows go into an adjacency

    all_edges = sweep.feature_rows([LAYER + 1], every, lambda rows: rows.weights)
    our_edges = torch.cat(list(all_edges))[sampled - targets[0]]
    work: dict[str, Callable[[], object]] = {}
    worst = 0.0
    for batch in BATCH_SIZES:
        reference = AutogradBlock(model, parts, batch)
        edges = torch.cat(list(reference.rows(sampled)))
        worst = max(worst, float((edges - our_edges).abs().max() / edges.abs().max()))
        work[f"{batch}"] = lambda reference=reference: deque(reference.rows(sampled), 0)
    if worst > AGREEMENT:
        raise SystemExit(f"the edges differ by {worst:.1e} of their scale")

    found, mine = timed(work, ours, repeats, device)
    whole = len(targets) / len(sampled)
    theirs = {batch: [whole * s for s in times] for batch, times in found.items()}
    best = min(theirs, key=lambda batch: median(theirs[batch]))
    distinct = len(parts.features.decoders[LAYER + 1, LAYER + 1])
    n_sources = len(parts.at(LAYER).kind)
    shape = f"{len(targets)} targets ({distinct} distinct) x {n_sources} sources"
    operations = edge_operations(parts, model, LAYER)
    cfg: Any = model.cfg
    a_target = n_pos * (2 * cfg.d_model * cfg.d_mlp + 2 * cfg.d_model**2)
    a_target += 2 * cfg.n_heads * n_pos**2 * cfg.d_head // 2 + n_sources * cfg.d_model
    name = f"edges, gpt2-small block, {n_pos} tokens"
    theirs_row = Row(f"{name}: autograd", theirs[best], "s", note=f"batch {best}")
    return [
        ceilings.stage(name, ours, repeats, operations, goal="goal: 65 %", note=shape),
        theirs_row,
        Row(
            f"{name}: ratio to autograd",
            ratios(theirs[best], mine[best]),
            "x",
            goal=GOALS.get(n_pos, ""),
            note=f"{2 * a_target * len(targets) / operations:.0f}x the operations; "
            f"same edges to {worst:.0e}",
        ),
    ]
