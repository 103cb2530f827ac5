"""QK attributions of a residual graph: components of the block's checkpoint, at the position itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from operator import index, itemgetter
from threading import RLock
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from circuit_tracer_qk.attribution.component import BIAS, FEATURE, KINDS, Component
from circuit_tracer_qk.attribution.qk import Label, Place, Scores
from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.attribution.text import shapes
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.base.rules import check, listed
from circuit_tracer_qk.base.topk import largest
from circuit_tracer_qk.model.attention import KEY, QUERY
from circuit_tracer_qk.model.heads import Heads

BATCH_BYTES = 3 << 20  # of tables whose largest terms are looked for at once


RUN = 16  # neighbouring positions projected at once: bounds memory, and stays in the cache


class TopTerms(NamedTuple):
    """The largest terms of one head and query at some of its keys, without their tables.

    Attributes:
        keys: (n_keys,) key positions.
        scores: (n_keys,) scores before the soft-cap.
        values: (n_keys, n) signed terms, largest by absolute value first; 0 beyond a small table.
        query_index, key_index: (n_keys, n) row and column in that key's :class:`QKTable`; -1 beyond
            a small table, and for some of the terms that are exactly 0.

    >>> top = graph.qk_top(layer=1, head=2, query=14, n=5)
    >>> table = graph.qk(layer=1, head=2, query=14, key=6)
    >>> table.query[top.query_index[6, 0]].feature, table.key[top.key_index[6, 0]].feature
    (129, 61)
    """

    keys: Int[Tensor, " n_keys"]
    scores: Float[Tensor, " n_keys"]
    values: Float[Tensor, "n_keys n"]
    query_index: Int[Tensor, "n_keys n"]
    key_index: Int[Tensor, "n_keys n"]

    __repr__ = shapes


class QK(Scores):
    """QK attributions of a residual graph's run.

    Projected components are kept for the most recent positions, so that the keys of a query and
    the queries of a key share them; so are the lists that name them.

    Args:
        parts: the run's components.
        heads: the model's heads on that run.
        label: names features.
        keep_bytes: how much memory projections may take.

    >>> round(ctqk.explain(prompt, model).table(1, 2, 14, 6).score, 1)
    73.3
    """

    def __init__(
        self, parts: Decomposition, heads: Heads, label: Label, keep_bytes: int = 256 << 20
    ) -> None:
        super().__init__(heads)
        self.parts = parts
        self.label = label
        self.keep_bytes = keep_bytes
        self._constants = lru_cache(maxsize=256)(
            lambda layer, head, side: heads.constants(layer, heads.everywhere, head, side)
        )
        self._lock = RLock()
        self.projected: OrderedDict[tuple[int, int, int, int], Tensor] = OrderedDict()
        self.kept_bytes = 0

    @exactly
    def top(self, layer: int, head: int, query: int, n: int = 50) -> TopTerms:
        """The ``n`` largest terms for every visible key of a query; no tables are kept.

        Raises:
            UserError: an index out of range.
        """
        n = check(n=n)["n"]
        layer, head, query, _ = self.check(layer, head, query)
        keys = range(self.heads.block(layer).first_key(query), query + 1)
        [(_, top)] = self._tops({(layer, head, query): list(keys)}, n)
        return top

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
        n = check(n=n)["n"]
        given = listed(places, "places", "a list of (layer, head, query, key)")
        for layer, head, query, key in sorted({self.check(*_place(place)) for place in given}):
            by_query.setdefault((layer, head, query), []).append(key)
        yield from self._tops(by_query, n)

    def _tops(
        self, by_query: dict[tuple[int, int, int], list[int]], n: int
    ) -> Iterator[tuple[tuple[int, int, int], TopTerms]]:
        """The same, for the keys of each (layer, head, query), all of a head's in a row."""
        sizes = {layer: self._sizes(layer) for layer, _, _ in by_query}
        # keys from few components to many, so that tables made at once are alike; what the device
        # has to know of them goes there in one go
        key_meta: list[tuple[int, int, int]] = []
        for (layer, _, _), keys in by_query.items():
            of = [(i, key, sizes[layer][key]) for i, key in enumerate(keys)]
            key_meta += sorted(of, key=itemgetter(2))
        here = torch.tensor(key_meta, device=self.heads.run.residual.device).view(-1, 3).T
        start = 0
        for (layer, head), queries in groupby(by_query, key=itemgetter(0, 1)):
            queries, group = list(queries), self.heads.block(layer).group(head)
            wanted = sorted({key for at in queries for key in by_query[at]})
            with exactly:
                images = self._images(layer, group, wanted, side=KEY)
                of_key = dict(zip(wanted, images, strict=True))
            for at in queries:
                stop = start + len(by_query[at])
                with exactly:
                    of_keys = [of_key[key] for _, key, _ in key_meta[start:stop]]
                    top = self._top(at, of_keys, here[:, start:stop], n)
                yield at, top._replace(keys=torch.tensor(by_query[at]))
                start = stop

    def _top(
        self, at: tuple[int, int, int], keys: list[Tensor], key_meta: Tensor, n: int
    ) -> TopTerms:
        """One query's terms.

        ``key_meta`` (3, n_keys) holds each key's row of the result, itself and its size.
        """
        layer, head, query = at
        to, key, size = key_meta
        q = self._images(layer, head, [query], side=QUERY)[0] / self.heads.block(layer).attn_scale
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
        columns = features.checkpoint, features.feature, features.activation
        named = zip(*(column[at].tolist() for column in columns), strict=True)
        listed = []
        for code in kinds.tolist():
            if code == FEATURE:
                c, feature, activation = next(named)
                label = self.label(c, feature)
                listed.append(Component("feature", c, feature, position, activation, label))
            else:
                label = "b_dec" if code == BIAS else KINDS[code]
                listed.append(Component(KINDS[code], layer, None, position, None, label))
        return listed + self._constant_component(layer, position, side)

    def _image(
        self, layer: int, head: int, position: int, side: int
    ) -> Float[Tensor, "n_components d_head"]:
        checkpoint = self.parts.at(layer)
        vectors = checkpoint.vectors(range(position, position + 1)).to(self.wide)
        at = checkpoint.position[checkpoint.at(position)]
        image = self.heads.image(layer, vectors, at, head, side)
        return self._with_constant(image, layer, head, position, side)

    def _images(self, layer: int, head: int, at: Sequence[int], side: int) -> list[Tensor]:
        """Projected components of several positions, each (n_components, d_head), kept."""
        wanted = [(side, layer, head, p) for p in at]
        with self._lock:
            missing = [p for p in at if (side, layer, head, p) not in self.projected]
            self._project(missing, layer, head, side)
            for key in wanted:
                self.projected.move_to_end(key)
            images = [self.projected[key] for key in wanted]
            while self.kept_bytes > self.keep_bytes and len(self.projected) > len(wanted):
                self.kept_bytes -= self.projected.popitem(last=False)[1].nbytes
        return images

    def _project(self, positions: list[int], layer: int, head: int, side: int) -> None:
        checkpoint, has_constants = self.parts.at(layer), self.heads.has_constants(layer)
        constants = self._constants(layer, head, side) if has_constants else None
        for run in _runs(positions):
            part = slice(checkpoint.starts[run.start], checkpoint.starts[run.stop])
            vectors, at = checkpoint.vectors(run), checkpoint.position[part]
            images = self.heads.image(layer, vectors, at, head, side)
            for p in run:
                here = checkpoint.at(p)
                image = images[here.start - part.start : here.stop - part.start]
                # a copy: dropping it later frees its memory, whatever became of its neighbours
                image = torch.cat([image] if constants is None else [image, constants[p][None]])
                self.projected[side, layer, head, p] = image
                self.kept_bytes += image.nbytes


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
    q: Float[Tensor, "n_query d_head"],
    keys: list[Tensor],
    to: Int[Tensor, " n_keys"],
    size: Int[Tensor, " n_keys"],
    n: int,
) -> tuple[Float[Tensor, "n_keys n"], Int[Tensor, "2 n_keys n"]]:
    """The ``n`` largest terms of one query's images with those of each key.

    Args:
        q: images of the query, divided by the scale.
        keys: (n_components, d_head) images of each key, from few to many.
        to: rows of the result that they go to.
        size: how many images each has.

    Returns:
        Values; rows and columns, -1 beyond a small table.
    """
    values = q.new_zeros(len(keys), n)
    index = torch.full((2, len(keys), n), -1, device=q.device)
    stop = len(keys)
    while stop:  # tables made at once are filled up to the largest of them
        width = len(keys[stop - 1])
        start = max(0, stop - max(1, BATCH_BYTES // (width * len(q) * q.element_size())))
        k = pad_sequence(keys[start:stop], batch_first=True)
        terms = (k.flatten(0, 1) @ q.T).view(stop - start, -1)
        largest_values, place = largest(terms, min(n, terms.shape[1]))
        row, column = place % len(q), place // len(q)
        real, at, m = column < size[start:stop, None], to[start:stop], largest_values.shape[1]
        values[at, :m] = largest_values
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
