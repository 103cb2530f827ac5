"""The largest of many numbers, without sorting what cannot be among them.

Numbers are put into groups of ``GROUP``. The ``n`` largest lie in the ``n`` groups with the largest
maxima: each of these holds one number at least as large as any of another group's. So one pass for
the maxima is followed by sorting ``1 / GROUP`` of the numbers, and then ``n * GROUP`` of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8


def largest(rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``n`` largest of every row by absolute value, signed, largest first.

    Args:
        rows: (n_rows, width)
        n: how many, at most ``width``.

    Returns:
        (n_rows, n) values and their columns. Equal to ``rows.abs().topk(n)`` but for the order of
        equals.
    """
    n_groups = rows.shape[1] // GROUP
    if n_groups < 2 * n:
        at = rows.abs().topk(n, dim=1).indices
        return rows.gather(1, at), at
    even = GROUP * n_groups
    grouped = rows[:, :even].unflatten(1, (GROUP, n_groups))  # columns: maxima are contiguous
    groups = grouped.abs().amax(1).topk(n, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None].expand(-1, GROUP, -1)).flatten(1)
    steps = n_groups * torch.arange(GROUP, device=rows.device)
    where = (groups[:, None] + steps[:, None]).flatten(1)
    if even < rows.shape[1]:  # the few that fill no group
        tail = torch.arange(even, rows.shape[1], device=rows.device).expand(len(rows), -1)
        candidates, where = torch.cat([candidates, rows[:, even:]], 1), torch.cat([where, tail], 1)
    at = candidates.abs().topk(n, dim=1).indices
    return candidates.gather(1, at), where.gather(1, at)
