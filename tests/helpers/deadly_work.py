"""What workers do in the tests of engines: a module of its own, since each of them imports it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.cli.prompts import worker


def die() -> None:
    """As the kernel ends a process when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def set_up(how: str) -> str:
    """A worker's beginning: "dies", "refuses", or well."""
    if how == "dies":
        die()
    if how == "refuses":
        raise UserError("there is no model.")
    return how


def do(state: str, item: Any) -> Any:
    """An item: "deadly" always, a path until it is there, "last" for all; else harmless."""
    if item == "deadly":
        die()
    if isinstance(item, Path) and not item.exists():
        item.touch()
        die()
    if item == "last":
        raise UserError("no more of it.")
    return state, item


def attribute_or_die(maker: worker.Maker, request: Any) -> worker.Outcome:
    """A prompt, or the worker's end for the one called "doomed"."""
    if request.slug == "doomed":
        die()
    return worker.work(maker, request)
