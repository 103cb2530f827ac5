"""Where transcoders read from a block and write to it, as frozen linear maps (attribution/README.md, section 4).

A transcoder stands in for an MLP: it reads the stream that the MLP's norm reads and writes where
the MLP writes. The host's hooks name the exact places; the norms between are frozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.model.linear import LinearMap, Matrix
from circuit_tracer_qk.model.norm import Norm, cast
from circuit_tracer_qk.model.run import FrozenRun

READS = ("mlp.hook_in", "ln2.hook_normalized", "hook_resid_mid")
WRITES = ("mlp.hook_out", "hook_mlp_out")


@dataclass(frozen=True, eq=False)
class HookPoint:
    """One block's transcoder input and output on one frozen run.

    Attributes:
        ln2: the norm between the stream and the input; not present where the stream is read.
        ln2_scale: (n_pos,) its frozen denominators.
        post: the norm between the output and the stream; not present where nothing is between.
        post_scale: (n_pos,) its frozen denominators.
        skip: (d_model, d_model) acting as ``x @ skip`` from input to output; None without one.
    """

    ln2: Norm
    ln2_scale: Tensor
    post: Norm
    post_scale: Tensor
    skip: Tensor | None

    def reading(self, positions: Tensor | slice) -> LinearMap:
        """From the stream to the transcoder's input, at positions."""
        return self.ln2.at(self.ln2_scale[positions])

    def writing(self, positions: Tensor | slice) -> LinearMap:
        """From the transcoder's output to what is added to the stream, at positions."""
        return self.post.at(self.post_scale[positions])

    def skipping(self, positions: Tensor | slice) -> LinearMap | None:
        """From the stream through the skip back to the stream; None without a skip."""
        if self.skip is None:
            return None
        return self.writing(positions) @ Matrix(self.skip) @ self.reading(positions)

    def constant(self, n_pos: int) -> Tensor:
        """(n_pos, d_model): what the skip writes for the bias of the norm before it."""
        assert self.skip is not None
        zero = self.ln2_scale.new_zeros(n_pos, self.skip.shape[0])
        read = zero if self.ln2.b is None else zero + self.ln2.b
        return self.writing(slice(None))(read @ self.skip)


def read_hook_points(
    blocks: Iterable[Any], run: FrozenRun, reads: str, writes: str, skips: Sequence[Tensor | None]
) -> list[HookPoint]:
    """The hook points of every block.

    Args:
        blocks: TransformerLens blocks.
        run: the frozen run.
        reads, writes: circuit-tracer's ``feature_input_hook`` and ``feature_output_hook``.
        skips: (d_model, d_model) of each block, acting as ``x @ skip``.

    Raises:
        UserError: a hook whose place is not known.
    """
    for hook, known in ((reads, READS), (writes, WRITES)):
        if hook not in known:
            raise UserError(
                f"these transcoders use the hook {hook}, whose place in the block is not known "
                f"here: {', '.join(known)} are."
            )
    absent = Norm.read(None)
    dtype = run.residual.dtype

    def norm(module: Any, bare: bool = False) -> Norm:
        read = cast(Norm.read(module), dtype)
        return replace(read, w=None, b=None) if bare else read

    hook_points = []
    for layer, (block, skip) in enumerate(zip(blocks, skips, strict=True)):
        ln2 = absent
        if reads != "hook_resid_mid":
            bare = reads == "ln2.hook_normalized" and _hooked_before_gain(block.ln2)
            ln2 = norm(block.ln2, bare=bare)
        post = norm(getattr(block, "ln2_post", None)) if writes == "mlp.hook_out" else absent
        scales = run.scale("ln2", layer), run.scale("ln2_post", layer)
        skip = None if skip is None else skip.to(dtype)
        hook_points.append(HookPoint(ln2, scales[0], post, scales[1], skip))
    return hook_points


@torch.no_grad()
def _hooked_before_gain(ln: Any) -> bool:
    """Whether a norm's ``hook_normalized`` lies before its gain, not after.

    TransformerLens' versions differ, so the module is asked. Where the gain is one, both are right.
    """
    seen: list[Tensor] = []
    handle = ln.hook_normalized.register_forward_hook(lambda _, __, out: seen.append(out))
    parameter = next(iter(ln.parameters()), torch.zeros(ln.cfg.d_model))
    probe = torch.linspace(-1, 2, ln.cfg.d_model).to(parameter)
    try:
        out = ln(probe.expand(1, 2, -1))
    finally:
        handle.remove()
    return not torch.allclose(seen[0], out)
