"""What to change: features in the queries or keys of chosen heads, or what heads write.

:class:`QKEdit` and :class:`HeadEdit` take what a user may write and check it while they are made.
Their ``resolved`` is the same edit in narrow types, which the rest of this room reads; what it does
to a prompt is for :mod:`circuit_tracer_qk.steering.resolve` to say (paper, "Induction" and
"Antonyms"; attribution/README.md, section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from circuit_tracer_qk.attribution.head import Head, HeadLike, head_name, parse_head
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.feature_names import feature_name, is_feature_name, parse_feature_name
from circuit_tracer_qk.base.rules import finite, listed, whole

Side = Literal["query", "key"]
SIDES: tuple[Side, ...] = ("query", "key")
OTHER_KINDS = ("bias", "error", "embedding", "position")
ALL = "all"

Amount = TypeVar("Amount")
T = TypeVar("T")


def component_name(checkpoint: int, component: int | str) -> str:
    """A feature's name, such as L0/61; other components are named by their kind."""
    return component if isinstance(component, str) else feature_name(checkpoint, component)


@dataclass(frozen=True)
class ResolvedQKEdit:
    """A :class:`QKEdit`, checked, in narrow types.

    Attributes:
        heads: (layer, head) of every head.
        side: "query" or "key".
        components: (checkpoint, feature index or kind) of every component.
        positions: as given; None where none were.
        amount: what activations are multiplied with, or what is added to them.
        injects: whether ``amount`` is added.
    """

    heads: tuple[Head, ...]
    side: Side
    components: tuple[tuple[int, int | str], ...]
    positions: tuple[int, ...] | None
    amount: float
    injects: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The components' names."""
        return tuple(component_name(*component) for component in self.components)

    @property
    def features(self) -> tuple[tuple[int, int], ...]:
        """(checkpoint, index) of the components that are features."""
        return tuple((c, f) for c, f in self.components if not isinstance(f, str))

    def apply(self, activation: Amount) -> Amount:
        """An activation, or a tensor of them, after the edit."""
        value: Any = activation
        return value + self.amount if self.injects else value * self.amount

    def __str__(self) -> str:
        how = f"{self.amount:+g}" if self.injects else f"x {self.amount:g}"
        heads = _heads_at(self.heads, self.positions)
        return f"{self.side} of {heads}: {', '.join(self.names)} {how}"


@dataclass(frozen=True)
class ResolvedHeadEdit:
    """A :class:`HeadEdit`, checked, in narrow types."""

    heads: tuple[Head, ...]
    factor: float
    positions: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"output of {_heads_at(self.heads, self.positions)} x {self.factor:g}"


@dataclass(frozen=True)
class QKEdit:
    """Scale, remove or inject features on one side of some heads' QK circuit.

    Several edits combine in the order given: each starts from the activations that the one before
    left, so injecting a feature and then removing it is the clean run. (Paper, "Induction" and
    "Antonyms".)

    Attributes:
        heads: ``(layer, head)`` or ``"L4H0"``, one or several; query heads, also under GQA.
        side: "query" or "key".
        checkpoint: the checkpoint that the features read (as in ``Component.checkpoint``); not
            needed where every feature is given by its name.
        features: names such as "L0/61" or "in/5", also of several checkpoints; or indices in the
            dictionary of ``checkpoint``; or other kinds of components ("bias", "error",
            "embedding", "position"), or "all" for everything, where ``checkpoint`` is the heads'
            own, their layer.
        positions: query or key positions, negative ones from the end. None: wherever a feature is
            active (``factor``), or every position that has features at all (``inject``); in
            generation also at the tokens generated.
        factor: what activations are multiplied with; 0 removes, 1 changes nothing.
        inject: what is added to the activations instead, in their own units, for features that are
            not active.
        resolved: the same in narrow types.

    Once made, ``heads``, ``features`` and ``positions`` are tuples; features of one checkpoint are
    indices, those of several are names.

    Raises:
        UserError: an edit that means nothing.

    >>> edit = QKEdit("L1H2", "key", features=["L0/61", "L0/177"], positions=6, factor=0)
    >>> edit == QKEdit([(1, 2)], "key", 1, [61, 177], [6], 0)
    True
    """

    heads: Iterable[HeadLike] | HeadLike
    side: Side
    checkpoint: int | None = None
    features: Iterable[int | str] | int | str = ()
    positions: Iterable[int] | int | None = None
    factor: float | None = None
    inject: float | None = None
    resolved: ResolvedQKEdit = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        heads, features = _heads(self.heads), _features(self.features)
        positions = _positions(self.positions)
        checkpoint = None if self.checkpoint is None else _whole("checkpoint", self.checkpoint)
        components = _components(features, checkpoint, heads)
        if self.side not in SIDES:
            raise UserError(f"an edit's side is {self.side!r:.60}: it must be 'query' or 'key'.")
        if (self.factor is None) == (self.inject is None):
            raise UserError(
                "an edit takes either factor= (0 removes a feature) or inject= (an activation to "
                f"add), and this one has {'neither' if self.factor is None else 'both'}."
            )
        injects = self.factor is None
        called = "inject" if injects else "factor"
        amount = _number(called, getattr(self, called))
        for _, component in components if injects else ():
            if isinstance(component, str):
                raise UserError(
                    f"{component!r} cannot be injected, it has no activation: inject= takes "
                    "features, by their indices or names."
                )
        resolved = ResolvedQKEdit(heads, self.side, components, positions, amount, injects)
        checkpoints, indices = zip(*components, strict=True)
        if len(set(checkpoints)) == 1:
            checkpoint, features = checkpoints[0], indices
        else:
            features = resolved.names
        _set(self, heads=heads, features=features, positions=positions, checkpoint=checkpoint)
        _set(self, resolved=resolved, **{called: amount})


@dataclass(frozen=True)
class HeadEdit:
    """Scale the output of heads: what they write into the residual stream, value bias included.

    (Folding a model's value biases into its output bias therefore changes what is scaled.)

    Attributes:
        heads: ``(layer, head)`` or ``"L4H0"``, one or several.
        factor: 0 removes the heads' writes, 1 changes nothing.
        positions: query positions, negative ones from the end; None for all.
        resolved: the same in narrow types.

    Raises:
        UserError: an edit that means nothing.

    >>> HeadEdit("L1H2", factor=0)
    HeadEdit(heads=((1, 2),), factor=0.0, positions=None)
    """

    heads: Iterable[HeadLike] | HeadLike
    factor: float
    positions: Iterable[int] | int | None = None
    resolved: ResolvedHeadEdit = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        heads, positions = _heads(self.heads), _positions(self.positions)
        resolved = ResolvedHeadEdit(heads, _number("factor", self.factor), positions)
        _set(self, heads=heads, factor=resolved.factor, positions=positions, resolved=resolved)


Edit = QKEdit | HeadEdit
Edits = Edit | Iterable[Edit]


def listed_edits(edits: Edits) -> tuple[Edit, ...]:
    """One edit or several as a tuple.

    Raises:
        UserError: none, or something else than an edit.
    """
    alone = isinstance(edits, QKEdit | HeadEdit)
    given = [edits] if alone else listed(edits, "edits", "a QKEdit, a HeadEdit or a list of them")
    if not given:
        raise UserError("there is nothing to steer: give at least one QKEdit or HeadEdit.")
    for edit in given:
        if not isinstance(edit, QKEdit | HeadEdit):
            raise UserError(
                f"{type(edit).__name__} is no edit: give circuit_tracer_qk.QKEdit or HeadEdit."
            )
    return tuple(given)


def swap(
    heads: Iterable[HeadLike] | HeadLike,
    side: Side,
    checkpoint: int | None = None,
    *,
    remove: Iterable[int | str] | int | str,
    inject: Iterable[int | str] | int | str,
    activation: float,
    positions: Iterable[int] | int | None,
) -> list[Edit]:
    """One feature for another (minus yellow, plus red): a removal and an injection.

    (Paper, "Antonyms" and "Correctness circuits".)

    Args:
        heads, side, checkpoint, positions: as in :class:`QKEdit`.
        remove: features that lose their activation, by index or name.
        inject: features that get ``activation``, by index or name.
        activation: in the features' own units.

    Returns:
        The two edits, for :func:`circuit_tracer_qk.steer`.

    Raises:
        UserError: an edit that means nothing.

    >>> away, put = swap("L1H2", "key", remove="L0/61", inject="L0/3", activation=5, positions=6)
    >>> away.factor, put.features, put.inject
    (0.0, (3,), 5.0)
    """
    return [
        QKEdit(heads, side, checkpoint, remove, positions, factor=0.0),
        QKEdit(heads, side, checkpoint, inject, positions, inject=activation),
    ]


def _heads_at(heads: tuple[Head, ...], positions: tuple[int, ...] | None) -> str:
    at = "" if positions is None else f" at {', '.join(map(str, positions))}"
    return " ".join(map(head_name, heads)) + at


def _set(edit: Edit, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(edit, name, value)  # frozen: normalised once, while it is made


def _plain(values: Any) -> Any:
    """Arrays and tensors as lists of plain numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


def _several(values: Any, checked: Callable[[Any], T]) -> tuple[T, ...]:
    """Every one of some values, or the only one, checked, each once; () where there is none."""
    values = _plain(values)
    if isinstance(values, str) or hasattr(values, "__index__"):
        values = [values]
    try:
        return tuple(dict.fromkeys(checked(value) for value in values))
    except TypeError:
        return ()


def _heads(heads: Any) -> tuple[Head, ...]:
    heads = _plain(heads)
    if isinstance(heads, Iterable) and not isinstance(heads, str):
        heads = list(heads)
        if len(heads) == 2 and all(hasattr(number, "__index__") for number in heads):
            heads = [heads]
    parsed = () if hasattr(heads, "__index__") else _several(heads, parse_head)
    if not parsed:
        raise UserError(f"an edit's heads are {heads!r:.60}: give (layer, head) pairs or 'L4H0'.")
    return parsed


def _features(features: Any) -> tuple[int | str, ...]:
    kinds = (*OTHER_KINDS, ALL)

    def checked(feature: Any) -> int | str:
        if not isinstance(feature, str):
            return _whole("feature", feature)
        if feature not in kinds and not is_feature_name(feature):
            raise UserError(
                f"{feature!r:.60} is no component: give features by their indices or names, such "
                f"as L0/61, or one of {', '.join(kinds)}."
            )
        return feature

    parsed = _several(features, checked)
    if not parsed:
        raise UserError(
            f"an edit's features are {_plain(features)!r:.60}: give at least one index or name."
        )
    return parsed


def _components(
    features: tuple[int | str, ...], checkpoint: int | None, heads: tuple[Head, ...]
) -> tuple[tuple[int, int | str], ...]:
    """(checkpoint, feature index or kind) of what an edit names, each once."""
    components: list[tuple[int, int | str]] = []
    for feature in features:
        if isinstance(feature, str) and is_feature_name(feature):
            read, number = parse_feature_name(feature)
            if checkpoint not in (None, read):
                raise UserError(
                    f"{feature} is feature {number} of checkpoint {read}, and the edit says "
                    f"checkpoint {checkpoint}: leave the checkpoint out."
                )
            components.append((read, number))
        elif checkpoint is None:
            layer = heads[0][0]
            raise UserError(
                f"an edit of {feature!r} lacks checkpoint: "
                + (
                    f"write checkpoint={layer}, the layer of its heads (one edit for each layer)."
                    if isinstance(feature, str)
                    else "write it too, such as checkpoint=1, or give the feature by its name, "
                    f"which is L0/{feature} at checkpoint 1."
                )
            )
        else:
            components.append((checkpoint, feature))
    return tuple(dict.fromkeys(components))


def _positions(positions: Any) -> tuple[int, ...] | None:
    if positions is None:
        return None
    parsed = _several(positions, lambda position: _whole("position", position))
    if not parsed:
        raise UserError("an edit's positions are empty: name some, or leave them out for all.")
    return parsed


def _whole(name: str, value: Any) -> int:
    number = whole(_plain(value))
    if number is None:
        raise UserError(f"{name} {value!r:.60} is not a whole number.")
    return number


def _number(name: str, value: Any) -> float:
    number = finite(value)
    if number is None:
        raise UserError(f"{name} {value!r:.60} is not a finite number.")
    return number
