"""Runs of a command that are killed, or find the disk full, at one of their changes to a folder.

A change is what Python's audit events tell: a file opened for writing, a name given, moved or
removed. A process killed before every change is also killed after every one. Each run is a fork of
this process, so that what is loaded here need not be loaded again.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

KILL, FULL = "killed", "full"
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
NEEDS_ROOM = {"open", "os.mkdir", "os.rename"}


class End(NamedTuple):
    """How a run ended.

    Attributes:
        status: its exit status; negative for a signal.
        changes: the audit events of its changes, in order.
        err: what it wrote to stderr.
    """

    status: int
    changes: list[str]
    err: str


def run(command: Callable[[], int], folder: Path, fault: str = "", at: int = -1) -> End:
    """Run a command in a fork of this process.

    Args:
        command: returns its exit status.
        folder: changes below it are counted.
        fault: what happens, KILL or FULL; the disk is full from then on.
        at: before which change.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(command, folder, fault, at, writing)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    changes, _, err = said.partition("\0")
    return End(os.waitstatus_to_exitcode(status), changes.split(), err)


def _child(command: Callable[[], int], folder: Path, fault: str, at: int, writing: int) -> None:
    below, count = os.path.realpath(folder), 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if not os.path.realpath(os.fsdecode(args[0])).startswith(below):
            return
        os.write(writing, f"{event}\n".encode())
        count += 1
        if fault == KILL and count > at:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == FULL and count > at and event in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    status, err = 70, io.StringIO()
    try:
        sys.addaudithook(hook)
        with redirect_stdout(io.StringIO()), redirect_stderr(err):
            status = command()
    except BaseException as error:
        err.write(f"{type(error).__name__}: {error}")
    finally:
        os.write(writing, b"\0" + err.getvalue().encode()[:60_000])
        os._exit(status)
