"""Requests of any kind to a served graph: a status that says what is wrong, and a living server."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.fuzzing import TEXTS, leftovers, run_cases
from helpers.serving import ask, port_of
from hypothesis import strategies as st

import circuit_tracer_qk as ctqk

KNOWN = {
    200,
    206,
    304,
    400,
    403,
    404,
    405,
    409,
    411,
    413,
    414,
    415,
    416,
    422,
    428,
    431,
    501,
    503,
    505,
}
PROMPT = "I met Aunt Sally. I like Aunt"


class Served(NamedTuple):
    server: ctqk.Server
    folder: Path
    document: dict[str, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("graphs")
    model = ctqk.load_model(device="cpu")
    graph = ctqk.attribute(PROMPT, model, max_feature_nodes=40)
    path = ctqk.create_graph_files(graph, "sally", folder)
    live = ctqk.LiveGraphs({"sally": graph}, {"sally": model})
    server = ctqk.serve(folder, port=0, live=live)
    yield Served(server, folder, json.loads(path.read_bytes()))
    server.stop()


SAFE = st.sampled_from("abcxyz0159._-~%/=&?+,:L H\u00e9")
PATHS = st.sampled_from(
    [
        *(
            "/",
            "/index.html",
            "/graph_data/sally.json",
            "/data/graph-metadata.json",
            "/qk/config.json",
        ),
        *(
            "/qk/panel.js",
            "/qk/table/sally",
            "/qk/steer/sally",
            "/save_graph/sally",
            "/features/a.json",
        ),
        *(
            "/graph_data/%2e%2e/x",
            "//",
            "/%00",
            "/graph_data/" + "a" * 3000,
            "*",
            "http://x/y",
            "/\\x",
        ),
    ]
) | st.text(SAFE, max_size=30).map(lambda text: "/" + text)
VALUES = st.sampled_from(
    [
        "0",
        "1",
        "6",
        "-1",
        "99",
        "nan",
        "1e9",
        "L1H2",
        "L9H9",
        "L0/61",
        "query",
        "key",
        "0.5",
        "frozen",
    ]
) | st.text(SAFE, max_size=6)
NAMES = st.sampled_from(
    [
        *("layer", "head", "query", "key", "heads", "side", "features", "checkpoint", "positions"),
        *("factor", "inject", "norms", "freeze", "controls", "seed", "digest", "x"),
    ]
)
QUERIES = st.lists(st.tuples(NAMES, VALUES), max_size=6).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
)
STEER = st.fixed_dictionaries(
    {"heads": VALUES | st.just("L1H2"), "controls": st.sampled_from(["0", "1", "x"])},
    optional={
        "side": st.sampled_from(["key", "query", "x"]),
        "features": VALUES | st.just("L0/61"),
        "positions": VALUES,
        "factor": VALUES,
        "norms": VALUES,
    },
).map(lambda given: "&".join(f"{k}={v}" for k, v in given.items()))
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "Host",
            "Origin",
            "Range",
            "If-None-Match",
            "Content-Length",
            "Content-Type",
            "Accept-Encoding",
        ]
    ),
    st.sampled_from(["", "0", "5", "-1", "x", "bytes=0-3", "bytes=9-", "gzip", "null", "a, b"])
    | st.text(SAFE, max_size=8),
    max_size=2,
)
METHODS = st.sampled_from(
    ["GET", "GET", "GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "X", "get"]
)
BODIES = st.none() | st.binary(max_size=40) | st.sampled_from([b"{}", b"[" * 3000, b'{"a": NaN}'])


def test_requests(served: Served, request: pytest.FixtureRequest) -> None:
    before = (served.folder / "sally.json").read_bytes()
    bodies = BODIES | st.just(json.dumps({"qParams": served.document["qParams"]}).encode())

    def check(case: Any) -> None:
        method, path, query, headers, body = case
        target = f"{path}?{query}" if query else path
        reply = raw(served, method, target, headers, body)
        if reply is None:  # the server closed the connection of what is no HTTP
            return
        status, content_type, content = reply
        assert status in KNOWN, (status, content[:300])
        if status >= 400 and content and "json" in content_type:
            assert json.loads(content)["error"]
        assert b"Traceback" not in content

    steering = st.tuples(st.just("GET"), st.just("/qk/steer/sally"), STEER, st.just({}), st.none())
    any_request = st.tuples(METHODS, PATHS, st.just("") | QUERIES, HEADERS, bodies)
    run_cases(request.config, any_request | any_request | any_request | steering, check)
    assert ask(served.server, "/graph_data/sally.json").status == 200
    assert not leftovers(served.folder)
    saved = json.loads((served.folder / "sally.json").read_bytes())
    assert saved["nodes"] == json.loads(before)["nodes"]
    assert threading.active_count() < 50


def test_bytes_that_are_no_http(served: Served, request: pytest.FixtureRequest) -> None:
    def check(data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", port_of(served.server)), timeout=10) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(1 << 16)
        assert b"Traceback" not in answer
        if answer:
            assert int(answer.split()[1]) in KNOWN

    lines = st.lists(TEXTS, max_size=4).map(
        lambda parts: " ".join(parts).encode("utf-8", "replace")
    )
    run_cases(request.config, st.binary(max_size=60) | lines.map(lambda t: t + b"\r\n\r\n"), check)
    assert ask(served.server, "/qk/config.json").status == 200


def raw(
    served: Served, method: str, target: str, headers: dict[str, str], body: bytes | None
) -> tuple[int, str, bytes] | None:
    """A request as it is, without a client's own checks; None where nothing comes back."""
    given = {"Host": served.server.url.removeprefix("http://")} | headers
    if body is not None:
        given.setdefault("Content-Length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    data = f"{method} {target} HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", port_of(served.server)), timeout=30) as client:
        try:
            client.sendall(data + (body or b""))
            client.shutdown(socket.SHUT_WR)
            answer = http.client.HTTPResponse(client, method=method)
            answer.begin()
            return answer.status, answer.headers.get("Content-Type", ""), answer.read()
        except (http.client.HTTPException, ConnectionError):
            return None
