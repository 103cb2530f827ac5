"""Connections: taken, each in a thread of its own, and let go of."""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import logging
import socket
import sys
import threading
from socketserver import BaseRequestHandler, TCPServer, ThreadingMixIn
from typing import Any

from circuit_tracer_qk.frontend import addresses
from circuit_tracer_qk.frontend.routes import Site
from circuit_tracer_qk.frontend.saving import Saver
from circuit_tracer_qk.frontend.static import Zipped

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""How long stopping takes to be noticed."""

CONNECTIONS = 512
"""How many may be open; every one has a thread and a file descriptor."""


class Listener(ThreadingMixIn, TCPServer):
    """Takes connections, each in a thread of its own, and can let go of all of them.

    Not ``http.server``'s own class, which asks the network for this machine's name first.

    Attributes:
        site: what is served.
        saver: what puts into its graph files what the page saves.
        zipped: what was compressed for earlier requests.
        url: the page's address.
    """

    allow_reuse_address = addresses.REUSE_ADDRESS
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, site: Site, handler: type[BaseRequestHandler]) -> None:
        self.address_family, address = addresses.socket_address(host, port)
        self.site = site
        self.saver = Saver(site.data)
        self.zipped = Zipped()
        machine = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), machine, machine.partition(".")[0]}
        self._open: set[Any] = set()
        self._ending = threading.Lock()
        self._ended = False
        super().__init__(address, handler)
        self._port = self.server_address[1]  # the system's choice where 0 was asked for
        self.url = addresses.url(host, self._port)
        self._thread = threading.Thread(
            target=self.serve_forever,
            args=(POLL_SECONDS,),
            daemon=True,
            name="circuit-tracer-qk server",
        )

    def start(self) -> None:
        """Answer until stopped or until this process ends."""
        addresses.serving[self._port] = self.url
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Free the port and close every connection."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            atexit.unregister(self.stop)
            addresses.serving.pop(self._port, None)
            if self._thread.is_alive():  # not in the child of a fork
                self.shutdown()
            self.server_close()
            for connection in list(self._open):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._thread.join(timeout=1)

    def is_called(self, name: str) -> bool:
        """Whether a host name without port is this server's.

        A page whose own name was made to lead here (DNS rebinding) still gives its own name.
        """
        name = name.rstrip(".")
        if name in self._names or name.endswith(".localhost"):
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return True
        return False

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            with contextlib.suppress(OSError):  # so that "::" is every address, as its URL says
                self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._open) < CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.ERROR  # it went away
        log.log(level, "a connection ended early", exc_info=True)
