"""Which heads carried an edge between transcoder features, at every block on its way.

Between features several blocks apart paths multiply, so no single head has *the* loading. What is
exact (attribution/README.md, section 4): cut the linear map at one block,

    edge = sum_h through(block, h) + bypass(block)

for every block between source and target (cuts of different blocks overlap: never add them); and
one list that does sum, by the head that delivered it, after which no attention follows,

    edge = attention_free + sum over blocks and heads of last(block, h)

One sweep forward of the sources and one back of the targets give both for all edges at once, and
what each head carried from every key to every query.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.attribution.text import shapes
from circuit_tracer_qk.attribution.transcoder.propagate import Carried, FrozenBlocks


class Writes(NamedTuple):
    """What sources write: one row a vector; a cross-layer feature has one for every block.

    Attributes:
        source: the source of each row.
        layer: the block at whose output it is added; -1 for what enters block 0.
        position: its position; all rows of a source share one.
        vector: as added to the residual stream.
    """

    source: Int[Tensor, " n"]
    layer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    vector: Float[Tensor, "n d_model"]


class Reads(NamedTuple):
    """What targets read.

    Attributes:
        layer: the block whose transcoder input is read; n_layers for logits, which read the
            last checkpoint.
        position: (n,)
        row: gradient at the stream that is read.
    """

    layer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    row: Float[Tensor, "n d_model"]


class Listing(NamedTuple):
    """Which heads of a block to list for an edge, and how many of their pairs.

    Attributes:
        heads: at most so many, the largest by |part|.
        share: no more than reach this share of the block's sum of |part|.
        pairs: so many (query, key) pairs of each.

    >>> ctqk.Listing(heads=5)
    Listing(heads=5, share=0.9, pairs=2)
    """

    heads: int = 3
    share: float = 0.9
    pairs: int = 2


class Pairs(NamedTuple):
    """The listed heads (of ``TranscoderGraph.split``): a row for each edge, block and head.

    Rows are in no order.

    Law: a head's part is the sum of its pairs, of which the largest are here.

    Attributes:
        edge, layer, head: (n,) what a row is about.
        query, key: (n, pairs) positions, largest by |value| first.
        value: (n, pairs) what the head carried from key to query; 0 where there are fewer.
    """

    edge: Int[Tensor, " n"]
    layer: Int[Tensor, " n"]
    head: Int[Tensor, " n"]
    query: Int[Tensor, "n pairs"]
    key: Int[Tensor, "n pairs"]
    value: Float[Tensor, "n pairs"]

    __repr__ = shapes


class Splits(NamedTuple):
    """How a list of edges splits. Zero at blocks that are not between source and target.

    Laws: ``weight = attention_free + last.sum((1, 2))``; across positions ``attention_free = 0``,
    and ``weight = through.sum(2)`` at a block that is the only one between.

    Attributes:
        weight: (n,) the edges.
        through: (n, n_layers, n_heads) the part that passes each head of each block.
        last: (n, n_layers, n_heads) the part that passes no attention after this head.
        attention_free: (n,) the part that passes none at all.
        between: (n, n_layers) the blocks between source and target.
        pairs: of the listed heads; None where none were asked for.
    """

    weight: Float[Tensor, " n"]
    through: Float[Tensor, "n n_layers n_heads"]
    last: Float[Tensor, "n n_layers n_heads"]
    attention_free: Float[Tensor, " n"]
    between: Bool[Tensor, "n n_layers"]
    pairs: Pairs | None = None

    __repr__ = shapes


class _Back(NamedTuple):
    """Targets carried back, as gradients at the outputs of one block's heads.

    Attributes:
        row: the row of each target, -1 for those that read before this block.
        whole: along every path; zero after the target's position.
        local: at the target's position, along paths without attention.
    """

    row: Int[Tensor, " n_targets"]
    whole: Float[Tensor, "n_heads n n_pos d_head"]
    local: Float[Tensor, "n n_heads d_head"]


class _Meeting(NamedTuple):
    """Sources and targets at the outputs of one block's heads.

    Attributes:
        layer: the block.
        start: the first position that the sources are carried over.
        carried: the sources there.
        back: the targets there.
        pattern: (n_heads, n_pos, n_pos) the block's attention.
    """

    layer: int
    start: int
    carried: Carried
    back: _Back
    pattern: Float[Tensor, "n_heads n_pos n_pos"]


class _Edges(NamedTuple):
    """Some of the edges, with the places of their ends.

    Attributes:
        at: which edges they are.
        source, target: rows of the sources and of the targets at hand.
        target_layer, target_position: where each edge ends.
    """

    at: Int[Tensor, " n"]
    source: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    target_layer: Int[Tensor, " n"]
    target_position: Int[Tensor, " n"]

    def only(self, chosen: Tensor) -> _Edges:
        """Those at ``chosen``, indices or a mask."""
        return _Edges(*(part[chosen] for part in self))


def stream_bytes(device: torch.device) -> int:
    """How much may be carried forward at once: what a cache holds, or keeps a GPU busy."""
    return (256 if device.type == "cuda" else 16) << 20


def gradient_bytes(device: torch.device) -> int:
    """How much of targets may be carried back at once; all sources are carried for each such part.

    A quarter of what is free on a GPU, an eighth of a machine's memory, at least 512 MiB.
    """
    available = 0
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0] // 4
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    return max(available, 512 << 20)


@torch.no_grad()
def split_edges(
    blocks: FrozenBlocks,
    writes: Writes,
    reads: Reads,
    source: Int[Tensor, " n"],
    target: Int[Tensor, " n"],
    listing: Listing | None = None,
    progress: bool = False,
) -> Splits:
    """Split edges at every block.

    Memory is bounded: targets are carried back, and sources forward, some at a time.

    Args:
        blocks: the frozen blocks.
        writes: of all sources.
        reads: of all targets.
        source, target: ends of each edge, as ``writes.source`` and rows of ``reads``.
        listing: list heads with the positions between which they carried.
        progress: show it, where it takes longer than two seconds.

    Returns:
        In the order of the edges.
    """
    run = blocks.heads.run
    n, zeros, d_head = len(source), run.residual.new_zeros, blocks.heads.blocks[0].W_Q.shape[2]
    n_heads = blocks.heads.blocks[0].n_heads
    shape = n, run.n_layers, n_heads
    between = torch.zeros(n, run.n_layers, dtype=torch.bool, device=source.device)
    out = Splits(zeros(n), zeros(shape), zeros(shape), zeros(n), between)
    position, first = (_by_source(writes, values) for values in (writes.position, writes.layer))
    width = n_heads * d_head * run.residual.element_size()

    pairs: list[Pairs] = []
    causal = position[source] <= reads.position[target]  # all else is zero
    order = target[causal].unique()
    order = order[reads.position[order].argsort(stable=True)]
    targets_at_once = max(1, gradient_bytes(source.device) // (width * run.n_pos * run.n_layers))
    sources_at_once = max(1, stream_bytes(source.device) // (width * run.n_pos))
    with tqdm(total=n, desc="edges by head", delay=2, disable=None if progress else True) as bar:
        for target_chunk in order.split(targets_at_once):
            local = torch.full_like(reads.layer, -1)
            local[target_chunk] = torch.arange(len(target_chunk), device=target_chunk.device)
            group = Reads(*(part[target_chunk] for part in reads))
            back, free = _sweep_back(blocks, group)
            edges = (causal & (local[target] >= 0)).nonzero().flatten()
            of_group = source[edges]
            ends = of_group.unique()
            ends = ends[position[ends].argsort(stable=True)]
            for source_chunk in ends.split(sources_at_once):
                source_chunk = source_chunk[first[source_chunk].argsort(stable=True)]
                row = torch.full_like(position, -1)
                row[source_chunk] = torch.arange(len(source_chunk), device=source_chunk.device)
                kept = row[writes.source] >= 0
                chosen = Writes(row[writes.source[kept]], *(part[kept] for part in writes[1:]))
                at = edges[row[of_group] >= 0]
                t = local[target[at]]
                these = _Edges(at, row[source[at]], t, group.layer[t], group.position[t])
                pairs += _sweep(blocks, chosen, group, back, free, these, out, listing)
                bar.update(len(at))
    if listing is None:
        return out
    none, nowhere = source.new_zeros(0), source.new_zeros(0, listing.pairs)
    pairs.append(Pairs(none, none, none, nowhere, nowhere, zeros(0, listing.pairs)))
    return out._replace(pairs=Pairs(*map(torch.cat, zip(*pairs, strict=True))))


def _by_source(writes: Writes, values: Int[Tensor, " n"]) -> Int[Tensor, " n_sources"]:
    """The least of each source's values."""
    out = values.new_zeros(int(writes.source.max()) + 1 if len(writes.source) else 0)
    return out.scatter_reduce_(0, writes.source, values, "amin", include_self=False)


def _sweep(
    blocks: FrozenBlocks,
    writes: Writes,
    reads: Reads,
    back: list[_Back],
    free: list[Tensor],
    edges: _Edges,
    out: Splits,
    listing: Listing | None,
) -> list[Pairs]:
    """Carry some sources forward, those written first in front, and split their edges."""
    run = blocks.heads.run
    start, end = int(writes.position.min()), int(reads.position.max()) + 1
    position, first = (_by_source(writes, values) for values in (writes.position, writes.layer))
    n_sources, d_model = len(position), run.residual.shape[2]
    # nothing flows before the first source, and nothing after the last target is read
    x = run.residual.new_zeros(n_sources, end - start, d_model)
    here = edges.only(edges.target_position == position[edges.source])
    pairs: list[Pairs] = []

    def write(layer: int) -> None:
        now = writes.layer == layer
        at = writes.source[now], writes.position[now] - start
        x.index_put_(at, writes.vector[now], accumulate=True)
        # what passes no attention at all stays at its position
        free_edges = here.only(here.target_layer > layer)
        if bool(now.any()) and len(free_edges.at):
            vectors = x.new_zeros(n_sources, d_model)
            vectors.index_add_(0, writes.source[now], writes.vector[now])
            s, t = free_edges.source, free_edges.target
            out.attention_free[free_edges.at] += _dots(vectors, s, free[layer + 1], t)

    write(-1)
    for layer in range(run.n_layers):
        parallel = blocks.heads.block(layer).parallel
        begun = int((first < layer).sum())  # sources are in this order: those after are zero
        carried = blocks.carry(layer, x[:begun], start)
        ends_later = edges.target_layer > layer if parallel else edges.target_layer >= layer
        crossing = edges.only((first[edges.source] < layer) & ends_later)
        if len(crossing.at):
            meeting = _Meeting(layer, start, carried, back[layer], run.pattern[layer])
            through = _through(meeting, crossing)
            out.between[crossing.at, layer] = True
            out.through[crossing.at, layer] = through
            out.last[crossing.at, layer] = _last(meeting, crossing)
            if listing is not None:
                row, head = _largest(through, listing)
                pairs.append(_pairs(meeting, crossing, row, head, position, listing.pairs))
        reading = edges.only((edges.target_layer == layer) & (first[edges.source] < layer))
        out.weight[reading.at] = _read(carried.mid, reads, reading, start)
        x[:begun] = carried.out
        write(layer)
    reading = edges.only(edges.target_layer == run.n_layers)
    out.weight[reading.at] = _read(x, reads, reading, start)
    return pairs


def _through(meeting: _Meeting, edges: _Edges) -> Float[Tensor, "n n_heads"]:
    """Products over positions, of every source with every target in one product."""
    _, start, carried, back, _ = meeting
    sources, s = edges.source.unique(return_inverse=True)
    targets, t = edges.target.unique(return_inverse=True)
    left = carried.z[sources].permute(2, 0, 1, 3).flatten(2)
    right = back.whole[:, back.row[targets], start : start + carried.z.shape[1]].flatten(2)
    return (left @ right.transpose(1, 2))[:, s, t].T


def _last(meeting: _Meeting, edges: _Edges) -> Float[Tensor, "n n_heads"]:
    """Products at the target's position alone, from where no attention follows."""
    _, start, carried, back, _ = meeting
    n_heads = carried.z.shape[2]
    at = edges.source * carried.z.shape[1] + (edges.target_position - start)
    z, local = carried.z.flatten(2).flatten(0, 1), back.local.flatten(1)
    return _dots(z, at, local, back.row[edges.target], n_heads)


def _largest(
    through: Float[Tensor, "n n_heads"], listing: Listing
) -> tuple[Int[Tensor, " n_listed"], Int[Tensor, " n_listed"]]:
    """The heads to list, as rows of ``through`` and heads."""
    size, order = through.abs().sort(dim=1, descending=True, stable=True)
    before = size.cumsum(1) - size
    wanted = (before < listing.share * size.sum(1, keepdim=True)) & (size > 0)
    wanted[:, listing.heads :] = False
    row, rank = wanted.nonzero(as_tuple=True)
    return row, order[row, rank]


def _pairs(
    meeting: _Meeting,
    edges: _Edges,
    row: Int[Tensor, " n_listed"],
    head: Int[Tensor, " n_listed"],
    first_key: Int[Tensor, " n_sources"],
    n: int,
    chunk: int = 128,
) -> Pairs:
    """What each listed head carried from every key to every query, the ``n`` largest of it.

    Args:
        meeting: the block.
        edges: that cross it.
        row, head: rows of ``edges``, and the head listed.
        first_key: where each source is.
        n: how many.
    """
    layer, start, carried, back, pattern = meeting
    order = first_key[edges.source[row]].argsort()
    row, head = row[order], head[order]
    n_pos = pattern.shape[1]
    where = row.new_zeros(len(row), n)
    value = pattern.new_zeros(len(row), n)
    for at in torch.arange(len(row), device=row.device).split(chunk):
        if not len(at):  # no head is listed
            break
        r, h = row[at], head[at]
        # from the first key that any of these has to the last query
        key = int(first_key[edges.source[r]].min())
        query = int(edges.target_position[r].max()) + 1
        values = carried.values[edges.source[r], key - start : query - start, h]
        gradient = back.whole[h, back.row[edges.target[r]], key:query]
        parts = gradient @ values.transpose(1, 2) * pattern[h, key:query, key:query]
        size, k = query - key, min(n, (query - key) ** 2)
        largest = parts.flatten(1).abs().topk(k, dim=1).indices
        value[at, :k] = parts.flatten(1).gather(1, largest)
        where[at, :k] = (key + largest // size) * n_pos + key + largest % size
    return Pairs(
        edge=edges.at[row],
        layer=torch.full_like(row, layer),
        head=head,
        query=where // n_pos,
        key=where % n_pos,
        value=value,
    )


def _dots(
    a: Float[Tensor, "n_a width"],
    i: Int[Tensor, " n"],
    b: Float[Tensor, "n_b width"],
    j: Int[Tensor, " n"],
    parts: int | None = None,
    chunk: int = 4096,
) -> Float[Tensor, "n ..."]:
    """Products of rows ``a[i]`` and ``b[j]``, in parts of equal length."""
    pieces = []
    for rows, columns in zip(i.split(chunk), j.split(chunk), strict=True):
        product = a[rows] * b[columns]
        pieces.append(product.unflatten(1, (parts or 1, -1)).sum(2))
    products = torch.cat(pieces) if pieces else a.new_zeros(0, parts or 1)
    return products if parts else products[:, 0]


def _read(
    x: Float[Tensor, "n_sources m d_model"], reads: Reads, edges: _Edges, start: int
) -> Float[Tensor, " n"]:
    at = edges.source * x.shape[1] + (edges.target_position - start)
    return _dots(x.flatten(0, 1), at, reads.row, edges.target)


def _sweep_back(blocks: FrozenBlocks, reads: Reads) -> tuple[list[_Back], list[Tensor]]:
    """Carry targets back.

    Returns:
        For every block, its heads' gradients; for every checkpoint, (n_targets, d_model) gradients
        at the target's position along paths without attention.
    """
    run = blocks.heads.run
    n_layers, n_targets, d_model = run.n_layers, len(reads.layer), reads.row.shape[1]
    order = reads.layer.argsort(descending=True, stable=True)  # later ones first: rows are added
    layer_of, position, row = reads.layer[order], reads.position[order], reads.row[order]
    end = int(position.max()) + 1

    def placed(first: int, n: int) -> Tensor:
        g = row.new_zeros(n - first, end, d_model)
        g[torch.arange(n - first, device=g.device), position[first:n]] = row[first:n]
        return g

    n = int((layer_of == n_layers).sum())
    g, local = placed(0, n), row[:n]
    free = [row.new_zeros(n_targets, d_model) for _ in range(n_layers + 1)]
    free[n_layers][order[:n]] = local
    back: list[_Back] = []
    for layer in reversed(range(n_layers)):
        first, n = n, int((layer_of >= layer).sum())
        gradients = [blocks.vjp(layer, g), blocks.vjp_mid(layer, placed(first, n))]
        later = blocks.vjp_here(layer, local, position[:first])
        begun = blocks.vjp_here(layer, row[first:n], position[first:n], mid=True)
        z, local = (torch.cat(both) for both in zip(later, begun, strict=True))
        where = torch.full_like(reads.layer, -1)
        where[order[:n]] = torch.arange(n, device=where.device)
        whole = torch.cat([p.z for p in gradients]).permute(2, 0, 1, 3).contiguous()
        back.append(_Back(where, whole, z))
        g = torch.cat([p.whole for p in gradients])
        free[layer][order[:n]] = local
    return back[::-1], free
