"""The strongest head loadings of a target, without computing all of them.

All loadings of a target are heads x earlier components, which grows with the context; all those of
a prompt grow with its square. But

    |total_h| = A_h[p_t, p_s] |z_h(u) . v_h(a_s v_s)|  <=  A_h[p_t, p_s] |z_h(u)| max_s |v_h(a_s v_s)|

and the right side, one number for each head and key position, falls off as attention does. A search
in its order stops when no pair of head and key position left can hold one of the ``n`` largest:
what it lists is what computing everything would list (paper, "Head loadings"; its section on
limitations leaves the quadratic cost open).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.residual.edges import BlockEdges, PositionRun, Targets, at_write

SLACK = 1 + 1e-5  # bounds are rounded too
TINY = 1e-30  # no loading is this small but 0
STEP_BYTES = 1 << 26  # that a step of the search may take
FIRST = 8  # pairs of head and key position looked at first; then twice as many, and so on


class Strongest(NamedTuple):
    """The largest head loadings of some targets across one block.

    Attributes:
        loading: signed, largest by absolute value first; 0 beyond the last.
        head: (n_targets, n); -1 beyond the last.
        source: row among the components of the block's checkpoint; -1 beyond.
        exact: True where no loading left out can be larger than one listed; False
            only where a budget cut the search.
        share: the listed have at least this share of the sum of the target's
            |loadings|: what was not computed is counted by its bound.
        computed: how many loadings were computed.
        of: how many there are.
    """

    loading: Float[Tensor, "n_targets n"]
    head: Int[Tensor, "n_targets n"]
    source: Int[Tensor, "n_targets n"]
    exact: Bool[Tensor, " n_targets"]
    share: Float[Tensor, " n_targets"]
    computed: int
    of: int


def strongest(
    block: BlockEdges, targets: Targets, runs: list[PositionRun], n: int, budget: int | None = None
) -> Strongest:
    """The ``n`` largest head loadings of every target, over all heads and sources.

    Args:
        block: the sources of the block crossed.
        targets: rows ordered by position.
        runs: their positions.
        n: how many of each target.
        budget: most pairs of head and key position that are computed for the targets of a
            position; None for as many as it takes.
    """
    heads, layer, sources = block.heads, block.layer, block.sources
    attention, pattern = heads.block(layer), heads.run.pattern[layer]
    z = heads.output_path(layer, targets.positions).vjp(at_write(attention, targets))
    device, n_heads = z.device, attention.n_heads
    group = torch.arange(n_heads, device=device) // (n_heads // attention.n_kv)
    sizes = block.values.norm(dim=2)  # (n_sources, n_kv)
    largest = sizes.new_zeros(heads.run.n_pos, attention.n_kv)
    summed = torch.zeros_like(largest)
    place = sources.position[:, None].expand_as(sizes)
    largest.scatter_reduce_(0, place, sizes, "amax")
    summed.scatter_add_(0, place, sizes)
    largest, summed = largest.T[group], summed.T[group]  # (n_heads, n_pos)
    starts = torch.tensor(sources.starts, device=device)
    n_sources = len(block.values)
    widest = max(stop - start for start, stop in pairwise(sources.starts))

    none, exact = group.new_full((len(z), n), -1), group.new_ones(len(z), dtype=torch.bool)
    out = Strongest(z.new_zeros(len(z), n), none, none.clone(), exact, z.new_zeros(len(z)), 0, 0)
    computed = of = 0
    for p, first, last in runs:
        z_here, rows = z[first:last], slice(first, last)  # (n_here, n_heads, d_head)
        size, weight = z_here.norm(dim=2), pattern[:, p, : p + 1]
        reach = weight * largest[:, : p + 1]  # times |z_h|: the bound
        mass = weight * summed[:, : p + 1]  # times |z_h|: the bound of the sum over sources
        budget_left = reach.numel() if budget is None else budget
        waiting = torch.ones_like(reach, dtype=torch.bool)
        total = z_here.new_zeros(len(z_here))
        best, code = out.loading[rows], out.source[rows]
        step = FIRST
        most = max(
            1, STEP_BYTES // (widest * (z_here.shape[2] + 3 * len(z_here)) * z.element_size())
        )
        while budget_left:
            # above one: the pair may hold more than the least that some target lists
            hope = SLACK * reach * (size / best[:, -1:].abs().clamp_min(TINY)).amax(0)[:, None]
            hope = torch.where(waiting & (reach > 0), hope, 0).flatten()
            hope, pairs = hope.topk(min(step, most, budget_left, len(hope)))
            pairs = pairs[hope > 1]
            if not len(pairs):
                break
            waiting.view(-1)[pairs] = False
            budget_left -= len(pairs)
            step *= 2
            h, k = pairs // (p + 1), pairs % (p + 1)
            width = int((starts[k + 1] - starts[k]).max())
            source = starts[k][:, None] + torch.arange(width, device=device)
            real = source < starts[k + 1][:, None]
            source = source.clamp_max(n_sources - 1)
            values = block.values[source, group[h][:, None]]  # (n_pairs, width, d_head)
            loading = torch.bmm(values, z_here[:, h].permute(1, 2, 0)) * weight[h, k][:, None, None]
            loading = loading.masked_fill(~real[..., None], 0).flatten(0, 1).T  # (n_here, ...)
            codes = (h[:, None] * n_sources + source).flatten().expand(len(z_here), -1)
            total += loading.abs().sum(1)
            computed += int(real.sum()) * len(z_here)
            loading, codes = torch.cat([best, loading], 1), torch.cat([code, codes], 1)
            at = loading.abs().topk(n, dim=1).indices
            best, code = loading.gather(1, at), codes.gather(1, at)
        of += sources.starts[p + 1] * n_heads * len(z_here)
        left = torch.where(waiting, reach, 0).amax(1) * size  # (n_here, n_heads)
        out.exact[rows] = SLACK * left.amax(1) <= best[:, -1].abs().clamp_min(TINY)
        total += size @ torch.where(waiting, mass, 0).sum(1)
        listed = best != 0
        out.loading[rows] = best
        out.head[rows] = torch.where(listed, code // n_sources, -1)
        out.source[rows] = torch.where(listed, code % n_sources, -1)
        out.share[rows] = best.abs().sum(1) / total.clamp_min(TINY)
    return out._replace(computed=computed, of=of)
