"""Long requests: a bounded queue, whose waiting requests go with their clients."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from helpers.panel import PROMPT
from helpers.serving import ask, port_of

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.frontend import routes, server
from circuit_tracer_qk.frontend.steer_requests import SteerRequest, read_request
from circuit_tracer_qk.plugin.live import LiveGraphs

DIGEST = "0" * 32
STEER = f"/qk/steer/sally?digest={DIGEST}&heads=L1H2&factor=0"
TABLE = f"/qk/table/sally?digest={DIGEST}&layer=0&head=0&query=0&key=0"
RUN_SECONDS, RUNS = 0.05, 200  # ten seconds, where nobody ends it


class SlowLive:
    """A graph in memory whose steered runs take long, and whose tables wait until they may."""

    digests = {"sally": DIGEST}
    steerable = ("sally",)

    def __init__(self) -> None:
        self.begun, self.ended = threading.Event(), threading.Event()
        self.runs = 0
        self.short = False

    def steer(
        self, slug: str, request: SteerRequest, before_run: Callable[[], object] | None = None
    ) -> bytes:
        self.begun.set()
        for _ in range(1 if self.short else RUNS):
            assert before_run is not None
            before_run()
            self.runs += 1
            time.sleep(RUN_SECONDS)
        return b"{}"

    def table(self, slug: str, layer: int, head: int, query: int, key: int) -> bytes:
        self.begun.set()
        self.ended.wait(30)
        return b"{}"

    def examples(self, scan: str, index: int) -> bytes | None:
        return None


@pytest.fixture
def live() -> Iterator[SlowLive]:
    slow = SlowLive()
    yield slow
    slow.ended.set()


@pytest.fixture
def site(live, tmp_path) -> Iterator[server.Server]:
    running = server.serve(tmp_path, port=0, live=live)
    yield running
    running.stop()


def request(site: server.Server, path: str) -> socket.socket:
    """A request whose answer is not waited for."""
    connection = socket.create_connection(("127.0.0.1", port_of(site)), timeout=10)
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return connection


def eventually(true: Callable[[], Any], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(true())


def test_abandoned_requests_leave_no_threads_and_block_nobody(site, live):
    before = threading.active_count()
    for _ in range(200):
        request(site, STEER).close()
    live.short = True
    begun = time.monotonic()
    assert ask(site, STEER).status == 200
    assert time.monotonic() - begun < 3
    assert eventually(lambda: threading.active_count() <= before + 1)
    assert live.runs < RUNS


def test_a_run_ends_when_its_client_has_gone(site, live):
    connection = request(site, STEER)
    assert eventually(lambda: live.runs > 1)
    connection.close()
    time.sleep(4 * RUN_SECONDS)
    runs = live.runs
    time.sleep(4 * RUN_SECONDS)
    assert live.runs == runs


@pytest.mark.parametrize(
    ("path", "waiting"), [(STEER, routes.WAITING), (TABLE, routes.WAITING_TABLES)]
)
def test_a_full_queue_refuses_with_a_sentence(site, live, path, waiting):
    before = threading.active_count()
    with ExitStack() as held:
        for _ in range(1 + waiting + 20):
            held.enter_context(request(site, path))
        assert live.begun.wait(5)
        assert eventually(lambda: ask(site, path).status == 503)
        answer = ask(site, path)
        assert answer.status == 503 and int(answer.headers["Retry-After"]) > 0
        assert f"{waiting} requests for" in answer.json["error"]
        assert ask(site, "/").status == 200  # the page is there all the time
        assert threading.active_count() <= before + 1 + waiting + 20 + 1
    live.ended.set()
    live.short = True
    assert eventually(lambda: threading.active_count() <= before + 1)
    assert ask(site, path).status == 200


def test_requests_that_wait_are_answered(site, live):
    live.short = True
    connections = [request(site, STEER) for _ in range(5)]
    for connection in connections:
        with connection:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert live.runs == 5


def test_stop_with_a_full_queue_returns_at_once(site, live):
    before = threading.active_count()
    connections = [request(site, STEER) for _ in range(1 + routes.WAITING)]
    assert live.begun.wait(5)
    begun = time.monotonic()
    site.stop()
    assert time.monotonic() - begun < 2
    assert eventually(lambda: threading.active_count() <= before)
    assert live.runs < RUNS
    for connection in connections:
        connection.close()


def test_steering_is_cancelled_between_runs():
    model = ctqk.load_model(device="cpu")
    graph = ctqk.attribute(PROMPT, model, max_n_logits=1)
    graphs = LiveGraphs({"sally": graph}, {"sally": model})
    asked = read_request("heads=L1H2&side=key&features=L0/61&factor=0&controls=5")
    runs: list[int] = []

    def third() -> None:
        runs.append(len(runs))
        if len(runs) == 3:
            raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        graphs.steer("sally", asked, third)
    assert len(runs) == 3
    whole: list[int] = []
    answer = graphs.steer("sally", asked, lambda: whole.append(1))
    assert len(whole) > 5 and answer == LiveGraphs({"sally": graph}, {"sally": model}).steer(
        "sally", asked
    )
