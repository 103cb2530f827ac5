"""Block totals: a table's score by the kinds of its components."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from circuit_tracer_qk.attribution.component import KINDS, Component

_CODE = {kind: i for i, kind in enumerate(KINDS)}


def block_totals(
    query: Sequence[Sequence[Component]], key: Sequence[Sequence[Component]], terms: Tensor
) -> Tensor:
    """The sums of the terms of each kind of query component with each kind of key component.

    Args:
        query, key: the components of either side of each table.
        terms: (n_tables, n_query, n_key) on the CPU, zero beyond a table's components.

    Returns:
        (n_tables, n_kinds, n_kinds), float64, in the order of ``KINDS``.
    """
    rows, columns = _kinds(query, terms.shape[1]), _kinds(key, terms.shape[2])
    return rows.transpose(1, 2) @ terms.double() @ columns


def blocks_by_kind(
    query: Sequence[Component], key: Sequence[Component], totals: Sequence[Sequence[float]]
) -> dict[tuple[str, str], float]:
    """{(query kind, key kind): total} of one table, from its part of :func:`block_totals`.

    All nine pairs of feature, bias and error where the checkpoint has a dictionary; the pairs of
    the kinds present elsewhere.
    """
    present = {c.kind for side in (query, key) for c in side}
    if not present & {"embedding", "position"}:
        present |= {"feature", "bias", "error"}
    kinds = [kind for kind in KINDS if kind in present]
    return {(a, b): totals[_CODE[a]][_CODE[b]] for a in kinds for b in kinds}


def _kinds(components: Sequence[Sequence[Component]], width: int) -> Tensor:
    """(n_tables, width, n_kinds): one at each component's kind, zero beyond the components."""
    codes = [[_CODE[c.kind] for c in side] for side in components]
    padded = [side + [len(KINDS)] * (width - len(side)) for side in codes]
    return one_hot(torch.tensor(padded, dtype=torch.long), len(KINDS) + 1)[
        :, :, : len(KINDS)
    ].double()
