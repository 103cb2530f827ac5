"""Work shared out over the processor's threads, each piece done by one of them from end to end.

torch divides every single operation over its threads. Where operations are small, the threads wait
for one another at each, and take from one another's caches what the operation before has written:
on processors whose cores do not share a cache two threads were as slow as one. Threads that each
do a piece of their own share only what they read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from threading import Barrier, local
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


class Crew:
    """Threads that take pieces of work. They end with it.

    Args:
        device: where the work's tensors are; only a processor has a crew.
        most: how many threads at most; those of torch without it.
    """

    def __init__(self, device: torch.device, most: int | None = None) -> None:
        n = torch.get_num_threads() if device.type == "cpu" else 1
        self.size = n if most is None else max(1, min(n, most))
        self._pool: ThreadPoolExecutor | None = None

    def do(self, work: Callable[[T], R], pieces: Sequence[T]) -> Iterator[R]:
        """``work`` of every piece, in order.

        Args:
            work: called in several threads at once, in which torch has one thread each and the
                caller's modes of gradients and inference. What it returns is small, or is meant to
                be kept: nothing waits for the caller to take it.
            pieces: what to call it with.

        Yields:
            What ``work`` returned.
        """
        if self.size == 1 or len(pieces) < 2:
            yield from map(work, pieces)
        else:
            yield from self._threads().map(_as_here(work), pieces)

    def flow(
        self, begin: Callable[[S], tuple[Callable[[T], R], Sequence[T]]], stages: Sequence[S]
    ) -> Generator[R, None, None]:
        """What :meth:`do` would yield of one stage of work after the other, without a break between.

        While the last pieces of a stage are done, the next stage's are taken up and the one after
        is begun, by one thread: no more than three are in memory.

        Args:
            begin: makes a stage's work and its pieces.
            stages: what to call it with.

        Yields:
            What the stages' work returned, in order.
        """
        if self.size == 1 or len(stages) < 2:
            for stage in stages:
                yield from self.do(*begin(stage))
            return
        threads, begin = self._threads(), _as_here(begin)
        begun, waiting = threads.submit(begin, stages[0]), deque[Future[R]]()
        try:
            for after in range(1, len(stages) + 1):
                work, pieces = begun.result()
                if after < len(stages):
                    begun = threads.submit(begin, stages[after])
                n_before, work = len(waiting), _as_here(work)
                waiting.extend(threads.submit(work, piece) for piece in pieces)
                for _ in range(n_before):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in (begun, *waiting):
                future.cancel()

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = _started(self.size)
        return self._pool


def _as_here(work: Callable[[T], R]) -> Callable[[T], R]:
    """The same work, for another thread, with this one's modes of gradients and inference."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alone(piece: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(piece)

    return alone


def _started(n: int) -> ThreadPoolExecutor:
    """So many threads, in which torch has one thread each."""
    all_threads, ready = torch.get_num_threads(), Barrier(n + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread takes over its creator's number when it first asks
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(n, "circuit-tracer-qk", start)
    for _ in range(n):
        pool.submit(int)
    ready.wait()
    # each thread's number is its own, but the last one set is also that of threads yet to start
    torch.set_num_threads(all_threads)
    return pool


class Scratch(local):
    """Memory of each thread's own, kept from call to call: fresh memory costs as much as using it."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def of(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of any content, until the next call; ``like`` is of one type and device always."""
        n = prod(shape)
        if self._kept is None or len(self._kept) < n:
            self._kept = like.new_empty(n)
        return self._kept[:n].view(shape)
