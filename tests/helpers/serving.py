"""Asking a page server."""

from __future__ import annotations

import http.client
import json
from typing import Any, NamedTuple

from circuit_tracer_qk.frontend import server


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def port_of(site: server.Server) -> int:
    return int(site.url.rpartition(":")[2])


def ask(
    site: server.Server, path: str, method: str = "GET", body: Any = None, **headers: str
) -> Reply:
    """One request; ``Accept_Encoding`` stands for Accept-Encoding."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(site), timeout=10)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names)
        answer = connection.getresponse()
        return Reply(answer.status, answer.headers, answer.read())
    finally:
        connection.close()
