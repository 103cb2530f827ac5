"""What is found under which path: the page, our panel, graph files, graphs in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, unquote_to_bytes

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.json_text import encode
from circuit_tracer_qk.base.package import __version__
from circuit_tracer_qk.frontend.answers import Refusal, not_found
from circuit_tracer_qk.frontend.page import INDEX, Page
from circuit_tracer_qk.frontend.saving import digest_of
from circuit_tracer_qk.frontend.static import ASSET_KINDS, Content, Folder, made
from circuit_tracer_qk.frontend.turns import IsGone, Turns

if TYPE_CHECKING:
    from circuit_tracer_qk.frontend.steer_requests import SteerRequest

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:]")  # the last two mean more on Windows
_QUERY_NUMBER = re.compile(r"[0-9]{1,9}")
WAITING, WAITING_TABLES = 8, 32
"""How many requests for steered runs and for tables may wait; one of each is worked on."""

_EXAMPLES = re.compile(r"([0-9]{1,18})\.json")


class Live(Protocol):
    """Graphs in memory that can be asked for what their files do not hold; asked from threads."""

    @property
    def digests(self) -> Mapping[str, str]:
        """The graphs that can be asked: slug -> which graph it is, ``metadata.info.digest`` of its file."""
        ...

    @property
    def steerable(self) -> tuple[str, ...]:
        """Those of them whose model is in memory, too."""
        ...

    def table(self, slug: str, layer: int, head: int, query: int, key: int) -> bytes:
        """A QK table in JSON.

        Raises:
            UserError: there is no such table.
        """
        ...

    def steer(
        self, slug: str, request: SteerRequest, before_run: Callable[[], object] | None = None
    ) -> bytes:
        """A steered run with its clean run and controls, in JSON.

        Args:
            slug, request: which graph, and what is asked.
            before_run: called before every run; what it raises ends the work.

        Raises:
            UserError: no model is in memory, or it cannot be steered so.
        """
        ...

    def examples(self, scan: str, index: int) -> bytes | None:
        """A feature's examples in JSON, None without any."""
        ...


def split_target(target: str) -> tuple[list[str], str]:
    """A request's path, decoded and in parts that are safe to join to a folder, and its query.

    Raises:
        Refusal: a path that does not name a file in one plain way.
    """
    path, _, query = target.partition("?")
    try:
        decoded = unquote_to_bytes(path.encode("ascii")).decode()
    except UnicodeError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "the path is not UTF-8.") from error
    if not decoded.startswith("/") or _FORBIDDEN.search(decoded):
        raise Refusal(HTTPStatus.BAD_REQUEST, "the path is not one.")
    parts = decoded[1:].split("/")
    if parts != [""] and any(not part.strip(".") for part in parts):  # a slug may begin with a dot
        raise not_found()
    return parts, query


@dataclass(frozen=True)
class Site:
    """What is served.

    Attributes:
        data: the folder of graph files.
        assets: circuit-tracer's page as it is installed.
        panel: our panel.
        features: examples of local transcoders, as circuit-tracer's server takes them.
        page: the index with our panel in it.
        online: whether the page may ask circuit-tracer's own hosts.
        live: graphs in memory.
        steering, tables: the requests to them that wait.
    """

    data: Folder
    assets: Folder
    panel: Folder
    features: Folder | None
    page: Page
    online: bool
    live: Live | None
    steering: Turns = field(default_factory=lambda: Turns(WAITING, "steered runs"))
    tables: Turns = field(default_factory=lambda: Turns(WAITING_TABLES, "tables"))

    def find(self, parts: list[str], query: str, is_gone: IsGone) -> Content:
        """What is under a path.

        Args:
            parts, query: of the path.
            is_gone: whether the client has gone, so that long work need not be done.

        Raises:
            Refusal: nothing is, the query is malformed, or too many requests are waiting.
            ConnectionAbortedError: the client went away before its answer was there.
        """
        match parts:
            case [""] | ["index.html"]:
                return self._index()
            case ["qk", "config.json"]:
                digests = {} if self.live is None else dict(self.live.digests)
                steerable = () if self.live is None else tuple(self.live.steerable)
                known = {"live": digests, "steerable": steerable}
                return made(encode({**known, "online": self.online, "version": __version__}))
            case ["qk", "table", slug]:
                return made(self._table(slug, query, is_gone))
            case ["qk", "steer", slug]:
                return made(self._steer(slug, query, is_gone))
            case ["qk", *rest] if rest:
                return self.panel.find(rest)
            case ["graph_data", scan, name]:
                try:
                    return self.data.find([scan, name])
                except Refusal:
                    return self._examples(scan, name)
            case ["features", *rest] if rest and self.features is not None:
                return self.features.find(rest)
            case ["data" | "graph_data", *rest] if rest:
                return self.data.find(rest)
        return self.assets.find(parts)

    def _index(self) -> Content:
        index = self.page.index
        tag = hashlib.sha256(index).hexdigest()[:32]
        kind = ASSET_KINDS[os.path.splitext(INDEX)[1]]
        return Content(kind, len(index), lambda: index, tag)

    def _table(self, slug: str, query: str, is_gone: IsGone) -> bytes:
        """A QK table of a graph in memory."""
        live, query = self._in_memory(slug, query)
        names = ("layer", "head", "query", "key")
        given = parse_qsl(query, keep_blank_values=True)
        values = dict(given)
        if sorted(values) != sorted(names) or len(given) != len(names):
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "a table needs layer, head, query and key, each once."
            )
        for name in names:
            if not _QUERY_NUMBER.fullmatch(values[name]):
                raise Refusal(HTTPStatus.BAD_REQUEST, f"{name} must be a whole number from 0 on.")
        try:
            with self.tables.turn(is_gone) as check:
                check()
                return live.table(slug, *(int(values[name]) for name in names))
        except UserError as error:
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error

    def _steer(self, slug: str, query: str, is_gone: IsGone) -> bytes:
        """A steered run on the prompt of a graph in memory."""
        from circuit_tracer_qk.frontend.steer_requests import read_request  # loads pydantic

        live, query = self._in_memory(slug, query)
        try:
            request = read_request(query)
            with self.steering.turn(is_gone) as check:
                check()
                return live.steer(slug, request, check)
        except UserError as error:
            raise Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error

    def _in_memory(self, slug: str, query: str) -> tuple[Live, str]:
        """The graphs in memory, and a query without the digest of the graph that it is about.

        A query without a digest is about the graph that the file on disk holds.

        Raises:
            Refusal: no graph of this name is in memory, or another one than asked about.
        """
        if self.live is None or slug not in self.live.digests:
            raise Refusal(
                HTTPStatus.NOT_FOUND, f"the graph {slug} is not in memory, only its file is here."
            )
        fields = query.split("&")
        asked = [field.removeprefix("digest=") for field in fields if field.startswith("digest=")]
        if (asked or [self._written_digest(slug)]) != [self.live.digests[slug]]:
            raise Refusal(
                HTTPStatus.CONFLICT,
                f"the graph {slug} in this server's memory is another one than the request or the "
                "file on disk is about: reload the page to see what was written to the file.",
            )
        return self.live, "&".join(field for field in fields if not field.startswith("digest="))

    def _written_digest(self, slug: str) -> Any:
        """Which graph the file on disk is of; None where it does not say."""
        data = self.data.find([f"{slug}.json"]).read()
        try:
            return digest_of(json.loads(data))
        except (ValueError, RecursionError):
            return None

    def _examples(self, scan: str, name: str) -> Content:
        """Examples of a feature without a file."""
        index = _EXAMPLES.fullmatch(name)
        if self.live is None or index is None:
            raise not_found()
        try:
            data = self.live.examples(scan, int(index[1]))
        except UserError as error:
            raise not_found() from error
        if data is None:
            raise not_found()
        return made(data)
