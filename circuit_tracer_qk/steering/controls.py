"""Matched controls: the same intervention on features, and on heads, that were not chosen.

An effect counts only beside these. A feature control replaces every edited feature by another one
of the same position, of similar activation, changed by the same ratio in the same heads; a head
control makes the same edits in other heads of the same layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import comb, log, prod
from random import Random
from typing import NamedTuple, TypeVar

from circuit_tracer_qk.attribution.head import Head
from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.steering.edits import ResolvedQKEdit, Side
from circuit_tracer_qk.steering.options import CONTROLS
from circuit_tracer_qk.steering.resolve import (
    Changed,
    HeadSide,
    Intervention,
    activations,
    active_at,
)

MOST = 10_000  # controls of either kind
TRIES = 40  # draws per control wanted before giving up on finding another distinct one
LEAST = 0.5  # controls that cover a smaller part of the edited features would be weaker edits
ALIKE = (0.5, 2.0)  # stand-ins whose activations lie outside this ratio are reported

T = TypeVar("T")

StandIn = tuple[int, int]
"""(checkpoint, feature) of a feature that takes the place of an edited one."""


class _Edited(NamedTuple):
    """A feature at one position of one side: the same edit in every head that it is made in."""

    side: Side
    checkpoint: int
    feature: int
    position: int


class _Group(NamedTuple):
    """What an edited feature and its stand-ins share."""

    side: Side
    layers: frozenset[int]  # of the heads that it is edited in
    position: int
    active: bool


class Controls(NamedTuple):
    """Interventions to run beside another, and what could not be had.

    Attributes:
        features: distinct ones with other features.
        heads: distinct ones with other heads.
        notes: sentences on what was not matched.
    """

    features: list[Intervention]
    heads: list[Intervention]
    notes: list[str]


def matched(
    intervention: Intervention, dictionaries: DictionarySet, parts: Decomposition, n: int, seed: int
) -> Controls:
    """Draw up to ``n`` distinct controls of either kind.

    Args:
        intervention: what is to be compared.
        dictionaries, parts: what it was read on.
        n: how many of each kind.
        seed: of the draw.

    Raises:
        UserError: more than the usual number are asked for, and fewer exist.
    """
    if n == 0 or not intervention.heads:
        return Controls([], [], [])
    pools = _Pools(intervention, dictionaries, parts)
    n, asked = min(n, MOST), n
    features, feature_notes = _other_features(intervention, pools, n, Random(seed))
    n_heads = parts.run.pattern.shape[1]
    heads, head_notes = _other_heads(intervention, n_heads, n, Random(seed))
    most = max(len(features), len(heads))
    if asked > max(most, CONTROLS.default):
        exist = f"{len(features)} sets of other features and {len(heads)} of other heads exist here"
        reason = "more are not run" if most == MOST else exist
        raise UserError(f"controls is {asked}: {reason}; ask for at most {most}.")
    return Controls(features, heads, feature_notes + head_notes)


def _other_features(
    intervention: Intervention, pools: _Pools, n: int, random: Random
) -> tuple[list[Intervention], list[str]]:
    edited = pools.edited
    if not edited:
        return [], ["no feature is edited, so there are no other features to compare with"]
    groups: dict[_Group, list[_Edited]] = defaultdict(list)
    for feature, before in edited.items():
        at = frozenset(pools.layers[feature])
        groups[_Group(feature.side, at, feature.position, before != 0)].append(feature)
    ranked = {group: pools.ranked(group, features) for group, features in groups.items()}
    notes = []
    covered = sum(min(len(features), len(ranked[group])) for group, features in groups.items())
    if covered < LEAST * len(edited):
        return [], [
            f"only {covered} of {len(edited)} edited features have a counterpart at their "
            "position, too few for a control of other features"
        ]
    if covered < len(edited):
        notes.append(
            f"{len(edited) - covered} of {len(edited)} edited features have no counterpart at "
            "their position: the controls leave them as they are"
        )
    sizes = _pool_sizes(groups, ranked, n)
    controls: dict[frozenset[tuple[str, int, StandIn]], Intervention] = {}
    n_distinct = min(n, _n_draws(groups, sizes))
    for _ in range(TRIES * n_distinct):
        chosen: dict[_Edited, StandIn] = {}
        for group, features in groups.items():
            pool = ranked[group][: sizes[group]]
            drawn = random.sample(pool, min(len(features), len(pool)))
            # the largest stands for the largest, so that activations stay alike
            drawn.sort(key=lambda s: -pools.activation(s, group.position))
            features = sorted(features, key=lambda feature: -edited[feature])
            chosen |= zip(features, drawn, strict=False)
        if chosen:
            key = frozenset((f.side, f.position, stand_in) for f, stand_in in chosen.items())
            controls.setdefault(key, _with_features(intervention, chosen, pools))
        if len(controls) == n_distinct:
            break
    ratio = _activity(controls.values(), edited)
    if ratio is not None and not ALIKE[0] <= ratio <= ALIKE[1]:
        notes.append(
            f"the other features are {ratio:.2g} times as active as the edited ones, on average"
        )
    if len(controls) < n:
        notes.append(
            f"only {len(controls)} distinct sets of other features could be drawn, of {n} asked for"
        )
    return list(controls.values()), notes


def _feature_changes(intervention: Intervention) -> Iterator[tuple[HeadSide, _Edited, Changed]]:
    """Every change of a feature, by head; errors and biases have no counterparts."""
    for place, changes in intervention.changes.items():
        for c in changes:
            if not isinstance(c.component, str):
                yield (place, _Edited(place.side, c.checkpoint, c.component, c.position), c)


def _activity(controls: Iterable[Intervention], edited: dict[_Edited, float]) -> float | None:
    """Mean activation of stand-ins over that of edited features; None where all are absent."""
    stand_ins = [c.before for run in controls for *_, c in _feature_changes(run) if c.before]
    replaced = [before for before in edited.values() if before]
    if not stand_ins or not replaced:
        return None
    return (sum(stand_ins) / len(stand_ins)) / (sum(replaced) / len(replaced))


class _Pools:
    """Which features may stand in for edited ones."""

    def __init__(
        self, intervention: Intervention, dictionaries: DictionarySet, parts: Decomposition
    ) -> None:
        self.dictionaries, self.parts = dictionaries.by_checkpoint, parts
        self.active = activations(parts)
        self.edited: dict[_Edited, float] = {}  # its activation
        self.layers: dict[_Edited, set[int]] = defaultdict(set)
        for place, feature, change in _feature_changes(intervention):
            self.edited[feature] = change.before
            self.layers[feature].add(place.layer)

    def activation(self, stand_in: StandIn, position: int) -> float:
        return self.active.get((*stand_in, position), 0.0)

    def ranked(self, group: _Group, features: list[_Edited]) -> list[StandIn]:
        """What may replace a group's features, best first."""
        readable = {c for c, d in self.dictionaries.items() if group.layers <= set(d.decoders)}
        edited = {
            (f.checkpoint, f.feature)
            for f in self.edited
            if (f.side, f.position) == (group.side, group.position)
        }
        active = {
            (c, f): activation
            for layer in group.layers
            for c, f, activation in active_at(self.parts, layer, group.position)
            if c in readable
        }
        if group.active:
            wanted = [self.edited[feature] for feature in features]
            distance = {
                stand_in: min(abs(log(abs(activation / size))) for size in wanted)
                for stand_in, activation in active.items()
            }
            return sorted(distance.keys() - edited, key=lambda x: (distance[x], x))
        # absent ones, of the same dictionaries: those active at other tokens of the prompt first
        checkpoints = {feature.checkpoint for feature in features}
        absent = {(c, f) for c in checkpoints for f in range(len(self.dictionaries[c].b_enc))}
        absent -= edited | active.keys()
        elsewhere = {(c, f) for c, f, _ in self.active} & absent
        return sorted(elsewhere) + sorted(absent - elsewhere)


def _pool_sizes(
    groups: dict[_Group, list[_Edited]], ranked: dict[_Group, list[StandIn]], n: int
) -> dict[_Group, int]:
    """How many of the best candidates to draw from: as few as give ``n`` distinct draws."""
    sizes = {group: min(len(features), len(ranked[group])) for group, features in groups.items()}

    while _n_draws(groups, sizes) < 2 * n and any(sizes[g] < len(ranked[g]) for g in groups):
        sizes = {g: min(size + 1, len(ranked[g])) for g, size in sizes.items()}
    return sizes


def _n_draws(groups: dict[_Group, list[_Edited]], sizes: dict[_Group, int]) -> int:
    """How many different draws there are."""
    return prod(comb(sizes[g], min(len(fs), sizes[g])) for g, fs in groups.items())


def _with_features(
    intervention: Intervention, chosen: dict[_Edited, StandIn], pools: _Pools
) -> Intervention:
    """The same intervention on the stand-ins."""
    changes: dict[HeadSide, tuple[Changed, ...]] = {}
    for place, original in intervention.changes.items():
        replaced = []
        for c in original:
            if isinstance(c.component, str):
                replaced.append(c)
                continue
            stand_in = chosen.get(_Edited(place.side, c.checkpoint, c.component, c.position))
            if stand_in is not None:
                before = pools.activation(stand_in, c.position)
                after = before * (c.after / c.before) if c.before else c.after
                replaced.append(Changed(*stand_in, c.position, before, after))
        if replaced:
            changes[place] = tuple(replaced)
    # at tokens still to be generated an edited feature keeps its first stand-in
    first: dict[tuple[Side, int, int], StandIn] = {}
    for feature, stand_in in chosen.items():
        first.setdefault((feature.side, feature.checkpoint, feature.feature), stand_in)
    held: dict[HeadSide, list[ResolvedQKEdit]] = defaultdict(list)
    for place, edits in intervention.held.items():
        for edit in edits:
            for feature in edit.features:
                if (stand_in := first.get((place.side, *feature))) is not None:
                    held[place].append(replace(edit, components=(stand_in,)))
    return replace(
        intervention, changes=changes, held={place: tuple(edits) for place, edits in held.items()}
    )


def _other_heads(
    intervention: Intervention, n_heads: int, n: int, random: Random
) -> tuple[list[Intervention], list[str]]:
    steered: dict[int, list[int]] = defaultdict(list)
    for layer, head in intervention.heads:
        steered[layer].append(head)
    others = {
        layer: [h for h in range(n_heads) if h not in heads] for layer, heads in steered.items()
    }
    notes = []
    full = [layer for layer, free in others.items() if not free]
    if full:
        layers = ", ".join(map(str, full))
        notes.append(f"every head of layer {layers} is steered, so no other heads are left there")
        steered = {layer: heads for layer, heads in steered.items() if others[layer]}
        if not steered:
            return [], notes
    wanted = {layer: min(len(heads), len(others[layer])) for layer, heads in steered.items()}
    if any(wanted[layer] < len(heads) for layer, heads in steered.items()):
        notes.append(
            "there are fewer other heads than steered ones in a layer: the head controls take "
            "those there are"
        )
    count = prod(comb(len(others[layer]), n_wanted) for layer, n_wanted in wanted.items())
    controls: dict[tuple[Head, ...], Intervention] = {}
    for _ in range(TRIES * min(n, count)):
        stand_ins: dict[Head, Head] = {}
        for layer, heads in steered.items():
            drawn = random.sample(others[layer], wanted[layer])
            stand_ins |= {(layer, a): (layer, b) for a, b in zip(heads, drawn, strict=False)}
        controls.setdefault(tuple(sorted(stand_ins.values())), _with_heads(intervention, stand_ins))
        if len(controls) == min(n, count):
            break
    if len(controls) < n:
        notes.append(f"only {len(controls)} sets of other heads exist, of {n} asked for")
    return list(controls.values()), notes


def _with_heads(intervention: Intervention, stand_ins: dict[Head, Head]) -> Intervention:
    """The same intervention in other heads."""

    def sides(by_place: dict[HeadSide, T]) -> dict[HeadSide, T]:
        return {
            HeadSide(*stand_ins[place.layer, place.head], place.side): value
            for place, value in by_place.items()
            if (place.layer, place.head) in stand_ins
        }

    def heads(by_head: dict[Head, T]) -> dict[Head, T]:
        return {stand_ins[h]: value for h, value in by_head.items() if h in stand_ins}

    return Intervention(
        sides(intervention.changes),
        heads(intervention.outputs),
        sides(intervention.held),
        heads(intervention.held_outputs),
    )
