"""QK attributions over the nodes of a transcoder graph (method, section 4).

The residual stream at a block and a position is the sum of all sources carried there, so a score
is a sum over pairs of sources, from wherever they are. Sources that are no nodes are rows too:
features that the graph left out are one, biases one for each of what wrote them.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from circuit_tracer_qk.components import Component
from circuit_tracer_qk.qk import Label, Scores
from circuit_tracer_qk.transcoders import TranscoderRun

UNSELECTED = "unselected features"


class TranscoderQK(Scores):
    """QK attributions of a transcoder graph's run.

    Args:
        parts: the run, with what every source writes.
        label: names features, by (layer + 1, feature).
        keep: how many positions' images to keep, of all heads of one block.
    """

    def __init__(self, parts: TranscoderRun, label: Label, keep: int = 8) -> None:
        super().__init__(parts.carrier.heads)
        self.parts = parts
        self.label = label
        self.keep = keep
        self._kept: dict[tuple[int, int, int], Tensor] = {}

    @cached_property
    def _row(self) -> Tensor:
        """(n_sources,) the row of each source; those that share one are summed."""
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
    def _first(self) -> tuple[list[int], list[int]]:
        """By row: the first block that it is written before, and the first position."""
        writes, n_rows = self.parts.writes, int(self._row.max()) + 1
        row, far = self._row[writes.source], self.parts.run.n_layers + 1
        block = torch.full((n_rows,), far, device=row.device)
        block.scatter_reduce_(0, row, writes.layer + 1, "amin")
        position = torch.full((n_rows,), self.parts.run.n_pos, device=row.device)
        position.scatter_reduce_(0, row, writes.position, "amin")
        return block.tolist(), position.tolist()

    def _reaching(self, layer: int, position: int) -> list[int]:
        """The rows that may reach a block at a position."""
        blocks, positions = self._first
        return [
            i for i, (b, p) in enumerate(zip(blocks, positions, strict=True))
            if b <= layer and p <= position
        ]  # fmt: skip

    @cached_property
    def _of_row(self) -> dict[int, int]:
        """Row to the first source in it."""
        found: dict[int, int] = {}
        for i, row in enumerate(self._row.tolist()):
            found.setdefault(row, i)
        return found

    def _list(self, layer: int, position: int, side: int) -> list[Component]:
        listed = []
        for row in self._reaching(layer, position):
            i = self._of_row[row]
            source = self.parts.sources[i]
            assert source is not None  # logits write nothing
            if source.label:
                listed.append(Component(source.kind, layer, None, position, None, source.label))
            elif i >= self.parts.n_nodes:
                listed.append(Component("error", layer, None, position, None, UNSELECTED))
            else:
                at = source.layer + 1
                label = source.kind
                if source.feature is not None:
                    label = self.label(at, source.feature)
                listed.append(
                    Component(
                        source.kind, at, source.feature, source.position, source.activation, label
                    )
                )
        if self.heads.has_constants(layer):
            label = ("b_Q + b_ln W_Q", "b_K + b_ln W_K")[side]
            listed.append(Component("bias", layer, None, position, None, label))
        return listed

    @torch.no_grad()
    def _image(self, layer: int, head: int, position: int, side: int) -> Tensor:
        images = self._images(layer, position, side)[:, head]
        images = images[self._reaching(layer, position)].to(self._wide or images.dtype)
        if not self.heads.has_constants(layer):
            return images
        at = torch.tensor([position], device=images.device)
        return torch.cat([images, self.heads.constants(layer, at, self._wide)[side][:, head]])

    def _images(self, layer: int, position: int, side: int) -> Tensor:
        """(n_rows, n_heads or n_kv, d_head): images of every source, of all heads at once.

        The map from the stream to a projection is carried back to what the sources write: as many
        gradients as the block's heads have dimensions, whatever the number of sources.
        """
        key = layer, position, side
        if key in self._kept:
            return self._kept[key]
        run, writes = self.parts.run, self.parts.writes
        width = run.residual.shape[2]
        eye = torch.eye(width, dtype=run.residual.dtype, device=run.residual.device)
        at = torch.full((width,), position, device=eye.device)
        image = (self.heads.queries, self.heads.keys)[side](layer, eye, at)
        rows = image.flatten(1).T  # (n_heads * d_head, d_model), gradients at the stream
        g = rows.new_zeros(len(rows), position + 1, width)
        g[:, position] = rows
        out = rows.new_zeros(int(self._row.max()) + 1, len(rows))
        for block in range(layer, -1, -1):  # g: gradients at what enters this block
            here = (writes.layer == block - 1) & (writes.position <= position)
            found = here.nonzero().flatten()
            for i in found.split(1024):
                products = torch.einsum("nd,rnd->nr", writes.vector[i], g[:, writes.position[i]])
                out.index_add_(0, self._row[writes.source[i]], products)
            if block:
                g = self.parts.carrier.pull(block - 1, g).whole
        while len(self._kept) >= self.keep:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = out.unflatten(1, image.shape[1:])
        return self._kept[key]
