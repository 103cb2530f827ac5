"""The largest of many numbers, without sorting what cannot be among them.

Numbers are put into groups of ``GROUP``. The ``n`` largest lie in the ``n`` groups with the largest
maxima: each of these holds one number at least as large as any of another group's. So one pass for
the maxima is followed by sorting ``1 / GROUP`` of the numbers, and then ``n * GROUP`` of them.
"""

from __future__ import annotations

from torch import Tensor

GROUP = 8


def largest(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``n`` largest of every row by absolute value, signed, largest first.

    Args:
        rows: (n_rows, width); quicker where ``width`` is a multiple of ``GROUP``.
        n: how many, at most ``width``.

    Returns:
        (n_rows, n) values and their columns. Equal to ``rows.abs().topk(n)`` but for the order of
        equals.
    """
    n_groups = rows.shape[1] // GROUP
    if rows.shape[1] % GROUP or n_groups < 2 * n:
        at = rows.abs().topk(n, dim=1).indices
        return rows.gather(1, at), at
    grouped = rows.view(len(rows), GROUP, n_groups)  # a group is a column: maxima are contiguous
    groups = grouped.abs().amax(1).topk(n, dim=1, sorted=False).indices
    some = grouped.gather(2, groups[:, None].expand(-1, GROUP, -1)).flatten(1)
    at = some.abs().topk(n, dim=1).indices
    return some.gather(1, at), groups.gather(1, at % n) + n_groups * (at // n)


def padded(size: int) -> int:
    """The next multiple of ``GROUP``."""
    return -(-size // GROUP) * GROUP
