"""One connection: who asks, what for, and sending the answer.

Any web page that the user has open can send requests here, so a request counts only if it names
this machine and comes from the page itself.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from circuit_tracer_qk.frontend.answers import Answer, Refusal, json_answer, not_found
from circuit_tracer_qk.frontend.listener import Listener
from circuit_tracer_qk.frontend.routes import split_target
from circuit_tracer_qk.frontend.saving import BODY_BYTES
from circuit_tracer_qk.frontend.static import negotiated, part_of

log = logging.getLogger(__name__)

IDLE_SECONDS = 30
"""How long a connection may wait for its next bytes, in either direction."""

CHUNK_BYTES = 1 << 16

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]*)?")


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: Listener
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # so that answers to damaged requests have a status too
    server_version, sys_version = "circuit-tracer-qk", ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    _unread = True  # a body may be on its way; not yet known

    def _answer(self) -> None:
        self._unread = self._has_body()
        try:
            answer = self._answered()
        except Refusal as refusal:
            answer = json_answer({"error": str(refusal)}, refusal.status, **refusal.headers)
        except ConnectionError:
            raise
        except Exception:
            log.exception("no answer to %s %r", self.command, self.path)
            error = {"error": "the server failed."}
            answer = json_answer(error, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = _answer
    do_CONNECT = _answer

    def _answered(self) -> Answer:
        self._check_sender()
        parts, query = split_target(self.path)
        if parts[0] == "save_graph":
            self._allow("POST")
            return self._save(parts[1:])
        self._allow("GET", "HEAD")
        content = self.server.site.find(parts, query, self._is_gone)
        part = part_of(content, self.headers.get("Range", ""))
        if part is not None:
            return part
        accepted = self.headers.get_all("Accept-Encoding", [])
        known = self.headers.get_all("If-None-Match", [])
        return negotiated(content, accepted, known, self.server.zipped)

    def _allow(self, *methods: str) -> None:
        if self.command not in methods:
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"only {' and '.join(methods)} can be done here.",
                Allow=", ".join(methods),
            )

    def _save(self, parts: list[str]) -> Answer:
        if len(parts) != 1:
            raise not_found()
        [slug] = parts
        self.server.saver.check(slug)
        self.server.saver.save(slug, self._body())
        return json_answer({"saved": slug})

    # Who asks

    def _check_sender(self) -> None:
        """Refuse what another web page made a browser send."""
        hosts = self.headers.get_all("Host", [])
        match = _AUTHORITY.fullmatch(hosts[0].strip().lower()) if len(hosts) == 1 else None
        if match is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request needs one Host header.")
        if not self.server.is_called(match[1]):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"this server does not go by the name {match[1]}: open {self.server.url}, or "
                "start it with this name as --host.",
            )
        same_site = f"http://{match[0]}", f"https://{match[0]}"
        if any(
            origin.strip().lower() not in same_site for origin in self.headers.get_all("Origin", [])
        ):
            raise Refusal(HTTPStatus.FORBIDDEN, "requests of other web pages are refused.")
        foreign = self.headers.get("Sec-Fetch-Site", "").lower() == "cross-site"
        if foreign and self.headers.get("Sec-Fetch-Mode", "").lower() != "navigate":
            raise Refusal(HTTPStatus.FORBIDDEN, "requests of other web pages are refused.")

    def _is_gone(self) -> bool:
        """Whether the client has closed its connection; what else it sends is left unread."""
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:  # it waits for its answer
            return False
        except OSError:
            return True
        finally:
            with contextlib.suppress(OSError):
                self.connection.settimeout(self.timeout)

    # The body

    def _has_body(self) -> bool:
        sizes = {size.strip() for size in self.headers.get_all("Content-Length", [])}
        return "Transfer-Encoding" in self.headers or not sizes <= {"0"}

    def _body(self) -> bytes:
        """What the client sends to be saved.

        Raises:
            Refusal: it is of another type, too long, or not as long as it says.
        """
        if self.headers.get_content_type() != "application/json":
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "what is saved must be application/json."
            )
        sizes = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not sizes:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "what is saved needs its Content-Length.")
        if len(sizes) > 1 or not re.fullmatch("[0-9]{1,18}", sizes[0].strip()):
            raise Refusal(HTTPStatus.BAD_REQUEST, "the Content-Length must be one number.")
        size = int(sizes[0])
        if size > BODY_BYTES:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {BODY_BYTES} bytes can be saved."
            )
        try:
            body = self.rfile.read(size)
        except TimeoutError as error:
            raise Refusal(
                HTTPStatus.REQUEST_TIMEOUT, "what was to be saved did not arrive."
            ) from error
        if len(body) < size:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the body is shorter than its Content-Length.")
        self._unread = False
        return body

    # Sending

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {
            "Content-Security-Policy": self.server.site.page.policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
            **answer.headers,
        }
        if answer.status != HTTPStatus.NOT_MODIFIED:
            headers["Content-Length"] = str(len(answer.body))
        if self._unread or self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            body = memoryview(answer.body)
            for at in range(0, len(body), CHUNK_BYTES):  # the timeout is one for each write
                self.wfile.write(body[at : at + CHUNK_BYTES])
        if self._unread:
            self._discard()

    def _discard(self) -> None:
        """Let a client finish sending: closing at once would take the answer away from it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            end = time.monotonic() + 2
            while time.monotonic() < end and self.connection.recv(CHUNK_BYTES):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that could not be parsed."""
        self._unread = True
        status = HTTPStatus(code)
        self._send(json_answer({"error": f"{message or status.phrase}."}, status))

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %r", self.client_address[0], format % args)
