"""Vectors carried through frozen attention from block to block, and gradients carried back.

With MLPs cut out (transcoders stand in for them) and patterns and norms frozen, a block is linear:

    write = post1(sum_h A_h V_h O_h x)        mid = x + write        (mid = x in parallel blocks)
    out   = x + write + skip(mid)

The skip is that of skip transcoders, absent otherwise (method, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.transcoder.hookpoints import Port
from circuit_tracer_qk.model.heads import Heads


class Carried(NamedTuple):
    """What a block does to vectors that enter it at positions from ``start`` on.

    Attributes:
        values: (n, m, n_heads, d_head) what each key offers to its queries.
        z: (n, m, n_heads, d_head) the heads' outputs, before their output weights.
        mid: (n, m, d_model) what the block's transcoder reads.
        out: (n, m, d_model) what leaves the block.
    """

    values: Tensor
    z: Tensor
    mid: Tensor
    out: Tensor


class Pulled(NamedTuple):
    """What a block does to gradients at its output, at positions up to ``end``.

    Attributes:
        z: (n, m, n_heads, d_head) gradients at the heads' outputs.
        bypass: (n, m, d_model) gradients at the block's input along every path past its heads.
        whole: (n, m, d_model) gradients at the block's input along every path.
    """

    z: Tensor
    bypass: Tensor
    whole: Tensor


class PulledHere(NamedTuple):
    """As :class:`Pulled`, at one position and for paths that pass no further attention.

    Attributes:
        z: (n, n_heads, d_head) gradients at the heads' outputs.
        bypass: (n, d_model) gradients at the block's input past its heads.
    """

    z: Tensor
    bypass: Tensor


class Carrier:
    """A model's blocks without MLPs, on one frozen run.

    Law: ``<g, carry(x).out> = <pull(g).whole, x> = <pull(g).bypass, x> + <pull(g).z, carry(x).z>``
    for streams over the same positions.

    Args:
        heads: the attention heads of the run.
        ports: where the transcoders read and write, by block.
    """

    def __init__(self, heads: Heads, ports: Sequence[Port]) -> None:
        self.heads = heads
        self.ports = ports

    def carry(self, layer: int, x: Tensor, start: int = 0) -> Carried:
        """Vectors through block ``layer``.

        Args:
            layer: the block.
            x: (n, m, d_model) streams at positions ``start`` to ``start + m - 1``; zero before.
            start: their first position.
        """
        run, block, port = self.heads.run, self.heads.block(layer), self.ports[layer]
        here = slice(start, start + x.shape[1])
        normed = block.ln1.linear(x, run.scale("ln1", layer)[here].expand(x.shape[:2]))
        values = block.expand(torch.einsum("nkd,gde->nkge", normed, block.W_V))
        z = torch.einsum("hqk,nkhe->nqhe", run.pattern[layer][:, here, here], values)
        write = z.flatten(2) @ block.W_O.flatten(0, 1)
        write = block.post.linear(write, run.scale("ln1_post", layer)[here].expand(x.shape[:2]))
        mid = x if block.parallel else x + write
        skip = port.forward(mid, start)
        out = x + write
        return Carried(values, z, mid, out if skip is None else out + skip)

    def constant(self, layer: int) -> tuple[Tensor, Tensor]:
        """What the block's attention writes whatever it reads, and what the skip makes of it.

        Returns:
            (n_pos, d_model) each: ``post1((b_ln1 W_V + b_V) W_O + b_O)``, since a pattern's row
            sums to one; and the skip's write for it and for the bias of its norm.
        """
        run, block, port = self.heads.run, self.heads.block(layer), self.ports[layer]
        z = block.expand(self.heads.value_bias(layer))
        write = torch.einsum("he,hed->d", z, block.W_O) + block.b_O
        write = block.post.apply(write.expand(run.n_pos, -1), run.scale("ln1_post", layer))
        skipped = torch.zeros_like(write)
        if port.skip is not None:
            mid = torch.zeros_like(write) if block.parallel else write
            skip = port.forward(mid[None])
            assert skip is not None
            skipped = skip[0] + port.constant(run.n_pos)
        return write, skipped

    def pull(self, layer: int, g: Tensor) -> Pulled:
        """Gradients through block ``layer``.

        Args:
            layer: the block.
            g: (n, m, d_model) gradients at its output at positions ``0`` to ``m - 1``; zero after.
        """
        block, skip = self.heads.block(layer), self.ports[layer].pull(g)
        past = g if skip is None else g + skip
        return self._pull(layer, g if block.parallel else past, past)

    def pull_mid(self, layer: int, g: Tensor) -> Pulled:
        """As :meth:`pull`, for gradients at what the block's transcoder reads."""
        block = self.heads.block(layer)
        return self._pull(layer, torch.zeros_like(g) if block.parallel else g, g)

    def pull_here(self, layer: int, g: Tensor, positions: Tensor) -> PulledHere:
        """Gradients (n, d_model) at the block's output at ``positions`` (n,), without attention."""
        skip = self.ports[layer].pull_at(g, positions)
        past = g if skip is None else g + skip
        at_write = g if self.heads.block(layer).parallel else past
        return PulledHere(self.heads.pull_output(layer, at_write, positions), past)

    def pull_mid_here(self, layer: int, g: Tensor, positions: Tensor) -> PulledHere:
        """As :meth:`pull_here`, for gradients at what the block's transcoder reads."""
        at_write = torch.zeros_like(g) if self.heads.block(layer).parallel else g
        return PulledHere(self.heads.pull_output(layer, at_write, positions), g)

    def _pull(self, layer: int, at_write: Tensor, past: Tensor) -> Pulled:
        run, block = self.heads.run, self.heads.block(layer)
        n, m, _ = past.shape
        g = block.post.pull(at_write, run.scale("ln1_post", layer)[:m].expand(n, m))
        z = (g @ block.W_O.flatten(0, 1).T).unflatten(2, (block.n_heads, -1))
        at_values = torch.einsum("hqk,nqhe->nkhe", run.pattern[layer][:, :m, :m], z)
        grouped = at_values.unflatten(2, (block.n_kv, -1)).sum(3)
        normed = torch.einsum("nkge,gde->nkd", grouped, block.W_V)
        through = block.ln1.pull(normed, run.scale("ln1", layer)[:m].expand(n, m))
        return Pulled(z, past, past + through)
