"""Work shared out: in this process, among processes of this machine, or over a Ray cluster.

Every engine takes the same three things: ``setup()``, which makes what a worker keeps; ``work``,
which does one item with it, ``work(state, item)``; and the items. Each item comes back with its
result, in the order in which they are done. Functions and items must be ones that pickle can name.

A worker that dies takes one item with it, which another one tries again, once. ``UserError`` from
``setup`` or ``work`` ends everything.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from circuit_tracer_qk.base.errors import UserError

Item = TypeVar("Item")
Seat = TypeVar("Seat", "_Process", "_Actor")
Setup = Callable[[], Any]
Work = Callable[[Any, Any], Any]
Reply = tuple[str, Any]
Results = Generator[tuple[Item, Any], None, None]
"""Every item with its result, or with :class:`Lost`, as they are done; what is closed early leaves no
worker behind."""

ENGINES = ("local", "ray")
DONE, STOP = "done", "stop"
PATIENCE = 5.0  # seconds that a worker has to tidy up


class Lost(NamedTuple):
    """In place of a result: the item's worker died, twice."""

    reason: str


class Died(Exception):
    """A worker is no more."""


def in_this_process(setup: Setup, work: Work, items: Iterable[Item]) -> Results[Item]:
    """One item after the other, here."""
    state = setup()
    for item in items:
        yield item, work(state, item)


# Seats --------------------------------------------------------------------------------------------
#
# A seat is a place for one worker at a time, which owes a reply from its start on, and after every
# item. ``start()`` puts a new worker there; ``give(item)`` lets it do an item; ``take()`` is its
# reply, which is there. Both raise Died where the worker is no more. ``leave()`` sends a worker that
# has nothing to do away, without waiting for it. After ``stop()`` no worker is there, whatever it was
# doing. ``number`` is that of the item in work.


def _share_out(
    items: Sequence[Item], seats: Sequence[Seat], replied: Callable[[list[Seat]], list[Seat]]
) -> Results[Item]:
    """Give items to seats until all are done.

    Args:
        items: what to do.
        seats: where, not started yet.
        replied: those of some seats that have replied, at least one of them.
    """
    left, died, working = deque(range(len(items))), set(), list(seats)
    reason = ""
    try:
        for seat in working:
            seat.start()
        while working:
            for seat in replied(working):
                done: list[tuple[Item, Any]] = []
                try:
                    kind, value = seat.take()
                    if kind == STOP:
                        raise UserError(value)
                    if seat.number is not None:
                        done.append((items[seat.number], value))
                        seat.number = None
                    if left:
                        seat.number = left.popleft()
                        seat.give(items[seat.number])
                    else:
                        working.remove(seat)
                        seat.leave()
                except Died as death:
                    reason, number, seat.number = str(death), seat.number, None
                    if number is None:  # before its first item: another one would fare no better
                        working.remove(seat)
                        continue
                    if number in died:
                        done.append((items[number], Lost(reason)))
                    else:
                        died.add(number)
                        left.append(number)
                    if left:
                        seat.start()
                    else:
                        working.remove(seat)
                yield from done
    finally:
        for seat in seats:
            seat.stop()
    if left:
        raise UserError(
            f"no worker is left: each died while it loaded the model ({reason}); give fewer "
            "--workers, each of which holds a model of its own."
        )


# Processes of this machine ------------------------------------------------------------------------


def in_processes(setup: Setup, work: Work, items: Sequence[Item], workers: int) -> Results[Item]:
    """Share out among new processes, each with its part of the cores and a GPU if there are some.

    None of them outlives this one: where it is killed, they end with the item in work.
    """
    workers = min(workers, len(items))
    seats = [_Process(setup, work, place, workers) for place in range(workers)]

    def replied(waiting: list[_Process]) -> list[_Process]:
        ready = wait([seat.pipe for seat in waiting])
        return [seat for seat in waiting if seat.pipe in ready]

    yield from _share_out(items, seats, replied)


class _Process:
    """A process with a pipe of its own, whose end says that the process on the other side died."""

    pipe: Connection
    number: int | None = None

    def __init__(self, *arguments: Any) -> None:
        self._arguments, self._process = arguments, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        with _deaf_to_interrupts():
            process.start()
        self._process = process
        theirs.close()

    def give(self, item: Any) -> None:
        try:
            self.pipe.send(item)
        except OSError as error:
            raise self._death() from error

    def take(self) -> Reply:
        try:
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    def _death(self) -> Died:
        assert self._process is not None
        self._process.join(PATIENCE)
        code = self._process.exitcode
        if code is None or code >= 0:
            return Died(f"its process ended with status {code}")
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return Died(f"its process was ended by {signal.Signals(-code).name}{hint}")

    def leave(self) -> None:
        self.pipe.close()

    def stop(self) -> None:
        if self._process is None:
            return
        if not self.pipe.closed:
            self.pipe.close()
            self._process.terminate()
        self._process.join(PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started within does not hear Ctrl+C, which the terminal sends to all processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection, setup: Setup, work: Work, place: int, workers: int) -> None:
    """A worker's whole life, in its own process."""
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # one for processes would be missed after a kill
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is being written is tidied up
    _take_gpu(place)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody is waiting
        reply, state = _reply(setup)
        pipe.send((reply, None if reply == DONE else state))
        while reply != STOP:
            item = pipe.recv()
            reply, value = _reply(lambda item=item: work(state, item))
            pipe.send((reply, value))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to tidy up


def _reply(do: Callable[[], Any]) -> Reply:
    try:
        return DONE, do()
    except UserError as error:
        return STOP, str(error)
    except Exception as error:
        import traceback

        traceback.print_exc()  # no mistake of the user's
        return STOP, f"{type(error).__name__}: {error}"


def _take_gpu(place: int) -> None:
    """Leave one GPU in view, before anything uses one; workers beyond their number share them."""
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        every = named.split(",") if named else [str(i) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = every[place % count]
        if torch.cuda.is_initialized():  # too late for that
            torch.cuda.set_device(place % count)


# Ray ----------------------------------------------------------------------------------------------


def check(engine: str) -> None:
    """Refuse an engine that is not installed.

    Raises:
        UserError: how to install it.
    """
    from importlib.util import find_spec

    if engine == "ray" and find_spec("ray") is None:
        raise UserError(
            '--engine ray needs Ray, which is not installed: pip install "circuit-tracer-qk[ray]", '
            "on every machine; or leave it out for processes of this machine."
        )


def on_ray(setup: Setup, work: Work, items: Sequence[Item], workers: int | None) -> Results[Item]:
    """Share out over the machines of a Ray cluster: the one at ``RAY_ADDRESS`` or that ``ray start``
    made here, else one of this machine alone, for the time of the work.

    One worker a GPU, or a machine where there are none, unless their number is given.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report to its makers
    import logging

    import ray  # type: ignore[import-not-found]

    started = not ray.is_initialized()
    try:
        if started:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False)
    except Exception as error:  # whatever a network does
        raise UserError(
            f"no Ray cluster can be reached or started ({str(error).splitlines()[0]}): check "
            "RAY_ADDRESS and `ray status`."
        ) from error
    try:
        room = ray.cluster_resources()
        gpus, cores = int(room.get("GPU", 0)), int(room.get("CPU", 1))
        machines = sum(bool(node["Alive"]) for node in ray.nodes())
        workers = min(workers or gpus or machines, len(items))
        needs = {
            "num_gpus": 1 / -(-workers // gpus) if gpus else 0,  # beyond their number they share
            "num_cpus": 1 if workers <= cores else 0,
            "scheduling_strategy": "SPREAD",
        }
        share = -(-workers // machines)
        seats = [_Actor(ray, needs, setup, work, share) for _ in range(workers)]

        def replied(waiting: list[_Actor]) -> list[_Actor]:
            by_reference = {seat.reference: seat for seat in waiting}
            done, _ = ray.wait(list(by_reference), num_returns=1)
            return [by_reference[reference] for reference in done]

        yield from _share_out(items, seats, replied)
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """What lives in an actor's process."""

    def set_up(self, setup: Setup, work: Work, share: int) -> Reply:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))  # which Ray set to one
        self._work = work
        reply, self._state = _reply(setup)
        return reply, None if reply == DONE else self._state

    def do(self, item: Any) -> Reply:
        return _reply(lambda: self._work(self._state, item))


class _Actor:
    """An actor of Ray's, which may be on any machine."""

    reference: Any = None
    number: int | None = None

    def __init__(self, ray: Any, needs: dict[str, Any], *arguments: Any) -> None:
        self._ray, self._needs, self._arguments, self._actor = ray, needs, arguments, None

    def start(self) -> None:
        self._actor = self._ray.remote(_Worker).options(**self._needs).remote()
        self.reference = self._actor.set_up.remote(*self._arguments)

    def give(self, item: Any) -> None:
        assert self._actor is not None
        self.reference = self._actor.do.remote(item)

    def take(self) -> Reply:
        errors = self._ray.exceptions
        try:
            return self._ray.get(self.reference)
        except errors.RayTaskError as error:  # such as a machine without this package
            return STOP, f"a machine of the cluster cannot work: {str(error).splitlines()[-1]}"
        except errors.RayError as error:
            raise Died(f"its worker died: {str(error).splitlines()[0]}") from error

    def leave(self) -> None:
        if self._actor is not None:
            with contextlib.suppress(Exception):  # a cluster that is gone
                self._ray.kill(self._actor)
        self._actor = None

    stop = leave
