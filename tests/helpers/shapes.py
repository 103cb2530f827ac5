"""Shapes in signatures, held while the suite runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A type checker for jaxtyping that looks at annotations with a shape and at no others.

    Public calls say in a sentence of their own what is wrong with an argument of another type.
    """
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if has_shape(hint)}
    return beartype(function)


def has_shape(hint: Any) -> bool:
    """Whether a type, or one inside it, is an array of some shape."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(has_shape, get_args(hint)))
