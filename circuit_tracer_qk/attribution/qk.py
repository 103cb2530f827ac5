"""QK attributions: a head's score at a query and a key position, as a sum of named terms.

    T[u, u'] = q(u) . k(u') / attn_scale,   sum over all u, u' of T = score

(attribution/README.md, section 2; paper, "QK attributions"). The table is never approximated; the score is
before soft-cap and mask. Bias and error components are rows and columns like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.blocks import block_totals, blocks_by_kind
from circuit_tracer_qk.attribution.component import Component
from circuit_tracer_qk.attribution.text import row_text, summarize_table
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.precision import exactly
from circuit_tracer_qk.base.rules import check, whole
from circuit_tracer_qk.model.attention import KEY, QUERY
from circuit_tracer_qk.model.heads import Heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE_TERMS = 1 << 16  # tables of more terms are contracted in the run's own dtype

Label = Callable[[int, int], str]
"""(checkpoint, feature) -> a short label, "" where there is none."""


RowPlace = tuple[int, int, int]
"""(layer, head, query) of an attention row."""


class Place(NamedTuple):
    """Where a table stands: one head's score of one key position at one query position.

    >>> ctqk.Place(layer=1, head=2, query=14, key=6)
    Place(layer=1, head=2, query=14, key=6)
    """

    layer: int
    head: int
    query: int
    key: int


@dataclass(frozen=True, eq=False, repr=False)
class QKTable:
    """Why head ``L{layer}H{head}`` at ``query_position`` scored ``key_position`` as it did.

    Every term is a query component with a key component, in units of the score, that is after the
    division by the square root of d_head (paper, "QK attributions"). Nothing is approximated.

    Attributes:
        layer, head: the head.
        query_position, key_position: where it looked from, and where to.
        score: attention score before soft-cap and mask, from the whole residual stream.
        score_capped: after the soft-cap (equal to ``score`` where the model has none).
        masked: the key lies outside the head's window, so the score never enters the softmax.
        query, key: the components of each side, in the order of the rows and columns.
        terms: (len(query), len(key)); ``terms.sum() == score``.

    >>> table = graph.qk(layer=1, head=2, query=14, key=6)
    >>> round(table.score, 1), round(float(table.terms.sum()), 1), tuple(table.terms.shape)
    (73.3, 73.3, (9, 13))
    """

    layer: int
    head: int
    query_position: int
    key_position: int
    score: float
    score_capped: float
    masked: bool
    query: list[Component]
    key: list[Component]
    terms: Float[Tensor, "n_query n_key"]

    @property
    def query_marginal(self) -> Float[Tensor, " n_query"]:
        """Row sums: what each query component adds to the score."""
        return self.terms.sum(1)

    @property
    def key_marginal(self) -> Float[Tensor, " n_key"]:
        """Column sums: what each key component adds to the score."""
        return self.terms.sum(0)

    @cached_property
    def blocks(self) -> dict[tuple[str, str], float]:
        """{(query kind, key kind): total}: how much of the score features explain.

        All nine pairs of feature, bias and error where the checkpoint has a dictionary; the kinds
        present elsewhere. The totals sum to the score.

        >>> blocks = graph.qk(1, 2, query=14, key=6).blocks
        >>> round(blocks["feature", "feature"], 1), round(sum(blocks.values()), 1)
        (113.3, 73.3)
        """
        totals = block_totals([self.query], [self.key], self.terms.cpu()[None])
        return blocks_by_kind(self.query, self.key, totals[0].tolist())

    def top(self, n: int) -> list[tuple[Component, Component, float]]:
        """The ``n`` terms largest by absolute value, largest first.

        Returns:
            (query component, key component, signed value) of each.

        Raises:
            UserError: ``n`` is below one.

        >>> [(query, key, value)] = graph.qk(1, 2, query=14, key=6).top(1)
        >>> query.label, query.feature, key.feature, round(value, 1)
        ('a title', 129, 61, 22.5)
        """
        check(n=n)
        flat = self.terms.flatten()
        at = flat.abs().topk(min(n, len(flat))).indices
        values = flat[at].tolist()
        width = self.terms.shape[1]
        return [
            (self.query[i // width], self.key[i % width], value)
            for i, value in zip(at.tolist(), values, strict=True)
        ]

    def plot(
        self, row: QKRow | None = None, tokens: Sequence[str] | None = None, n: int = 8
    ) -> Figure:
        """The marginals of both sides and a heatmap of the leading terms, as a figure.

        ``graph.plot(layer, head, query, key)`` adds the attention row and the tokens.

        Args:
            row: the attention row of the same head and query, of ``graph.qk_row``.
            tokens: the prompt's tokens, ``graph.token_strings``.
            n: how many components of either side are named; the others are drawn as one sum.

        Returns:
            A matplotlib figure, closed for pyplot: a notebook shows it, ``savefig`` writes it.

        Raises:
            UserError: matplotlib is not installed, ``n`` is below one, the table has no terms, or
                the row or the tokens are not the table's.

        >>> graph.qk(1, 2, 14, 6).plot().savefig(f"{tmp}/table.png")
        """
        from circuit_tracer_qk.attribution.plot import plot_table

        return plot_table(self, row, tokens, n)

    def __repr__(self) -> str:
        return summarize_table(self).text()

    def _repr_html_(self) -> str:
        return summarize_table(self).html()


class QKRow(NamedTuple):
    """One head's attention from one query over keys ``0..query`` (of ``graph.qk_row``).

    Attributes:
        scores: (query + 1,) after the soft-cap; -inf where masked. ``softmax(scores) == pattern``.
        pattern: (query + 1,) the model's own attention pattern; 0 where masked.
        scores_raw: (query + 1,) before soft-cap and mask.

    >>> row = graph.qk_row(layer=1, head=2, query=14)
    >>> len(row.pattern), int(row.pattern.argmax()), round(float(row.scores[6]), 1)
    (15, 6, 73.3)
    """

    scores: Float[Tensor, " n_keys"]
    pattern: Float[Tensor, " n_keys"]
    scores_raw: Float[Tensor, " n_keys"]

    def __repr__(self) -> str:
        return row_text(self)


class Scores(ABC):
    """Scores of one run and their tables, for any head and any pair of positions.

    ``graph.scores`` and :func:`circuit_tracer_qk.explain` give one. What a position's components
    are, and their images, is a subclass's.

    Args:
        heads: the model's heads on that run.

    >>> graph.scores.table(1, 2, 14, 6).score == graph.qk(1, 2, 14, 6).score
    True
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        # float32 products that cancel are off by more than 1e-5 of a score made of a few terms, so
        # scores and single tables are contracted in float64 where the device has it
        residual = heads.run.residual
        self.wide = residual.dtype if residual.device.type == "mps" else torch.float64
        # whole q and k of a layer serve every pair of its positions
        self._whole = lru_cache(maxsize=8)(partial(heads.whole, dtype=self.wide))
        self._exact = lru_cache(maxsize=256)(self._image)
        self._listed = lru_cache(maxsize=1024)(self._list)

    def check(self, layer: int, head: int, query: int, key: int = 0) -> Place:
        """Indices as plain numbers; refuses those that do not exist.

        Raises:
            UserError: layer, head or position out of range, or key > query.
        """
        n_pos, blocks = self.heads.run.n_pos, self.heads.blocks
        numbers: list[int] = []
        for name, value, limit in (
            ("layer", layer, len(blocks)),
            ("head", head, blocks[0].n_heads),
            ("query position", query, n_pos),
            ("key position", key, n_pos),
        ):
            number = whole(value)
            if number is None or not 0 <= number < limit:
                raise UserError(
                    f"{name} {value!r:.60} is out of range: it must be a whole number from 0 to "
                    f"{limit - 1}."
                )
            numbers.append(number)
        place = Place(*numbers)
        if place.key > place.query:
            raise UserError(
                f"key position {key} is after query position {query}: attention is causal, "
                "so the key must be at or before the query."
            )
        return place

    @fitting("this table", "make the graph of a shorter prompt, or with sparser dictionaries")
    @exactly
    def table(self, layer: int, head: int, query: int, key: int) -> QKTable:
        """The exact table of one head at one query and key position.

        Raises:
            UserError: an index out of range, or key > query.
        """
        layer, head, query, key = self.check(layer, head, query, key)
        block = self.heads.block(layer)
        q = self._exact(layer, head, query, side=QUERY)
        k = self._exact(layer, block.group(head), key, side=KEY)
        return self._made(layer, head, query, key, q, k)

    def tables(self, places: Iterable[Place]) -> Iterator[QKTable]:
        """Tables of many (layer, head, query, key), by layer, query and key.

        Raises:
            UserError: an index out of range, or key > query.
        """
        for place in sorted(set(places), key=lambda p: (p[0], p[2], p[3], p[1])):
            yield self.table(*place)

    def _made(
        self,
        layer: int,
        head: int,
        query: int,
        key: int,
        q: Float[Tensor, "n_query d_head"],
        k: Float[Tensor, "n_key d_head"],
    ) -> QKTable:
        """The table of the images of either side."""
        block = self.heads.block(layer)
        device = self.heads.run.residual.device
        score = self._scores(layer, head, query, torch.tensor([key], device=device))
        if len(q) * len(k) > WIDE_TERMS:  # so many do not cancel to nothing
            q, k = (image.to(self.heads.run.residual.dtype) for image in (q, k))
        terms = (q / block.attn_scale) @ k.T
        return QKTable(
            layer=layer,
            head=head,
            query_position=query,
            key_position=key,
            score=float(score),
            score_capped=float(block.cap(score)),
            masked=key < block.first_key(query),
            query=self.components(layer, query, side=QUERY),
            key=self.components(layer, key, side=KEY),
            terms=terms.to(self.heads.run.residual.dtype),
        )

    @exactly
    def row(self, layer: int, head: int, query: int) -> QKRow:
        """Scores and pattern of one head's query over its keys.

        Raises:
            UserError: an index out of range.
        """
        layer, head, query, _ = self.check(layer, head, query)
        whole = self._whole(layer, QUERY), self._whole(layer, KEY)
        return self.rows(layer, [(head, query)], *whole)[layer, head, query]

    def rows(
        self,
        layer: int,
        wanted: Iterable[tuple[int, int]],
        q: Float[Tensor, "n_pos n_heads d_head"],
        k: Float[Tensor, "n_pos n_kv d_head"],
        device: torch.device | None = None,
    ) -> dict[RowPlace, QKRow]:
        """Attention rows by (layer, head, query), all of a head together.

        Args:
            layer: the block.
            wanted: (head, query) of each.
            q, k: of the whole residual stream, at least for the heads and positions wanted.
            device: where the rows go; where the run lies if left out.
        """
        block, pattern = self.heads.block(layer), self.heads.run.pattern[layer]
        pattern = pattern.to(device or pattern.device)
        rows = {}
        for head, of_head in groupby(sorted(wanted), key=itemgetter(0)):
            queries = [query for _, query in of_head]
            raw = q[queries, head] @ k[:, block.group(head)].T / block.attn_scale
            capped, raw = (scores.to(pattern) for scores in (block.cap(raw), raw))
            capped = capped.clone()
            for i, query in enumerate(queries):
                capped[i, : block.first_key(query)] = -torch.inf
                seen = slice(query + 1)
                row = QKRow(capped[i, seen], pattern[head, query, seen], raw[i, seen])
                rows[layer, head, query] = row
        return rows

    def components(self, layer: int, position: int, side: int) -> list[Component]:
        """The components of checkpoint ``layer`` at a position, the map's constant last."""
        return list(self._listed(layer, position, side))

    @abstractmethod
    def _list(self, layer: int, position: int, side: int) -> list[Component]:
        """The components of one position, in the order of their images."""

    @abstractmethod
    def _image(
        self, layer: int, head: int, position: int, side: int
    ) -> Float[Tensor, "n_components d_head"]:
        """Projected components of one position, as wide as can be."""

    def _scores(
        self, layer: int, head: int, query: int, keys: Int[Tensor, " n_keys"]
    ) -> Float[Tensor, " n_keys"]:
        block = self.heads.block(layer)
        q, k = self._whole(layer, QUERY), self._whole(layer, KEY)
        return k[keys.to(k.device), block.group(head)] @ q[query, head] / block.attn_scale

    def _with_constant(
        self, images: Float[Tensor, "n d_head"], layer: int, head: int, position: int, side: int
    ) -> Float[Tensor, "n_components d_head"]:
        """Images of one position, and of the map's constant where it has one."""
        if not self.heads.has_constants(layer):
            return images
        at = torch.tensor([position], device=images.device)
        return torch.cat([images, self.heads.constants(layer, at, head, side, images.dtype)])

    def _constant_component(self, layer: int, position: int, side: int) -> list[Component]:
        """What names the row of that constant."""
        if not self.heads.has_constants(layer):
            return []
        label = ("b_Q + b_ln W_Q", "b_K + b_ln W_K")[side]
        return [Component("bias", layer, None, position, None, label)]
