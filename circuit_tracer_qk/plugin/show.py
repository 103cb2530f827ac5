"""``graph.show()``: a graph's files, written and served from this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.attribution.shown import HEIGHT, ShownGraph
from circuit_tracer_qk.frontend.server import DEFAULT_PORT, next_free_port, serve
from circuit_tracer_qk.graph_files.create import create_graph_files
from circuit_tracer_qk.plugin.live import LiveGraphs

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.residual.model import ResidualModel

Place = tuple[int, Path | None, str, int]

_served: dict[Place, ShownGraph] = {}
"""What runs, by graph, folder, slug and model. Servers keep theirs alive, so no id is used twice."""


def show(
    graph: ExplainedGraph,
    data_dir: str | Path | None = None,
    slug: str = "graph",
    *,
    model: ResidualModel | None = None,
    height: int = HEIGHT,
) -> ShownGraph:
    """As :meth:`ExplainedGraph.show`."""
    folder = None if data_dir is None else Path(data_dir).expanduser().resolve()
    place = id(graph), folder, slug, id(model)
    if place not in _served:
        _served[place] = _opened(graph, folder, slug, model, lambda: _served.pop(place))
    page = replace(_served[place], height=height)
    if not _in_notebook():
        print(page.url)
    return page


def _opened(
    graph: ExplainedGraph,
    folder: Path | None,
    slug: str,
    model: ResidualModel | None,
    forget: Callable[[], object],
) -> ShownGraph:
    live = LiveGraphs({slug: graph}, {} if model is None else {slug: model})
    with ExitStack() as ending:
        if folder is None:
            folder = Path(ending.enter_context(TemporaryDirectory(prefix="circuit-tracer-qk-")))
        create_graph_files(graph, slug, folder)
        server = serve(folder, next_free_port(DEFAULT_PORT), live=live)
        ending.callback(server.stop)
        ending.callback(forget)
        url = f"{server.url}/index.html?slug={slug}"
        return ShownGraph(url, folder, ending.pop_all().close)


def _in_notebook() -> bool:
    """Whether values are shown as HTML: a terminal's IPython has no kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
