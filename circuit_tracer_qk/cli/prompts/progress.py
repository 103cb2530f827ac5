"""Which prompts of a file are finished: a mark of each, written after its files.

A mark says what was asked for, of which model and dictionaries, and how large every file is. Files
are on the disk before they get their names, so that a file of the right size is a whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import check_folder, remove_temporaries, write_atomically
from circuit_tracer_qk.base.json_text import encode
from circuit_tracer_qk.base.package import __version__
from circuit_tracer_qk.base.yaml_files import read_yaml

if TYPE_CHECKING:
    from circuit_tracer_qk.cli.prompts.lines import Request

FOLDER = ".prompts"
KINDS = frozenset(".safetensors .json .yaml .yml .npz .pt .pth .bin .gguf .model .txt .zip".split())
"""The files of models and dictionaries, by suffix; features' examples are not asked."""


@dataclass
class Outcome:
    """What came of one prompt.

    Attributes:
        pages: its files in the folder of the graph files.
        saved: its files in the folder of the ``.pt`` files.
        listed: what the list of graphs should say; None without graph files.
        problem: why it failed; "" where it did not.
        warnings: what to know about it.
    """

    pages: list[Path] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)
    listed: dict[str, Any] | None = None
    problem: str = ""
    warnings: list[str] = field(default_factory=list)


class Marks:
    """The marks of a run's prompts, in a hidden folder beside their files.

    Args:
        pages: the folder of the graph files, if they are wanted.
        saved: the folder of the ``.pt`` files, if they are wanted.
        work: of :func:`work_of`.
    """

    def __init__(self, pages: str | None, saved: str | None, work: str) -> None:
        self.pages = Path(pages) if pages else None
        self.saved = Path(saved) if saved else None
        folders = {"pages": self.pages, "saved": self.saved}
        self._folders = {name: folder for name, folder in folders.items() if folder is not None}
        self.folder, self._work = Path(pages or saved or "", FOLDER), work
        self._id = ""
        self._sizes: dict[Path, dict[str, int]] = {}

    def _digest(self, request: Request) -> str:
        asked = [self._work, request.prompt, request.slug, request.options]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _path(self, request: Request) -> Path:
        return self.folder / f"{request.slug}.json"

    def remove(self, request: Request) -> None:
        """Forget a prompt, whose files are about to be written.

        Raises:
            OSError: its mark cannot be removed.
        """
        self._path(request).unlink(missing_ok=True)

    def write(self, request: Request, outcome: Outcome) -> None:
        """Mark a prompt as finished.

        Raises:
            UserError: the mark cannot be written.
        """
        mark = {"work": self._digest(request), "listed": outcome.listed}
        for name, folder in self._folders.items():
            files = getattr(outcome, name)
            sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}
            mark[name] = dict(sorted(sizes.items()))
        if self.pages is not None:
            data = (self.pages / f"{request.slug}.json").read_bytes()
            tail = data[max(0, data.find(b'"nodes":')) :]
            mark["tail"] = [len(tail), hashlib.sha256(tail).hexdigest()]
        write_atomically(self._path(request), encode(mark, "the mark"))

    def find(self, request: Request) -> dict[str, Any] | None:
        """What the list of graphs says of a finished prompt; None where it is not finished.

        A prompt is finished if the same was asked for and its files are whole. A graph's file in
        which the page saved what it shows is of another size; from its nodes on it is the same.
        """
        try:
            mark = json.loads(self._path(request).read_bytes())
            if mark["work"] != self._digest(request):
                return None
            for kind, folder in self._folders.items():
                files = mark.get(kind)
                if not files:
                    return None
                for name, size in files.items():
                    page = kind == "pages" and name == f"{request.slug}.json"
                    whole = self._size(folder / name) == size
                    if not whole and not (page and _ends_with(folder / name, *mark["tail"])):
                        return None
            return mark["listed"] or {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _size(self, path: Path) -> int | None:
        """A file's size; whole folders are read at once."""
        if path.parent not in self._sizes:
            sizes = {}
            with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        if entry.is_file():
                            sizes[entry.name] = entry.stat().st_size
            self._sizes[path.parent] = sizes
        return self._sizes[path.parent].get(path.name)

    def prepare(self) -> None:
        """Make the folders and remove what killed runs left in them.

        The folder gets a name for itself: another machine that finds it there shares the folder.

        Raises:
            UserError: a folder cannot be made or written to.
        """
        for folder in (*self._folders.values(), self.folder):
            remove_temporaries(check_folder(folder))
        path = self.folder / "id"
        if not path.is_file():
            write_atomically(path, secrets.token_hex(16).encode())
        self._id = path.read_text(encoding="ascii")
        self._sizes.clear()  # a worker needs none

    def here(self) -> bool:
        """Whether this machine has the folder that was prepared."""
        with contextlib.suppress(OSError, ValueError):
            return (self.folder / "id").read_text(encoding="ascii") == self._id
        return False


def _ends_with(path: Path, length: int, digest: str) -> bool:
    """Whether the end of a file is what it was.

    Raises:
        OSError: it cannot be read, or is too short.
    """
    with open(path, "rb") as file:
        file.seek(-length, os.SEEK_END)
        return hashlib.sha256(file.read()).hexdigest() == digest


def work_of(arguments: dict[str, Any], refs: Iterable[str | None], outputs: Iterable[Path]) -> str:
    """What every prompt of a run has in common; differs where the results would.

    Args:
        arguments: the flags, by name, as far as results hang on them.
        refs: the model and the dictionaries or transcoders. Files of local ones are told by name,
            size and time; hub ids by their text.
        outputs: folders in which results go, wherever they are.
    """
    places = [path.resolve() for path in outputs]
    facts: list[Any] = [__version__, arguments]
    with contextlib.suppress(PackageNotFoundError):  # a tree that is only on the path
        facts.append(version("circuit-tracer"))
    facts += [[ref, [] if ref is None else _files_of(ref, places)] for ref in refs]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _files_of(ref: str, outputs: list[Path]) -> list[Any]:
    """Name, size and time of every file that a reference may be read from, if it is local."""
    for text in (ref, ref.partition(":")[2]):  # FORMAT:FOLDER
        parts = Path(text).expanduser().parts
        wild = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
        root = Path(*parts[:wild])
        if parts[:wild] and os.path.exists(root):
            break
    else:
        return []
    root = root.resolve()
    stamps = _stamps(root, outputs)
    with contextlib.suppress(OSError, UserError, KeyError, TypeError):
        model = read_yaml(root / "config.yaml", "model_name: gpt2")["model_name"]
        if os.path.isdir(model):  # the model that is taken where none is named
            stamps += _stamps(Path(model).resolve(), outputs)
    return stamps


def _stamps(root: Path, outputs: list[Path]) -> list[tuple[str, int, int]]:
    stamps = []
    if root.is_file():
        stat = root.stat()
        return [(root.name, stat.st_size, stat.st_mtime_ns)]
    for folder, below, names in os.walk(root):
        here = Path(folder)
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".") and (here / name).resolve() not in outputs
        )
        if here in outputs:
            continue
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in KINDS and not (stem.isascii() and stem.isdigit()):
                with contextlib.suppress(OSError):
                    stat = (here / name).stat()
                    path = (here / name).relative_to(root).as_posix()
                    stamps.append((path, stat.st_size, stat.st_mtime_ns))
    return stamps
