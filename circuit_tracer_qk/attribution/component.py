"""One named part of the residual stream, whatever graph it is a part of."""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("feature", "bias", "error", "embedding", "position")


FEATURE, BIAS, ERROR, EMBEDDING, POSITION = range(5)


class Component(NamedTuple):
    """One named part of the residual stream at one position.

    ``checkpoint`` is the one that the feature reads; for the other kinds, the one decomposed.
    ``feature`` and ``activation`` are None for everything but features.
    """

    kind: str
    checkpoint: int
    feature: int | None
    position: int
    activation: float | None
    label: str
