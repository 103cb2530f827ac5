"""Many QK tables at once: each block's components are projected once, all products in a batch.

A file of a large graph holds hundreds of tables. One by one each costs a projection of its
components and dozens of small operations; side by side they cost their arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.batches import BATCH_TERMS, Batch
from circuit_tracer_qk.attribution.qk import WIDE_TERMS, Place
from circuit_tracer_qk.attribution.residual.qk import QK


class _Images(NamedTuple):
    """Projected components of one side of one block.

    Attributes:
        images: (n + 1, d_head), the last one zero.
        start, count: by (head, position), where its images lie and how many they are.
    """

    images: Tensor
    start: dict[tuple[int, int], int]
    count: dict[tuple[int, int], int]

    def gather(self, at: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor:
        """(len(at), most components, d_head), zero beyond those that a position has."""
        device = self.images.device
        start = torch.tensor([self.start[key] for key in at], device=device)
        count = torch.tensor([self.count[key] for key in at], device=device)
        row = torch.arange(int(count.max()), device=device)
        index = torch.where(row < count[:, None], start[:, None] + row, len(self.images) - 1)
        return self.images[index].to(dtype)


class ResidualBatches:
    """Batches of tables of a residual graph.

    Args:
        qk: its scores; :meth:`QK.table` gives the same tables one by one.
    """

    def __init__(self, qk: QK) -> None:
        self.qk = qk
        self.heads = qk.heads

    @torch.no_grad()
    def batches(self, places: Iterable[Place]) -> Iterator[Batch]:
        """Tables of many places, by layer and query."""
        for layer, of_layer in groupby(sorted(set(places)), key=lambda p: p.layer):
            yield from self._of_block(
                layer, sorted(of_layer, key=lambda p: (p.query, p.key, p.head))
            )

    def _of_block(self, layer: int, places: list[Place]) -> Iterator[Batch]:
        block = self.heads.block(layer)
        at_query = [(p.head, p.query) for p in places]
        at_key = [(block.group(p.head), p.key) for p in places]
        queries, keys, whole_q, whole_k = self._images(layer, at_query, at_key)
        wanted = {(p.head, p.query) for p in places}
        rows = self.qk.rows(layer, wanted, whole_q, whole_k, device=torch.device("cpu"))
        named = [
            {p: self.qk.components(layer, p, side) for p in {place[2 + side] for place in places}}
            for side in (0, 1)
        ]
        pattern = self.heads.run.pattern[layer]
        dtype, device = pattern.dtype, pattern.device
        counts = ((queries.count[q], keys.count[k]) for q, k in zip(at_query, at_key, strict=True))
        start, sizes = 0, list(counts)
        while start < len(places):
            here = slice(start, _end(start, sizes))
            # so many terms do not cancel to nothing
            of = dtype if prod(sizes[start]) > WIDE_TERMS else queries.images.dtype
            start = here.stop
            in_batch, q_at, k_at = places[here], at_query[here], at_key[here]
            q, k = queries.gather(q_at, of), keys.gather(k_at, of)
            head, query, key = torch.tensor([p[1:] for p in in_batch], device=device).T
            group = torch.tensor([g for g, _ in k_at], device=device)
            score = (whole_q[query, head] * whole_k[key, group]).sum(1) / block.attn_scale
            yield Batch(
                places=in_batch,
                score=score.cpu(),
                score_capped=block.cap(score).cpu(),
                pattern=pattern[head, query, key].cpu(),
                query=[named[0][p.query] for p in in_batch],
                key=[named[1][p.key] for p in in_batch],
                terms=((q / block.attn_scale) @ k.transpose(1, 2)).to(dtype).cpu(),
                rows={p[:3]: rows.pop(p[:3]) for p in in_batch if p[:3] in rows},
            )

    def _images(
        self, layer: int, at_query: list[tuple[int, int]], at_key: list[tuple[int, int]]
    ) -> tuple[_Images, _Images, Tensor, Tensor]:
        """Projected components of (head, position) and of (key-value head, position).

        Returns:
            Of queries and of keys; and q and k of the whole residual stream, (n_pos, n_heads,
            d_head) and (n_pos, n_kv, d_head), of the queries and of the key-value heads named.
        """
        checkpoint, stream = self.qk.parts.at(layer), self.heads.run.residual[layer]
        positions = sorted({p for _, p in (*at_query, *at_key)})
        parts = [checkpoint.at(p) for p in positions]
        vectors = torch.cat([*(checkpoint.vectors(range(p, p + 1)) for p in positions), stream])
        here = torch.cat([checkpoint.position[part] for part in parts] + [self.heads.everywhere])
        normed = self.heads.normed(layer, vectors.to(self.qk.wide), here)
        n_rows = [part.stop - part.start for part in parts]
        *rows_at, whole_rows = torch.arange(len(here)).split([*n_rows, len(stream)])
        rows = dict(zip(positions, rows_at, strict=True))
        has_constants = self.heads.has_constants(layer)
        everywhere = self.heads.everywhere
        sides, wholes = [], []
        for side, wanted in enumerate((at_query, at_key)):
            constants = self.heads.constants(layer, everywhere, None, side, self.qk.wide)
            whole = constants.clone()
            pieces, start, count, n = [], {}, {}, 0
            for head, places in groupby(sorted(set(wanted)), key=lambda at: at[0]):
                read_at = [p for _, p in places]
                read = read_at if side == 0 else list(range(len(stream)))
                of_head = torch.cat([*(rows[p] for p in read_at), whole_rows[read]]).to(here.device)
                image = self.heads.projected(layer, normed[of_head], here[of_head], head, side)
                *per_position, last = image.split([*(len(rows[p]) for p in read_at), len(read)])
                whole[read, head] += last
                for p, images in zip(read_at, per_position, strict=True):
                    pieces.append(images)
                    if has_constants:
                        pieces.append(constants[p, head][None])
                    start[head, p], count[head, p] = n, len(images) + has_constants
                    n += count[head, p]
            nothing = normed.new_zeros(1, pieces[0].shape[1])
            sides.append(_Images(torch.cat([*pieces, nothing]), start, count))
            wholes.append(whole)
        return sides[0], sides[1], wholes[0], wholes[1]


def _end(start: int, sizes: list[tuple[int, int]]) -> int:
    """Where a batch ends: before it is large, or holds both wide and narrow tables."""
    wide = prod(sizes[start]) > WIDE_TERMS
    n_query, n_key = sizes[start]
    for i in range(start + 1, len(sizes)):
        n_query, n_key = max(n_query, sizes[i][0]), max(n_key, sizes[i][1])
        full = (i + 1 - start) * n_query * n_key > BATCH_TERMS
        if full or (prod(sizes[i]) > WIDE_TERMS) != wide:
            return i
    return len(sizes)
