"""What may be replaced, what stays of it, and what killed processes leave behind."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from helpers import killing

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.files import (
    companion_of,
    read_file,
    remove_temporaries,
    workplace,
    write_atomically,
    write_pair,
)


def test_what_is_no_regular_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(ctqk.UserError, match=f"{path} .*it is no regular file"):
            write_atomically(path, b"new")
        assert not path.is_file() and path.exists()
    with pytest.raises(ctqk.UserError, match="loop .*symbolic links"):
        write_atomically(tmp_path / "loop", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "loop"]


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(tmp_path: Path, there: bool):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "file", tmp_path / "link"
    link.symlink_to("far/file")
    if there:
        target.write_bytes(b"old")
    write_atomically(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and not target.is_symlink()


def test_modes_stay_and_new_files_obey_the_umask(tmp_path: Path):
    path = tmp_path / "file"
    for mode in (0o600, 0o640, 0o444):
        path.write_bytes(b"old")
        path.chmod(mode)
        write_atomically(path, b"new")
        assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (mode, b"new")
        path.unlink()
    before = os.umask(0o027)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_living_process_keeps_its_workplace(tmp_path: Path):
    with workplace(tmp_path / "file") as folder:
        remove_temporaries(tmp_path)
        assert folder.is_dir()
        write_atomically(tmp_path / "file", b"new")
        assert folder.is_dir()
    assert not folder.exists()


def pair(folder: Path, which: str) -> int:
    def write(companion: Path) -> bytes:
        companion.write_text(f"companion of {which}")
        return which.encode()

    write_pair(folder / "g", folder / "g.more", write)
    return 0


def read(folder: Path) -> str:
    which = (folder / "g").read_text()
    assert companion_of(folder / "g", folder / "g.more").read_text() == f"companion of {which}"
    return which


@pytest.mark.parametrize("fault", [killing.KILL, killing.FULL])
@pytest.mark.parametrize("linked", [False, True])
def test_a_pair_is_whole_at_every_instant(tmp_path: Path, fault: str, linked: bool):
    folder = tmp_path / "folder"
    folder.mkdir()
    if linked:
        (tmp_path / "far").mkdir()
        (folder / "g").symlink_to("../far/g")
    pair(folder, "old")
    n = len(killing.run(lambda: pair(folder, "new"), tmp_path).changes)
    states = set()
    for at in range(n):
        for again in ("old", "third"):
            pair(folder, "old")
            killing.run(lambda: pair(folder, "new"), tmp_path, fault, at)
            state = read(folder)
            states.add(state)
            assert state in ("old", "new")
            # and killed once more, on the way from what that left
            for then in range(n):
                killing.run(lambda: pair(folder, again), tmp_path, fault, then)
                assert read(folder) in (state, again)
            pair(folder, again)
            assert read(folder) == again and (folder / "g.more").read_text().endswith(again)
            assert sorted(path.name for path in folder.iterdir()) == ["g", "g.more"]
    assert states == {"old", "new"}


# Reading ------------------------------------------------------------------------------------------


def test_a_small_file_is_read_and_a_larger_one_refused(tmp_path: Path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"12345")
    link.symlink_to("file")
    assert read_file(path, 5) == read_file(link, 6) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_file(path, 4)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 4)


def test_what_waits_or_never_ends_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "link", Path("/dev/zero")):
        for pipes in (False, True):
            with pytest.raises(OSError, match="it is no regular file"):
                read_file(path, 10, pipes=pipes)


def test_what_a_shell_hands_over_is_read():
    end, start = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(start, b"text"), os.close(start)))
    writer.start()
    assert read_file(f"/dev/fd/{end}", 10, pipes=True) == b"text"
    writer.join()
    with pytest.raises(OSError, match="it is no regular file"):
        read_file(f"/dev/fd/{end}", 10)
    os.close(end)
