"""The largest of many numbers: the same as sorting all of them."""

import pytest
import torch

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
