"""QK attributions over the nodes of a transcoder graph (attribution/README.md, section 4).

The residual stream at a block and a position is the sum of all sources carried there, so a score
is a sum over pairs of sources, from wherever they are. Sources that are no nodes are rows too:
features that the graph left out are one, biases one for each of what wrote them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.qk import Label, Place, QKTable, Scores
from circuit_tracer_qk.attribution.transcoder.cuts import Writes, stream_bytes
from circuit_tracer_qk.attribution.transcoder.nodes import TranscoderRun
from circuit_tracer_qk.model.attention import KEY, QUERY

UNSELECTED = "unselected features"
WIDE_ROWS = 256  # so few images may cancel in a score: they are projected in float64
ROUNDING = "rounding of the model's half precision"


class TranscoderQK(Scores):
    """QK attributions of a transcoder graph's run.

    A row of a table is a node, or several sources that are none. Single tables carry the head's
    map back to what the rows write; many are made in one sweep of the rows forward.

    Args:
        parts: the run, with what every source writes.
        label: names features, by (layer + 1, feature).
        rounded: the run is of a model in half precision, in which the sources do not quite sum to
            the residual stream: what is missing is a row of its own.
    """

    def __init__(self, parts: TranscoderRun, label: Label, rounded: bool = False) -> None:
        super().__init__(parts.blocks.heads)
        self.parts = parts
        self.label = label
        self.rounded = rounded

    @cached_property
    def row_of(self) -> Int[Tensor, " n_sources"]:
        """The row of each source; those that share one are summed."""
        rows: dict[object, int] = {}
        of_source = []
        for i, source in enumerate(self.parts.sources):
            name: object = i
            if source is not None and source.label:
                name = source.kind, source.label
            elif i >= self.parts.n_nodes:
                name = UNSELECTED
            of_source.append(rows.setdefault(name, len(rows)))
        return torch.tensor(of_source, device=self.parts.run.residual.device)

    @cached_property
    def _writes(self) -> Writes:
        """What every row writes, ``source`` being the row: one vector a block and position."""
        writes, run = self.parts.writes, self.parts.run
        row = self.row_of[writes.source]
        code = (row * (run.n_layers + 1) + writes.layer + 1) * run.n_pos + writes.position
        codes, at = code.unique(return_inverse=True)
        vectors = writes.vector.new_zeros(len(codes), writes.vector.shape[1])
        vectors.index_add_(0, at, writes.vector)
        rest, position = codes // run.n_pos, codes % run.n_pos
        row, layer = rest // (run.n_layers + 1), rest % (run.n_layers + 1) - 1
        return Writes(row, layer, position, vectors)

    @cached_property
    def _first(self) -> tuple[Int[Tensor, " n_rows"], Int[Tensor, " n_rows"]]:
        """By row: the first block that it is written before, and the first position."""
        writes, run = self._writes, self.parts.run
        n_rows = int(self.row_of.max()) + 1
        firsts = []
        for values, far in ((writes.layer + 1, run.n_layers + 1), (writes.position, run.n_pos)):
            first = torch.full((n_rows,), far, device=values.device)
            firsts.append(first.scatter_reduce_(0, writes.source, values, "amin"))
        return firsts[0], firsts[1]

    def rows_reaching(self, layer: int, position: int) -> Int[Tensor, " n"]:
        """The rows that may reach a block at a position."""
        blocks, positions = self._first
        return ((blocks <= layer) & (positions <= position)).nonzero().flatten()

    @cached_property
    def _components(self) -> list[Component]:
        """By row: its component; for a row that is no node its place is still to be put in."""
        listed: dict[int, Component] = {}
        sources = zip(self.row_of.tolist(), self.parts.sources, strict=True)
        for i, (row, source) in enumerate(sources):
            if row in listed:
                continue
            if source is None:  # a logit, which writes nothing
                listed[row] = Component("", 0, None, 0, None, "")
            elif source.label or i >= self.parts.n_nodes:
                kind = source.kind if source.label else "error"
                listed[row] = Component(kind, 0, None, 0, None, source.label or UNSELECTED)
            else:
                kind, layer, feature, position, activation, _ = source
                label = kind if feature is None else self.label(layer + 1, feature)
                listed[row] = Component(kind, layer + 1, feature, position, activation, label)
        return [listed[row] for row in range(len(listed))]

    @cached_property
    def _aggregated(self) -> set[int]:
        """The rows that are no nodes."""
        return set(self.row_of[self.parts.n_nodes :].tolist())

    def _list(self, layer: int, position: int, side: int) -> list[Component]:
        listed, no_nodes = [], self._aggregated
        for row in self.rows_reaching(layer, position).tolist():
            component = self._components[row]
            if row in no_nodes:
                component = component._replace(checkpoint=layer, position=position)
            listed.append(component)
        if self.rounded:
            listed.append(Component("error", layer, None, position, None, ROUNDING))
        return listed + self._constant_component(layer, position, side)

    @torch.no_grad()
    def _image(
        self, layer: int, head: int, position: int, side: int
    ) -> Float[Tensor, "n_components d_head"]:
        """The head's map is carried back to what the rows write: d_head gradients for any rows."""
        run, writes = self.parts.run, self._writes
        eye = torch.eye(run.residual.shape[2], dtype=self.wide, device=self.row_of.device)
        at = torch.full((len(eye),), position, device=eye.device)
        rows = self.heads.image(layer, eye, at, head, side).T  # (d_head, d_model), at the stream
        out = rows.new_zeros(len(self._components), len(rows))
        g = rows.new_zeros(len(rows), position + 1, len(eye))
        g[:, position] = rows
        for block in range(layer, -1, -1):  # g: gradients at what enters this block
            here = (writes.layer == block - 1) & (writes.position <= position)
            for p in writes.position[here].unique().tolist():
                i = (here & (writes.position == p)).nonzero().flatten()
                images = writes.vector[i].to(g.dtype) @ g[:, p].T
                out.index_add_(0, writes.source[i], images.to(self.wide))
            if block:
                g = self.parts.blocks.block(block - 1).vjp(g.to(run.residual.dtype))
        return self._finished(out[self.rows_reaching(layer, position)], layer, head, position, side)

    def _finished(
        self, images: Float[Tensor, "n d_head"], layer: int, head: int, position: int, side: int
    ) -> Float[Tensor, "n_components d_head"]:
        """The rows' images, and those of what is added at the position itself."""
        images = images.to(self.wide)
        if self.rounded:
            at = torch.tensor([position], device=images.device)
            stream = self.parts.run.residual[layer][at].to(images.dtype)
            whole = self.heads.image(layer, stream, at, head, side)
            images = torch.cat([images, whole - images.sum(0)])
        return self._with_constant(images, layer, head, position, side)

    @torch.no_grad()
    def tables(self, places: Iterable[Place]) -> Iterator[QKTable]:
        """Tables of many (layer, head, query, key), by layer, query and key.

        All rows are carried forward once, whatever the number of tables.

        Raises:
            UserError: an index out of range, or key > query.
        """
        by_layer: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for layer, head, query, key in sorted(set(places), key=lambda p: (p[0], p[2], p[3], p[1])):
            self.check(layer, head, query, key)
            by_layer[layer].append((head, query, key))
        for layer, streams in self._streams(max(by_layer, default=-1)):
            images, block = self._images(layer, streams), self.heads.block(layer)
            for head, query, key in by_layer[layer]:
                q, k = images(head, query, QUERY), images(block.group(head), key, KEY)
                yield self._made(layer, head, query, key, q, k)

    def _images(self, layer: int, streams: list[_Stream]) -> Callable[[int, int, int], Tensor]:
        """As :meth:`_image` at one block, of rows that were carried there."""

        @cache
        def vectors(position: int) -> Tensor:
            """The rows that may reach the position, there."""
            here = [s for s in streams if s.start <= position]
            rows = torch.cat([s.rows for s in here])
            place = torch.full_like(self._first[0], -1)
            place[rows] = torch.arange(len(rows), device=rows.device)
            there = torch.cat([s.x[:, position - s.start] for s in here])
            return there[place[self.rows_reaching(layer, position)]]

        @cache
        def images(head: int, position: int, side: int) -> Tensor:
            u = vectors(position)
            u = u.to(self.wide) if len(u) < WIDE_ROWS else u
            at = torch.full((len(u),), position, device=u.device)
            image = self.heads.image(layer, u, at, head, side)
            return self._finished(image, layer, head, position, side)

        return images

    def _streams(self, last: int) -> Iterator[tuple[int, list[_Stream]]]:
        """All rows at each block up to ``last``."""
        run, writes, (block, first) = self.parts.run, self._writes, self._first
        d_model = run.residual.shape[2]
        order = first.argsort(stable=True)
        order = order[first[order] < run.n_pos]  # logits write nothing
        width = run.n_pos * d_model * run.residual.element_size()
        rows_at_once = max(1, stream_bytes(order.device) // width)
        streams = []
        for rows in order.split(rows_at_once):
            rows = rows[block[rows].argsort(stable=True)]
            start = int(first[rows].min())
            x = run.residual.new_zeros(len(rows), run.n_pos - start, d_model)
            streams.append(_Stream(rows, start, x))
        place = torch.full_like(first, -1)
        for layer in range(last + 1):
            for rows, start, x in streams:
                if layer:
                    begun = int((block[rows] < layer).sum())  # those after are still zero
                    x[:begun] = self.parts.blocks.block(layer - 1, start)(x[:begun])
                place.fill_(-1)
                place[rows] = torch.arange(len(rows), device=place.device)
                now = (writes.layer == layer - 1) & (place[writes.source] >= 0)
                at = place[writes.source[now]], writes.position[now] - start
                x.index_put_(at, writes.vector[now], accumulate=True)
            yield layer, streams


class _Stream(NamedTuple):
    """Some rows at one block, those that are written first in front.

    Attributes:
        rows: the rows.
        start: the first of their positions.
        x: at positions from ``start`` on.
    """

    rows: Int[Tensor, " n"]
    start: int
    x: Float[Tensor, "n m d_model"]
