"""Writing files whole or not at all, and what they may be called."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError

LISTING = "graph-metadata.json"
"""The file in which circuit-tracer lists a folder's graphs."""

WAITING = 8
"""How many files' ways to the disk are waited for at once."""

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")
_NAME = 100  # characters of a name that its temporary keeps: names have an end


def temporary_for(path: Path) -> Path:
    """A new name beside a file, for what will take its place."""
    return path.with_name(f".{path.name[:_NAME]}.{secrets.token_hex(8)}.tmp")


def remove_temporaries(folder: Path, names: Collection[str]) -> None:
    """Remove what killed runs left behind of some files of a folder, which nobody writes now."""
    wanted = {name[:_NAME] for name in names}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None or match["name"] not in wanted:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace a file in one step: a full disk or a kill leaves the old one as it was.

    Raises:
        UserError: the file cannot be written; names it and the reason.
    """
    write_together({Path(path): data})


def write_together(files: Mapping[Path, bytes | memoryview]) -> None:
    """Replace files that belong together: all are on the disk before the first takes its place.

    The bytes go to temporary files beside their targets, to the disk, and then into their places.

    Raises:
        UserError: a file cannot be written; names it and the reason, and nothing has changed.
    """
    temporaries = {path: temporary_for(path) for path in files}
    path = next(iter(files))
    try:
        for path, temporary in temporaries.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            with open(temporary, "xb") as file:
                file.write(files[path])
        # many are waited for at once: the disk takes in several together
        with ThreadPoolExecutor(min(len(files), WAITING)) as pool:
            waits = [(path, pool.submit(_to_disk, at)) for path, at in temporaries.items()]
            for path, wait in waits:
                wait.result()
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be written ({reason}); what stood there before is unchanged: free "
            "the disk or choose another folder."
        ) from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):  # only there if something failed
                temporary.unlink()


def put_in_place(files: Mapping[Path, Path]) -> None:
    """Move finished files to their names: all are on the disk before the first is moved.

    Args:
        files: temporary file -> what it becomes, on the same file system.

    Raises:
        UserError: a file cannot be written; names it and the reason.
    """
    path = next(iter(files.values()))
    try:
        for source, path in files.items():
            _to_disk(source)
        for source, path in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be written ({reason}): free the disk or choose another folder."
        ) from error


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def check_folder(path: str | Path) -> Path:
    """A folder that can be written to, made if it is not there.

    Raises:
        UserError: what stands there is no folder, or it cannot be made or written to.
    """
    path = Path(path).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is no folder: choose another one.") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the folder {path} cannot be made ({reason}): choose another.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path} cannot be written to: choose another.")
    return path


def check_names(slug: str, np_model: str | None) -> None:
    """Refuse names that cannot stand for a graph's file, or that Neuronpedia does not take.

    Raises:
        UserError: which characters are allowed.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", slug) or slug in (".", "..", Path(LISTING).stem):
        raise UserError(
            f"the slug {slug!r} cannot name a graph: use letters, digits, '_', '.' and '-' only, "
            f"and not '.', '..' or {Path(LISTING).stem!r}."
        )
    if np_model is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", np_model):
        raise UserError(
            f"the Neuronpedia model id {np_model!r} is not one: Neuronpedia takes letters, "
            "digits, '_' and '-' only."
        )
