"""Requests that take long: one is worked on, a few wait for their turn, the others are refused."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from circuit_tracer_qk.frontend.answers import Refusal

POLL_SECONDS = 0.1
"""How long it takes until a waiting request whose client has gone is dropped."""

RETRY_SECONDS = 5

IsGone = Callable[[], bool]
"""Whether the client of a request has closed its connection."""


class Turns:
    """A queue of requests, in the order in which they came.

    Args:
        waiting: how many may wait, beside the one that is worked on.
        work: what they ask for, for the sentence that refuses further ones.
    """

    def __init__(self, waiting: int, work: str) -> None:
        self._size, self._work = 1 + waiting, work
        self._queue: deque[_Request] = deque()  # the first one is worked on
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, is_gone: IsGone) -> Iterator[Callable[[], None]]:
        """Wait until it is this request's turn, and hold it.

        Yields:
            To be called from time to time while working: it ends the work of a client that has
            gone, with a ConnectionAbortedError.

        Raises:
            Refusal: too many are waiting.
            ConnectionAbortedError: the client went away while waiting.
        """
        request = _Request(is_gone)
        with self._moved:
            self._join(request)
            try:
                while self._queue[0] is not request:
                    self._moved.wait(POLL_SECONDS)
                    request.check()
            except BaseException:
                self._leave(request)
                raise
        try:
            yield request.check
        finally:
            with self._moved:
                self._leave(request)

    def _join(self, request: _Request) -> None:
        if len(self._queue) >= self._size:
            first, *waiting = self._queue
            self._queue = deque([first, *(other for other in waiting if not other.has_gone())])
        if len(self._queue) >= self._size:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"the server is busy: {self._size - 1} requests for {self._work} are waiting "
                "already; try again in a few seconds.",
                **{"Retry-After": str(RETRY_SECONDS)},
            )
        self._queue.append(request)

    def _leave(self, request: _Request) -> None:
        if request in self._queue:  # not if another one found that its client had gone
            self._queue.remove(request)
        self._moved.notify_all()


class _Request:
    """One request, known to be gone from the moment on at which it was seen to be."""

    def __init__(self, is_gone: IsGone) -> None:
        self._is_gone, self._gone = is_gone, False

    def has_gone(self) -> bool:
        self._gone = self._gone or self._is_gone()
        return self._gone

    def check(self) -> None:
        if self.has_gone():
            raise ConnectionAbortedError("the client went away before its answer was there")
