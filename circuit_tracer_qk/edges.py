"""Edges of the residual graph across one block, and the heads that carried them.

    y          = a_t v_t                                 the target's decoder vector, weighted
    m          = M^T y                                   pulled through the MLP
    u          = y + m   (y in parallel blocks)          gradient at the attention write
    residual   = [p_s = p_t]  y . a_s v_s
    mlp        = [p_s = p_t]  m . a_s v_s
    total_h    = A_h[p_t, p_s]  z_h(u) . v_h(a_s v_s)    head loading
    direct_h   = A_h[p_t, p_s]  z_h(y) . v_h(a_s v_s)    the paper's printed formula
    edge       = residual + mlp + sum_h total_h

(method, section 3; paper, "Head loadings"). Every path between neighbouring checkpoints crosses
one block, so no backward pass through the sequence is needed: the MLP's part is one batched
product per position, the rest is matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.components import Checkpoint, Decomposition
from circuit_tracer_qk.heads import AttentionBlock, Heads, MLPBlock

TILE = 512  # sources weighted by attention at once: they stay in the processor's cache


class Targets(NamedTuple):
    """Targets across one block, in rows.

    Attributes:
        positions: (n,) token positions, ascending.
        y: (n, d_model) gradients at the block's output: ``a_t v_t``, or a logit's direction.
        m: (n, d_model) ``M^T y``, zeros where the block has no MLP.
    """

    positions: Tensor
    y: Tensor
    m: Tensor


class Parts(NamedTuple):
    """What carried each of a list of edges. ``weight = residual + mlp + total.sum(1)``.

    Attributes:
        residual, mlp: (n,) parts through the residual stream and the block's MLP.
        total: (n, n_heads) head loadings; a head's write also passes through the block's MLP.
        direct: (n, n_heads) the same without the MLP (the paper's printed formula).
        pattern: (n, n_heads) attention from the target's position to the source's.
    """

    residual: Tensor
    mlp: Tensor
    total: Tensor
    direct: Tensor
    pattern: Tensor


def pull_mlp(
    heads: Heads,
    mlp: MLPBlock | None,
    layer: int,
    y: Tensor,
    positions: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    """``M^T y`` of rows at given positions, at the block's true MLP input.

    Args:
        heads: the heads of the run.
        mlp: the block's MLP; None where it has none.
        layer: the block.
        y: (n, d_model) gradients at its output.
        positions: (n,) the position of each row.
        hidden: (n, d_mlp) ``mlp.read_back`` of the rows, where it is known already.

    Returns:
        (n, d_model)
    """
    if mlp is None:
        return torch.zeros_like(y)
    run = heads.run
    if hidden is None:
        hidden = mlp.read_back(y, run.scale("ln2_post", layer)[positions])
    here, row = positions.unique(return_inverse=True)  # the MLP's slope is needed nowhere else
    return mlp.pull(hidden, row, run.mlp_input[layer][here], run.scale("ln2", layer)[here])


class BlockEdges:
    """All edges across one block: sources are the components of its checkpoint.

    Args:
        parts: the run's components.
        heads: its heads.
        layer: the block crossed.
    """

    def __init__(self, parts: Decomposition, heads: Heads, layer: int) -> None:
        self.heads = heads
        self.layer = layer
        self.sources: Checkpoint = parts.tokens if layer == 0 else parts.at(layer)
        self.vectors = self.sources.vectors()
        # (n_sources, n_kv, d_head)
        self.values = heads.values(layer, self.vectors, self.sources.position)

    def rows(self, targets: Targets) -> Tensor:
        """Edges from every source to every target.

        Args:
            targets: rows ordered by position.

        Returns:
            (n_targets, n_sources) edge weights; zero where the source lies after the target or
            outside every head's window. Memory beyond the result is that of the targets.
        """
        block, sources = self.heads.block(self.layer), self.sources
        pattern = self.heads.run.pattern[self.layer]
        z = self.heads.pull_output(self.layer, _gradient(block, targets), targets.positions)
        z = z.flatten(1)
        local = targets.y + targets.m
        out = z.new_zeros(len(z), len(self.vectors))
        places, counts = targets.positions.unique_consecutive(return_counts=True)
        row = 0
        for p, count in zip(places.tolist(), counts.tolist(), strict=True):
            rows = slice(row, row + count)
            row += count
            attention = pattern[:, p].T.reshape(len(sources.starts) - 1, block.n_kv, -1, 1)
            end = sources.starts[p + 1]
            for start in range(sources.starts[block.first_key(p)], end, TILE):
                tile = slice(start, min(start + TILE, end))
                seen = attention[sources.position[tile]]
                weighted = (self.values[tile, :, None] * seen).flatten(1)
                out[rows, tile] = z[rows] @ weighted.T
            here = sources.at(p)
            out[rows, here] += local[rows] @ self.vectors[here].T
        return out


def edge_parts(
    heads: Heads,
    layer: int,
    targets: Targets,
    target_row: Tensor,
    vectors: Tensor,
    positions: Tensor,
    source_row: Tensor,
    chunk: int = 4096,
) -> Parts:
    """What carried each of a list of edges across one block.

    Args:
        heads: the heads of the run.
        layer: the block crossed.
        targets: distinct targets (any order).
        target_row: (n,) row in ``targets`` of each edge.
        vectors: (n_sources, d_model) distinct source vectors ``a_s v_s``.
        positions: (n_sources,) their positions.
        source_row: (n,) row in ``vectors`` of each edge.
        chunk: edges taken at once; bounds memory.

    Returns:
        The parts, (n,) and (n, n_heads).
    """
    block = heads.block(layer)
    z_total = heads.pull_output(layer, _gradient(block, targets), targets.positions)
    z_direct = z_total
    if not block.parallel:
        z_direct = heads.pull_output(layer, targets.y, targets.positions)
    values = heads.values(layer, vectors, positions)
    done: list[tuple[Tensor, ...]] = []
    for t, s in zip(target_row.split(chunk), source_row.split(chunk), strict=True):
        p_t, p_s = targets.positions[t], positions[s]
        same = (p_t == p_s).to(vectors.dtype)
        pattern = heads.run.pattern[layer][:, p_t, p_s].T
        v = block.expand(values[s])
        done.append(
            (
                same * (targets.y[t] * vectors[s]).sum(1),
                same * (targets.m[t] * vectors[s]).sum(1),
                pattern * (z_total[t] * v).sum(2),
                pattern * (z_direct[t] * v).sum(2),
                pattern,
            )
        )
    return Parts(*(torch.cat(column) for column in zip(*done, strict=True)))


def _gradient(block: AttentionBlock, targets: Targets) -> Tensor:
    """u: the gradient at the attention write. In parallel blocks the MLP does not read it."""
    return targets.y if block.parallel else targets.y + targets.m
