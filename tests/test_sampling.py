"""What ``make test`` leaves out of a matrix of cases."""

from __future__ import annotations

from helpers.sampling import LIMIT, cover
from hypothesis import given
from hypothesis import strategies as st

CASES = st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=60)


@given(CASES, st.text(max_size=3))
def test_a_sample_touches_every_row_and_column(cases: list[tuple[int, ...]], seed: str) -> None:
    chosen = cover(cases, seed)
    assert chosen == sorted(set(chosen)) == cover(cases, seed)
    assert {cell for i in chosen for cell in enumerate(cases[i])} == {
        cell for case in cases for cell in enumerate(case)
    }


def test_a_sample_is_small() -> None:
    cases = [(a, b, c) for a in range(11) for b in range(3) for c in range(4)]
    assert 11 <= len(cover(cases, "some test")) <= LIMIT
    assert cover(cases, "some test") != cover(cases, "another test")


def test_a_list_is_no_matrix() -> None:
    assert cover([(i,) for i in range(40)], "some test") == list(range(40))
