"""QK tables and attention rows as they are written to graph files and sent to the page.

``graph.schema.json`` describes both (``table`` and ``row``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.batches import Batch
from circuit_tracer_qk.attribution.blocks import block_totals, blocks_by_kind
from circuit_tracer_qk.attribution.columns import column_values
from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.qk import QKRow, RowPlace
from circuit_tracer_qk.base.json_text import (
    not_finite,
    numbers,
    rest,
    rounded,
    rounded_all,
    to_bytes,
    to_text,
)
from circuit_tracer_qk.base.topk import largest
from circuit_tracer_qk.dictionaries.features import feature_index

MARGINALS_LISTED = 20  # a table's largest marginals on either side, all of whose terms are written
TOP_TERMS = 50
_PLACE = ("kind", "checkpoint", "feature", "position")


@dataclass(frozen=True)
class Names:
    """Ids of components as nodes, and every feature that was mentioned.

    Attributes:
        tokens: the prompt's token ids.
        nodes: ids of the nodes written; None where every component may be one.
        features: (checkpoint, feature) by Cantor index; grows.
    """

    tokens: Sequence[int]
    nodes: Collection[str] | None = None
    features: dict[int, tuple[int, int]] = field(default_factory=dict)
    _written: dict[Component, tuple[str, str, str]] = field(default_factory=dict)

    def mention(self, checkpoint: int, feature: int) -> int | None:
        """The Cantor index of a feature, which is noted."""
        index = feature_index(checkpoint, feature)
        if index is not None:
            self.features[index] = checkpoint, feature
        return index

    def node_id(self, c: Component) -> str:
        """The id that a component has, or would have, as a node."""
        layer = c.checkpoint - 1
        if c.kind == "feature":
            return f"{layer}_{c.feature}_{c.position}"
        if c.kind == "error" and c.label == "error":
            return f"{layer}_-1_{c.position}"
        if c.kind == "embedding":
            return f"E_{self.tokens[c.position]}_{c.position}"
        if c.kind == "position":
            return f"E_position_{c.position}"
        return f"{layer}_{c.kind}_{c.label.split()[0]}_{c.position}"

    def is_node(self, c: Component) -> bool:
        """Whether a component is a node of the graph, or may be one where that is not known."""
        if self.nodes is None:
            return c.kind in ("feature", "embedding") or (c.kind, c.label) == ("error", "error")
        return self.node_id(c) in self.nodes

    def written(self, c: Component) -> tuple[str, str, str]:
        """A component in JSON, ``component`` of the schema, around its columns and its marginal."""
        if c not in self._written:
            place = {name: getattr(c, name) for name in _PLACE}
            after = f',"node_id":{to_text(self.node_id(c))}' if self.is_node(c) else ""
            index = None if c.feature is None else feature_index(c.checkpoint, c.feature)
            if index is not None:
                after += f',"id":{index}'
            self._written[c] = to_text(place)[:-1], f',"label":{to_text(c.label)}', after + "}"
        return self._written[c]


class Table(NamedTuple):
    """A table as it is written.

    Attributes:
        data: JSON, ``table`` of the schema.
        features: (checkpoint, feature) of the features that it mentions.
    """

    data: bytes
    features: list[tuple[int, int]]


def written_tables(batch: Batch, names: Names, top_terms: int = TOP_TERMS) -> list[Table]:
    """The largest terms and marginals of many tables.

    Identities, as written: score = the listed terms + rest = the listed marginals of either side
    + that side's rest. ``grid`` holds every term between the first components of either list.

    Args:
        batch: of keys that are not masked.
        names: says which components are nodes.
        top_terms: how many terms to list, by absolute value.

    Raises:
        UserError: a table holds NaN or infinite numbers.
    """
    terms, wide = batch.terms, batch.terms.double()
    flat_index, n_terms = largest_terms(terms, top_terms, -(-top_terms // 5))
    width = terms.shape[2]
    index = flat_index // width, flat_index % width
    values = terms.flatten(1).gather(1, flat_index)
    position = [p.query for p in batch.places], [p.key for p in batch.places]
    sides = []
    for side, components in enumerate((batch.query, batch.key)):
        marginals = wide.sum(2 - side)
        used = torch.zeros_like(marginals, dtype=torch.bool)
        counts = torch.arange(flat_index.shape[1]) < n_terms[:, None]
        used.scatter_(1, torch.where(counts, index[side], index[side][:, :1]), True)
        sides.append(_listed(components, marginals, used & (n_terms > 0)[:, None], position[side]))
    ends = [side.rank.gather(1, at) for side, at in zip(sides, index, strict=True)]
    triples = torch.stack([*ends, values], 2).flatten(1).tolist()
    first = [side.order[:, :MARGINALS_LISTED] for side in sides]
    grid = terms.gather(1, first[0][:, :, None].expand(-1, -1, width))
    grid = grid.gather(2, first[1][:, None].expand(-1, grid.shape[1], -1))
    heads = torch.stack([batch.score, batch.score_capped, batch.pattern], 1)
    blocks = block_totals(batch.query, batch.key, wide)
    for numbers_written in (heads, blocks):
        if not bool(numbers_written.isfinite().all()):
            raise not_finite()
    values, blocks = rounded_all(values), rounded_all(blocks)
    listed = [side.by_table() for side in sides]
    tables = []
    for i, (place, head, n) in enumerate(
        zip(batch.places, rounded_all(heads), n_terms.tolist(), strict=True)
    ):
        score, capped, pattern = head
        query, key, of_query, of_key = batch.query[i], batch.key[i], listed[0][i], listed[1][i]
        features: list[tuple[int, int]] = []
        of_table = wide[i, : len(query), : len(key)]
        query_text = _side("query", query, of_query, of_table, names, score, features)
        key_text = _side("key", key, of_key, of_table.T, names, score, features)
        n_query, n_key = (min(len(order), MARGINALS_LISTED) for order, _ in (of_query, of_key))
        cells = grid[i, :n_query, :n_key].flatten().tolist()
        by_kind = blocks_by_kind(query, key, blocks[i])
        text = (
            f'{{"layer":{place.layer},"head":{place.head},"query":{place.query},'
            f'"key":{place.key},"score":{score!r},"score_capped":{capped!r},'
            f'"pattern":{pattern!r},{query_text},{key_text},'
            f'"terms":[{_terms(n) % tuple(triples[i][: 3 * n])}],'
            f'"rest":{rest(score, values[i][:n])!r},'
            f'"grid":[{_grid(n_query, n_key) % tuple(cells)}],'
            f'"blocks":{to_text({f"{a}|{b}": total for (a, b), total in by_kind.items()})}}}'
        )
        tables.append(Table(to_bytes(text), features))
    return tables


@lru_cache(maxsize=1024)
def _terms(n: int) -> str:
    return ",".join(["[%d,%d,%.7g]"] * n)


@lru_cache(maxsize=MARGINALS_LISTED**2)
def _grid(n_query: int, n_key: int) -> str:
    return ",".join([f"[{','.join(['%.7g'] * n_key)}]"] * n_query)


def written_rows(rows: Mapping[RowPlace, QKRow]) -> dict[RowPlace, bytes]:
    """Attention rows, ``row`` of the schema; masked scores are null.

    Raises:
        UserError: a row holds NaN or infinite numbers.
    """
    texts = {}
    for (layer, head, query), row in rows.items():
        first = int(torch.isinf(row.scores).sum())  # a window's keys are the last ones
        scores, pattern = row.scores[first:].tolist(), row.pattern.tolist()
        if not math.isfinite(sum(scores) + sum(pattern)):
            raise not_finite()
        text = (
            f'{{"layer":{layer},"head":{head},"query":{query},'
            f'"scores":[{"null," * first}{numbers(scores)}],"pattern":[{numbers(pattern)}]}}'
        )
        texts[layer, head, query] = to_bytes(text)
    return texts


def largest_terms(terms: Tensor, n: int, of_sign: int = 0) -> tuple[Tensor, Tensor]:
    """The ``n`` largest terms of each table by absolute value, largest first; none is 0.

    Args:
        terms: (n_tables, n_rows, n_columns)
        n: how many.
        of_sign: as many of either sign are there too.

    Returns:
        (n_tables, most) indices into each flattened table, and (n_tables,) how many of them count.
    """
    flat = terms.flatten(1)
    width = flat.shape[1]
    chosen = [largest(flat, min(n, width))[1]]
    for sign in (1, -1) if of_sign else ():
        size, at = largest((sign * flat).clamp_min(0), min(of_sign, width))
        # where this sign has no more terms: the largest of all, which is chosen already
        chosen.append(torch.where(size > 0, at, chosen[0][:, :1]))
    index = torch.cat(chosen, 1).sort().values
    size = flat.gather(1, index).abs()
    size[:, 1:][index[:, 1:] == index[:, :-1]] = 0
    order = size.argsort(dim=1, descending=True, stable=True)
    return index.gather(1, order), (size > 0).sum(1)


class _Listed(NamedTuple):
    """Which components of one side are listed.

    Attributes:
        marginals: (n_tables, n_components).
        order: (n_tables, most) the components to list, by |marginal|.
        n_listed: (n_tables,) how many of these count.
        rank: (n_tables, n_components) where each is in the list.
    """

    marginals: Tensor
    order: Tensor
    n_listed: Tensor
    rank: Tensor

    def by_table(self) -> list[tuple[list[int], list[float]]]:
        """Of each table: the components listed, and their marginals as written."""
        marginals = rounded_all(self.marginals.gather(1, self.order))
        columns = zip(self.order.tolist(), marginals, self.n_listed.tolist(), strict=True)
        return [(order[:n], values[:n]) for order, values, n in columns]


def _listed(
    components: list[Sequence[Component]], marginals: Tensor, used: Tensor, position: list[int]
) -> _Listed:
    """The components to list, by |marginal|: those used, the largest, and all but features.

    In transcoder graphs errors and tokens are nodes at every earlier position too; of those that
    were carried to this one, too, only the used and the largest are listed.
    """
    size, chosen = marginals.abs(), used.clone()
    n = torch.tensor([len(side) for side in components])
    exists = torch.arange(size.shape[1]) < n[:, None]
    most = min(MARGINALS_LISTED, size.shape[1])
    chosen.scatter_(1, size.masked_fill(~exists, -1).topk(most).indices, True)
    for i, (side, p) in enumerate(zip(components, position, strict=True)):
        others = [j for j, c in enumerate(side) if c.kind != "feature" and c.position == p]
        chosen[i, others] = True
    chosen &= exists
    order = size.masked_fill(~chosen, -1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size.shape[1]).expand_as(order))
    n_listed = chosen.sum(1)
    return _Listed(marginals, order[:, : int(n_listed.max())], n_listed, rank)


def _side(
    name: str,
    components: Sequence[Component],
    listed: tuple[list[int], list[float]],
    terms: Tensor,
    names: Names,
    score: float,
    features: list[tuple[int, int]],
) -> str:
    """One side's listed components, and the sum of the marginals left out.

    Args:
        listed: which components to list, and their marginals as written.
        terms: (n_components, n_components of the other side).
        features: gets those that are listed.
    """
    order, marginals = listed
    components = [components[i] for i in order]
    columns = column_values(components, terms[order])
    entries = []
    for i, (c, marginal) in enumerate(zip(components, marginals, strict=True)):
        before, label, after = names.written(c)
        numbers_here = "".join(f',"{key}":{_number(column[i])}' for key, column in columns.items())
        entries.append(f'{before}{numbers_here}{label},"marginal":{marginal!r}{after}')
        if c.feature is not None:
            features.append((c.checkpoint, c.feature))
    missing = rest(score, marginals)
    return f'"{name}_components":[{",".join(entries)}],"{name}_rest":{missing!r}'


def _number(value: float | None) -> str:
    return "null" if value is None else to_text(rounded(value))
