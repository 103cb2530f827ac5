"""Matched controls: the same intervention on features, and on heads, that were not chosen.

An effect counts only beside these. A feature control replaces every edited feature by another one
of the same position, of similar activation, changed by the same ratio in the same heads; a head
control makes the same edits in other heads of the same layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb, log, prod
from random import Random

from circuit_tracer_qk.attribution.residual.decompose import Decomposition
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.steering.edits import Head, QKEdit
from circuit_tracer_qk.steering.resolve import Changed, HeadSide, Plan, active_at

# (side, checkpoint, feature, position): the same edit in every head that it is made in
_Item = tuple[str, int, int, int]
# (side, layers of those heads, position, whether it is active): what its stand-ins share
_Group = tuple[str, frozenset[int], int, bool]
TRIES = 40  # draws per control wanted before giving up on finding another distinct one
LEAST = 0.5  # controls that cover a smaller part of the edited features would be weaker edits
ALIKE = (0.5, 2.0)  # stand-ins whose activations lie outside this ratio are reported


@dataclass(frozen=True)
class Controls:
    """Plans to run beside an intervention, and what could not be had.

    Attributes:
        features: distinct plans with other features.
        heads: distinct plans with other heads.
        notes: sentences on what was not matched.
    """

    features: list[Plan]
    heads: list[Plan]
    notes: list[str]


def matched(
    plan: Plan, dictionaries: DictionarySet, parts: Decomposition, n: int, seed: int
) -> Controls:
    """Draw up to ``n`` distinct controls of either kind.

    Args:
        plan: the intervention.
        dictionaries, parts: what it was read on.
        n: how many of each kind.
        seed: of the draw.
    """
    if n == 0 or not plan.heads:
        return Controls([], [], [])
    features, feature_notes = _feature_plans(plan, dictionaries, parts, n, Random(seed))
    heads, head_notes = _head_plans(plan, parts.run.pattern.shape[1], n, Random(seed))
    return Controls(features, heads, feature_notes + head_notes)


def _feature_plans(
    plan: Plan, dictionaries: DictionarySet, parts: Decomposition, n: int, random: Random
) -> tuple[list[Plan], list[str]]:
    uses = _uses(plan)
    if not uses:
        return [], ["no feature is edited, so there are no other features to compare with"]
    pools = _Pools(dictionaries, parts, uses)
    layers: dict[_Item, set[int]] = {item: set() for item in uses}
    for place, changes in plan.changes.items():
        for c in changes:
            if not isinstance(c.component, str):
                item = (place.side, c.checkpoint, c.component, c.position)
                layers[item].add(place.layer)
    groups: dict[_Group, list[_Item]] = {}
    for item, use in uses.items():
        group = (item[0], frozenset(layers[item]), item[3], use.before != 0)
        groups.setdefault(group, []).append(item)
    ranked = {group: pools.ranked(group, items) for group, items in groups.items()}
    notes = []
    covered = sum(min(len(items), len(ranked[group])) for group, items in groups.items())
    if covered < LEAST * len(uses):
        return [], [
            f"only {covered} of {len(uses)} edited features have a counterpart at their position, "
            "too few for a control of other features"
        ]
    if covered < len(uses):
        notes.append(
            f"{len(uses) - covered} of {len(uses)} edited features have no counterpart at their "
            "position: the controls leave them as they are"
        )
    near = _nearest(groups, ranked, n)
    found: dict[frozenset[tuple[_Item, tuple[int, int]]], Plan] = {}
    for _ in range(TRIES * n):
        chosen: dict[_Item, tuple[int, int]] = {}
        for group, items in groups.items():
            pool = ranked[group][: near[group]]
            some = random.sample(pool, min(len(items), len(pool)))
            # the largest stands for the largest, so that activations stay alike
            some.sort(key=lambda s: -pools.activation(s, group[2]))
            items = sorted(items, key=lambda item: -uses[item].before)
            chosen |= dict(zip(items, some, strict=False))
        if chosen:
            key = frozenset((item[:1] + item[3:], choice) for item, choice in chosen.items())
            found.setdefault(key, _replaced(plan, chosen, pools))  # type: ignore[arg-type]
        if len(found) == n:
            break
    ratio = _activity(found.values(), uses)
    if ratio is not None and not ALIKE[0] <= ratio <= ALIKE[1]:
        notes.append(
            f"the other features are {ratio:.2g} times as active as the edited ones, on average"
        )
    if len(found) < n:
        notes.append(
            f"only {len(found)} distinct sets of other features could be drawn, of {n} asked for"
        )
    return list(found.values()), notes


def _activity(plans: Iterable[Plan], uses: dict[_Item, Changed]) -> float | None:
    """Mean activation of stand-ins over that of edited features; None where all are absent."""
    sizes = [
        c.before
        for plan in plans
        for changes in plan.changes.values()
        for c in changes
        if not isinstance(c.component, str) and c.before
    ]
    edited = [use.before for use in uses.values() if use.before]
    if not sizes or not edited:
        return None
    return (sum(sizes) / len(sizes)) / (sum(edited) / len(edited))


def _uses(plan: Plan) -> dict[_Item, Changed]:
    """Every edited feature with one of its changes."""
    return {
        (place.side, c.checkpoint, c.component, c.position): c
        for place, changes in plan.changes.items()
        for c in changes
        if not isinstance(c.component, str)
    }


class _Pools:
    """Which features may stand in for edited ones."""

    def __init__(
        self, dictionaries: DictionarySet, parts: Decomposition, uses: dict[_Item, Changed]
    ) -> None:
        self.known, self.parts, self.uses = dictionaries.by_checkpoint, parts, uses
        f = parts.features
        named = zip(f.checkpoint.tolist(), f.feature.tolist(), f.position.tolist(), strict=True)
        self.active = dict(zip(named, f.activation.tolist(), strict=True))

    def activation(self, choice: tuple[int, int], position: int) -> float:
        return self.active.get((*choice, position), 0.0)

    def ranked(self, group: _Group, items: list[_Item]) -> list[tuple[int, int]]:
        """(checkpoint, feature) that may replace a group's features, best first."""
        side, layers, position, present = group
        fit = {c for c, d in self.known.items() if layers <= set(d.decoders)}
        taken = {(c, f) for s, c, f, p in self.uses if (s, p) == (side, position)}
        here = {
            (c, f): a
            for layer in layers
            for c, f, a in active_at(self.parts, layer, position)
            if c in fit
        }
        if present:
            sizes = [self.uses[item].before for item in items]
            near = {x: min(abs(log(abs(a / s))) for s in sizes) for x, a in here.items()}
            return sorted(near.keys() - taken, key=lambda x: (near[x], x))
        # absent ones, of the same dictionaries: those active at other tokens of the prompt first
        reads = {c for _, c, _, _ in items}
        every = {(c, f) for c in reads for f in range(len(self.known[c].b_enc))}
        every -= taken | here.keys()
        elsewhere = {(c, f) for c, f, _ in self.active} & every
        return sorted(elsewhere) + sorted(every - elsewhere)


def _nearest(
    groups: dict[_Group, list[_Item]],
    ranked: dict[_Group, list[tuple[int, int]]],
    n: int,
) -> dict[_Group, int]:
    """How many of the best candidates to draw from: as few as give ``n`` distinct draws."""
    near = {group: min(len(items), len(ranked[group])) for group, items in groups.items()}

    def draws() -> int:
        return prod(comb(near[g], min(len(items), near[g])) for g, items in groups.items())

    while draws() < 2 * n and any(near[g] < len(ranked[g]) for g in groups):
        near = {g: min(size + 1, len(ranked[g])) for g, size in near.items()}
    return near


def _replaced(plan: Plan, chosen: dict[_Item, tuple[int, int]], pools: _Pools) -> Plan:
    changes: dict[HeadSide, tuple[Changed, ...]] = {}
    for place, some in plan.changes.items():
        now = []
        for c in some:
            choice = chosen.get((place.side, c.checkpoint, c.component, c.position))  # type: ignore
            if isinstance(c.component, str):
                now.append(c)  # errors and biases have no counterpart
            elif choice is not None:
                before = pools.activation(choice, c.position)
                after = before * (c.after / c.before) if c.before else c.after
                now.append(Changed(*choice, c.position, before, after))
        if now:
            changes[place] = tuple(now)
    # at tokens still to be generated an edited feature keeps its first stand-in
    stand_ins = {}
    for (side, checkpoint, feature, _), choice in chosen.items():
        stand_ins.setdefault((side, checkpoint, feature), choice)
    held = {
        place: tuple(
            QKEdit([place[:2]], place.side, c, f, None, edit.factor, edit.inject)  # type: ignore
            for edit in edits
            for name in edit.features  # type: ignore[union-attr]
            if (at := stand_ins.get((place.side, edit.checkpoint, name)))  # type: ignore
            for c, f in [at]
        )
        for place, edits in plan.held.items()
    }
    held = {place: edits for place, edits in held.items() if edits}
    return Plan(changes, plan.outputs, held, plan.held_outputs)


def _head_plans(plan: Plan, n_heads: int, n: int, random: Random) -> tuple[list[Plan], list[str]]:
    steered: dict[int, list[int]] = {}
    for layer, head in plan.heads:
        steered.setdefault(layer, []).append(head)
    others = {
        layer: [h for h in range(n_heads) if h not in heads] for layer, heads in steered.items()
    }
    notes = []
    full = [layer for layer, free in others.items() if not free]
    if full:
        named = ", ".join(map(str, full))
        notes.append(f"every head of layer {named} is steered, so no other heads are left there")
        steered = {layer: heads for layer, heads in steered.items() if others[layer]}
        if not steered:
            return [], notes
    if any(len(others[layer]) < len(heads) for layer, heads in steered.items()):
        notes.append(
            "there are fewer other heads than steered ones in a layer: the head controls take "
            "those there are"
        )
    count = prod(comb(len(others[k]), min(len(v), len(others[k]))) for k, v in steered.items())
    found: dict[tuple[Head, ...], Plan] = {}
    for _ in range(TRIES * n):
        to: dict[Head, Head] = {}
        for layer, heads in steered.items():
            some = random.sample(others[layer], min(len(heads), len(others[layer])))
            to |= {(layer, a): (layer, b) for a, b in zip(heads, some, strict=False)}
        found.setdefault(tuple(sorted(to.values())), _elsewhere(plan, to))
        if len(found) == min(n, count):
            break
    if len(found) < n:
        notes.append(f"only {len(found)} sets of other heads exist, of {n} asked for")
    return list(found.values()), notes


def _elsewhere(plan: Plan, to: dict[Head, Head]) -> Plan:
    return Plan(
        {
            HeadSide(*to[place.layer, place.head], place.side): changes
            for place, changes in plan.changes.items()
            if (place.layer, place.head) in to
        },
        {to[head]: factors for head, factors in plan.outputs.items() if head in to},
        {
            HeadSide(*to[place.layer, place.head], place.side): edits
            for place, edits in plan.held.items()
            if (place.layer, place.head) in to
        },
        {to[head]: factor for head, factor in plan.held_outputs.items() if head in to},
    )
