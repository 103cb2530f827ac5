"""The page that shows graph files, served by circuit-tracer's own server."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from circuit_tracer_qk import host_cli
from circuit_tracer_qk.errors import UserError

DEFAULT_PORT = 8032
LAST_PORT = 65535


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: the page's address, without a slash at the end.
        stop: ends it and frees its port; a second call does nothing.
    """

    url: str
    stop: Callable[[], None]


def serve(data_dir: str | Path, port: int = DEFAULT_PORT) -> Server:
    """Serve the graph files of a folder, in a thread of this process.

    Args:
        data_dir: where :func:`circuit_tracer_qk.create_graph_files` wrote.
        port: a free port.

    Raises:
        UserError: the folder does not exist, or the port cannot be had.
    """
    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(
            f"the graph folder {data_dir} does not exist; write graph files there first."
        )
    check_port(port)
    try:
        stock = host_cli.serve(data_dir=str(folder), port=port)
    except OSError as error:  # taken since
        raise _refused(port, error) from error
    return Server(f"http://127.0.0.1:{port}", stock.stop)


def check_port(port: int) -> None:
    """Refuse a port that a server could not have.

    Raises:
        UserError: out of range, taken or not allowed.
    """
    if not 1 <= port <= LAST_PORT:
        raise UserError(f"port {port} is out of range: give one from 1 to {LAST_PORT}.")
    try:
        _bind(port)
    except OSError as error:
        raise _refused(port, error) from error


def next_free_port(start: int) -> int:
    """The first free port from ``start`` on.

    Raises:
        UserError: ``start`` is out of range, or no port from it on is free.
    """
    for port in range(start, LAST_PORT + 1):
        try:
            check_port(port)
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
        else:
            return port
    raise UserError(f"no port from {start} to {LAST_PORT} is free: give a lower --port.")


def _bind(port: int) -> None:
    """Take and leave the port as circuit-tracer's server takes it."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port))


def _refused(port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} is in use: give another one with --port (or port=).")
    return UserError(f"port {port} cannot be used ({error.strerror}): give another one.")
