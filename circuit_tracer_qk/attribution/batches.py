"""Many QK tables side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.qk import Place, QKRow, QKTable, RowPlace, Scores

BATCH_TERMS = 1 << 18  # padded terms contracted at once: they stay in the processor's cache


class Terms(NamedTuple):
    """One table's components and terms, or a sum of several tables.

    Attributes:
        query, key: the components of either side.
        terms: (len(query), len(key)).
    """

    query: Sequence[Component]
    key: Sequence[Component]
    terms: Tensor


class Batch(NamedTuple):
    """Tables side by side.

    Attributes:
        places: where they stand.
        score, score_capped: (n,) before and after the soft-cap.
        pattern: (n,) the attention that each key got.
        query, key: the components of either side of each; lists may be shared.
        terms: (n, n_query, n_key), zero beyond a table's own components.
        rows: the attention rows of heads and queries that no earlier batch had.
    """

    places: list[Place]
    score: Tensor
    score_capped: Tensor
    pattern: Tensor
    query: list[Sequence[Component]]
    key: list[Sequence[Component]]
    terms: Tensor
    rows: dict[RowPlace, QKRow]

    @classmethod
    def of(cls, table: QKTable, row: QKRow) -> Batch:
        """One table alone, and its row."""
        place = Place(table.layer, table.head, table.query_position, table.key_position)
        numbers = (table.score, table.score_capped, float(row.pattern[place.key]))
        score, capped, pattern = torch.tensor(numbers, dtype=torch.float64)[:, None]
        terms = table.terms.cpu()[None]
        rows = {place[:3]: row}
        return cls([place], score, capped, pattern, [table.query], [table.key], terms, rows)

    def each(self) -> Iterator[tuple[Place, Terms]]:
        """The tables one by one."""
        sides = zip(self.places, self.query, self.key, self.terms, strict=True)
        for place, query, key, terms in sides:
            yield place, Terms(query, key, terms[: len(query), : len(key)])


def one_by_one(scores: Scores, places: Iterable[Place]) -> Iterator[Batch]:
    """Batches of one table each, every attention row with the first of its tables."""
    rows: dict[RowPlace, QKRow] = {}
    for table in scores.tables(places):
        at = table.layer, table.head, table.query_position
        if at in rows:
            yield Batch.of(table, rows[at])._replace(rows={})
        else:
            rows[at] = scores.row(*at)
            yield Batch.of(table, rows[at])
