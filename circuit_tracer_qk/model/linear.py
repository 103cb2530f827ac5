"""Linear maps that are known both ways.

A map is called for ``f(x)`` and has ``f.vjp(g)``, its transpose, with ``<g, f(x)> = <f.vjp(g), x>``.
``f @ g`` is the map that does ``g`` first. Everything that carries vectors forward or gradients
back is made of these (attribution/README.md, sections 3 and 4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class LinearMap(ABC):
    """A linear map and its transpose.

    Law, held by one test over every kind of map: ``(g * f(x)).sum() == (f.vjp(g) * x).sum()``.
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The image of ``x``."""

    @abstractmethod
    def vjp(self, g: Tensor) -> Tensor:
        """The image of ``g`` under the transpose: a gradient at the output, taken to the input."""

    def __matmul__(self, first: LinearMap) -> LinearMap:
        """The map ``x -> self(first(x))``."""
        return MapOf(lambda x: self(first(x)), lambda g: first.vjp(self.vjp(g)))

    @property
    def T(self) -> LinearMap:
        """The transpose as a map of its own."""
        return MapOf(self.vjp, self)


class MapOf(LinearMap):
    """A linear map that two functions make.

    Args:
        image: the map.
        transpose: its transpose.
    """

    def __init__(
        self, image: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]
    ) -> None:
        self.image, self.transpose = image, transpose

    def __call__(self, x: Tensor) -> Tensor:
        return self.image(x)

    def vjp(self, g: Tensor) -> Tensor:
        return self.transpose(g)


class Matrix(LinearMap):
    """``x @ W``.

    Args:
        W: (d_in, d_out).
    """

    def __init__(self, W: Float[Tensor, "d_in d_out"]) -> None:
        self.W = W

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return x @ self.W

    def vjp(self, g: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch d_in"]:
        return g @ self.W.T


class Split(LinearMap):
    """A vector as the parts of ``n`` heads, side by side.

    Args:
        n: how many heads.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n d_head"]:
        return x.unflatten(-1, (self.n, -1))

    def vjp(self, g: Float[Tensor, "*batch n d_head"]) -> Float[Tensor, "*batch d"]:
        return g.flatten(-2)


class Shared(LinearMap):
    """What key-value heads hold, as each of their query heads reads it.

    Args:
        size: how many query heads share one key-value head.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(
        self, x: Float[Tensor, "*batch n_kv d_head"]
    ) -> Float[Tensor, "*batch n_heads d_head"]:
        return x.repeat_interleave(self.size, dim=-2)

    def vjp(self, g: Float[Tensor, "*batch n_heads d_head"]) -> Float[Tensor, "*batch n_kv d_head"]:
        return g.unflatten(-2, (-1, self.size)).sum(-2)


class Mix(LinearMap):
    """Frozen attention: what every query gets of the values at its keys.

    Args:
        pattern: (n_heads, n_query, n_key) attention.
    """

    def __init__(self, pattern: Float[Tensor, "n_heads n_query n_key"]) -> None:
        self.pattern = pattern

    def __call__(
        self, x: Float[Tensor, "n n_key n_heads d_head"]
    ) -> Float[Tensor, "n n_query n_heads d_head"]:
        return torch.einsum("hqk,nkhe->nqhe", self.pattern, x)

    def vjp(
        self, g: Float[Tensor, "n n_query n_heads d_head"]
    ) -> Float[Tensor, "n n_key n_heads d_head"]:
        return torch.einsum("hqk,nqhe->nkhe", self.pattern, g)
