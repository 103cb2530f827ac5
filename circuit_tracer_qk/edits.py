"""What to change: edits of features inside heads' QK circuits, and what they come to on a prompt.

An edit names heads, a side, features and positions; :func:`resolve` reads it on one run and gives a
:class:`Plan`: for every head and side, which component goes from which activation to which. The
vectors that queries or keys are computed from move by

    dx[p] = sum over changes at p of (after - before) * vector

and nothing else does: values, other heads and other queries of a key-value group keep theirs
(method, section 5; paper, "Induction" and "Antonyms").
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.components import (
    BIAS,
    EMBEDDING,
    ERROR,
    FEATURE,
    KINDS,
    POSITION,
    Decomposition,
)
from circuit_tracer_qk.dictionaries import DictionarySet
from circuit_tracer_qk.errors import UserError

SIDES = ("query", "key")
OTHER_KINDS = {KINDS[code]: code for code in (BIAS, ERROR, EMBEDDING, POSITION)}
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
        features: indices in that checkpoint's dictionary; or kinds of other components of the
            heads' own checkpoint ("bias", "error", "embedding", "position"); or "all", everything.
        positions: query or key positions, negative ones from the end. None: wherever a feature is
            active (``factor``), or every position that has features at all (``inject``); in
            generation also at the tokens generated.
        factor: what activations are multiplied with; 0 removes, 1 changes nothing.
        inject: what is added to the activations instead, for features that are not active.

    Raises:
        UserError: an edit that means nothing.
    """

    heads: Sequence[HeadLike] | HeadLike
    side: Literal["query", "key"]
    checkpoint: int
    features: Sequence[int | str] | int | str
    positions: Sequence[int] | int | None = None
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
    """Scale the output of heads: what they write into the residual stream.

    Attributes:
        heads: ``(layer, head)`` or ``"L4H0"``, one or several.
        factor: 0 removes the heads' writes, 1 changes nothing.
        positions: query positions, negative ones from the end; None for all.
    """

    heads: Sequence[HeadLike] | HeadLike
    factor: float
    positions: Sequence[int] | int | None = None

    def __post_init__(self) -> None:
        _set(self, heads=_heads(self.heads), positions=_positions(self.positions))
        _set(self, factor=_number("factor", self.factor))


Edit = QKEdit | HeadEdit


def swap(
    heads: Sequence[HeadLike] | HeadLike,
    side: Literal["query", "key"],
    checkpoint: int,
    *,
    remove: Sequence[int] | int,
    inject: Sequence[int] | int,
    activation: float,
    positions: Sequence[int] | int | None,
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


class Changed(NamedTuple):
    """One component at one position of one side, before and after.

    Attributes:
        checkpoint: the one a feature reads; the head's own for other kinds.
        component: a feature's index, or the kind of another component.
        position: where.
        before, after: activations; for other kinds, multiples of the component's vector.
    """

    checkpoint: int
    component: int | str
    position: int
    before: float
    after: float


class Place(NamedTuple):
    """One side of one head."""

    layer: int
    head: int
    side: str


@dataclass(frozen=True)
class Plan:
    """What edits come to on one prompt.

    Attributes:
        changes: by head and side, the components that change (after != before).
        outputs: by head, the (n_pos,) factors of its output.
        held: edits without positions, by place, in order: they hold at generated tokens too.
        held_outputs: by head, the factor of its output at generated tokens.
    """

    changes: dict[Place, tuple[Changed, ...]] = field(default_factory=dict)
    outputs: dict[Head, tuple[float, ...]] = field(default_factory=dict)
    held: dict[Place, tuple[QKEdit, ...]] = field(default_factory=dict)
    held_outputs: dict[Head, float] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[Head, ...]:
        """Every head that is steered, in order."""
        steered = {(place.layer, place.head) for place in (*self.changes, *self.held)}
        return tuple(sorted(steered | set(self.outputs)))

    @property
    def first_layer(self) -> int | None:
        """The first block that is steered; None where nothing is."""
        return min((layer for layer, _ in self.heads), default=None)


def resolve(
    edits: Iterable[Edit], dictionaries: DictionarySet, parts: Decomposition, zero: slice
) -> Plan:
    """Read edits on one run.

    Args:
        edits: applied in order.
        dictionaries: whose features are edited.
        parts: the clean run's components: activations before.
        zero: positions that have no features (``ResidualModel.zero_positions``).

    Raises:
        UserError: a head, checkpoint, feature or position that does not exist, or a factor for a
            feature that is active nowhere there.
    """
    reading = _Reading(dictionaries, parts, zero)
    for edit in edits:
        if isinstance(edit, QKEdit):
            reading.add(edit)
        elif isinstance(edit, HeadEdit):
            reading.scale(edit)
        else:
            raise UserError(
                f"{type(edit).__name__} is no edit: give circuit_tracer_qk.QKEdit or HeadEdit."
            )
    return reading.plan()


class _Reading:
    """The state that edits leave one after another."""

    def __init__(self, dictionaries: DictionarySet, parts: Decomposition, zero: slice) -> None:
        self.dictionaries, self.parts = dictionaries, parts
        run, f = parts.run, parts.features
        self.n_pos, self.n_layers, self.n_heads = run.n_pos, run.n_layers, run.pattern.shape[1]
        named = zip(f.checkpoint.tolist(), f.feature.tolist(), f.position.tolist(), strict=True)
        self.active = dict(zip(named, f.activation.tolist(), strict=True))
        empty = set(range(self.n_pos)[zero])
        self.featured = [p for p in range(self.n_pos) if p not in empty]
        self.state: dict[tuple[Place, int, int | str, int], float] = {}
        self.outputs: dict[Head, list[float]] = {}
        self.held: dict[Place, list[QKEdit]] = {}
        self.held_outputs: dict[Head, float] = {}

    def plan(self) -> Plan:
        changes: dict[Place, list[Changed]] = {}
        for (place, checkpoint, component, position), after in self.state.items():
            before = self._clean(checkpoint, component, position)
            if after != before:
                changed = Changed(checkpoint, component, position, before, after)
                changes.setdefault(place, []).append(changed)
        return Plan(
            {place: tuple(some) for place, some in changes.items()},
            {
                head: tuple(factors)
                for head, factors in self.outputs.items()
                if any(f != 1 for f in factors)
            },
            {place: tuple(edits) for place, edits in self.held.items()},
            {head: factor for head, factor in self.held_outputs.items() if factor != 1},
        )

    def add(self, edit: QKEdit) -> None:
        for layer, head in self._checked(edit.heads):
            place = Place(layer, head, edit.side)
            for checkpoint, component in self._components(edit, layer):
                at = self._places(edit, place, checkpoint, component)
                for p in at:
                    key = (place, checkpoint, component, p)
                    value = self._value(key)
                    if edit.inject is not None:
                        self.state[key] = value + edit.inject
                    else:
                        self.state[key] = value * edit.factor  # type: ignore[operator]
            if edit.positions is None:
                self.held.setdefault(place, []).append(edit)

    def scale(self, edit: HeadEdit) -> None:
        at = range(self.n_pos) if edit.positions is None else self._at(edit.positions)
        for head in self._checked(edit.heads):
            factors = self.outputs.setdefault(head, [1.0] * self.n_pos)
            for p in at:
                factors[p] *= edit.factor
            if edit.positions is None:
                self.held_outputs[head] = self.held_outputs.get(head, 1.0) * edit.factor

    def _clean(self, checkpoint: int, component: int | str, position: int) -> float:
        if isinstance(component, str):
            return 1.0
        return self.active.get((checkpoint, component, position), 0.0)

    def _value(self, key: tuple[Place, int, int | str, int]) -> float:
        return self.state[key] if key in self.state else self._clean(*key[1:])

    def _checked(self, heads: Any) -> list[Head]:
        for layer, head in heads:
            if not (0 <= layer < self.n_layers and 0 <= head < self.n_heads):
                raise UserError(
                    f"there is no head L{layer}H{head}: the model has layers 0 to "
                    f"{self.n_layers - 1} of heads 0 to {self.n_heads - 1}."
                )
        return list(heads)

    def _at(self, positions: Any) -> list[int]:
        for p in positions:
            if not -self.n_pos <= p < self.n_pos:
                raise UserError(
                    f"position {p} is out of range: the prompt has positions 0 to "
                    f"{self.n_pos - 1} (or -{self.n_pos} to -1 from its end)."
                )
        return sorted({p % self.n_pos for p in positions})

    def _components(self, edit: QKEdit, layer: int) -> list[tuple[int, int | str]]:
        """(checkpoint read, component) of an edit in one block."""
        kinds = {KINDS[code] for code in self.parts.at(layer).kind.unique().tolist()} - {"feature"}
        found: list[tuple[int, int | str]] = []
        for name in edit.features:  # type: ignore[union-attr]
            if name == ALL:
                reads = [c for c, k in self.parts.features.decoders if k == layer]
                found += sorted({(c, f) for c, f, _ in self.active if c in reads})
                found += [(layer, kind) for kind in sorted(kinds)]
            elif isinstance(name, str):
                if name not in kinds:
                    raise UserError(
                        f"checkpoint {layer} has no component of kind {name!r}: it has "
                        f"{', '.join(sorted(kinds))} and features."
                    )
                found.append((layer, name))
            else:
                self._check_feature(edit.checkpoint, name, layer)
                found.append((edit.checkpoint, name))
        return found

    def _check_feature(self, checkpoint: int, feature: int, layer: int) -> None:
        known = self.dictionaries.by_checkpoint
        if checkpoint not in known:
            raise UserError(
                f"there is no dictionary at checkpoint {checkpoint}: {self.dictionaries.scan} has "
                f"them at {', '.join(map(str, sorted(known)))}."
            )
        dictionary = known[checkpoint]
        if layer not in dictionary.decoders:
            sites = ", ".join(map(str, sorted(dictionary.decoders)))
            raise UserError(
                f"features of checkpoint {checkpoint} have no decoder vector at checkpoint "
                f"{layer}, which layer {layer} reads (they have one at {sites}): name heads of "
                "such a layer, or features of that checkpoint."
            )
        width = len(dictionary.b_enc)
        if not 0 <= feature < width:
            raise UserError(
                f"there is no feature {feature} at checkpoint {checkpoint}: its dictionary has "
                f"features 0 to {width - 1}."
            )

    def _places(
        self, edit: QKEdit, place: Place, checkpoint: int, component: int | str
    ) -> list[int]:
        """The positions at which one component is edited."""
        named = None if edit.positions is None else self._at(edit.positions)
        if edit.inject is not None or isinstance(component, str):
            everywhere = range(self.n_pos) if isinstance(component, str) else self.featured
            return list(everywhere) if named is None else named
        at = range(self.n_pos) if named is None else named
        found = [p for p in at if self._value((place, checkpoint, component, p))]
        # "all" means what is there, so its features need not be at every position named
        if not found and ALL not in edit.features and edit.factor != 1:  # type: ignore[operator]
            where = "anywhere" if named is None else f"at position {', '.join(map(str, named))}"
            raise UserError(
                f"feature {component} of checkpoint {checkpoint} is not active {where}, so a "
                f"factor changes nothing: {self._hint(checkpoint, named)}."
            )
        return found

    def _hint(self, checkpoint: int, named: Sequence[int] | None) -> str:
        here = {f for c, f, p in self.active if c == checkpoint and p in (named or ())}
        if not here:
            return "give inject= with an activation, or features that are active there"
        some = ", ".join(map(str, sorted(here)[:12]))
        return f"give inject= with an activation, or one that is active there ({some})"


def changed_vectors(
    changes: Iterable[Changed], layer: int, dictionaries: DictionarySet, parts: Decomposition
) -> Tensor:
    """(n_pos, d_model): how the stream that a head's query or key side reads moves."""
    run = parts.run
    moved = torch.zeros_like(run.residual[layer])
    for changed in changes:
        step = changed.after - changed.before
        moved[changed.position] += step * _vector(changed, layer, dictionaries, parts).to(moved)
    return moved


def _vector(
    changed: Changed, layer: int, dictionaries: DictionarySet, parts: Decomposition
) -> Tensor:
    if not isinstance(changed.component, str):
        return dictionaries.by_checkpoint[changed.checkpoint].decoders[layer][changed.component]
    checkpoint = parts.at(layer)
    here = checkpoint.at(changed.position)
    at = (checkpoint.kind[here] == OTHER_KINDS[changed.component]).nonzero().flatten()
    row = here.start + int(at[0])
    return checkpoint.vectors(slice(row, row + 1))[0]


def active_at(parts: Decomposition, layer: int, position: int) -> list[tuple[int, int, float]]:
    """(checkpoint read, feature, activation) of the features that block ``layer`` reads there."""
    checkpoint = parts.at(layer)
    here = checkpoint.at(position)
    nodes = checkpoint.node[here][checkpoint.kind[here] == FEATURE]
    f = parts.features
    columns = (f.checkpoint[nodes], f.feature[nodes], f.activation[nodes])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _set(edit: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(edit, name, value)  # frozen: normalised once, while it is made


def _heads(heads: Any) -> tuple[Head, ...]:
    single = isinstance(heads, str) or (
        isinstance(heads, Sequence)
        and len(heads) == 2
        and all(hasattr(h, "__index__") for h in heads)
    )
    try:
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
            layer, number = head
            return index(layer), index(number)
        except (TypeError, ValueError):
            pass
    raise UserError(f"{head!r} is no head: write (layer, head) or L4H0.")


def _features(features: Any) -> tuple[int | str, ...]:
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
        return index(value)
    except TypeError:
        raise UserError(f"{name} {value!r} is not a whole number.") from None


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} {value!r} is not a finite number.")
    return number
