"""QK tables beside a graph's file: what does not fit into it lies in one file for each head.

    a.json                          qk.sidecars: {"L3H5": {"file": "a.qk/L3H5-5f0c2a91.json", ...}}
    a.qk/L3H5-5f0c2a91.json         tables and rows of that head (``sidecar`` of the schema)

A sidecar's name ends with a hash of its contents, so writing a graph anew never changes a file
that the old one names: the new files are there before the graph's file takes its place, and the
old ones go after that. The page's server sends none whose contents no longer fit its name.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from circuit_tracer_qk.attribution.qk import Place
from circuit_tracer_qk.base import digests
from circuit_tracer_qk.base.json_text import Encoded, encode
from circuit_tracer_qk.graph_files.select_tables import Attributions

FILE_BYTES = 40_000_000
"""How long a graph's file may become by its tables."""

_NAME = re.compile(r"L[0-9]+H[0-9]+-[0-9a-f]{8}\.json")


class Divided(NamedTuple):
    """QK attributions in their files.

    Attributes:
        qk: what the graph's file holds of them.
        files: the sidecars, by their path beside that file.
    """

    qk: dict[str, Any]
    files: dict[str, bytes]


def divide(attributions: Attributions, slug: str, room: int) -> Divided:
    """The most wanted tables into the graph's file while it has room, others into sidecars.

    Args:
        attributions: tables, the most wanted first.
        slug: names the folder of the sidecars.
        room: how many bytes the graph's file has left for tables and rows.
    """
    n_fit = _n_fit(attributions, room)
    if n_fit < len(attributions.tables):
        # the list of sidecars takes room too: at most that of all tables
        listed = _by_head(attributions, list(attributions.tables), slug, lambda _: b"")
        n_fit = _n_fit(attributions, room - len(encode(_index(listed))))
    places = list(attributions.tables)
    qk: dict[str, Any] = attributions.facts | _tables(attributions, places[:n_fit])
    files: dict[str, bytes] = {}
    if n_fit < len(places):
        heads = _by_head(
            attributions,
            places[n_fit:],
            slug,
            lambda of_head: encode(_sidecar(attributions, of_head)),
        )
        qk["sidecars"] = _index(heads)
        files = {head.file: head.data for head in heads.values()}
    return Divided(qk, files)


def _n_fit(attributions: Attributions, room: int) -> int:
    """How many of the tables fit, with the rows that they need."""
    rows: set[tuple[int, int, int]] = set()
    for n, (place, data) in enumerate(attributions.tables.items()):
        room -= len(data) + 1
        if place[:3] not in rows:
            rows.add(place[:3])
            room -= len(attributions.rows[place[:3]]) + 1
        if room < 0:
            return n
    return len(attributions.tables)


def _tables(attributions: Attributions, places: Collection[Place]) -> dict[str, Encoded]:
    rows = sorted({place[:3] for place in places})
    return {
        "attributions": Encoded.listed([attributions.tables[place] for place in sorted(places)]),
        "rows": Encoded.listed([attributions.rows[at] for at in rows]),
    }


def _sidecar(attributions: Attributions, places: list[Place]) -> dict[str, Any]:
    layer, head, *_ = places[0]
    return {"schema_version": 1, "layer": layer, "head": head, **_tables(attributions, places)}


class _Head(NamedTuple):
    """One head's sidecar.

    Attributes:
        file: its path beside the graph's file.
        data: its bytes.
        tables: (query, key) of each of its tables.
    """

    file: str
    data: bytes
    tables: list[tuple[int, int]]


def _by_head(
    attributions: Attributions,
    places: list[Place],
    slug: str,
    data_of: Callable[[list[Place]], bytes],
) -> dict[str, _Head]:
    by_head: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for place in sorted(places):
        by_head[place.layer, place.head].append(place)
    heads = {}
    for (layer, head), of_head in by_head.items():
        name, data = f"L{layer}H{head}", data_of(of_head)
        file = f"{folder_of(slug)}/{digests.file_name(name, data)}"
        heads[name] = _Head(file, data, [(place.query, place.key) for place in of_head])
    return heads


def _index(heads: Mapping[str, _Head]) -> dict[str, Any]:
    return {name: {"file": head.file, "tables": head.tables} for name, head in heads.items()}


def folder_of(slug: str) -> str:
    """The folder of a graph's sidecars, beside its file."""
    return f"{slug}.qk"


def sidecars_of(folder: Path, slug: str) -> list[str]:
    """The sidecars that lie there for a graph, by their path beside its file."""
    try:
        names = sorted(path.name for path in (folder / folder_of(slug)).iterdir())
    except OSError:
        return []
    return [f"{folder_of(slug)}/{name}" for name in names if _NAME.fullmatch(name)]


def remove_others(folder: Path, slug: str, kept: Collection[str]) -> None:
    """Remove a graph's sidecars but those kept, by their path; other files stay.

    One that cannot be removed is left: no graph names it.
    """
    for name in sidecars_of(folder, slug):
        if name not in kept:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    with contextlib.suppress(OSError):  # others lie there, or it never was
        (folder / folder_of(slug)).rmdir()
