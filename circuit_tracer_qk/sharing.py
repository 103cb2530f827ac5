"""Work shared out over the processor's threads, each piece done by one of them from end to end.

torch divides every single operation over its threads. Where operations are small, the threads wait
for one another at each, and take from one another's caches what the operation before has written:
on processors whose cores do not share a cache two threads were as slow as one. Threads that each
do a piece of their own share only what they read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from threading import local
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def n_threads(device: torch.device) -> int:
    """How many pieces are worked on at once: torch's own threads; 1 off the processor."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def shared_out(
    work: Callable[[T], R], pieces: Sequence[T], device: torch.device
) -> Generator[R, None, None]:
    """``work`` of every piece, in order, by :func:`n_threads` threads.

    Args:
        work: called in several threads at once, in which torch has one thread each and the
            caller's modes of gradients and inference. What it returns is small, or is meant to be
            kept: nothing waits for the caller to take it.
        pieces: what to call it with.
        device: where its tensors are.

    Yields:
        What ``work`` returned.
    """
    n = min(n_threads(device), len(pieces))
    if n < 2:
        yield from map(work, pieces)
        return
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    all_threads = torch.get_num_threads()

    def alone(piece: T) -> R:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(piece)

    # a thread's number of threads is its own, but also that of threads which start later
    with ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield from pool.map(alone, pieces)
        finally:
            torch.set_num_threads(all_threads)


class Scratch(local):
    """Memory of each thread's own, kept from call to call: fresh memory costs as much as using it."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def of(self, like: Tensor, *shape: int) -> Tensor:
        """A tensor of any content, with the type and device of another, until the next call."""
        n = prod(shape)
        if self._kept is None or len(self._kept) < n:
            self._kept = like.new_empty(n)
        return self._kept[:n].view(shape)
