"""QK tables of graphs in memory, and steered runs of their models, when the page asks for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from circuit_tracer_qk.attribution.batches import Batch
from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.json_text import Encoded, encode
from circuit_tracer_qk.dictionaries.features import indexed_feature
from circuit_tracer_qk.graph_files.feature_files import (
    folder_name,
    stored_examples,
    without_examples,
)
from circuit_tracer_qk.graph_files.tables import Names, written_rows, written_tables
from circuit_tracer_qk.host import graph as host

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.residual.model import ResidualModel
    from circuit_tracer_qk.frontend.steer_requests import SteerRequest
    from circuit_tracer_qk.steering.results import SteeredRun
    from circuit_tracer_qk.steering.steer import Session

LEADING = 3
"""Of the clean and of the steered predictions, how many tokens are compared."""

KEPT_ANSWERS = 32


class LiveGraphs:
    """Graphs that answer for any head and any pair of positions; safe to ask from many threads.

    Args:
        graphs: by the slug that their file has. The page is answered only where its file is of
            the same graph.
        models: by slug, the model that a residual graph was made with; with it the page can steer.

    Raises:
        UserError: a model of no graph, or of a graph that it did not make.

    >>> live = ctqk.LiveGraphs({"aunt": graph}, {"aunt": model})
    >>> live.slugs, live.steerable
    (('aunt',), ('aunt',))
    """

    def __init__(
        self,
        graphs: Mapping[str, ExplainedGraph],
        models: Mapping[str, ResidualModel] | None = None,
    ) -> None:
        self._graphs, self._models = dict(graphs), dict(models or {})
        for slug, model in self._models.items():
            _check_model(slug, self._graphs.get(slug), model)
        self._examples = {
            folder_name(graph): stored_examples(graph)
            for graph in self._graphs.values()
            if graph.writes_examples
        }
        self._lock = Lock()  # a graph keeps what it projected, and archives have one position
        self._steering = Lock()  # tables need not wait for runs
        self._sessions: dict[str, Session] = {}
        self._steered: OrderedDict[tuple[str, SteerRequest], bytes] = OrderedDict()

    @property
    def slugs(self) -> tuple[str, ...]:
        """The graphs that can be asked."""
        return tuple(self._graphs)

    @property
    def digests(self) -> dict[str, str]:
        """slug -> which graph it is, as its file says in ``metadata.info.digest``."""
        return self._digests

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {slug: host.graph_digest(graph) for slug, graph in self._graphs.items()}

    @property
    def steerable(self) -> tuple[str, ...]:
        """The graphs whose model is in memory."""
        return tuple(self._models)

    def table(self, slug: str, layer: int, head: int, query: int, key: int) -> bytes:
        """A table and its attention row, in the form they have in graph files.

        Returns:
            JSON {"digest", "table", "row"}: of which graph; the table is null where the key is
            masked.

        Raises:
            UserError: an index out of range, or key > query.
        """
        graph = self._graphs[slug]
        with self._lock:
            table, row = graph.qk(layer, head, query, key), graph.qk_row(layer, head, query)
        document = None
        if not table.masked:
            names = Names(graph.input_tokens.tolist())
            [written] = written_tables(Batch.of(table, row), names)
            document = Encoded(written.data)
        [written_row] = written_rows({(layer, head, query): row}).values()
        return encode(
            {"digest": self.digests[slug], "table": document, "row": Encoded(written_row)}
        )

    def steer(
        self, slug: str, request: SteerRequest, before_run: Callable[[], object] | None = None
    ) -> bytes:
        """The graph's prompt with an edit, its clean run and matched controls.

        Args:
            slug, request: which graph, and what is asked.
            before_run: called before the clean run, the edit's and each control's; what it raises
                ends the work.

        Returns:
            JSON, :func:`~circuit_tracer_qk.steering.to_json.run_document` of the leading tokens,
            clean ones first; its attention rows have ``scores_before`` and ``scores_after`` too.

        Raises:
            UserError: no model is in memory, or it cannot be steered so.
        """
        graph = self._graphs[slug]
        if graph.kind != "residual":
            raise UserError(
                f"{slug} is a graph of transcoders, and steering is for residual graphs: make one "
                "with `circuit-tracer-qk attribute -d DICTIONARIES ... --server`."
            )
        if slug not in self._models:
            raise UserError(
                f"no model is in memory for the graph {slug}: start with `circuit-tracer-qk "
                "attribute ... --server` or `circuit-tracer-qk demo`."
            )
        n_pos = len(graph.input_tokens)
        query = n_pos - 1 if request.query is None else request.query
        if query >= n_pos:
            raise UserError(
                f"query {query} is out of range: the prompt has positions 0 to {n_pos - 1}."
            )
        with self._steering:
            if (slug, request) in self._steered:
                self._steered.move_to_end((slug, request))
                return self._steered[slug, request]
            run = self._session(slug).steer(
                request.edit, before_run=before_run, **asdict(request.options)
            )
            document = {"digest": self.digests[slug]} | _document(run, query)
            answer = encode(document, "the steered run")
            self._steered[slug, request] = answer
            while len(self._steered) > KEPT_ANSWERS:
                self._steered.popitem(last=False)
            return answer

    def _session(self, slug: str) -> Session:
        """The prompt as its model reads it, once."""
        from circuit_tracer_qk.steering.steer import Session

        if slug not in self._sessions:
            self._sessions[slug] = Session(self._models[slug], self._graphs[slug].input_tokens)
        return self._sessions[slug]

    def examples(self, scan: str, index: int) -> bytes | None:
        """A feature's examples, or an empty form where none are stored; None in other scans.

        Args:
            scan: the name of the features' folder.
            index: the feature's Cantor index.
        """
        if scan not in self._examples:
            return None
        examples, (checkpoint, feature) = self._examples[scan], indexed_feature(index)
        with self._lock:
            stored = examples and examples.read(checkpoint, feature)
        return stored or encode(without_examples(feature, scan))


def _check_model(slug: str, graph: ExplainedGraph | None, model: ResidualModel) -> None:
    if graph is None:
        raise UserError(f"there is a model for {slug}, but no graph of that name: give both.")
    if graph.kind != "residual":
        raise UserError(
            f"{slug} is a graph of transcoders, and steering is for residual graphs: leave its "
            "model out."
        )
    scan = host.graph_scan(graph)
    if scan != model.scan:
        raise UserError(
            f"the graph {slug} was made with the dictionaries {scan}, and its model has "
            f"{model.scan}: give the model that made it."
        )


def _document(run: SteeredRun, query: int) -> dict[str, Any]:
    from circuit_tracer_qk.attribution.head import parse_head
    from circuit_tracer_qk.steering.to_json import run_document

    leading = [i for r in (run.clean, run) for _, i, _ in r.top(LEADING)]
    document = run_document(run, list(dict.fromkeys(leading)), [query])
    for row in document["attention"]:
        head = parse_head(row["head"])
        for name, source in (("scores_before", run.clean), ("scores_after", run)):
            row[name] = source.scores[head][query, : query + 1].tolist()
    return document
