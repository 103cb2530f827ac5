"""What edits come to on one prompt.

:func:`resolve` reads edits on one run and gives an :class:`Intervention`: for every head and side,
which component goes from which activation to which. The stream that queries or keys are computed
from moves by

    dx[p] = sum over changes at p of (after - before) * vector

and nothing else does: values, other heads and other queries of a key-value group keep theirs
(attribution/README.md, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.component import FEATURE, KINDS
from circuit_tracer_qk.attribution.head import Head, head_name
from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.feature_names import feature_name
from circuit_tracer_qk.dictionaries.dictionary import like
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.steering.edits import (
    ALL,
    Edits,
    ResolvedHeadEdit,
    ResolvedQKEdit,
    Side,
    component_name,
    listed_edits,
)


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

    @property
    def name(self) -> str:
        """The feature's name, such as L0/61, or the kind."""
        return component_name(self.checkpoint, self.component)


class HeadSide(NamedTuple):
    """One side of one head."""

    layer: int
    head: int
    side: Side


@dataclass(frozen=True)
class Intervention:
    """What edits come to on one prompt.

    Attributes:
        changes: by head and side, the components that change (after != before).
        outputs: by head, the (n_pos,) factors of its output.
        held: edits without positions, by head and side, in order: they hold at generated tokens
            too.
        held_outputs: by head, the factor of its output at generated tokens.
    """

    changes: dict[HeadSide, tuple[Changed, ...]] = field(default_factory=dict)
    outputs: dict[Head, tuple[float, ...]] = field(default_factory=dict)
    held: dict[HeadSide, tuple[ResolvedQKEdit, ...]] = field(default_factory=dict)
    held_outputs: dict[Head, float] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[Head, ...]:
        """Every head that is steered, in order."""
        steered = {(place.layer, place.head) for place in (*self.changes, *self.held)}
        return tuple(sorted(steered | set(self.outputs)))


def resolve(
    edits: Edits, dictionaries: DictionarySet, parts: Decomposition, zero: slice
) -> Intervention:
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
    for edit in listed_edits(edits):
        if isinstance(edit.resolved, ResolvedQKEdit):
            reading.add(edit.resolved)
        else:
            reading.scale(edit.resolved)
    return reading.intervention()


class _Reading:
    """The state that edits leave one after another."""

    def __init__(self, dictionaries: DictionarySet, parts: Decomposition, zero: slice) -> None:
        self.dictionaries, self.parts = dictionaries, parts
        run = parts.run
        self.n_pos, self.n_layers, self.n_heads = run.n_pos, run.n_layers, run.pattern.shape[1]
        self.active = activations(parts)
        every = range(self.n_pos)
        self.featured = [p for p in every if p not in every[zero]]
        self.state: dict[tuple[HeadSide, int, int | str, int], float] = {}
        self.outputs: dict[Head, list[float]] = {}
        self.held: dict[HeadSide, list[ResolvedQKEdit]] = {}
        self.held_outputs: dict[Head, float] = {}

    def intervention(self) -> Intervention:
        changes: dict[HeadSide, list[Changed]] = {}
        for (place, checkpoint, component, position), after in self.state.items():
            before = self._clean(checkpoint, component, position)
            if after != before:
                changed = Changed(checkpoint, component, position, before, after)
                changes.setdefault(place, []).append(changed)
        outputs = {h: tuple(fs) for h, fs in self.outputs.items() if any(f != 1 for f in fs)}
        return Intervention(
            {place: tuple(listed) for place, listed in changes.items()},
            outputs,
            {place: tuple(edits) for place, edits in self.held.items()},
            {head: factor for head, factor in self.held_outputs.items() if factor != 1},
        )

    def add(self, edit: ResolvedQKEdit) -> None:
        for layer, head in self._checked(edit.heads):
            place = HeadSide(layer, head, edit.side)
            for checkpoint, component in self._components(edit, layer):
                for p in self._edited_positions(edit, place, checkpoint, component):
                    key = (place, checkpoint, component, p)
                    self.state[key] = edit.apply(self._value(*key))
            if edit.positions is None:
                self.held.setdefault(place, []).append(edit)

    def scale(self, edit: ResolvedHeadEdit) -> None:
        positions = range(self.n_pos) if edit.positions is None else self._counted(edit.positions)
        for head in self._checked(edit.heads):
            factors = self.outputs.setdefault(head, [1.0] * self.n_pos)
            for p in positions:
                factors[p] *= edit.factor
            if edit.positions is None:
                self.held_outputs[head] = self.held_outputs.get(head, 1.0) * edit.factor

    def _clean(self, checkpoint: int, component: int | str, position: int) -> float:
        is_feature = not isinstance(component, str)
        return self.active.get((checkpoint, component, position), 0.0) if is_feature else 1.0

    def _value(self, place: HeadSide, *component: Any) -> float:
        return self.state.get((place, *component), self._clean(*component))

    def _checked(self, heads: tuple[Head, ...]) -> tuple[Head, ...]:
        for layer, head in heads:
            if not (0 <= layer < self.n_layers and 0 <= head < self.n_heads):
                raise UserError(
                    f"there is no head {head_name((layer, head))}: the model has layers 0 to "
                    f"{self.n_layers - 1} of heads 0 to {self.n_heads - 1}."
                )
        return heads

    def _counted(self, positions: tuple[int, ...]) -> list[int]:
        """Positions counted from the start, in order."""
        for p in positions:
            if not -self.n_pos <= p < self.n_pos:
                raise UserError(
                    f"position {p} is out of range: the prompt has positions 0 to "
                    f"{self.n_pos - 1} (or -{self.n_pos} to -1 from its end)."
                )
        return sorted({p % self.n_pos for p in positions})

    def _components(self, edit: ResolvedQKEdit, layer: int) -> list[tuple[int, int | str]]:
        """(checkpoint read, component) of an edit in one block."""
        kinds = {KINDS[code] for code in self.parts.at(layer).kind.unique().tolist()} - {"feature"}
        components: list[tuple[int, int | str]] = []
        for checkpoint, component in edit.components:
            if not isinstance(component, str):
                self._check_feature(checkpoint, component, layer)
                components.append((checkpoint, component))
            elif checkpoint != layer:
                raise UserError(
                    f"{component!r} of checkpoint {checkpoint} is no part of what layer {layer} "
                    f"reads, which is checkpoint {layer}: give checkpoint={layer}."
                )
            elif component == ALL:
                reads = [c for c, k in self.parts.features.decoders if k == layer]
                components += sorted({(c, f) for c, f, _ in self.active if c in reads})
                components += [(layer, kind) for kind in sorted(kinds)]
            elif component not in kinds:
                raise UserError(
                    f"checkpoint {layer} has no component of kind {component!r}: it has "
                    f"{', '.join(sorted(kinds))} and features."
                )
            else:
                components.append((layer, component))
        return list(dict.fromkeys(components))  # what "all" names again is edited once

    def _check_feature(self, checkpoint: int, feature: int, layer: int) -> None:
        by_checkpoint = self.dictionaries.by_checkpoint
        name = feature_name(checkpoint, feature)
        if checkpoint not in by_checkpoint:
            raise UserError(
                f"there is no dictionary at checkpoint {checkpoint} ({name}): "
                f"{self.dictionaries.scan} has them at {', '.join(map(str, sorted(by_checkpoint)))}."
            )
        dictionary = by_checkpoint[checkpoint]
        if layer not in dictionary.decoders:
            sites = ", ".join(map(str, sorted(dictionary.decoders)))
            raise UserError(
                f"features of checkpoint {checkpoint} ({name}) have no decoder vector at checkpoint "
                f"{layer}, which layer {layer} reads (they have one at {sites}): name heads of such a "
                "layer, or features of that checkpoint."
            )
        width = len(dictionary.b_enc)
        if not 0 <= feature < width:
            raise UserError(
                f"there is no feature {feature} at checkpoint {checkpoint} ({name}): its dictionary "
                f"has features 0 to {width - 1}."
            )

    def _edited_positions(
        self, edit: ResolvedQKEdit, place: HeadSide, checkpoint: int, component: int | str
    ) -> Sequence[int]:
        """The positions at which one component is edited."""
        named = None if edit.positions is None else self._counted(edit.positions)
        if edit.injects or isinstance(component, str):
            everywhere = range(self.n_pos) if isinstance(component, str) else self.featured
            return everywhere if named is None else named
        candidates = range(self.n_pos) if named is None else named
        active = [p for p in candidates if self._value(place, checkpoint, component, p)]
        # "all" means what is there, so its features need not be at every position named
        if active or ALL in edit.names or edit.amount == 1:
            return active
        where = "anywhere" if named is None else f"at position {', '.join(map(str, named))}"
        there = {f for c, f, p in self.active if c == checkpoint and p in (named or ())}
        names = ", ".join(feature_name(checkpoint, f) for f in sorted(there)[:12])
        others = (
            f"one that is active there ({names})" if there else "features that are active there"
        )
        raise UserError(
            f"{feature_name(checkpoint, component)} (feature {component} of checkpoint "
            f"{checkpoint}) is not active {where}, so a factor changes nothing: give inject= with an "
            f"activation, or {others}."
        )


def changed_vectors(
    changes: Iterable[Changed], layer: int, dictionaries: DictionarySet, parts: Decomposition
) -> Tensor:
    """(n_pos, d_model): how the stream that a head's query or key side reads moves."""
    moved, checkpoint = torch.zeros_like(parts.run.residual[layer]), parts.at(layer)
    for c in changes:
        if isinstance(c.component, str):
            kind = KINDS.index(c.component)
            group = next(group for group in checkpoint.groups if group.kind == kind)
            vectors = checkpoint.of(group, slice(c.position, c.position + 1))
        else:
            dictionary = dictionaries.by_checkpoint[c.checkpoint]
            vectors = dictionary.vectors(layer, torch.tensor([c.component]))
        moved[c.position] += (c.after - c.before) * like(vectors[0], moved)
    return moved


def activations(parts: Decomposition) -> dict[tuple[int, int, int], float]:
    """(checkpoint read, feature, position) -> activation, of every active feature."""
    f = parts.features
    places = zip(f.checkpoint.tolist(), f.feature.tolist(), f.position.tolist(), strict=True)
    return dict(zip(places, f.activation.tolist(), strict=True))


def active_at(parts: Decomposition, layer: int, position: int) -> list[tuple[int, int, float]]:
    """(checkpoint read, feature, activation) of the features that block ``layer`` reads there."""
    checkpoint = parts.at(layer)
    there = checkpoint.at(position)
    nodes = checkpoint.node[there][checkpoint.kind[there] == FEATURE]
    f = parts.features
    columns = (f.checkpoint[nodes], f.feature[nodes], f.activation[nodes])
    return list(zip(*(column.tolist() for column in columns), strict=True))
