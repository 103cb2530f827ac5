"""What can be read: files of certain kinds in a folder, sent compressed or not at all if known."""

from __future__ import annotations

import gzip
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from circuit_tracer_qk.base.digests import fits_name
from circuit_tracer_qk.frontend.answers import JSON, TEXT, Answer, Refusal, not_found

DATA_KINDS = {".json": JSON, ".gz": "application/gzip"}
ASSET_KINDS = {
    ".html": f"text/html{TEXT}",
    ".js": f"text/javascript{TEXT}",
    ".css": f"text/css{TEXT}",
    ".json": JSON,
    ".txt": f"text/plain{TEXT}",
    ".svg": f"image/svg+xml{TEXT}",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}
FEATURE_KINDS = {**DATA_KINDS, ".bin": "application/octet-stream"}
PANEL_KINDS = {suffix: ASSET_KINDS[suffix] for suffix in (".js", ".css", ".txt")}

SMALL_BYTES = 1 << 10
LARGE_BYTES = 1 << 20
KEPT_BYTES = 128 << 20
GZIP_LEVEL = 3
"""Up to SMALL_BYTES are sent as they are; from LARGE_BYTES on, what was compressed is kept."""

_SIDECAR = re.compile(r".+\.qk/L[0-9]+H[0-9]+-[0-9a-f]{8}\.json")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")


@dataclass(frozen=True)
class Content:
    """What a GET found.

    Attributes:
        kind: its Content-Type.
        size: how many bytes ``read`` gives.
        tag: differs whenever the bytes do; empty where they are made for each request.
        file: where it lies; None if it is no file.
    """

    kind: str
    size: int
    read: Callable[[], bytes]
    tag: str = ""
    file: Path | None = None

    @property
    def compressible(self) -> bool:
        """Whether compressing it is worth the time."""
        return self.kind.endswith(TEXT) and self.size > SMALL_BYTES


def made(body: bytes) -> Content:
    """JSON that was made for this request."""
    return Content(JSON, len(body), lambda: body)


# Folders ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A folder whose files may be read.

    Attributes:
        kinds: the Content-Type of each suffix that may.
        links: follow links out of the folder; some installers link every file of a package.
    """

    path: Path
    kinds: Mapping[str, str]
    links: bool = True

    def find(self, parts: list[str]) -> Content:
        """The file at a path already checked.

        Raises:
            Refusal: there is none that may be read.
        """
        try:
            path = self.path.joinpath(*parts).resolve(strict=True)
            status = path.stat()
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
            raise not_found() from error
        kind = self._kind(parts[-1])
        inside = self.links or path.is_relative_to(self.path)
        if kind is None or not inside or not stat.S_ISREG(status.st_mode):
            raise not_found()
        tag = f"{status.st_mtime_ns:x}-{status.st_size:x}"
        return Content(kind, status.st_size, lambda: _read(path), tag, path)

    def _kind(self, name: str) -> str | None:
        if self.links and name.startswith("LICENSE"):
            return ASSET_KINDS[".txt"]
        return self.kinds.get(os.path.splitext(name)[1].lower())


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise not_found() from error
    if _SIDECAR.fullmatch(f"{path.parent.name}/{path.name}") and not fits_name(path.name, data):
        raise Refusal(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            f"{path.parent.name}/{path.name} is damaged: its contents are not those that it is "
            "named after; write the graph again.",
        )
    return data


def part_of(content: Content, asked: str) -> Answer | None:
    """The bytes of a file that a Range header asks for; None where it asks for no one range.

    Raises:
        Refusal: they lie beyond the file's end, or cannot be read.
    """
    match = _RANGE.fullmatch(asked)
    if match is None or content.file is None:
        return None
    start, end = int(match[1]), min(int(match[2] or content.size), content.size - 1)
    if start > end:
        raise Refusal(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            "these bytes lie beyond the file's end.",
            **{"Content-Range": f"bytes */{content.size}"},
        )
    try:
        with open(content.file, "rb") as file:
            file.seek(start)
            body = file.read(end - start + 1)
    except OSError as error:
        raise not_found() from error
    headers = {
        "Content-Type": content.kind,
        "Content-Range": f"bytes {start}-{start + len(body) - 1}/{content.size}",
    }
    return Answer(HTTPStatus.PARTIAL_CONTENT, body, headers)


# Forms --------------------------------------------------------------------------------------------


class Zipped:
    """Compressed bytes, the large ones kept so that the next client need not wait for them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, tuple[str, bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, content: Content) -> bytes:
        """A content's bytes, compressed.

        Raises:
            Refusal: they cannot be read.
        """
        if content.file is None or content.size < LARGE_BYTES:
            return _zip(content)
        with self._lock:  # also while compressing: those who wait want the same
            tag, data = self._kept.pop(content.file, ("", b""))
            if tag != content.tag:
                data = _zip(content)
            self._kept[content.file] = content.tag, data
            size = sum(len(kept) for _, kept in self._kept.values())
            while size > KEPT_BYTES and self._kept:
                size -= len(self._kept.popitem(last=False)[1][1])
        return data


def _zip(content: Content) -> bytes:
    return gzip.compress(content.read(), GZIP_LEVEL, mtime=0)


def negotiated(content: Content, accepted: list[str], known: list[str], zipped: Zipped) -> Answer:
    """The form of a content that the client takes, or that it has the newest one already.

    Args:
        accepted: its Accept-Encoding headers.
        known: its If-None-Match headers.

    Raises:
        Refusal: the content cannot be read.
    """
    zips = content.compressible and _takes_gzip(accepted)
    headers = {"Content-Type": content.kind}
    if content.compressible:
        headers["Vary"] = "Accept-Encoding"
    if content.tag:
        headers["ETag"] = f'"{content.tag}{"-gzip" if zips else ""}"'
        if _has_tag(known, headers["ETag"]):
            return Answer(HTTPStatus.NOT_MODIFIED, headers=headers)
    if not zips:
        return Answer(HTTPStatus.OK, content.read(), headers)
    headers["Content-Encoding"] = "gzip"
    return Answer(HTTPStatus.OK, zipped.read(content), headers)


def _takes_gzip(headers: list[str]) -> bool:
    """Whether an Accept-Encoding allows gzip."""
    qualities = {}
    for item in ",".join(headers).lower().split(","):
        coding, *parameters = (part.strip() for part in item.split(";"))
        quality = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        qualities[coding] = re.fullmatch(r"0(\.0*)?", quality.strip()) is None
    return qualities.get("gzip", qualities.get("*", False))


def _has_tag(headers: list[str], tag: str) -> bool:
    """Whether an If-None-Match has a tag, strong or weak."""
    tags = {item.strip().removeprefix("W/") for item in ",".join(headers).split(",")}
    return bool(tags & {tag, "*"})
