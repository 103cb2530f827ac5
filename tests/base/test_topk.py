"""The largest of many numbers: the same as sorting all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuit_tracer_qk.base.topk import largest


@pytest.mark.parametrize("width", [1, 50, 799, 800, 8 * 123, 7128, 6561])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_the_largest_are_those_of_a_full_sort(width: int, n: int) -> None:
    generator = torch.Generator().manual_seed(width + n)
    rows = torch.randn(5, width, generator=generator) ** 3
    rows[1] = rows[1].abs()
    rows[2, width // 2 :] = 0
    rows[3] = rows[3].round()  # equals
    n = min(n, width)
    values, at = largest(rows, n)
    assert torch.equal(values, rows.gather(1, at))
    assert torch.equal(values.abs(), rows.abs().sort(1, descending=True).values[:, :n])
    assert all(len(set(row)) == n for row in at.tolist())


@given(st.data())
def test_the_largest_are_topk(data: st.DataObject) -> None:
    n_rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 90))
    n, seed = data.draw(st.integers(0, width)), data.draw(st.integers(0, 2**31))
    rows = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(seed))
    rows = (rows * 4).round() / 4  # some are equal
    values, columns = largest(rows, n)
    assert torch.equal(values, rows.gather(1, columns))
    assert torch.equal(values.abs(), rows.abs().topk(n, dim=1).values)
    assert all(len(set(row)) == n for row in columns.tolist())
