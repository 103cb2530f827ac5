"""The page that shows graph files, served to browsers on this machine.

Files are read from three folders: the data folder, circuit-tracer's page and our panel
(:mod:`~circuit_tracer_qk.frontend.routes`); one kind of request writes, saving what the page shows of a
graph into its file (:mod:`~circuit_tracer_qk.frontend.saving`). Who may ask is decided in
:mod:`~circuit_tracer_qk.frontend.handler`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.rules import check
from circuit_tracer_qk.frontend.addresses import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    LAST_PORT,
    check_port,
    is_public,
    next_free_port,
    refused,
)
from circuit_tracer_qk.frontend.handler import Handler
from circuit_tracer_qk.frontend.listener import Listener
from circuit_tracer_qk.frontend.page import panel_folder, read_page
from circuit_tracer_qk.frontend.routes import Live, Site
from circuit_tracer_qk.frontend.static import (
    ASSET_KINDS,
    DATA_KINDS,
    FEATURE_KINDS,
    PANEL_KINDS,
    Folder,
)
from circuit_tracer_qk.host import cli as host_cli


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: the page's address, without a slash at the end.
        stop: ends it and frees its port; a second call does nothing.
    """

    url: str
    stop: Callable[[], None]


def serve(
    data_dir: str | Path,
    port: int = DEFAULT_PORT,
    *,
    host: str = DEFAULT_HOST,
    online: bool = False,
    live: Live | None = None,
    features_dir: str | Path | None = None,
) -> Server:
    """Serve the graph files of a folder, in threads of this process, until it ends.

    Args:
        data_dir: where :func:`circuit_tracer_qk.create_graph_files` wrote.
        port: a free port; 0 takes any, which ``url`` of the server says.
        host: the address to listen on. Everyone who reaches it can read and save the graphs.
        online: let the page ask circuit-tracer's own hosts for feature examples.
        live: graphs that answer for any head and any pair of positions, where the file that the
            page shows is of the same graph.
        features_dir: where examples of local transcoders lie, as circuit-tracer's newer server
            takes them.

    Raises:
        UserError: the folder does not exist, the address cannot be had, or the installed
            circuit-tracer's page is not one that this release knows.

    >>> page = ctqk.create_graph_files(graph, "aunt", tmp)
    >>> server = ctqk.serve(tmp, port=8765)  # doctest: +SKIP
    >>> server.url  # doctest: +SKIP
    'http://127.0.0.1:8765'
    >>> server.stop()  # doctest: +SKIP
    """
    check(data_dir=data_dir, features_dir=features_dir, online=online)
    folder = Path(os.path.realpath(Path(data_dir).expanduser()))
    if not os.path.isdir(folder):
        raise UserError(
            f"the graph folder {data_dir} does not exist; write graph files there first."
        )
    features = (
        None if features_dir is None else Path(os.path.realpath(Path(features_dir).expanduser()))
    )
    if features is not None and not os.path.isdir(features):
        raise UserError(f"the folder of features {features_dir} does not exist: give another one.")
    check_port(port, host)
    assets = host_cli.assets()
    site = Site(
        data=Folder(folder, DATA_KINDS, links=False),
        assets=Folder(assets, ASSET_KINDS),
        panel=Folder(panel_folder(), PANEL_KINDS),
        features=None if features is None else Folder(features, FEATURE_KINDS, links=False),
        page=read_page(assets, online=online),
        online=online,
        live=live,
    )
    try:
        listener = Listener(host, port, site, Handler)
    except OSError as error:  # taken since
        raise refused(host, port, error) from error
    listener.start()
    return Server(listener.url, listener.stop)


__all__ = [
    "DEFAULT_HOST",
    "DEFAULT_PORT",
    "LAST_PORT",
    "Live",
    "Server",
    "check_port",
    "is_public",
    "next_free_port",
    "serve",
]
