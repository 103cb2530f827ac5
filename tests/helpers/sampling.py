"""Of a test's matrix of cases, a seeded sample that touches every row and every column.

A test that is parametrised over several axes (architectures, dictionary sets, dtypes, modes) has as
many cases as their product. ``make test`` runs a sample of it, ``make test-all`` the whole. A
test with one axis is a list, not a matrix: it is run whole.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence

import pytest

LIMIT = 12  # a matrix of no more cases than this is run whole


def cover(cases: Sequence[Sequence[Hashable]], seed: str) -> list[int]:
    """Indices of cases, in order, that together have every value of every axis.

    Args:
        cases: each with one value an axis.
        seed: the same one draws the same sample, in every process.
    """
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    missing = {cell for case in cases for cell in enumerate(case)}
    chosen = []
    while missing:
        best = max(order, key=lambda i: len(missing & set(enumerate(cases[i]))))
        chosen.append(best)
        missing -= set(enumerate(cases[best]))
    return sorted(chosen)


def axes(item: pytest.Item) -> tuple[str, ...]:
    """The values of a parametrised test's case: one for each of its axes.

    Arguments that one mark gives together are one axis. So is every entry of a fixture's tuple.
    """
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return ()
    parameters = dict(callspec.params)
    values = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",")]
        values.append(repr([parameters.pop(name) for name in names]))
    for value in parameters.values():  # those of fixtures
        values += map(repr, value) if isinstance(value, tuple) else [repr(value)]
    return tuple(values)


def sample(items: Sequence[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """(tests to run, tests left out), each in the order of ``items``."""
    by_test: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_test[item.nodeid.partition("[")[0]].append(item)
    left_out: set[pytest.Item] = set()
    for test, cases in by_test.items():
        if len(cases) > LIMIT:
            chosen = cover([axes(case) for case in cases], test)
            left_out |= set(cases) - {cases[i] for i in chosen}
    run = [item for item in items if item not in left_out]
    return run, [item for item in items if item in left_out]
