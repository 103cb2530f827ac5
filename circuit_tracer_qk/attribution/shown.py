"""A graph on its page: what ``graph.show()`` returns, and the door to what makes it.

Writing and serving files is the work of rooms that import this one, so a graph cannot call them.
The package's root, which every import of the package runs first, puts their function
(:func:`circuit_tracer_qk.plugin.show.show`) into :data:`opener`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

HEIGHT = 800


@dataclass(frozen=True, repr=False)
class ShownGraph:
    """A graph's page, served from this process; a notebook shows it in a frame.

    Attributes:
        url: the page's address, for browsers on this machine.
        folder: where the graph's files lie.
        stop: ends the server and removes a temporary folder; a second call does nothing.
        height: of the frame, in pixels.

    >>> ctqk.ShownGraph("http://127.0.0.1:8032/index.html?slug=graph", Path(tmp), lambda: None)
    ShownGraph(http://127.0.0.1:8032/index.html?slug=graph)
    """

    url: str
    folder: Path
    stop: Callable[[], None]
    height: int = HEIGHT

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url})"

    def _repr_html_(self) -> str:
        url = escape(self.url)
        frame = f'<iframe src="{url}" width="100%" height="{self.height}" style="border: 0">'
        return f'{frame}</iframe><a href="{url}" target="_blank">{url}</a>'


opener: Callable[..., ShownGraph] | None = None
"""Writes and serves a graph, with the arguments of :meth:`ExplainedGraph.show`."""
