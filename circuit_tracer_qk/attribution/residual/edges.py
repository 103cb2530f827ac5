"""Edges of the residual graph across one block, and the heads that carried them.

    y          = a_t v_t                                 the target's decoder vector, weighted
    m          = M^T y                                   gradient through the MLP
    u          = y + m   (y in parallel blocks)          gradient at the attention write
    residual   = [p_s = p_t]  y . a_s v_s
    mlp        = [p_s = p_t]  m . a_s v_s
    total_h    = A_h[p_t, p_s]  z_h(u) . v_h(a_s v_s)    head loading
    direct_h   = A_h[p_t, p_s]  z_h(y) . v_h(a_s v_s)    the paper's printed formula
    edge       = residual + mlp + sum_h total_h

(attribution/README.md, section 3; paper, "Head loadings"). Every path between neighbouring checkpoints crosses
one block, so no backward pass through the sequence is needed: the MLP's part is one batched
product per position, the rest is matrix products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.component import FEATURE
from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.attribution.text import shapes
from circuit_tracer_qk.base.threads import Scratch
from circuit_tracer_qk.model.attention import AttentionBlock
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.mlp import MLPBlock

TILE_BYTES = 1 << 21  # weighted by attention at once: what a processor's cache holds
TILE_BYTES_ELSEWHERE = 1 << 26  # few calls
SHARED_BYTES = 1 << 28  # images of decoder vectors that are made once for all positions


class Targets(NamedTuple):
    """Targets across one block, in rows.

    Attributes:
        positions: token positions.
        y: gradients at the block's output: ``a_t v_t``, or a logit's direction.
        m: ``M^T y``, zeros where the block has no MLP.
    """

    positions: Int[Tensor, " n"]
    y: Float[Tensor, "n d_model"]
    m: Float[Tensor, "n d_model"]


class PositionRun(NamedTuple):
    """Rows ``start`` to ``stop - 1`` of some targets stand at one position."""

    position: int
    start: int
    stop: int


def runs_of(positions: Int[Tensor, " n"]) -> list[PositionRun]:
    """Ascending positions, which must be at hand (on the CPU), as runs."""
    places, counts = positions.unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    return [PositionRun(p, *ends[i : i + 2]) for i, p in enumerate(places.tolist())]


class Parts(NamedTuple):
    """What carried each of a list of edges. ``weight = residual + mlp + total.sum(1)``.

    Attributes:
        residual, mlp: (n,) parts through the residual stream and the block's MLP.
        total: (n, n_heads) head loadings; a head's write also passes through the block's MLP.
        direct: (n, n_heads) the same without the MLP (the paper's printed formula).
        pattern: (n, n_heads) attention from the target's position to the source's.

    >>> parts = graph.edges(sources=[61], targets=[313]).parts
    >>> weight = parts.residual + parts.mlp + parts.total.sum(1)
    >>> weight.shape, parts.total.shape
    (torch.Size([1]), torch.Size([1, 8]))
    """

    residual: Float[Tensor, " n"]
    mlp: Float[Tensor, " n"]
    total: Float[Tensor, "n n_heads"]
    direct: Float[Tensor, "n n_heads"]
    pattern: Float[Tensor, "n n_heads"]

    __repr__ = shapes


class EdgeParts(NamedTuple):
    """The parts of many edges, in the order asked for (of ``graph.edges``).

    Attributes:
        layer: (n,) block crossed; -1 where a logit reads its own checkpoint.
        query, key: (n,) positions of target and source.
        parts: residual, mlp, total, direct and pattern of each.

    >>> graph.edges([61, 68], [313, 314]).query.tolist()
    [14, 14]
    """

    layer: Int[Tensor, " n"]
    query: Int[Tensor, " n"]
    key: Int[Tensor, " n"]
    parts: Parts

    __repr__ = shapes


def recurs(n_distinct: int, n: int, bytes_each: int) -> bool:
    """Whether images of distinct decoder vectors, shared by the positions at which their feature
    is active, save work and fit into memory."""
    return 4 * n_distinct <= 3 * n and n_distinct * bytes_each <= SHARED_BYTES


class BlockMLP:
    """The MLP of one block at every position of a run, transposed: ``y -> M^T y``.

    Several threads may ask at once.

    Args:
        heads: the heads of the run.
        mlp: the block's MLP; None where it has none.
        layer: the block.
    """

    def __init__(self, heads: Heads, mlp: MLPBlock | None, layer: int) -> None:
        run = heads.run
        self.mlp = mlp
        self.scale = run.scale("ln2", layer)
        self.post_scale = run.scale("ln2_post", layer)
        self._slopes = () if mlp is None else mlp.slopes(run.mlp_input[layer], self.scale)
        self._scratch = Scratch()

    def vjp(
        self, y: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"], runs: list[PositionRun]
    ) -> Float[Tensor, "n d_model"]:
        """``M^T y`` of rows at given positions.

        Args:
            y: gradients at the block's output.
            positions: ascending.
            runs: the same.
        """
        if self.mlp is None:
            return torch.zeros_like(y)
        hidden = self.mlp.output_vjp(y, self.post_scale[positions])
        rows = torch.arange(len(y), device=y.device)
        return self._through_hidden(hidden, rows, positions, runs)

    def shared(
        self, decoder: Float[Tensor, "n_distinct d_model"], n: int
    ) -> Float[Tensor, "n_distinct d_mlp"] | None:
        """Decoder vectors at the hidden layer, for :meth:`vjp_shared`.

        None where there is no MLP, or where so few of the ``n`` targets share one that it is not
        worth it.
        """
        item = self.scale.element_size()
        if self.mlp is None or not recurs(len(decoder), n, self.mlp.W_out.shape[0] * item):
            return None
        decoder = decoder.to(self.scale.dtype)
        return self.mlp.output_vjp(decoder, decoder.new_ones(len(decoder)))

    def vjp_shared(
        self,
        shared: Float[Tensor, "n_distinct d_mlp"],
        row: Int[Tensor, " n"],
        weight: Float[Tensor, " n"],
        positions: Int[Tensor, " n"],
        runs: list[PositionRun],
    ) -> Float[Tensor, "n d_model"]:
        """``M^T y`` of rows ``weight * decoder[row]``, from :meth:`shared`."""
        m = self._through_hidden(shared, row, positions, runs)
        return m.mul_((weight / self.post_scale[positions])[:, None])

    def _through_hidden(
        self,
        hidden: Float[Tensor, "n_hidden d_mlp"],
        row: Int[Tensor, " n"],
        positions: Int[Tensor, " n"],
        runs: list[PositionRun],
    ) -> Float[Tensor, "n d_model"]:
        """``hidden[row]``, which is never made as a whole, through the hidden layer."""
        assert self.mlp is not None
        sloped = self._scratch.of(hidden, len(row), hidden.shape[1])
        g = hidden.new_empty(len(row), self.mlp.W_out.shape[1])
        for i, (slope, reader) in enumerate(zip(self._slopes, self.mlp.readers, strict=True)):
            for p, start, stop in runs:
                part = sloped[start:stop]
                torch.index_select(hidden, 0, row[start:stop], out=part)
                part.mul_(slope[p])
            if i:
                g.addmm_(sloped, reader.T)
            else:
                torch.mm(sloped, reader.T, out=g)
        return self.mlp.ln2.at(self.scale[positions]).vjp(g)


class BlockEdges:
    """All edges across one block: sources are the components of its checkpoint.

    Several threads may ask for rows at once.

    Args:
        parts: the run's components.
        heads: its heads.
        layer: the block crossed.
    """

    def __init__(self, parts: Decomposition, heads: Heads, layer: int) -> None:
        self.heads = heads
        self.layer = layer
        self.sources = parts.sources(layer)
        self.vectors = self.sources.vectors()
        self.values = self._values(parts)
        self._scratch = Scratch()
        block = heads.block(layer)
        # heads of a group read the same values: weighing and adding up targets takes fewer and
        # smaller products, weighing sources fewer calls, which is what a GPU waits for
        self.by_target = block.n_heads > block.n_kv and self.values.device.type == "cpu"

    def _values(self, parts: Decomposition) -> Float[Tensor, "n_sources n_kv d_head"]:
        block, run, features = self.heads.block(self.layer), parts.run, parts.features
        scale = run.scale("ln1", self.layer)
        width = block.n_kv * block.W_V.shape[2]
        out = self.vectors.new_empty(len(self.vectors), width)
        for group in self.sources.groups:
            n = len(group.at)
            if group.kind == FEATURE:
                decoder = features.decoders[group.read, self.sources.checkpoint]
                if recurs(len(decoder), n, width * out.element_size()):
                    undivided = self.heads.value_path(self.layer, None)
                    shared = undivided(decoder.to(out.dtype)).flatten(1)
                    of_group = slice(group.first, group.first + n)
                    weight = features.activation[of_group] / scale[features.position[of_group]]
                    image = shared[features.row[of_group]].mul_(weight[:, None])
                    out.index_copy_(0, group.at, image)
                    continue
            vectors, at = self.sources.of(group, slice(0, n)), self.sources.position[group.at]
            values = self.heads.value_path(self.layer, at)(vectors)
            out.index_copy_(0, group.at, values.flatten(1))
        return out.unflatten(1, (block.n_kv, -1))

    def rows(
        self, targets: Targets, runs: list[PositionRun]
    ) -> Float[Tensor, "n_targets n_sources"]:
        """Edges from every source to every target.

        Args:
            targets: rows ordered by position.
            runs: their positions.

        Returns:
            Edge weights; zero where the source lies after the target or
            outside every head's window. Memory beyond the result is that of the targets.
        """
        block, sources = self.heads.block(self.layer), self.sources
        pattern = self.heads.run.pattern[self.layer]
        local, u = targets.y + targets.m, at_write(block, targets)
        z = self.heads.output_path(self.layer, targets.positions).vjp(u).flatten(1)
        out = z.new_empty(len(z), len(self.vectors))
        for p, first, last in runs:
            rows = slice(first, last)
            begin, end = sources.starts[block.first_key(p)], sources.starts[p + 1]
            out[rows, :begin].zero_()
            out[rows, end:].zero_()
            weigh = self._weighted_targets if self.by_target else self._weighted_sources
            weigh(p, pattern[:, p], z[rows], out[rows])
            here = sources.at(p)
            out[rows, here].addmm_(local[rows], self.vectors[here].T)
        return out

    def _weighted_sources(
        self,
        p: int,
        attention: Float[Tensor, "n_heads n_pos"],
        z: Float[Tensor, "n width"],
        out: Float[Tensor, "n n_sources"],
    ) -> None:
        """Put what attention carries into targets at ``p``, with the sources weighted by it.

        Args:
            p: the targets' position.
            attention: from there.
            z: of the targets, the heads side by side.
            out: of which the visible are written.
        """
        block, sources = self.heads.block(self.layer), self.sources
        begin, end = sources.starts[block.first_key(p)], sources.starts[p + 1]
        seen = attention.T.contiguous().index_select(0, sources.position[begin:end])
        seen = seen.view(end - begin, block.n_kv, -1, 1)
        on_cpu = z.device.type == "cpu"
        step = (TILE_BYTES if on_cpu else TILE_BYTES_ELSEWHERE) // z[0].nbytes
        for start in range(begin, end, step):
            stop = min(start + step, end)
            here = seen[start - begin : stop - begin]
            weighted = self._scratch.of(z, *here.shape[:3], self.values.shape[2])
            torch.mul(self.values[start:stop, :, None], here, out=weighted)
            torch.mm(z, weighted.flatten(1).T, out=out[:, start:stop])

    def _weighted_targets(
        self,
        p: int,
        attention: Float[Tensor, "n_heads n_pos"],
        z: Float[Tensor, "n width"],
        out: Float[Tensor, "n n_sources"],
    ) -> None:
        """The same, with the targets weighted and added up over the heads of a group."""
        block, sources = self.heads.block(self.layer), self.sources
        n, n_kv, width = len(z), block.n_kv, self.values.shape[2]
        group = block.n_heads // n_kv
        z = z.view(n, n_kv, group, width).permute(1, 2, 0, 3).reshape(n_kv, group, n * width)
        seen = attention.view(n_kv, group, -1).transpose(1, 2)
        step = max(1, TILE_BYTES // (n * n_kv * width * z.element_size()))
        for start in range(block.first_key(p), p + 1, step):
            keys = range(start, min(start + step, p + 1))
            summed = torch.bmm(seen[:, start : keys.stop], z).view(n_kv, len(keys), n, width)
            summed = summed.permute(1, 2, 0, 3).reshape(len(keys), n, n_kv * width)
            for at_key, key in zip(summed, keys, strict=True):
                here = sources.at(key)
                torch.mm(at_key, self.values[here].flatten(1).T, out=out[:, here])


def edge_parts(
    heads: Heads,
    layer: int,
    targets: Targets,
    target_row: Int[Tensor, " n"],
    vectors: Float[Tensor, "n_sources d_model"],
    positions: Int[Tensor, " n_sources"],
    source_row: Int[Tensor, " n"],
    chunk: int = 4096,
) -> Parts:
    """What carried each of a list of edges across one block.

    Args:
        heads: the heads of the run.
        layer: the block crossed.
        targets: distinct targets (any order).
        target_row: row in ``targets`` of each edge.
        vectors: distinct source vectors ``a_s v_s``.
        positions: their positions.
        source_row: row in ``vectors`` of each edge.
        chunk: edges taken at once; bounds memory.
    """
    block = heads.block(layer)
    output = heads.output_path(layer, targets.positions)
    u = at_write(block, targets)
    z_total = output.vjp(u)
    z_direct = z_total if u is targets.y else output.vjp(targets.y)
    values = heads.value_path(layer, positions)(vectors)
    done: list[tuple[Tensor, ...]] = []
    for t, s in zip(target_row.split(chunk), source_row.split(chunk), strict=True):
        p_t, p_s = targets.positions[t], positions[s]
        same = (p_t == p_s).to(vectors.dtype)
        pattern = heads.run.pattern[layer][:, p_t, p_s].T
        v = block.shared(values[s])
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


def at_write(block: AttentionBlock, targets: Targets) -> Float[Tensor, "n d_model"]:
    """u: the gradient at the attention write. In parallel blocks the MLP does not read it."""
    return targets.y if block.parallel else targets.y + targets.m
