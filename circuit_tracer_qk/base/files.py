"""Writing files whole or not at all, and what they may be called."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.rules import check

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed: that says the same
    fcntl = None

LISTING = "graph-metadata.json"
"""The file in which circuit-tracer lists a folder's graphs."""

LONGEST_NAME = 255
"""How many bytes the name of a file or folder may have, on most file systems."""

LONGEST_SLUG = LONGEST_NAME - len(".pt.qk.safetensors")
"""How long a slug may be: so long that every file named after it can be written."""

WAITING = 8
"""How many files' ways to the disk are waited for at once."""

_NAME = 100  # characters of a name that its workplace keeps: names have an end
_WORKPLACE = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_STAGED = re.compile(r"[0-9a-f]{64}")
_LOCK = "lock"


# Workplaces ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace(target: Path, decides: Path | None = None) -> Iterator[Path]:
    """A new hidden folder beside a target, for what will take its place; removed at the end.

    A process that was killed leaves it behind. The next one that writes to the same folder removes
    it: a file in it is locked for as long as its process lives.

    Args:
        target: what will be replaced.
        decides: the file whose companion it is, if there is one.

    Raises:
        OSError: it cannot be made.
    """
    remove_temporaries(target.parent)
    with contextlib.ExitStack() as stack:
        lock = None
        while lock is None:  # only where another process removed it before it was locked
            folder = target.with_name(f".{target.name[:_NAME]}.{secrets.token_hex(8)}.tmp")
            folder.mkdir(mode=0o700)
            stack.callback(_leave, folder, decides)
            lock = _locked(folder / _LOCK, "xb")
        stack.enter_context(lock)
        yield folder


def _leave(folder: Path, decides: Path | None) -> None:
    """Remove a workplace, but for a companion in it whose deciding file is in place."""
    staged = [path.name for path in _entries(folder) if _STAGED.fullmatch(path.name)]
    if decides is not None and staged and _digest_of(decides) in staged:
        return
    with contextlib.suppress(OSError):
        _remove(folder)


def remove_temporaries(folder: Path, stale: str | None = None) -> None:
    """Remove what processes that are no more left behind in a folder.

    Args:
        folder: where they wrote.
        stale: the name of a companion that has its plain name: others that wait to become it go
            too. Those that wait for other names stay, they may be needed.
    """
    for path in _entries(folder):
        if _WORKPLACE.fullmatch(path.name) is None or path.is_symlink():
            continue
        waits = any(_STAGED.fullmatch(inside.name) for inside in _entries(path))
        if waits and (stale is None or not _is_workplace_of(path, stale)):
            continue
        with contextlib.suppress(OSError):  # not ours to remove, or of a process that lives
            if not (path / _LOCK).exists():
                path.rmdir()  # killed before it was locked
            elif fcntl is None:
                (path / _LOCK).unlink()
                _remove(path)
            elif (lock := _locked(path / _LOCK, "rb+")) is not None:
                with lock:
                    _remove(path)


def _remove(folder: Path) -> None:
    """Remove a workplace, its lock last: without it, it is empty.

    Raises:
        OSError: something cannot be removed.
    """
    for path in _entries(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
    (folder / _LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _locked(path: Path, mode: str) -> IO[Any] | None:
    """Open and lock a file until it is closed; None where another process has it, or removes it.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        file = open(path, mode)
    except FileNotFoundError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks: written without, and never removed
        if mode != "xb":
            file.close()
            return None
    if not path.exists():
        file.close()
        return None
    return file


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where that cannot be known."""
    with contextlib.suppress(OSError):
        return [folder / name for name in os.listdir(folder)]
    return []


def _is_workplace_of(folder: Path, name: str) -> bool:
    return folder.name[1:-21] == name[:_NAME]


# Writing ------------------------------------------------------------------------------------------


def write_target(path: str | Path) -> Path:
    """The file that writing to a path replaces or makes: what a link leads to, there or not.

    Raises:
        OSError: it is no regular file, or links lead in a circle.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass
    else:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return Path(os.path.realpath(path))


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace a file in one step: a full disk or a kill leaves the old one as it was.

    Raises:
        UserError: the file cannot be written; names it and the reason.
    """
    write_together({Path(path): data})


def write_together(files: Mapping[Path, bytes | memoryview]) -> None:
    """Replace files: all are on the disk before the first takes its place, in their order.

    A file that names others comes after them. Two of which neither names the other are for
    :func:`write_pair`. Links are followed, a file keeps its mode and where possible its owner.

    Raises:
        UserError: a file cannot be written; names it and the reason, and what has changed.
    """
    placed, path = 0, next(iter(files))
    try:
        targets: dict[Path, Path] = {}
        for path in files:
            targets[path] = write_target(path)
        with contextlib.ExitStack() as stack:
            folders: dict[int, Path] = {}  # a file is only moved within its device
            temporaries: dict[Path, Path] = {}
            for number, (path, target) in reversed([*enumerate(targets.items())]):
                device = target.parent.stat().st_dev
                if device not in folders:
                    folders[device] = stack.enter_context(workplace(target))
                temporaries[path] = folders[device] / str(number)
            for path, data in files.items():
                with open(temporaries[path], "xb") as file:
                    file.write(data)
            # many are waited for at once: the disk takes in several together
            with ThreadPoolExecutor(min(len(files), WAITING)) as pool:
                waits = [(path, pool.submit(_to_disk, temporaries[path])) for path in files]
                for path, wait in waits:
                    wait.result()
            for path, target in targets.items():
                _replace(temporaries[path], target)
                placed += 1
    except OSError as error:
        raise _not_written(path, error, placed) from error


def write_pair(path: Path, companion: Path, write: Callable[[Path], bytes | memoryview]) -> None:
    """Replace two files that belong together: at every instant one whole pair can be read.

    The companion waits under the digest of the deciding file's new bytes, in a workplace. When the
    deciding file takes its place, this one is the companion that :func:`companion_of` finds; then
    it gets its plain name.

    Args:
        path: the file that decides.
        companion: the other one.
        write: writes the companion to where it is told, and returns the bytes of the deciding file.

    Raises:
        UserError: a file cannot be written; names it and the reason, and what has changed.
    """
    decided, named = False, path
    try:
        target = write_target(path)
        named, plain = companion, write_target(companion)
        settled = companion_of(path, companion)
        if settled != companion:
            os.replace(settled, plain)
        remove_temporaries(plain.parent, stale=plain.name)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(workplace(plain, decides=target))
            waiting, new = folder / "0", folder / "1"
            if target.parent.stat().st_dev != plain.parent.stat().st_dev:
                new = stack.enter_context(workplace(target)) / "1"
            data = write(waiting)
            _to_disk(waiting)
            _keep_mode(waiting, plain)
            named = path
            new.write_bytes(data)
            _to_disk(new)
            staged = folder / hashlib.sha256(data).hexdigest()
            os.replace(waiting, staged)
            _replace(new, target)
            decided, named = True, companion
            os.replace(staged, plain)
    except OSError as error:
        raise _not_written(named, error, decided) from error


def companion_of(path: str | Path, companion: Path) -> Path:
    """Where the companion of a deciding file lies: after a kill, not yet under its plain name."""
    plain = Path(os.path.realpath(companion))
    staged = [
        file
        for folder in _entries(plain.parent)
        if _WORKPLACE.fullmatch(folder.name) and _is_workplace_of(folder, plain.name)
        for file in _entries(folder)
        if _STAGED.fullmatch(file.name)
    ]
    digest = _digest_of(Path(path)) if staged else None
    return next((file for file in staged if file.name == digest), companion)


def put_in_place(files: Mapping[Path, Path]) -> None:
    """Move finished files to their names: all are on the disk before the first is moved.

    Args:
        files: temporary file -> what it becomes, on the same file system.

    Raises:
        UserError: a file cannot be written; names it and the reason, and what has changed.
    """
    placed, path = 0, next(iter(files.values()))
    try:
        targets: dict[Path, Path] = {}
        for source, path in files.items():
            targets[source] = write_target(path)
            _to_disk(source)
        for source, path in files.items():
            targets[source].parent.mkdir(parents=True, exist_ok=True)
            _replace(source, targets[source])
            placed += 1
    except OSError as error:
        raise _not_written(path, error, placed) from error


def put_folder_in_place(folder: Path, target: Path) -> None:
    """Move a finished folder to a name that is free: all in it is on the disk before.

    Raises:
        OSError: it cannot be.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _to_disk(path)
    os.rename(folder, target)


def _not_written(path: Path, error: OSError, placed: int) -> UserError:
    """What to say of a file that cannot be written.

    Args:
        placed: how many others are in their places already.
    """
    before = "what stood there before is unchanged"
    if placed:
        before = f"{placed} of the files that go with it are in their places, each of them whole"
    return UserError(
        f"{path} cannot be written ({error.strerror or error}); {before}: free the disk or choose "
        "another folder."
    )


def _replace(temporary: Path, target: Path) -> None:
    """Put a file in the place of another."""
    _keep_mode(temporary, target)
    os.replace(temporary, target)


def _keep_mode(temporary: Path, target: Path) -> None:
    """Give a file the mode of the one that it replaces, and where possible its owner."""
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return
    new = os.stat(temporary)
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with contextlib.suppress(OSError):
            os.chown(temporary, old.st_uid, old.st_gid)
    if old.st_mode != new.st_mode:
        os.chmod(temporary, stat.S_IMODE(old.st_mode))


def _to_disk(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _digest_of(path: Path) -> str | None:
    """The SHA-256 of a file; None where it cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 20):
            digest.update(data)
        return digest.hexdigest()
    return None


# Reading ------------------------------------------------------------------------------------------


def read_file(path: str | Path, most: int, *, pipes: bool = False) -> bytes:
    """The bytes of a small file that others wrote, or of what a link leads to.

    Args:
        path: the file.
        most: how many bytes such a file may have.
        pipes: take what a shell hands over too: ``/dev/stdin``, ``<(command)``.

    Raises:
        OSError: it cannot be read, is larger, or is no regular file: what waits for a writer or
            never ends is not opened.
    """
    mode = os.stat(path).st_mode
    handed = pipes and stat.S_ISFIFO(mode) and Path(os.path.realpath(path)).parent.name == "fd"
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or handed):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    parts, left = [], most + 1
    with open(path, "rb") as file:
        while left and (part := file.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
    if not left:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return b"".join(parts)


# Names --------------------------------------------------------------------------------------------


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


_WINDOWS = re.compile(r"(?i:con|prn|aux|nul|(?:com|lpt)[1-9])(?:\..*)?|.*\.")
"""Names that stand for devices on Windows, or that it shortens."""


def check_case(folder: Path, name: str) -> None:
    """Refuse a name that is another file's of the folder but for capitals.

    Raises:
        UserError: naming that file.
    """
    if not folder.is_dir() or (folder / name).exists():
        return
    for other in folder.iterdir():
        if other.name.lower() == name.lower():
            raise UserError(
                f"{folder} has {other.name}, and {name} would be the same file on Windows and "
                "macOS: choose another name."
            )


def beside(path: str | Path) -> Path:
    """Where the record of a graph saved at ``path`` lies: ``graph.pt.qk.safetensors``."""
    return Path(f"{path}.qk.safetensors")


def check_names(slug: str, np_model: str | None) -> None:
    """Refuse names that cannot stand for a graph's file, or that Neuronpedia does not take.

    Raises:
        UserError: which characters are allowed, or how many.
    """
    check(slug=slug, np_model=np_model)
    for name, called in ((slug, "slug"), (np_model or "", "Neuronpedia model id")):
        if len(name) > LONGEST_SLUG:
            raise UserError(
                f"the {called} {name[:20]!r}... has {len(name)} characters, too many for the name "
                f"of a file: it may have {LONGEST_SLUG}."
            )
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", slug) or slug in (".", "..", Path(LISTING).stem):
        raise UserError(
            f"the slug {slug!r} cannot name a graph: use letters, digits, '_', '.' and '-' only, "
            f"and not '.', '..' or {Path(LISTING).stem!r}."
        )
    if _WINDOWS.fullmatch(slug):
        raise UserError(
            f"the slug {slug!r} is no file's name on Windows: choose another, without a '.' at its "
            "end."
        )
    if np_model is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", np_model):
        raise UserError(
            f"the Neuronpedia model id {np_model!r} is not one: Neuronpedia takes letters, "
            "digits, '_' and '-' only."
        )
