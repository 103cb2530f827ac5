"""How numbers are written."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_tracer_qk.base.json_text import rounded, rounded_all

FLOATS = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)


@given(st.lists(FLOATS, max_size=20))
def test_numbers_are_rounded_alike_alone_and_together(values: list[float]) -> None:
    together = rounded_all(torch.tensor(values, dtype=torch.float64))
    assert together == [rounded(value) for value in values]
    assert [rounded(value) for value in together] == together
