"""QK tables of graphs in memory, computed when the page asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

from circuit_tracer_qk.dictionaries import indexed_feature
from circuit_tracer_qk.feature_files import folder_name, stored_examples, without_examples
from circuit_tracer_qk.graph import ExplainedGraph
from circuit_tracer_qk.tables import Names, row_document, table_document
from circuit_tracer_qk.written import encode


class LiveGraphs:
    """Graphs that answer for any head and any pair of positions; safe to ask from many threads.

    Args:
        graphs: by the slug that their file has.
    """

    def __init__(self, graphs: Mapping[str, ExplainedGraph]) -> None:
        self._graphs = dict(graphs)
        self._examples = {
            folder_name(graph): stored_examples(graph)
            for graph in self._graphs.values()
            if graph.kind == "residual"  # transcoders' examples lie where their scan says
        }
        self._lock = Lock()  # a graph keeps what it projected, and archives have one position

    @property
    def slugs(self) -> tuple[str, ...]:
        """The graphs that can be asked."""
        return tuple(self._graphs)

    def table(self, slug: str, layer: int, head: int, query: int, key: int) -> bytes:
        """A table and its attention row, in the form they have in graph files.

        Returns:
            JSON {"table", "row"}; the table is null where the key is masked.

        Raises:
            UserError: an index out of range, or key > query.
        """
        graph = self._graphs[slug]
        with self._lock:
            table, row = graph.qk(layer, head, query, key), graph.qk_row(layer, head, query)
        document = None
        if not table.masked:
            names = Names(graph.input_tokens.tolist())
            document = table_document(table, float(row.pattern[key]), names)
        return encode({"table": document, "row": row_document(layer, head, query, row)})

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
