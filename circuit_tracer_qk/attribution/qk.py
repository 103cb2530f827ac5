"""QK attributions: a head's score at a query and a key position, as a sum of named terms.

    T[u, u'] = q(u) . k(u') / attn_scale,   sum over all u, u' of T = score

(method, section 2; paper, "QK attributions"). The table is never approximated; the score is
before soft-cap and mask. Bias and error components are rows and columns like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby
from operator import index, itemgetter
from threading import RLock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from circuit_tracer_qk.attribution.residual.decompose import (
    BIAS,
    FEATURE,
    KINDS,
    Component,
    Decomposition,
)
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.base.topk import largest
from circuit_tracer_qk.model.heads import Heads

WIDE_TERMS = 1 << 16  # tables of more terms are contracted in the run's own dtype
BATCH_BYTES = 3 << 20  # of tables whose largest terms are looked for at once
RUN = 16  # neighbouring positions projected at once: bounds memory, and stays in the cache

Label = Callable[[int, int], str]
"""(checkpoint, feature) -> a short label, "" where there is none."""


class Place(NamedTuple):
    """Where a table stands: one head's score of one key position at one query position."""

    layer: int
    head: int
    query: int
    key: int


@dataclass(frozen=True, eq=False)
class QKTable:
    """Why head ``L{layer}H{head}`` at ``query_position`` scored ``key_position`` as it did.

    Attributes:
        score: attention score before soft-cap and mask, from the whole residual stream.
        score_capped: after the soft-cap (equal to ``score`` where the model has none).
        masked: the key lies outside the head's window, so the score never enters the softmax.
        query, key: the components of each side, in the order of the rows and columns.
        terms: (len(query), len(key)); ``terms.sum() == score``.
    """

    layer: int
    head: int
    query_position: int
    key_position: int
    score: float
    score_capped: float
    masked: bool
    query: list[Component]
    key: list[Component]
    terms: Tensor

    @property
    def query_marginal(self) -> Tensor:
        """(len(query),) row sums: what each query component adds to the score."""
        return self.terms.sum(1)

    @property
    def key_marginal(self) -> Tensor:
        """(len(key),) column sums: what each key component adds to the score."""
        return self.terms.sum(0)

    @cached_property
    def blocks(self) -> dict[tuple[str, str], float]:
        """{(query kind, key kind): total}: how much of the score features explain.

        All nine pairs of feature, bias and error where the checkpoint has a dictionary; the kinds
        present elsewhere. The totals sum to the score.
        """
        rows, columns = (
            one_hot(torch.tensor([KINDS.index(c.kind) for c in side]), len(KINDS)).to(self.terms)
            for side in (self.query, self.key)
        )
        totals = (rows.T @ self.terms @ columns).tolist()
        present = {c.kind for c in (*self.query, *self.key)}
        if not present & {"embedding", "position"}:
            present |= {"feature", "bias", "error"}
        kinds = [k for k in KINDS if k in present]
        return {(a, b): totals[KINDS.index(a)][KINDS.index(b)] for a in kinds for b in kinds}

    def top(self, n: int) -> list[tuple[Component, Component, float]]:
        """The ``n`` terms largest by absolute value, signed, largest first.

        Raises:
            UserError: ``n`` is below one.
        """
        check_count(n)
        flat = self.terms.flatten()
        at = flat.abs().topk(min(n, len(flat))).indices
        values = flat[at].tolist()
        width = self.terms.shape[1]
        return [
            (self.query[i // width], self.key[i % width], value)
            for i, value in zip(at.tolist(), values, strict=True)
        ]


class QKRow(NamedTuple):
    """One head's attention from one query over keys ``0..query``.

    Attributes:
        scores: (query + 1,) after the soft-cap; -inf where masked. ``softmax(scores) == pattern``.
        pattern: (query + 1,) the model's own attention pattern; 0 where masked.
        scores_raw: (query + 1,) before soft-cap and mask.
    """

    scores: Tensor
    pattern: Tensor
    scores_raw: Tensor


class TopTerms(NamedTuple):
    """The largest terms of one head and query at some of its keys, without their tables.

    Attributes:
        keys: (n_keys,) key positions.
        scores: (n_keys,) scores before the soft-cap.
        values: (n_keys, n) signed terms, largest by absolute value first; 0 beyond a small table.
        query_index, key_index: (n_keys, n) row and column in that key's :class:`QKTable`; -1 beyond
            a small table, and for some of the terms that are exactly 0.
    """

    keys: Tensor
    scores: Tensor
    values: Tensor
    query_index: Tensor
    key_index: Tensor


class Scores(ABC):
    """Scores of one run and their tables, for any head and any pair of positions.

    What a position's components are, and their images, is a subclass's.

    Args:
        heads: the model's heads on that run.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        # float32 products that cancel are off by more than 1e-5 of a score made of a few terms, so
        # scores and single tables are contracted in float64 where the device has it
        residual = heads.run.residual
        self.wide = residual.dtype if residual.device.type == "mps" else torch.float64
        # whole q and k of a layer serve every pair of its positions
        self._whole = lru_cache(maxsize=4)(partial(heads.whole, dtype=self.wide))
        self._exact = lru_cache(maxsize=256)(self._image)
        self._listed = lru_cache(maxsize=1024)(self._list)

    def check(self, layer: int, head: int, query: int, key: int | None = None) -> None:
        """Refuse indices that do not exist.

        Raises:
            UserError: layer, head or position out of range, or key > query.
        """
        n_pos, blocks = self.heads.run.n_pos, self.heads.blocks
        for name, value, limit in (
            ("layer", layer, len(blocks)),
            ("head", head, blocks[0].n_heads),
            ("query position", query, n_pos),
            ("key position", 0 if key is None else key, n_pos),
        ):
            if not hasattr(value, "__index__") or not 0 <= index(value) < limit:
                raise UserError(
                    f"{name} {value} is out of range: it must be a whole number from 0 to "
                    f"{limit - 1}."
                )
        if key is not None and key > query:
            raise UserError(
                f"key position {key} is after query position {query}: attention is causal, "
                "so the key must be at or before the query."
            )

    @exactly
    def table(self, layer: int, head: int, query: int, key: int) -> QKTable:
        """The exact table of one head at one query and key position.

        Raises:
            UserError: an index out of range, or key > query.
        """
        self.check(layer, head, query, key)
        block = self.heads.block(layer)
        q = self._exact(layer, head, query, side=0)
        k = self._exact(layer, block.group(head), key, side=1)
        return self._made(layer, head, query, key, q, k)

    def tables(self, places: Iterable[Place]) -> Iterator[QKTable]:
        """Tables of many (layer, head, query, key), by layer, query and key.

        Raises:
            UserError: an index out of range, or key > query.
        """
        for place in sorted(set(places), key=lambda p: (p[0], p[2], p[3], p[1])):
            yield self.table(*place)

    def _made(self, layer: int, head: int, query: int, key: int, q: Tensor, k: Tensor) -> QKTable:
        """The table of the images of either side, (n_components, d_head) each."""
        block = self.heads.block(layer)
        device = self.heads.run.residual.device
        score = self._scores(layer, head, query, torch.tensor([key], device=device))
        if len(q) * len(k) > WIDE_TERMS:  # so many do not cancel to nothing
            q, k = (image.to(self.heads.run.residual.dtype) for image in (q, k))
        terms = (q / block.attn_scale) @ k.T
        return QKTable(
            layer=layer,
            head=head,
            query_position=query,
            key_position=key,
            score=float(score),
            score_capped=float(block.cap(score)),
            masked=key < block.first_key(query),
            query=self.components(layer, query, side=0),
            key=self.components(layer, key, side=1),
            terms=terms.to(self.heads.run.residual.dtype),
        )

    @exactly
    def row(self, layer: int, head: int, query: int) -> QKRow:
        """Scores and pattern of one head's query over its keys.

        Raises:
            UserError: an index out of range.
        """
        self.check(layer, head, query)
        block = self.heads.block(layer)
        device = self.heads.run.residual.device
        raw = self._scores(layer, head, query, torch.arange(query + 1, device=device))
        scores = block.cap(raw).clone()
        scores[: block.first_key(query)] = -torch.inf
        pattern = self.heads.run.pattern[layer, head, query, : query + 1].clone()
        return QKRow(scores.to(pattern.dtype), pattern, raw.to(pattern.dtype))

    def components(self, layer: int, position: int, side: int) -> list[Component]:
        """The components of checkpoint ``layer`` at a position, the map's constant last."""
        return list(self._listed(layer, position, side))

    @abstractmethod
    def _list(self, layer: int, position: int, side: int) -> list[Component]:
        """The components of one position, in the order of their images."""

    @abstractmethod
    def _image(self, layer: int, head: int, position: int, side: int) -> Tensor:
        """Projected components of one position, (n_components, d_head), as wide as can be."""

    def _scores(self, layer: int, head: int, query: int, keys: Tensor) -> Tensor:
        block = self.heads.block(layer)
        q, k = self._whole(layer)
        return k[keys.to(k.device), block.group(head)] @ q[query, head] / block.attn_scale


class QK(Scores):
    """QK attributions of a residual graph's run.

    Projected components are kept for the most recent positions, so that the keys of a query and
    the queries of a key share them; so are the lists that name them.

    Args:
        parts: the run's components.
        heads: the model's heads on that run.
        label: names features.
        keep_bytes: how much memory projections may take.
    """

    def __init__(
        self, parts: Decomposition, heads: Heads, label: Label, keep_bytes: int = 256 << 20
    ) -> None:
        super().__init__(heads)
        self.parts = parts
        self.label = label
        self.keep_bytes = keep_bytes
        everywhere = torch.arange(heads.run.n_pos, device=heads.run.residual.device)
        self._constants = lru_cache(maxsize=4)(lambda layer: heads.constants(layer, everywhere))
        self._lock = RLock()
        self._projected: OrderedDict[tuple[int, int, int, int], Tensor] = OrderedDict()
        self._kept_bytes = 0

    @exactly
    def top(self, layer: int, head: int, query: int, n: int = 50) -> TopTerms:
        """The ``n`` largest terms for every visible key of a query; no tables are kept.

        Raises:
            UserError: an index out of range.
        """
        check_count(n)
        self.check(layer, head, query)
        keys = range(self.heads.block(layer).first_key(query), query + 1)
        [(_, found)] = self._tops({(layer, head, query): list(keys)}, n)
        return found

    def tops(
        self, places: Iterable[Sequence[int]], n: int = 50
    ) -> Iterator[tuple[tuple[int, int, int], TopTerms]]:
        """The ``n`` largest terms of many tables, by (layer, head, query); no tables are kept.

        The keys of a query and the queries of a key share their projections, and tables are made
        ``BATCH_BYTES`` at a time: all pairs of a head take no more room than a few of them.

        Args:
            places: (layer, head, query, key) of each table.
            n: how many terms of each.

        Raises:
            UserError: an index out of range, or key > query.
        """
        by_query: dict[tuple[int, int, int], list[int]] = {}
        check_count(n)
        for layer, head, query, key in sorted({_place(place) for place in places}):
            self.check(layer, head, query, key)
            by_query.setdefault((layer, head, query), []).append(key)
        yield from self._tops(by_query, n)

    def _tops(
        self, by_query: dict[tuple[int, int, int], list[int]], n: int
    ) -> Iterator[tuple[tuple[int, int, int], TopTerms]]:
        """The same, for the keys of each (layer, head, query), all of a head's in a row."""
        sizes = {layer: self._sizes(layer) for layer, _, _ in by_query}
        # keys from few components to many, so that tables made at once are alike; what the device
        # has to know of them is told in one go
        told: list[tuple[int, int, int]] = []
        for (layer, _, _), keys in by_query.items():
            of = [(i, key, sizes[layer][key]) for i, key in enumerate(keys)]
            told += sorted(of, key=itemgetter(2))
        here = torch.tensor(told, device=self.heads.run.residual.device).view(-1, 3).T
        start = 0
        for (layer, head), queries in groupby(by_query, key=itemgetter(0, 1)):
            queries, group = list(queries), self.heads.block(layer).group(head)
            wanted = sorted({key for at in queries for key in by_query[at]})
            with exactly:
                images = self._images(layer, group, wanted, side=1)
                of_key = dict(zip(wanted, images, strict=True))
            for at in queries:
                stop = start + len(by_query[at])
                with exactly:
                    mine = [of_key[key] for _, key, _ in told[start:stop]]
                    found = self._top(at, mine, here[:, start:stop], n)
                yield at, found._replace(keys=torch.tensor(by_query[at]))
                start = stop

    def _top(self, at: tuple[int, int, int], keys: list[Tensor], told: Tensor, n: int) -> TopTerms:
        """One query's terms; ``told`` (3, n_keys): each key's row of the result, itself, its size."""
        layer, head, query = at
        to, key, size = told
        q = self._images(layer, head, [query], side=0)[0] / self.heads.block(layer).attn_scale
        values, index = _largest_terms(q, keys, to, size, n)
        scores = torch.empty_like(values[:, 0])
        scores[to] = self._scores(layer, head, query, key).to(values.dtype)
        return TopTerms(key, scores, values, index[0], index[1])

    def _sizes(self, layer: int) -> list[int]:
        """How many components each position has, the map's constant among them."""
        starts, more = self.parts.at(layer).starts, int(self.heads.has_constants(layer))
        return [stop - start + more for start, stop in zip(starts, starts[1:], strict=False)]

    def _list(self, layer: int, position: int, side: int) -> list[Component]:
        checkpoint = self.parts.at(layer)
        part = checkpoint.at(position)
        features = self.parts.features
        kinds, nodes = checkpoint.kind[part], checkpoint.node[part]
        at = nodes[kinds == FEATURE]
        named = iter(
            zip(
                features.checkpoint[at].tolist(),
                features.feature[at].tolist(),
                features.activation[at].tolist(),
                strict=True,
            )
        )
        listed = []
        for code in kinds.tolist():
            if code == FEATURE:
                c, feature, activation = next(named)
                label = self.label(c, feature)
                listed.append(Component("feature", c, feature, position, activation, label))
            else:
                label = "b_dec" if code == BIAS else KINDS[code]
                listed.append(Component(KINDS[code], layer, None, position, None, label))
        if self.heads.has_constants(layer):
            label = ("b_Q + b_ln W_Q", "b_K + b_ln W_K")[side]
            listed.append(Component("bias", layer, None, position, None, label))
        return listed

    def _image(self, layer: int, head: int, position: int, side: int) -> Tensor:
        checkpoint = self.parts.at(layer)
        vectors = checkpoint.vectors(range(position, position + 1))
        vectors = vectors.to(self.wide)
        project = (self.heads.queries, self.heads.keys)[side]
        image = project(layer, vectors, checkpoint.position[checkpoint.at(position)], head)
        if not self.heads.has_constants(layer):
            return image
        at = torch.tensor([position], device=image.device)
        return torch.cat([image, self.heads.constants(layer, at, self.wide)[side][:, head]])

    def _images(self, layer: int, head: int, at: Sequence[int], side: int) -> list[Tensor]:
        """Projected components of several positions, each (n_components, d_head), kept."""
        with self._lock:
            return self._kept(layer, head, at, side)

    def _kept(self, layer: int, head: int, at: Sequence[int], side: int) -> list[Tensor]:
        wanted = [(side, layer, head, p) for p in at]
        missing = [key for key in wanted if key not in self._projected]
        if missing:
            self._project([p for *_, p in missing], layer, head, side)
        for key in wanted:
            self._projected.move_to_end(key)
        images = [self._projected[key] for key in wanted]
        while self._kept_bytes > self.keep_bytes and len(self._projected) > len(wanted):
            self._kept_bytes -= self._projected.popitem(last=False)[1].nbytes
        return images

    def _project(self, positions: list[int], layer: int, head: int, side: int) -> None:
        checkpoint = self.parts.at(layer)
        project = (self.heads.queries, self.heads.keys)[side]
        constants = None
        if self.heads.has_constants(layer):
            constants = self._constants(layer)[side][:, head]
        for run in _runs(positions):
            part = slice(checkpoint.starts[run.start], checkpoint.starts[run.stop])
            images = project(layer, checkpoint.vectors(run), checkpoint.position[part], head)
            for p in run:
                here = checkpoint.at(p)
                image = images[here.start - part.start : here.stop - part.start]
                # a copy: dropping it later frees its memory, whatever became of its neighbours
                image = torch.cat([image] if constants is None else [image, constants[p][None]])
                self._projected[side, layer, head, p] = image
                self._kept_bytes += image.nbytes


def check_count(n: int, name: str = "n") -> None:
    """Refuse to list less than one of something.

    Raises:
        UserError: it is no whole number, or below one.
    """
    if not hasattr(n, "__index__") or isinstance(n, bool) or index(n) < 1:
        raise UserError(f"{name} is {n}: it must be a whole number of at least 1.")


def _place(place: Sequence[int]) -> Place:
    """A place, however it was written.

    Raises:
        UserError: it is not four whole numbers.
    """
    try:
        return Place(*(index(value) for value in place))
    except TypeError as error:
        raise UserError(
            f"{place} is no place of a table: give a list of (layer, head, query, key), four whole "
            "numbers each."
        ) from error


def _largest_terms(
    q: Tensor, keys: list[Tensor], to: Tensor, size: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """The ``n`` largest terms of one query's images with those of each key.

    Args:
        q: (n_query, d_head) images of the query, divided by the scale.
        keys: (n_components, d_head) images of each key, from few to many.
        to: (n_keys,) rows of the result that they go to.
        size: (n_keys,) how many images each has.

    Returns:
        (n_keys, n) values; (2, n_keys, n) rows and columns, -1 beyond a small table.
    """
    values = q.new_zeros(len(keys), n)
    index = torch.full((2, len(keys), n), -1, device=q.device)
    stop = len(keys)
    while stop:  # tables made at once are filled up to the largest of them
        width = len(keys[stop - 1])
        start = max(0, stop - max(1, BATCH_BYTES // (width * len(q) * q.element_size())))
        k = pad_sequence(keys[start:stop], batch_first=True)
        terms = (k.flatten(0, 1) @ q.T).view(stop - start, -1)
        found, place = largest(terms, min(n, terms.shape[1]))
        row, column = place % len(q), place // len(q)
        real, at, m = column < size[start:stop, None], to[start:stop], found.shape[1]
        values[at, :m] = found
        index[0, at, :m] = torch.where(real, row, -1)
        index[1, at, :m] = torch.where(real, column, -1)
        stop = start
    return values, index


def _runs(positions: list[int]) -> list[range]:
    """Ascending positions as ranges of at most ``RUN`` neighbours."""
    runs: list[range] = []
    for p in positions:
        if runs and runs[-1].stop == p and len(runs[-1]) < RUN:
            runs[-1] = range(runs[-1].start, p + 1)
        else:
            runs.append(range(p, p + 1))
    return runs
