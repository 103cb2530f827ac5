"""LayerNorm and RMSNorm, and what they are with a frozen denominator: linear maps."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.model.linear import LinearMap


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of a model.

    Attributes:
        w: (d,) gain; None where it is one (folded).
        b: (d,) bias; None where there is none.
        centred: LayerNorm subtracts the mean, RMSNorm does not.
        present: False stands for a model without this norm: the identity.
        eps: what its denominator adds to the mean square.
    """

    w: Float[Tensor, " d"] | None = None
    b: Float[Tensor, " d"] | None = None
    centred: bool = False
    present: bool = False
    eps: float = 0.0

    @classmethod
    def read(cls, module: torch.nn.Module | None) -> Norm:
        """The norm of a TransformerLens module, by what the module is.

        Raises:
            UserError: a norm of another kind.
        """
        if module is None or isinstance(module, torch.nn.Identity):
            return cls()
        name = type(module).__name__
        if name not in {"LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"}:
            raise UserError(
                f"This model has a norm of kind {name}, which is not supported exactly: use a "
                "model with LayerNorm or RMSNorm."
            )
        return cls(
            weight_of(module, "w"),
            weight_of(module, "b"),
            centred=name.startswith("Layer"),
            present=True,
            eps=float(module.eps),  # type: ignore[arg-type]
        )

    def at(self, scale: Float[Tensor, "*#batch"]) -> FrozenNorm:
        """The norm without its bias, its denominators frozen at ``scale``."""
        return FrozenNorm(self, scale)

    def denominator(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """What the norm divides streams ``x`` by when it is not frozen."""
        if not self.present:
            return x.new_ones(x.shape[:-1])
        return rms(x - x.mean(-1, keepdim=True) if self.centred else x, self.eps)

    def apply(
        self, x: Float[Tensor, "*batch d"], scale: Float[Tensor, "*#batch"]
    ) -> Float[Tensor, "*batch d"]:
        """The norm itself with given denominators, bias included."""
        y = self.at(scale)(x)
        return y if self.b is None else y + self.b


class FrozenNorm(LinearMap):
    """A norm with frozen denominators and without its bias: centre, divide, multiply by the gain.

    Args:
        norm: the norm.
        scale: its denominators, one for each position that vectors stand at.
    """

    def __init__(self, norm: Norm, scale: Float[Tensor, "*batch"]) -> None:
        self.norm, self.scale = norm, scale

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        norm = self.norm
        if not norm.present:
            return x
        x = (x - x.mean(-1, keepdim=True) if norm.centred else x) / self.scale[..., None]
        return x if norm.w is None else x * norm.w

    def vjp(self, g: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        norm = self.norm
        if not norm.present:
            return g
        g = (g if norm.w is None else g * norm.w) / self.scale[..., None]
        return g - g.mean(-1, keepdim=True) if norm.centred else g


def rms(x: Float[Tensor, "*batch d"], eps: float) -> Float[Tensor, "*batch"]:
    """The root of the mean square, ``eps`` added to the mean."""
    return (x.pow(2).mean(-1) + eps).sqrt()


def weight_of(module: Any, name: str) -> Tensor | None:
    """A module's weight without its gradient; None where it has none of that name."""
    weight = getattr(module, name, None)
    return None if weight is None else weight.data


def cast(block: Any, dtype: torch.dtype) -> Any:
    """The same frozen dataclass with every floating tensor in ``dtype`` (no copy if it is)."""
    changed = {}
    for f in fields(block):
        value = getattr(block, f.name)
        if isinstance(value, Norm):
            changed[f.name] = cast(value, dtype)
        elif isinstance(value, Tensor) and value.is_floating_point():
            changed[f.name] = value.to(dtype)
    return replace(block, **changed)
