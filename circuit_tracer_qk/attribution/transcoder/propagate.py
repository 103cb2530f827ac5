"""Vectors carried through frozen attention from block to block, and gradients carried back.

With MLPs cut out (transcoders stand in for them) and patterns and norms frozen, a block is linear:

    write = post1(sum_h A_h V_h O_h x)        mid = x + write        (mid = x in parallel blocks)
    out   = x + write + skip(mid)

The skip is that of skip transcoders, absent otherwise (attribution/README.md, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.transcoder.hookpoints import HookPoint
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.linear import LinearMap, MapOf, Mix


class Carried(NamedTuple):
    """What a block does to vectors that enter it at positions from ``start`` on.

    Attributes:
        values: what each key offers to its queries.
        z: the heads' outputs, before their output weights.
        mid: what the block's transcoder reads.
        out: what leaves the block.
    """

    values: Float[Tensor, "n m n_heads d_head"]
    z: Float[Tensor, "n m n_heads d_head"]
    mid: Float[Tensor, "n m d_model"]
    out: Float[Tensor, "n m d_model"]


class Gradients(NamedTuple):
    """What a block does to gradients at its output, at positions up to ``end``.

    Attributes:
        z: gradients at the heads' outputs.
        bypass: gradients at the block's input along every path past its heads.
        whole: gradients at the block's input along every path.
    """

    z: Float[Tensor, "n m n_heads d_head"]
    bypass: Float[Tensor, "n m d_model"]
    whole: Float[Tensor, "n m d_model"]


class FrozenBlocks:
    """A model's blocks without MLPs, on one frozen run.

    Law: ``<g, carry(x).out> = <vjp(g).whole, x> = <vjp(g).bypass, x> + <vjp(g).z, carry(x).z>``
    for streams over the same positions.

    Args:
        heads: the attention heads of the run.
        hook_points: where the transcoders read and write, by block.
    """

    def __init__(self, heads: Heads, hook_points: Sequence[HookPoint]) -> None:
        self.heads = heads
        self.hook_points = hook_points

    def block(self, layer: int, start: int = 0) -> LinearMap:
        """The whole block as one map of (n, m, d_model) streams at positions from ``start`` on."""
        return MapOf(
            lambda x: self.carry(layer, x, start).out, lambda g: self.vjp(layer, g, start).whole
        )

    def carry(self, layer: int, x: Float[Tensor, "n m d_model"], start: int = 0) -> Carried:
        """Vectors through block ``layer``.

        Args:
            layer: the block.
            x: streams at positions ``start`` to ``start + m - 1``; zero before.
            start: their first position.
        """
        values, mix, output, skip = self._maps(layer, slice(start, start + x.shape[1]))
        at_keys = values(x)
        z = mix(at_keys)
        write = output(z)
        mid = x if self.heads.block(layer).parallel else x + write
        out = x + write
        return Carried(at_keys, z, mid, out if skip is None else out + skip(mid))

    def constant(
        self, layer: int
    ) -> tuple[Float[Tensor, "n_pos d_model"], Float[Tensor, "n_pos d_model"]]:
        """What the block's attention writes whatever it reads, and what the skip makes of it.

        Returns:
            ``post1((b_ln1 W_V + b_V) W_O + b_O)``, since a pattern's row
            sums to one; and the skip's write for it and for the bias of its norm.
        """
        run, block, point = self.heads.run, self.heads.block(layer), self.hook_points[layer]
        z = block.shared(block.value_bias())
        write = torch.einsum("he,hed->d", z, block.W_O) + block.b_O
        write = block.post.apply(write.expand(run.n_pos, -1), run.scale("ln1_post", layer))
        skipped = torch.zeros_like(write)
        skip = point.skipping(slice(None))
        if skip is not None:
            mid = torch.zeros_like(write) if block.parallel else write
            skipped = skip(mid) + point.constant(run.n_pos)
        return write, skipped

    def vjp(self, layer: int, g: Float[Tensor, "n m d_model"], start: int = 0) -> Gradients:
        """Gradients through block ``layer``.

        Args:
            layer: the block.
            g: gradients at its output at positions ``start`` to ``start + m - 1``;
                zero after.
            start: their first position.
        """
        here = slice(start, start + g.shape[1])
        return self._vjp(layer, *self._past_heads(layer, g, here), here)

    def vjp_mid(self, layer: int, g: Float[Tensor, "n m d_model"]) -> Gradients:
        """As :meth:`vjp`, for gradients at what the block's transcoder reads."""
        here = slice(g.shape[1])
        return self._vjp(layer, *self._past_heads(layer, g, here, mid=True), here)

    def vjp_here(
        self,
        layer: int,
        g: Float[Tensor, "n d_model"],
        positions: Int[Tensor, " n"],
        mid: bool = False,
    ) -> tuple[Float[Tensor, "n n_heads d_head"], Float[Tensor, "n d_model"]]:
        """Gradients at single positions, along paths that pass no further attention.

        Args:
            layer: the block.
            g: gradients at its output, or with ``mid`` at what its transcoder reads.
            positions: of the rows of ``g``.

        Returns:
            Gradients at the heads' outputs, and at the block's input past its heads.
        """
        at_write, past = self._past_heads(layer, g, positions, mid)
        return self.heads.output_path(layer, positions).vjp(at_write), past

    def _past_heads(
        self, layer: int, g: Tensor, here: Tensor | slice, mid: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Gradients at the attention's write, and at the block's input past its heads."""
        parallel = self.heads.block(layer).parallel
        if mid:
            return torch.zeros_like(g) if parallel else g, g
        skip = self.hook_points[layer].skipping(here)
        past = g if skip is None else g + skip.vjp(g)
        return g if parallel else past, past

    def _vjp(
        self,
        layer: int,
        at_write: Float[Tensor, "n m d_model"],
        past: Float[Tensor, "n m d_model"],
        here: slice,
    ) -> Gradients:
        values, mix, output, _ = self._maps(layer, here)
        z = output.vjp(at_write)
        return Gradients(z, past, past + values.vjp(mix.vjp(z)))

    def _maps(
        self, layer: int, here: slice
    ) -> tuple[LinearMap, LinearMap, LinearMap, LinearMap | None]:
        """The block's values, attention, output and skip, for streams at the same positions."""
        heads, pattern = self.heads, self.heads.run.pattern[layer]
        return (
            heads.block(layer).shared @ heads.value_path(layer, here),
            Mix(pattern[:, here, here]),
            heads.output_path(layer, here),
            self.hook_points[layer].skipping(here),
        )
