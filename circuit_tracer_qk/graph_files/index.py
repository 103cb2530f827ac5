"""The list of a folder's graphs, which the page's menu reads: one writer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import LISTING, read_file, write_atomically
from circuit_tracer_qk.base.json_text import encode

LOCK = f".{LISTING}.lock"
LISTING_BYTES = 2**28  # how long such a list may be
PATIENCE = 60.0  # seconds; a list is written in far less


def read_listing(folder: Path) -> dict[str, Any]:
    """The folder's list of graphs, empty where there is none.

    Raises:
        UserError: a file that is no such list.
    """
    path = folder / LISTING
    try:
        listing = json.loads(read_file(path, LISTING_BYTES))
        graphs = listing["graphs"]
        if not isinstance(graphs, list) or not all(
            isinstance(g, dict) and isinstance(g.get("slug", ""), str) for g in graphs
        ):
            raise TypeError("graphs is no list of objects with slugs")
    except FileNotFoundError:
        return {"graphs": []}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}) and was left as it is: repair it, or remove it to "
            "start a new list of graphs."
        ) from error
    return listing


def add_to_listing(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Put graphs into the folder's list, in place of those with their slugs.

    Other processes that do so at the same time wait, on this machine and on others that share the
    folder.

    Args:
        folder: of the graph files.
        entries: their ``metadata``, each with its ``slug``.

    Raises:
        UserError: a damaged list, one that cannot be written, or one that stays locked.
    """
    new = {entry["slug"]: entry for entry in entries}
    if not new:
        return
    with _locked(folder):
        listing = read_listing(folder)
        others = [graph for graph in listing["graphs"] if graph.get("slug") not in new]
        write_atomically(folder / LISTING, encode(listing | {"graphs": [*others, *new.values()]}))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone with the list. The lock goes with its process, however that ends."""
    lock = FileLock(folder / LOCK, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{folder / LISTING} has been locked for {PATIENCE:.0f} s by another process that "
            "writes graphs there: wait for it, or end it, and try again."
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{folder / LISTING} cannot be locked ({reason}): choose a folder in which files can "
            "be written and locked."
        ) from error
    try:
        yield
    finally:
        lock.release()
