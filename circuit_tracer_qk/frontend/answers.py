"""What a request ends with: an answer to send, or a refusal, which becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

from circuit_tracer_qk.base.json_text import encode

TEXT = "; charset=utf-8"
"""How the Content-Type of everything that is text ends."""

JSON = f"application/json{TEXT}"


class Answer(NamedTuple):
    """A status, the bytes to send and the headers that are this answer's own."""

    status: HTTPStatus
    body: bytes = b""
    headers: Mapping[str, str] = {}


class Refusal(Exception):
    """Ends a request with an error status and a sentence."""

    def __init__(self, status: HTTPStatus, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


def not_found() -> Refusal:
    """The same for all that is not there and all that may not be read."""
    return Refusal(HTTPStatus.NOT_FOUND, "there is no such file here.")


def json_answer(document: Any, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> Answer:
    """An answer in JSON."""
    return Answer(status, encode(document), {"Content-Type": JSON, **headers})
