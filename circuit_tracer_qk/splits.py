"""Which heads carried an edge between transcoder features, at every block on its way.

Between features several blocks apart paths multiply, so no single head has *the* loading. What is
exact (method, section 4): cut the linear map at one block,

    edge = sum_h through(block, h) + bypass(block)

for every block between source and target (cuts of different blocks overlap: never add them); and
one list that does sum, by the head that delivered it, after which no attention follows,

    edge = attention_free + sum over blocks and heads of last(block, h)

One sweep forward of the sources and one back of the targets give both for all edges at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.carry import Carrier


class Writes(NamedTuple):
    """What sources write: one row a vector; a cross-layer feature has one for every block.

    Attributes:
        source: (n,) the source of each row.
        layer: (n,) the block at whose output it is added; -1 for what enters block 0.
        position: (n,) its position; all rows of a source share one.
        vector: (n, d_model) as added to the residual stream.
    """

    source: Tensor
    layer: Tensor
    position: Tensor
    vector: Tensor


class Reads(NamedTuple):
    """What targets read.

    Attributes:
        layer: (n,) the block whose transcoder input is read; n_layers for logits, which read the
            last checkpoint.
        position: (n,)
        row: (n, d_model) gradient at the stream that is read.
    """

    layer: Tensor
    position: Tensor
    row: Tensor


class Splits(NamedTuple):
    """How a list of edges splits. Zero at blocks that are not between source and target.

    Laws: ``weight = attention_free + last.sum((1, 2))``; across positions ``attention_free = 0``,
    and ``weight = through.sum(2)`` at a block that is the only one between.

    Attributes:
        weight: (n,) the edges.
        through: (n, n_layers, n_heads) the part that passes each head of each block.
        last: (n, n_layers, n_heads) the part that passes no attention after this head.
        attention_free: (n,) the part that passes none at all.
    """

    weight: Tensor
    through: Tensor
    last: Tensor
    attention_free: Tensor


class _Back(NamedTuple):
    """Targets carried back, as gradients at the outputs of one block's heads.

    Attributes:
        row: (n_targets,) the row of each target, -1 for those that read before this block.
        whole: (n, n_pos, n_heads * d_head) along every path; zero after the target's position.
        local: (n, n_heads * d_head) at the target's position, along paths without attention.
    """

    row: Tensor
    whole: Tensor
    local: Tensor


@torch.no_grad()
def split_edges(
    carrier: Carrier, writes: Writes, reads: Reads, source: Tensor, target: Tensor
) -> Splits:
    """Split edges at every block.

    Args:
        carrier: the frozen blocks.
        writes: of all sources.
        reads: of all targets.
        source, target: (n,) ends of each edge, as ``writes.source`` and rows of ``reads``.

    Returns:
        In the order of the edges.
    """
    run = carrier.heads.run
    n_heads = carrier.heads.blocks[0].n_heads
    back, free = _sweep_back(carrier, reads)
    n, zeros = len(source), run.residual.new_zeros
    shape = n, run.n_layers, n_heads
    out = Splits(zeros(n), zeros(shape), zeros(shape), zeros(n))

    n_sources = int(writes.source.max()) + 1
    position = writes.position.new_zeros(n_sources)
    position[writes.source] = writes.position
    for start in position[source].unique().tolist():
        edges = (position[source] == start).nonzero().flatten()
        mine, of_edge = source[edges].unique(return_inverse=True)
        local = torch.full_like(position, -1)
        local[mine] = torch.arange(len(mine), device=mine.device)
        rows = (local[writes.source] >= 0).nonzero().flatten()
        group = Writes(local[writes.source[rows]], *(part[rows] for part in writes[1:]))
        _sweep(carrier, group, reads, back, free, start, edges, of_edge, target[edges], out)
    return out


def _sweep(
    carrier: Carrier,
    writes: Writes,
    reads: Reads,
    back: list[_Back],
    free: list[Tensor],
    start: int,
    edges: Tensor,
    source: Tensor,
    target: Tensor,
    out: Splits,
) -> None:
    """Carry the sources of one position forward, and split their edges at each block."""
    run = carrier.heads.run
    n_sources, n_layers = int(writes.source.max()) + 1, run.n_layers
    x = run.residual.new_zeros(n_sources, run.n_pos - start, run.residual.shape[2])
    first = torch.full((n_sources,), n_layers, device=x.device)
    first.scatter_reduce_(0, writes.source, writes.layer, "amin")
    at_target, at_layer = reads.position[target], reads.layer[target]

    def write(layer: int) -> None:
        now = writes.layer == layer
        x[:, 0].index_add_(0, writes.source[now], writes.vector[now])
        # what passes no attention at all stays at its position
        e = ((at_target == start) & (at_layer > layer)).nonzero().flatten()
        if bool(now.any()) and len(e):
            vectors = x.new_zeros(n_sources, x.shape[2])
            vectors.index_add_(0, writes.source[now], writes.vector[now])
            products = (vectors[source[e]] * free[layer + 1][target[e]]).sum(1)
            out.attention_free[edges[e]] += products

    write(-1)
    for layer in range(n_layers):
        parallel = carrier.heads.block(layer).parallel
        carried = carrier.carry(layer, x, start)
        crosses = (first[source] < layer) & (at_layer > layer if parallel else at_layer >= layer)
        e = crosses.nonzero().flatten()
        if len(e):
            s, t = source[e], target[e]
            rows = back[layer].row[t]
            z = carried.z.flatten(2)
            whole = _products(z, back[layer].whole[:, start:], s, rows)
            out.through[edges[e], layer] = whole.unflatten(1, carried.z.shape[2:]).sum(2)
            here = z[s, at_target[e] - start] * back[layer].local[rows]
            out.last[edges[e], layer] = here.unflatten(1, carried.z.shape[2:]).sum(2)
        e = (at_layer == layer).nonzero().flatten()
        out.weight[edges[e]] = _read(carried.mid, reads, source[e], target[e], start)
        x = carried.out
        write(layer)
    e = (at_layer == n_layers).nonzero().flatten()
    out.weight[edges[e]] = _read(x, reads, source[e], target[e], start)


def _products(z: Tensor, whole: Tensor, s: Tensor, t: Tensor, chunk: int = 256) -> Tensor:
    """(n, n_heads * d_head): products of rows over the positions, which are summed."""
    parts = zip(s.split(chunk), t.split(chunk), strict=True)
    return torch.cat([(z[i] * whole[j]).sum(1) for i, j in parts])


def _read(x: Tensor, reads: Reads, s: Tensor, t: Tensor, start: int) -> Tensor:
    return (x[s, reads.position[t] - start] * reads.row[t]).sum(1)


def _sweep_back(carrier: Carrier, reads: Reads) -> tuple[list[_Back], list[Tensor]]:
    """Carry the targets back.

    Returns:
        For every block, its heads' gradients; for every checkpoint, (n_targets, d_model) gradients
        at the target's position along paths without attention.
    """
    run = carrier.heads.run
    n_layers, n_targets, d_model = run.n_layers, len(reads.layer), reads.row.shape[1]
    width = carrier.heads.blocks[0].W_Q.shape[0] * carrier.heads.blocks[0].W_Q.shape[2]
    new = reads.row.new_zeros
    back = []
    for layer in range(n_layers):
        row = torch.full_like(reads.layer, -1)
        reading = (reads.layer >= layer).nonzero().flatten()
        row[reading] = torch.arange(len(reading), device=row.device)
        back.append(_Back(row, new(len(reading), run.n_pos, width), new(len(reading), width)))
    free = [new(n_targets, d_model) for _ in range(n_layers + 1)]
    for end in reads.position.unique().tolist():
        mine = (reads.position == end).nonzero().flatten()
        _back_from(carrier, reads, mine, end, back, free)
    return back, free


def _back_from(
    carrier: Carrier, reads: Reads, mine: Tensor, end: int, back: list[_Back], free: list[Tensor]
) -> None:
    """Carry back the targets of one position."""
    n_layers, layer_of = carrier.heads.run.n_layers, reads.layer[mine]
    order = layer_of.argsort(descending=True)  # those that read latest come first: rows are added
    mine, layer_of = mine[order], layer_of[order]
    row = reads.row[mine]
    n = int((layer_of == n_layers).sum())
    g = row.new_zeros(n, end + 1, row.shape[1])
    g[:, end] = row[:n]
    local = row[:n]
    free[n_layers][mine[:n]] = local
    for layer in reversed(range(n_layers)):
        first, n = n, int((layer_of >= layer).sum())
        reading = row.new_zeros(n - first, end + 1, row.shape[1])
        reading[:, end] = row[first:n]
        pulled = [carrier.pull(layer, g), carrier.pull_mid(layer, reading)]
        z = torch.cat([p.z for p in pulled]).flatten(2)
        rows = back[layer].row[mine[:n]]
        back[layer].whole[rows, : end + 1] = z
        at = [carrier.pull_here(layer, local, end), carrier.pull_mid_here(layer, row[first:n], end)]
        back[layer].local[rows] = torch.cat([a.z for a in at]).flatten(1)
        g = torch.cat([p.whole for p in pulled])
        local = torch.cat([a.bypass for a in at])
        free[layer][mine[:n]] = local
