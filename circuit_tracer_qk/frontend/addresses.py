"""Hosts and ports: which ones a server can have, and what it is called by browsers."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from typing import Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.rules import check

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8032
LAST_PORT = 65535

REUSE_ADDRESS = os.name == "posix"
"""Take a port whose last connections have only just ended; elsewhere it would share one in use."""


serving: dict[int, str] = {}
"""Servers of this process: port -> address of the page."""


def check_port(port: int, host: str = DEFAULT_HOST) -> None:
    """Refuse an address that a server could not have; port 0 stands for any that is free.

    Raises:
        UserError: the port is out of range, taken or not allowed, or the host is not this
            machine's.
    """
    check(port=port, host=host)
    try:
        _bind(port, host)
    except OSError as error:
        raise refused(host, port, error) from error


def next_free_port(start: int, host: str = DEFAULT_HOST) -> int:
    """The first free port from ``start`` on; 0, which stands for any free one, stays 0.

    Raises:
        UserError: ``start`` is out of range, no port from it on is free, or the host is not this
            machine's.
    """
    for port in range(start, LAST_PORT + 1):
        try:
            check_port(port, host)
        except UserError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or _is_foreign(cause):
                raise
        else:
            return port
    raise UserError(f"no port from {start} to {LAST_PORT} is free: give a lower --port.")


def is_public(host: str) -> bool:
    """Whether other machines may reach a server on this address."""
    try:
        _, address = socket_address(host, DEFAULT_PORT)
    except OSError:
        return True
    return not ipaddress.ip_address(address[0]).is_loopback


def url(host: str, port: int) -> str:
    """Where a browser on this machine finds the page."""
    name = host.strip("[]")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name)
        if address.is_unspecified:
            name = DEFAULT_HOST
        elif address.version == 6:
            name = f"[{name}]"
    return f"http://{name}:{port}"


def socket_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """The socket family and address of a host name or literal.

    Raises:
        OSError: it has none.
    """
    try:
        resolved = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except ValueError as error:  # it cannot even be written as a host name
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    family, _, _, _, address = resolved[0]
    return family, address


def refused(host: str, port: int, error: OSError) -> UserError:
    """What to tell whoever asked for an address that the system did not give."""
    if _is_foreign(error):
        return UserError(
            f"the host {host!r} is no address of this machine: give --host (or host=) one, or "
            f"leave it out for {DEFAULT_HOST}."
        )
    if error.errno == errno.EADDRINUSE and port in serving:
        return UserError(
            f"port {port} is in use: this process serves at {serving[port]} already; go on with "
            "the object that serve() returned then, or call its .stop(), or give another port (0 "
            "for any free one)."
        )
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} is in use: give another one with --port (or port=).")
    return UserError(f"port {port} cannot be used ({error.strerror}): give another one.")


def _bind(port: int, host: str) -> None:
    """Take and leave an address as the server takes it."""
    family, address = socket_address(host, port)
    with socket.socket(family) as listener:
        if REUSE_ADDRESS:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)


def _is_foreign(error: OSError) -> bool:
    """Whether an address cannot be had on any port."""
    unavailable = errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT
    return isinstance(error, socket.gaierror) or error.errno in unavailable
