"""A ``circuit_tracer.Graph`` whose scores can be taken apart, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuit_tracer_qk.attribution import shown
from circuit_tracer_qk.attribution.batches import Batch
from circuit_tracer_qk.attribution.links import Kept, Links
from circuit_tracer_qk.attribution.qk import Place, QKRow, QKTable, Scores
from circuit_tracer_qk.attribution.text import summarize_graph
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.selection import CIRCUIT_TRACER
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.run import FrozenRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ExplainedGraph(host.Graph, ABC):
    """A ``circuit_tracer.Graph`` whose scores can be taken apart: what every kind of graph gives.

    Nodes, their order and the adjacency matrix (rows are targets) are circuit-tracer's: its
    ``prune_graph``, ``compute_graph_scores`` and ``to_pt`` work on it.

    Attributes:
        kind: its name in graph files, "residual" or "transcoder".
        writes_examples: examples of its features are written beside its file; circuit-tracer's page
            finds those of other kinds by the graph's scan.
        token_strings: the prompt's tokens as text.
        first_error_layer: the layer, as nodes have it, that the first error slot stands for.
        dictionary_folder: of dictionaries whose examples are written; None if there is none.
        neuronpedia: checkpoint -> Neuronpedia's id of its dictionary, such as "gpt2-small/3-res-jb".
        feature_hook: "resid_pre" where each dictionary was trained at the input of the block after
            its layer.
        select: the rule by which its nodes were chosen, and are for its file: "circuit-tracer" or
            "explained".

    >>> graph.kind, graph.n_pos, graph.n_features, graph.token_strings[6]
    ('residual', 15, 680, ' Sally')
    """

    kind: str
    writes_examples: bool
    token_strings: list[str]
    first_error_layer: int = 0
    dictionary_folder: str | None = None
    neuronpedia: Mapping[int, str] = MappingProxyType({})
    feature_hook: str | None = None
    select: str = CIRCUIT_TRACER

    @property
    @abstractmethod
    def scores(self) -> Scores:
        """Scores of the graph's run."""

    @abstractmethod
    def label(self, checkpoint: int, feature: int) -> str:
        """A feature's label, "" without one."""

    @abstractmethod
    def batches(self, places: Iterable[Place]) -> Iterator[Batch]:
        """The tables of many places, side by side, by layer and query.

        Raises:
            UserError: an index out of range, or key > query.
        """

    @abstractmethod
    def links(self, kept: Kept) -> Links:
        """The links that pruning left, with what carried them, and the tables that they want.

        Raises:
            UserError: a link holds NaN or infinite numbers.
        """

    @property
    def run(self) -> FrozenRun:
        """The frozen run of the prompt."""
        return self.scores.heads.run

    @property
    def n_features(self) -> int:
        """How many feature nodes the graph has."""
        return len(self.selected_features)

    def first_indices(self) -> tuple[int, int, int, int]:
        """The first node that is an error, a token, a logit, and no node at all."""
        tokens = self.n_features + self.n_pos * self.run.n_layers
        logits = tokens + self.n_pos
        return self.n_features, tokens, logits, logits + len(self.logit_targets)

    def source_nodes(self, nodes: Sequence[int] | Tensor) -> Tensor:
        """(n,) node indices on the run's device.

        Raises:
            UserError: one of them is no source.
        """
        node = node_indices(nodes, "sources").to(self.run.residual.device)
        features, _, logits, _ = self.first_indices()
        for bad in node[(node < 0) | (node >= logits)].tolist():
            raise UserError(
                f"node {bad} is no source: sources are features (0 to {features - 1}), errors and "
                f"tokens (up to {logits - 1})."
            )
        return node

    def target_nodes(self, nodes: Sequence[int] | Tensor) -> Tensor:
        """(n,) node indices on the run's device.

        Raises:
            UserError: one of them is no target.
        """
        node = node_indices(nodes, "targets").to(self.run.residual.device)
        features, _, logits, end = self.first_indices()
        allowed = ((node >= 0) & (node < features)) | ((node >= logits) & (node < end))
        for bad in node[~allowed].tolist():
            raise UserError(
                f"node {bad} is no target: targets are features (0 to {features - 1}) and logits "
                f"({logits} to {end - 1})."
            )
        return node

    @property
    def positions(self) -> Tensor:
        """(n_nodes,) token position of every node, in adjacency order."""
        features = self.active_features[self.selected_features, 1]
        everywhere = torch.arange(self.n_pos, device=features.device)
        logits = features.new_full((len(self.logit_targets),), self.n_pos - 1)
        return torch.cat([features, everywhere.repeat(self.run.n_layers + 1), logits])

    def qk(self, layer: int, head: int, query: int, key: int) -> QKTable:
        """QK attributions of any head at any pair of positions, in the graph or not.

        The head's score as a sum over pairs of components (paper, "QK attributions";
        attribution/README.md, section 2).

        Args:
            layer, head: the head; in models with grouped keys the query head.
            query, key: token positions, key at or before query.

        Returns:
            Score and terms in units of the attention score, before soft-cap and mask.

        Raises:
            UserError: an index out of range, or key > query.

        >>> print(graph.qk(1, 2, query=14, key=6))  # doctest: +ELLIPSIS
        QKTable L1H2, query 14, key 6: score 73.33
          term    query ...
        """
        return self.scores.table(layer, head, query, key)

    def qk_row(self, layer: int, head: int, query: int) -> QKRow:
        """Scores and pattern of one head's query over keys ``0..query``.

        Raises:
            UserError: an index out of range.

        >>> round(float(graph.qk_row(1, 2, query=14).pattern[6]), 3)
        1.0
        """
        return self.scores.row(layer, head, query)

    def plot(self, layer: int, head: int, query: int, key: int, n: int = 8) -> Figure:
        """Why a head looked from one position to another, as one figure.

        The attention row on top; below it the marginals of both sides and a heatmap of the
        leading terms (:meth:`QKTable.plot`).

        Args:
            layer, head, query, key: as in :meth:`qk`.
            n: how many components of either side are named; the others are drawn as one sum.

        Raises:
            UserError: as :meth:`qk`, or matplotlib is not installed.

        >>> graph.plot(1, 2, query=14, key=6).savefig(f"{tmp}/L1H2.pdf")
        """
        row = self.qk_row(layer, head, query)
        return self.qk(layer, head, query, key).plot(row, self.token_strings, n)

    def show(
        self,
        data_dir: str | Path | None = None,
        slug: str = "graph",
        *,
        model: Any = None,
        height: int = shown.HEIGHT,
    ) -> shown.ShownGraph:
        """The graph's page, served from this process until it ends or the page is stopped.

        A notebook shows the page in a frame; elsewhere its address is printed. The browser must
        run on this machine, or reach the port by a tunnel. While the page is served it answers
        for any head and any pair of positions, and the graph stays in memory.

        Args:
            data_dir: where the graph's files are written; a temporary folder if left out.
            slug: names the graph's file.
            model: what made a residual graph; with it the page can steer.
            height: of the frame, in pixels.

        Returns:
            The page, with ``url`` and ``stop()``. A second call with the same folder, slug and
            model gives the page that runs.

        Raises:
            UserError: the folder or slug cannot be used, or the model did not make the graph.

        >>> page = graph.show()  # doctest: +ELLIPSIS
        http://127.0.0.1:.../index.html?slug=graph
        >>> page.stop()
        """
        if shown.opener is None:
            raise UserError("graphs are shown by the whole package: import circuit_tracer_qk.")
        return shown.opener(self, data_dir, slug, model=model, height=height)

    def __repr__(self) -> str:
        return summarize_graph(self).text()

    def _repr_html_(self) -> str:
        return summarize_graph(self).html()


def node_indices(nodes: Any, called: str) -> Tensor:
    """(n,) node indices.

    Raises:
        UserError: they are not a list of whole numbers.
    """
    try:
        indices = torch.as_tensor(nodes)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        indices = torch.empty(())
    whole = indices.dtype != torch.bool and not indices.is_floating_point()
    if indices.ndim != 1 or (len(indices) and (not whole or indices.is_complex())):
        raise UserError(
            f"{nodes!r:.60} are no {called}: give a list of node indices, whole numbers."
        )
    return indices.long()
