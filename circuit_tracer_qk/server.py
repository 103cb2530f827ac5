"""The page that shows graph files, served to browsers on this machine.

Any web page that the user has open can send requests here, so a request counts only if it names
this machine and comes from the page itself. Files are read from three folders: the data folder,
circuit-tracer's page and our panel; one kind of request writes, saving what the page shows of a
graph into its file.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gzip
import hashlib
import ipaddress
import json
import logging
import math
import os
import re
import socket
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qsl, unquote_to_bytes

from circuit_tracer_qk import __version__, host_cli
from circuit_tracer_qk.errors import UserError
from circuit_tracer_qk.files import check_names, write_atomically
from circuit_tracer_qk.page import INDEX, Page, panel_folder, read_page
from circuit_tracer_qk.written import encode

log = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8032
LAST_PORT = 65535

IDLE_SECONDS = 30
"""How long a connection may wait for its next bytes, in either direction."""

POLL_SECONDS = 0.1
"""How long stopping takes to be noticed."""

CONNECTIONS = 512
"""How many may be open; every one has a thread and a file descriptor."""

BODY_BYTES = 1 << 20
BODY_DEPTH = 8
"""Limits of what may be saved."""

SMALL_BYTES = 1 << 10
LARGE_BYTES = 1 << 20
KEPT_BYTES = 128 << 20
CHUNK_BYTES = 1 << 16
GZIP_LEVEL = 3
"""Up to SMALL_BYTES are sent as they are; from LARGE_BYTES on, what was compressed is kept."""

_TEXT = "; charset=utf-8"
_JSON = f"application/json{_TEXT}"
DATA_KINDS = {".json": _JSON, ".gz": "application/gzip"}
ASSET_KINDS = {
    ".html": f"text/html{_TEXT}",
    ".js": f"text/javascript{_TEXT}",
    ".css": f"text/css{_TEXT}",
    ".json": _JSON,
    ".txt": f"text/plain{_TEXT}",
    ".svg": f"image/svg+xml{_TEXT}",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
PANEL_KINDS = {suffix: ASSET_KINDS[suffix] for suffix in (".js", ".css", ".txt")}


class Live(Protocol):
    """Graphs in memory that can be asked for what their files do not hold; asked from threads."""

    @property
    def slugs(self) -> tuple[str, ...]:
        """The graphs that can be asked."""
        ...

    def table(self, slug: str, layer: int, head: int, query: int, key: int) -> bytes:
        """A QK table in JSON.

        Raises:
            UserError: there is no such table.
        """
        ...

    def examples(self, scan: str, index: int) -> bytes | None:
        """A feature's examples in JSON, None without any."""
        ...


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
) -> Server:
    """Serve the graph files of a folder, in threads of this process, until it ends.

    Args:
        data_dir: where :func:`circuit_tracer_qk.create_graph_files` wrote.
        port: a free port.
        host: the address to listen on. Everyone who reaches it can read and save the graphs.
        online: let the page ask circuit-tracer's own hosts for feature examples.
        live: graphs that answer for any head and any pair of positions.

    Raises:
        UserError: the folder does not exist, the address cannot be had, or the installed
            circuit-tracer's page is not one that this release knows.
    """
    folder = Path(data_dir).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(
            f"the graph folder {data_dir} does not exist; write graph files there first."
        )
    check_port(port, host)
    assets = host_cli.assets()
    site = _Site(
        data=_Folder(folder, DATA_KINDS, links=False),
        assets=_Folder(assets, ASSET_KINDS),
        panel=_Folder(panel_folder(), PANEL_KINDS),
        page=read_page(assets, online=online),
        online=online,
        live=live,
    )
    try:
        listener = _Listener(host, port, site)
    except OSError as error:  # taken since
        raise _refused(host, port, error) from error
    listener.start()
    return Server(listener.url, listener.stop)


# Addresses ----------------------------------------------------------------------------------------


def check_port(port: int, host: str = DEFAULT_HOST) -> None:
    """Refuse an address that a server could not have.

    Raises:
        UserError: the port is out of range, taken or not allowed, or the host is not this
            machine's.
    """
    if not 1 <= port <= LAST_PORT:
        raise UserError(f"port {port} is out of range: give one from 1 to {LAST_PORT}.")
    try:
        _bind(port, host)
    except OSError as error:
        raise _refused(host, port, error) from error


def next_free_port(start: int, host: str = DEFAULT_HOST) -> int:
    """The first free port from ``start`` on.

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
        _, address = _address(host, DEFAULT_PORT)
    except OSError:
        return True
    return not ipaddress.ip_address(address[0]).is_loopback


def _address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """The socket family and address of a host name or literal.

    Raises:
        OSError: it has none.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except ValueError as error:  # it cannot even be written as a host name
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    family, _, _, _, address = found[0]
    return family, address


def _bind(port: int, host: str) -> None:
    """Take and leave an address as the server takes it."""
    family, address = _address(host, port)
    with socket.socket(family) as listener:
        if _Listener.allow_reuse_address:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)


def _is_foreign(error: OSError) -> bool:
    """Whether an address cannot be had on any port."""
    unavailable = errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT
    return isinstance(error, socket.gaierror) or error.errno in unavailable


def _refused(host: str, port: int, error: OSError) -> UserError:
    if _is_foreign(error):
        return UserError(
            f"the host {host!r} is no address of this machine: give --host (or host=) one, or "
            f"leave it out for {DEFAULT_HOST}."
        )
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} is in use: give another one with --port (or port=).")
    return UserError(f"port {port} cannot be used ({error.strerror}): give another one.")


def _url(host: str, port: int) -> str:
    """Where a browser on this machine finds the page."""
    name = host.strip("[]")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name)
        if address.is_unspecified:
            name = DEFAULT_HOST
        elif address.version == 6:
            name = f"[{name}]"
    return f"http://{name}:{port}"


# Listening ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """What is served."""

    data: _Folder
    assets: _Folder
    panel: _Folder
    page: Page
    online: bool
    live: Live | None
    saving: threading.Lock = field(default_factory=threading.Lock)

    @property
    def slugs(self) -> tuple[str, ...]:
        return () if self.live is None else tuple(self.live.slugs)


class _Listener(ThreadingMixIn, TCPServer):
    """Takes connections, each in a thread of its own, and can let go of all of them.

    Not ``http.server``'s own class, which asks the network for this machine's name first.
    """

    allow_reuse_address = os.name == "posix"  # elsewhere it would share a port in use
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, site: _Site) -> None:
        self.address_family, address = _address(host, port)
        self.site = site
        self.zipped = _Zipped()
        self.url = _url(host, port)
        machine = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), machine, machine.partition(".")[0]}
        self._open: set[Any] = set()
        self._ending = threading.Lock()
        self._ended = False
        super().__init__(address, _Handler)
        self._thread = threading.Thread(
            target=self.serve_forever,
            args=(POLL_SECONDS,),
            daemon=True,
            name="circuit-tracer-qk server",
        )

    def start(self) -> None:
        """Answer until stopped or until this process ends."""
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Free the port and close every connection."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            atexit.unregister(self.stop)
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


# Answers ------------------------------------------------------------------------------------------


class _Refusal(Exception):
    """Ends a request with an error status and a sentence."""

    def __init__(self, status: HTTPStatus, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class _Answer(NamedTuple):
    status: HTTPStatus
    body: bytes = b""
    headers: Mapping[str, str] = {}


@dataclass(frozen=True)
class _Content:
    """What a GET found.

    Attributes:
        kind: its Content-Type.
        size: how many bytes ``read`` gives.
        tag: differs whenever the bytes do; empty where they are made for each request.
        name: what it is kept under once compressed.
    """

    kind: str
    size: int
    read: Callable[[], bytes]
    tag: str = ""
    name: str = ""

    @property
    def compressible(self) -> bool:
        return self.kind.endswith(_TEXT) and self.size > SMALL_BYTES


def _made(body: bytes, kind: str = _JSON) -> _Content:
    return _Content(kind, len(body), lambda: body)


def _json(document: Any, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> _Answer:
    return _Answer(status, encode(document), {"Content-Type": _JSON, **headers})


def _not_found() -> _Refusal:
    return _Refusal(HTTPStatus.NOT_FOUND, "there is no such file here.")


@dataclass(frozen=True)
class _Folder:
    """A folder whose files may be read.

    Attributes:
        kinds: the Content-Type of each suffix that may.
        links: follow links out of the folder; some installers link every file of a package.
    """

    path: Path
    kinds: Mapping[str, str]
    links: bool = True

    def find(self, parts: list[str]) -> _Content:
        """The file at a path already checked.

        Raises:
            _Refusal: there is none that may be read.
        """
        try:
            path = self.path.joinpath(*parts).resolve(strict=True)
            status = path.stat()
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
            raise _not_found() from error
        kind = self._kind(parts[-1])
        inside = self.links or path.is_relative_to(self.path)
        if kind is None or not inside or not stat.S_ISREG(status.st_mode):
            raise _not_found()
        tag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
        return _Content(kind, status.st_size, lambda: _read(path), tag, str(path))

    def _kind(self, name: str) -> str | None:
        if self.links and name.startswith("LICENSE"):
            return ASSET_KINDS[".txt"]
        return self.kinds.get(os.path.splitext(name)[1].lower())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _not_found() from error


class _Zipped:
    """Compressed bytes, the large ones kept so that the next client need not wait for them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, content: _Content) -> bytes:
        if not content.tag or content.size < LARGE_BYTES:
            return _zip(content)
        with self._lock:  # also while compressing: those who wait want the same
            tag, data = self._kept.pop(content.name, ("", b""))
            if tag != content.tag:
                data = _zip(content)
            self._kept[content.name] = content.tag, data
            size = sum(len(kept) for _, kept in self._kept.values())
            while size > KEPT_BYTES and self._kept:
                size -= len(self._kept.popitem(last=False)[1][1])
        return data


def _zip(content: _Content) -> bytes:
    return gzip.compress(content.read(), GZIP_LEVEL, mtime=0)


# Requests -----------------------------------------------------------------------------------------

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]*)?")
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:]")  # the last two mean more on Windows
_QUERY_NUMBER = re.compile(r"[0-9]{1,9}")
_EXAMPLES = re.compile(r"([0-9]{1,18})\.json")


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: _Listener
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
        except _Refusal as refusal:
            answer = _json({"error": str(refusal)}, refusal.status, **refusal.headers)
        except ConnectionError:
            raise
        except Exception:
            log.exception("no answer to %s %r", self.command, self.path)
            answer = _json({"error": "the server failed."}, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = _answer
    do_CONNECT = _answer

    def _answered(self) -> _Answer:
        self._check_sender()
        parts, query = _split(self.path)
        if parts[0] == "save_graph":
            self._allow("POST")
            return self._save(parts[1:])
        self._allow("GET", "HEAD")
        return self._negotiated(self._found(parts, query))

    def _allow(self, *methods: str) -> None:
        if self.command not in methods:
            raise _Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"only {' and '.join(methods)} can be done here.",
                Allow=", ".join(methods),
            )

    # Who asks

    def _check_sender(self) -> None:
        """Refuse what another web page made a browser send."""
        hosts = self.headers.get_all("Host", [])
        found = _AUTHORITY.fullmatch(hosts[0].strip().lower()) if len(hosts) == 1 else None
        if found is None:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the request needs one Host header.")
        if not self.server.is_called(found[1]):
            raise _Refusal(
                HTTPStatus.FORBIDDEN,
                f"this server does not go by the name {found[1]}: open {self.server.url}, or "
                "start it with this name as --host.",
            )
        own = f"http://{found[0]}", f"https://{found[0]}"
        if any(origin.strip().lower() not in own for origin in self.headers.get_all("Origin", [])):
            raise _Refusal(HTTPStatus.FORBIDDEN, "requests of other web pages are refused.")
        foreign = self.headers.get("Sec-Fetch-Site", "").lower() == "cross-site"
        if foreign and self.headers.get("Sec-Fetch-Mode", "").lower() != "navigate":
            raise _Refusal(HTTPStatus.FORBIDDEN, "requests of other web pages are refused.")

    # Reading

    def _found(self, parts: list[str], query: str) -> _Content:
        site = self.server.site
        match parts:
            case [""] | ["index.html"]:
                return self._page(site.page)
            case ["qk", "config.json"]:
                config = {"live": site.slugs, "online": site.online, "version": __version__}
                return _made(encode(config))
            case ["qk", "table", slug]:
                return _made(self._table(slug, query))
            case ["qk", *rest] if rest:
                return site.panel.find(rest)
            case ["graph_data", scan, name]:
                try:
                    return site.data.find([scan, name])
                except _Refusal:
                    return self._examples(scan, name)
            case ["data" | "graph_data", *rest] if rest:
                return site.data.find(rest)
        return site.assets.find(parts)

    def _page(self, page: Page) -> _Content:
        tag = hashlib.sha256(page.index).hexdigest()[:32]
        kind = ASSET_KINDS[os.path.splitext(INDEX)[1]]
        return _Content(kind, len(page.index), lambda: page.index, tag)

    def _table(self, slug: str, query: str) -> bytes:
        live = self.server.site.live
        if live is None or slug not in live.slugs:
            raise _Refusal(
                HTTPStatus.NOT_FOUND, f"the graph {slug} is not in memory, only its file is here."
            )
        names = ("layer", "head", "query", "key")
        given = parse_qsl(query, keep_blank_values=True)
        values = dict(given)
        if sorted(values) != sorted(names) or len(given) != len(names):
            raise _Refusal(
                HTTPStatus.BAD_REQUEST, "a table needs layer, head, query and key, each once."
            )
        for name in names:
            if not _QUERY_NUMBER.fullmatch(values[name]):
                raise _Refusal(HTTPStatus.BAD_REQUEST, f"{name} must be a whole number from 0 on.")
        try:
            return live.table(slug, *(int(values[name]) for name in names))
        except UserError as error:
            raise _Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error

    def _examples(self, scan: str, name: str) -> _Content:
        """Examples of a feature without a file."""
        live, index = self.server.site.live, _EXAMPLES.fullmatch(name)
        if live is None or index is None:
            raise _not_found()
        try:
            data = live.examples(scan, int(index[1]))
        except UserError as error:
            raise _not_found() from error
        if data is None:
            raise _not_found()
        return _made(data)

    def _negotiated(self, content: _Content) -> _Answer:
        """The form of a content that the client takes, or that it has the newest one already."""
        zipped = content.compressible and _takes_gzip(self.headers.get_all("Accept-Encoding", []))
        headers = {"Content-Type": content.kind}
        if content.compressible:
            headers["Vary"] = "Accept-Encoding"
        if content.tag:
            headers["ETag"] = f'"{content.tag}{"-gzip" if zipped else ""}"'
            if _has_tag(self.headers.get_all("If-None-Match", []), headers["ETag"]):
                return _Answer(HTTPStatus.NOT_MODIFIED, headers=headers)
        if not zipped:
            return _Answer(HTTPStatus.OK, content.read(), headers)
        headers["Content-Encoding"] = "gzip"
        return _Answer(HTTPStatus.OK, self.server.zipped.read(content), headers)

    # Saving

    def _save(self, parts: list[str]) -> _Answer:
        if len(parts) != 1:
            raise _not_found()
        [slug] = parts
        try:
            check_names(slug, None)
        except UserError as error:
            raise _not_found() from error
        folder = self.server.site.data
        folder.find([f"{slug}.json"])
        parameters = _parameters(self._body())
        with self.server.site.saving:
            path = folder.path.joinpath(f"{slug}.json").resolve()
            data = _with_parameters(folder.find([f"{slug}.json"]).read(), parameters)
            try:
                write_atomically(path, data)
            except UserError as error:
                log.debug("not saved", exc_info=True)
                raise _Refusal(
                    HTTPStatus.INTERNAL_SERVER_ERROR,
                    f"the file of {slug} cannot be written and is unchanged.",
                ) from error
        return _json({"saved": slug})

    def _has_body(self) -> bool:
        sizes = {size.strip() for size in self.headers.get_all("Content-Length", [])}
        return "Transfer-Encoding" in self.headers or not sizes <= {"0"}

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise _Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "what is saved must be application/json."
            )
        sizes = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not sizes:
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "what is saved needs its Content-Length.")
        if len(sizes) > 1 or not re.fullmatch("[0-9]{1,18}", sizes[0].strip()):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the Content-Length must be one number.")
        size = int(sizes[0])
        if size > BODY_BYTES:
            raise _Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {BODY_BYTES} bytes can be saved."
            )
        try:
            body = self.rfile.read(size)
        except TimeoutError as error:
            raise _Refusal(
                HTTPStatus.REQUEST_TIMEOUT, "what was to be saved did not arrive."
            ) from error
        if len(body) < size:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the body is shorter than its Content-Length.")
        self._unread = False
        return body

    # Sending

    def _send(self, answer: _Answer) -> None:
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
        self._send(_json({"error": f"{message or status.phrase}."}, status))

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %r", self.client_address[0], format % args)


def _split(target: str) -> tuple[list[str], str]:
    """A request's path, decoded and in parts that are safe to join to a folder, and its query.

    Raises:
        _Refusal: a path that does not name a file in one plain way.
    """
    path, _, query = target.partition("?")
    try:
        decoded = unquote_to_bytes(path.encode("ascii")).decode()
    except UnicodeError as error:
        raise _Refusal(HTTPStatus.BAD_REQUEST, "the path is not UTF-8.") from error
    if not decoded.startswith("/") or _FORBIDDEN.search(decoded):
        raise _Refusal(HTTPStatus.BAD_REQUEST, "the path is not one.")
    parts = decoded[1:].split("/")
    if parts != [""] and any(not part.strip(".") for part in parts):  # a slug may begin with a dot
        raise _not_found()
    return parts, query


def _takes_gzip(headers: list[str]) -> bool:
    """Whether an Accept-Encoding allows gzip."""
    qualities = {}
    for item in ",".join(headers).lower().split(","):
        coding, *parameters = (part.strip() for part in item.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        qualities[coding] = re.fullmatch(r"0(\.0*)?", quality.strip()) is None
    return qualities.get("gzip", qualities.get("*", False))


def _has_tag(headers: list[str], tag: str) -> bool:
    """Whether an If-None-Match has a tag, strong or weak."""
    tags = {item.strip().removeprefix("W/") for item in ",".join(headers).split(",")}
    return bool(tags & {tag, "*"})


# Saving -------------------------------------------------------------------------------------------


def _parameters(body: bytes) -> dict[str, Any]:
    """What a request saves.

    Raises:
        _Refusal: it is not {"qParams": {...}} in JSON.
    """
    try:
        document = _parsed(body)
    except ValueError as error:
        raise _Refusal(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}.") from error
    parameters = document.get("qParams") if isinstance(document, dict) else None
    if not isinstance(parameters, dict):
        raise _Refusal(HTTPStatus.BAD_REQUEST, 'the body must be {"qParams": {...}}.')
    if not _is_plain(parameters, BODY_DEPTH):
        raise _Refusal(
            HTTPStatus.BAD_REQUEST,
            f"qParams is nested more than {BODY_DEPTH} deep or holds an infinite number.",
        )
    return parameters


def _with_parameters(data: bytes, parameters: dict[str, Any]) -> bytes:
    """A graph's file with other parameters.

    Raises:
        _Refusal: it is no graph's file.
    """
    try:
        document = _parsed(data)
        if isinstance(document, dict):
            return encode(document | {"qParams": parameters})
    except ValueError:  # a UserError is one: a number too large to be written again
        pass
    raise _Refusal(
        HTTPStatus.UNPROCESSABLE_ENTITY, "the graph's file is damaged and was left as it is."
    )


def _parsed(data: bytes) -> Any:
    """Strict JSON.

    Raises:
        ValueError: it is not.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(data.decode(), parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict | list):
        children = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(child, depth - 1) for child in children)
    return True
