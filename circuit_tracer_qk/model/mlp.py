"""The MLP of one block, and its true local gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.model.norm import Norm, cast, weight_of


@dataclass(frozen=True, eq=False)
class MLPBlock:
    """The MLP of one block between its two frozen norms.

    Plain: ``act(n W_in + b_in) W_out + b_out`` with ``n = ln2(x)``.
    Gated: ``(act(n W_gate + b_gate) * (n W_in + b_up) + b_in) W_out + b_out``; TransformerLens
    adds a gated MLP's ``b_in`` after the product, and only Llama's ``mlp_bias`` has the other two.
    """

    W_in: Tensor
    W_out: Tensor
    W_gate: Tensor | None
    b_in: Tensor
    b_out: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    act: Callable[[Tensor], Tensor]
    ln2: Norm
    post: Norm

    @classmethod
    def read(cls, block: Any) -> MLPBlock | None:
        """The facts of a TransformerLens block; None where it has no MLP."""
        if block.attn.cfg.attn_only:
            return None
        mlp = block.mlp
        if type(mlp).__name__ not in {"MLP", "GatedMLP", "BiasedGatedMLP"}:
            raise UserError(
                f"This model's MLP is of kind {type(mlp).__name__} (mixture of experts or "
                "quantised), whose local Jacobian is not supported exactly: use a dense model."
            )
        return cls(
            W_in=mlp.W_in.data,
            W_out=mlp.W_out.data,
            W_gate=weight_of(mlp, "W_gate"),
            b_in=mlp.b_in.data,
            b_out=mlp.b_out.data,
            b_gate=weight_of(mlp, "b_gate"),
            b_up=weight_of(mlp, "b_up"),
            act=mlp.act_fn,
            ln2=Norm.read(block.ln2),
            post=Norm.read(getattr(block, "ln2_post", None)),
        )

    def output(self, x: Tensor, scale: Tensor, post_scale: Tensor) -> Tensor:
        """(n_pos, d_model): what the MLP adds to the residual stream at input ``x``."""
        n = self.ln2.apply(x, scale)
        if self.W_gate is None:
            hidden = self.act(n @ self.W_in + self.b_in)
        else:
            gate, linear = self._gated(n)
            hidden = self.act(gate) * linear + self.b_in
        return self.post.apply(hidden @ self.W_out + self.b_out, post_scale)

    def _gated(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """The gate before its activation, and what it multiplies."""
        assert self.W_gate is not None
        gate, linear = n @ self.W_gate, n @ self.W_in
        return (
            gate if self.b_gate is None else gate + self.b_gate,
            linear if self.b_up is None else linear + self.b_up,
        )

    def _slope(self, pre: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller's mode
            pre = pre.detach().clone().requires_grad_()
            return torch.autograd.grad(self.act(pre).sum(), pre)[0]

    def output_vjp(self, y: Tensor, post_scale: Tensor) -> Tensor:
        """(n, d_mlp): gradients (n, d_model) at the block's output, at the MLP's hidden layer.

        ``post_scale`` (n,) is the post-norm's denominator of each row; the result is linear in
        ``y / post_scale``, so rows along one decoder vector share it up to a factor.
        """
        return self.post.at(post_scale).vjp(y) @ self.W_out.T

    def slopes(self, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """Derivatives of the hidden layer by what each of :meth:`readers` gives it.

        Args:
            x: (n_pos, d_model) the MLP's input.
            scale: (n_pos,) frozen denominators of ln2.

        Returns:
            (n_pos, d_mlp) each. The derivative is the MLP's true local one; the norms'
            denominators are constants (attribution/README.md, section 3).
        """
        n = self.ln2.apply(x, scale)
        if self.W_gate is None:
            return (self._slope(n @ self.W_in + self.b_in),)
        gate, linear = self._gated(n)
        return linear * self._slope(gate), self.act(gate)

    @property
    def readers(self) -> tuple[Tensor, ...]:
        """(d_model, d_mlp) each: what reads the normed stream, in the order of the slopes."""
        return (self.W_in,) if self.W_gate is None else (self.W_gate, self.W_in)


def read_mlp(block: Any, dtype: torch.dtype) -> MLPBlock | None:
    """A block's MLP in the contraction dtype; None where there is none."""
    mlp = MLPBlock.read(block)
    return None if mlp is None else cast(mlp, dtype)
