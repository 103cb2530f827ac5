"""Where a dictionary's files are: a local folder or a hub repository, listed and had one by one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from circuit_tracer_qk.base import hub
from circuit_tracer_qk.base.errors import UserError

WILD = re.compile(r"[*?\[]")
MOST = 100_000  # files of a folder that is still looked through
DEPTH = 5  # folders below the one named that are looked into


@dataclass(frozen=True)
class Files:
    """The files of a dictionary set, by their names below a root, as ``folder/file``.

    Attributes:
        title: how messages name the folder or repository.
        root: the local folder; None for a hub repository.
        repo, revision: the hub repository.
        below: the folder in it that names are relative to.
        from_cache: whether the names are those of the cache alone, because the hub is silent.
        names: the files that are looked at.
    """

    title: str
    root: Path | None
    repo: str = ""
    revision: str | None = None
    below: str = ""
    from_cache: bool = False
    names: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def local(cls, folder: Path, pattern: str | None = None) -> Files:
        """A local folder's files, or those below the folders that match a pattern."""
        names: list[str] = []
        seen: set[str] = set()
        for where, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
            below = Path(where).relative_to(folder)
            if len(below.parts) >= DEPTH or os.path.realpath(where) in seen:
                folders.clear()  # deep enough, or links in a circle
            seen.add(os.path.realpath(where))
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            names += [(below / name).as_posix() for name in sorted(files)]
            if len(names) > MOST:
                raise UserError(
                    f"{folder} holds more than {MOST} files: name the folder of the dictionaries."
                )
        title = str(folder if pattern is None else folder / pattern)
        return cls(title, folder, names=_matching(str(folder), names, pattern))

    @classmethod
    def on_hub(cls, repo: str, revision: str | None, pattern: str | None = None) -> Files:
        """A repository's files, listed by the hub (by the cache where the hub is silent).

        Raises:
            UserError: it cannot be listed.
        """
        listed, from_cache = hub.list_files(repo, revision)
        names = _matching(repo, listed, pattern)
        title = repo if pattern is None else f"{repo}/{pattern}"
        title = title if revision is None else f"{title}@{revision}"
        below = "" if pattern is None or WILD.search(pattern) else pattern
        names = tuple(name.removeprefix(below).lstrip("/") for name in names)
        return cls(title, None, repo, revision, below, from_cache, names)

    @property
    def full_path(self) -> str:
        """The whole path of the root: folders are often told apart by their names."""
        if self.root is not None:
            return Path(os.path.abspath(self.root)).as_posix()
        return joined(self.repo, self.below) if self.below else self.repo

    def get(self, name: str) -> Path:
        """One file as a local path; the hub's are fetched.

        Raises:
            UserError: it cannot be had.
        """
        if self.root is not None:
            return self.root / name
        return hub.download(self.repo, joined(self.below, name), self.revision)

    def fetch(self, names: Iterable[str]) -> None:
        """Have several files, with a progress bar: the hub's are downloaded where need be.

        Raises:
            UserError: one cannot be had.
        """
        if self.root is None:
            for name in tqdm(list(names), "Fetching files", leave=False, delay=2, disable=None):
                self.get(name)

    def numbered(self, folder: str, pattern: re.Pattern[str]) -> dict[int, str]:
        """The files of a folder whose names fit a pattern, by the number that it catches."""
        start = joined(folder, "")
        names = ((name, name.removeprefix(start)) for name in self.names if name.startswith(start))
        return {int(m[1]): name for name, last in names if (m := pattern.fullmatch(last))}

    def folders_with(self, files: Iterable[str]) -> list[str]:
        """The folders ("" for the root) that hold all of some files, in natural order.

        A file may lie deeper, ``checkpoints/final.safetensors``, or be a pattern, ``layer*.pt``.
        """
        names_in: dict[str, list[str]] = {}
        for name in self.names:
            folder, _, file = name.rpartition("/")
            names_in.setdefault(folder, []).append(file)
        complete: set[str] | None = None
        for file in files:
            inner, _, last = file.rpartition("/")
            having = {
                folder.removesuffix(inner).rstrip("/")
                for folder, there in names_in.items()
                if (not inner or folder == inner or folder.endswith("/" + inner))
                and any(fnmatchcase(name, last) for name in there)
            }
            complete = having if complete is None else complete & having
        return sorted(complete or (), key=natural)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): it may hold layers.")


def joined(folder: str, name: str) -> str:
    """A file's name below the root."""
    return f"{folder}/{name}" if folder else name


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts layer_2 before layer_10."""
    parts = re.split(r"([0-9]+)", text)
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in parts]


def _matching(title: str, names: Iterable[str], pattern: str | None) -> tuple[str, ...]:
    """The names below the folders that a pattern such as ``layer_*/width_16k`` matches."""
    if pattern is None:
        return tuple(names)
    names, wanted = list(names), PurePosixPath(pattern).parts

    def matches(name: str) -> bool:
        parts = PurePosixPath(name).parts[: len(wanted)]
        return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))

    kept = [name for name in names if matches(name)]
    if not kept:
        here = sorted({PurePosixPath(name).parts[0] for name in names}, key=natural)
        held = f"{', '.join(here[:6])}{', ...' if len(here) > 6 else ''}" if here else "nothing"
        raise UserError(f"{title} has nothing below {pattern}: it has {held}.")
    return tuple(kept)
