"""What to change: features in the queries or keys of chosen heads, or what heads write.

Plain values, checked while they are made and normalised to tuples; what they come to on a prompt is
:mod:`circuit_tracer_qk.steering.resolve`'s to say (paper, "Induction" and "Antonyms"; method, section 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

from circuit_tracer_qk.base.errors import UserError

SIDES = ("query", "key")
OTHER_KINDS = ("bias", "error", "embedding", "position")
ALL = "all"

Head = tuple[int, int]
"""(layer, head)."""

HeadLike = Head | str
"""A head as ``(4, 0)`` or ``"L4H0"``."""


@dataclass(frozen=True)
class QKEdit:
    """Scale, remove or inject features on one side of some heads' QK circuit.

    Several edits combine in the order given: each starts from the activations that the one before
    left, so injecting a feature and then removing it is the clean run.

    Attributes:
        heads: ``(layer, head)`` or ``"L4H0"``, one or several; query heads, also under GQA.
        side: "query" or "key".
        checkpoint: the checkpoint that the features read (as in ``Component.checkpoint``).
        features: indices in that checkpoint's dictionary; or other kinds of components ("bias",
            "error", "embedding", "position"), or "all" for everything, where ``checkpoint`` is the
            heads' own, their layer.
        positions: query or key positions, negative ones from the end. None: wherever a feature is
            active (``factor``), or every position that has features at all (``inject``); in
            generation also at the tokens generated.
        factor: what activations are multiplied with; 0 removes, 1 changes nothing.
        inject: what is added to the activations instead, for features that are not active.

    Raises:
        UserError: an edit that means nothing.
    """

    heads: Iterable[HeadLike] | HeadLike
    side: Literal["query", "key"]
    checkpoint: int
    features: Iterable[int | str] | int | str
    positions: Iterable[int] | int | None = None
    factor: float | None = None
    inject: float | None = None

    def __post_init__(self) -> None:
        _set(self, heads=_heads(self.heads), features=_features(self.features))
        _set(self, positions=_positions(self.positions))
        _set(self, checkpoint=_whole("checkpoint", self.checkpoint))
        if self.side not in SIDES:
            raise UserError(f"an edit's side is {self.side!r}: it must be 'query' or 'key'.")
        if (self.factor is None) == (self.inject is None):
            raise UserError(
                "an edit takes either factor= (0 removes a feature) or inject= (an activation to "
                f"add), and this one has {'neither' if self.factor is None else 'both'}."
            )
        if self.factor is not None:
            _set(self, factor=_number("factor", self.factor))
        if self.inject is not None:
            _set(self, inject=_number("inject", self.inject))
            for name in self.features:  # type: ignore[union-attr]
                if isinstance(name, str):
                    raise UserError(
                        f"{name!r} cannot be injected, it has no activation: inject= takes "
                        "features, by their indices."
                    )


@dataclass(frozen=True)
class HeadEdit:
    """Scale the output of heads: what they write into the residual stream, value bias included.

    (Folding a model's value biases into its output bias therefore changes what is scaled.)

    Attributes:
        heads: ``(layer, head)`` or ``"L4H0"``, one or several.
        factor: 0 removes the heads' writes, 1 changes nothing.
        positions: query positions, negative ones from the end; None for all.
    """

    heads: Iterable[HeadLike] | HeadLike
    factor: float
    positions: Iterable[int] | int | None = None

    def __post_init__(self) -> None:
        _set(self, heads=_heads(self.heads), positions=_positions(self.positions))
        _set(self, factor=_number("factor", self.factor))


Edit = QKEdit | HeadEdit


def swap(
    heads: Iterable[HeadLike] | HeadLike,
    side: Literal["query", "key"],
    checkpoint: int,
    *,
    remove: Iterable[int] | int,
    inject: Iterable[int] | int,
    activation: float,
    positions: Iterable[int] | int | None,
) -> list[Edit]:
    """One feature for another (minus yellow, plus red): a removal and an injection.

    Args:
        heads, side, checkpoint, positions: as in :class:`QKEdit`.
        remove: features that lose their activation.
        inject: features that get ``activation``.
    """
    return [
        QKEdit(heads, side, checkpoint, remove, positions, factor=0.0),
        QKEdit(heads, side, checkpoint, inject, positions, inject=activation),
    ]


def _set(edit: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(edit, name, value)  # frozen: normalised once, while it is made


def _listed(values: Any) -> Any:
    """Arrays and tensors as lists of plain numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


def _heads(heads: Any) -> tuple[Head, ...]:
    heads = _listed(heads)
    try:
        heads = heads if isinstance(heads, str) else list(heads)
        pair = not isinstance(heads, str) and len(heads) == 2
        single = isinstance(heads, str) or pair and all(hasattr(h, "__index__") for h in heads)
        found = tuple(dict.fromkeys(parse_head(h) for h in ([heads] if single else heads)))
    except TypeError:
        found = ()
    if not found:
        raise UserError(f"an edit's heads are {heads!r}: give (layer, head) pairs or 'L4H0'.")
    return found


def parse_head(head: Any) -> Head:
    """``(4, 0)`` or ``"L4H0"`` as (layer, head).

    Raises:
        UserError: anything else.
    """
    if isinstance(head, str) and (found := re.fullmatch(r"[Ll](\d+)[Hh](\d+)", head.strip())):
        return int(found[1]), int(found[2])
    if not isinstance(head, str):
        try:
            layer, number = _listed(head)
            return index(layer), index(number)
        except (TypeError, ValueError):
            pass
    raise UserError(f"{head!r} is no head: write (layer, head) or L4H0.")


def _features(features: Any) -> tuple[int | str, ...]:
    features = _listed(features)
    if isinstance(features, str) or hasattr(features, "__index__"):
        features = [features]
    known = (*OTHER_KINDS, ALL)
    found: list[int | str] = []
    try:
        for name in features:
            if isinstance(name, str):
                if name not in known:
                    raise UserError(
                        f"{name!r} is no component: give features by their indices, or one of "
                        f"{', '.join(known)}."
                    )
                found.append(name)
            else:
                found.append(_whole("feature", name))
    except TypeError:
        found = []
    if not found:
        raise UserError(f"an edit's features are {features!r}: give at least one index.")
    return tuple(dict.fromkeys(found))


def _positions(positions: Any) -> tuple[int, ...] | None:
    if positions is None:
        return None
    positions = _listed(positions)
    if hasattr(positions, "__index__"):
        positions = [positions]
    try:
        found = tuple(dict.fromkeys(_whole("position", p) for p in positions))
    except TypeError:
        found = ()
    if not found:
        raise UserError("an edit's positions are empty: name some, or leave them out for all.")
    return found


def _whole(name: str, value: Any) -> int:
    try:
        return index(_listed(value))
    except TypeError:
        raise UserError(f"{name} {value!r} is not a whole number.") from None


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} {value!r} is not a finite number.")
    return number
