"""Saving what the page shows of a graph: what may be saved, and how it goes into the file."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from http import HTTPStatus
from typing import Any, NamedTuple

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import check_names, write_atomically
from circuit_tracer_qk.base.json_text import encode, to_bytes
from circuit_tracer_qk.frontend.answers import Refusal, not_found
from circuit_tracer_qk.frontend.static import Folder

log = logging.getLogger(__name__)

ANY = object()
"""In place of a digest that is not given."""

BODY_BYTES = 1 << 20
BODY_DEPTH = 8
"""Limits of what may be saved."""


class Saver:
    """Puts parameters into the graph files of a folder, one at a time."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def check(self, slug: str) -> None:
        """Refuse what is no graph of the folder.

        Raises:
            Refusal: it is none.
        """
        try:
            check_names(slug, None)
        except UserError as error:
            raise not_found() from error
        self._folder.find([f"{slug}.json"])

    def save(self, slug: str, body: bytes) -> None:
        """Replace the parameters of a graph that was checked, and nothing else of its file.

        Raises:
            Refusal: the body does not hold parameters, the file is of another graph than the page
                shows, or it is damaged or cannot be written; the file is unchanged.
        """
        saved = _parsed_body(body)
        with self._lock:
            path = self._folder.path.joinpath(f"{slug}.json").resolve()
            data = _with_parameters(self._folder.find([f"{slug}.json"]).read(), saved)
            try:
                write_atomically(path, data)
            except UserError as error:
                log.debug("not saved", exc_info=True)
                raise Refusal(
                    HTTPStatus.INTERNAL_SERVER_ERROR,
                    f"the file of {slug} cannot be written and is unchanged.",
                ) from error


class _Saved(NamedTuple):
    """What a request saves.

    Attributes:
        parameters: what the page shows.
        digest: of the graph that it shows; None where its file has none, ANY where it does not say.
    """

    parameters: dict[str, Any]
    digest: Any


def _parsed_body(body: bytes) -> _Saved:
    """What a request saves.

    Raises:
        Refusal: it is not {"qParams": {...}} in JSON.
    """
    try:
        document = _parsed(body)
    except ValueError as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}.") from error
    parameters = document.get("qParams") if isinstance(document, dict) else None
    if not isinstance(parameters, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, 'the body must be {"qParams": {...}}.')
    if not _is_plain(parameters, BODY_DEPTH):
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            f"qParams is nested more than {BODY_DEPTH} deep or holds an infinite number.",
        )
    return _Saved(parameters, document.get("digest", ANY))


def _with_parameters(data: bytes, saved: _Saved) -> bytes:
    """A graph's file with other parameters.

    Raises:
        Refusal: it is no graph's file, or another graph's.
    """
    parameters = saved.parameters
    try:
        document = _parsed(data)
        if isinstance(document, dict):
            if saved.digest not in (ANY, digest_of(document)):
                raise Refusal(
                    HTTPStatus.CONFLICT,
                    "not saved: the graph's file was replaced by another graph since the page "
                    "read it; reload the page.",
                )
            place = _place(data.decode(), "qParams")
            if place is None:
                return encode(document | {"qParams": parameters})
            text = data.decode()  # every other byte stays
            return to_bytes(text[: place.start] + encode(parameters).decode() + text[place.stop :])
    except ValueError:  # a UserError is one: a number too large to be written again
        pass
    raise Refusal(
        HTTPStatus.UNPROCESSABLE_ENTITY, "the graph's file is damaged and was left as it is."
    )


def digest_of(document: Any) -> Any:
    """Which graph a file is of; None where it does not say."""
    try:
        return document["metadata"]["info"]["digest"]
    except (KeyError, TypeError):
        return None


def _place(text: str, key: str) -> slice | None:
    """Where the value of an object's key stands in its JSON; None where that is not certain."""
    if text.count(f'"{key}"') != 1:
        return None
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        match = space.match(text, at)
        return at if match is None else match.end()

    at = skip(text.index("{") + 1)
    while text[at] == '"':
        name, at = decoder.raw_decode(text, at)
        start = skip(at)
        _, at = decoder.raw_decode(text, start)
        if name == key:
            return slice(start, at)
        at = skip(at)
    return None


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
    """Whether a value nests no deeper than this and every number in it is finite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict | list):
        children = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(child, depth - 1) for child in children)
    return True
