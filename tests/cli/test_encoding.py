"""What is printed arrives on any stdout: of another encoding, closed, full, or with no reader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from circuit_tracer_qk.dictionaries.catalogue import MINIATURES

COMMAND = [sys.executable, "-m", "circuit_tracer_qk"]
TABLE = ["qk", "-p", "I met Aunt Sally, Aunt", "--head", "L1H2"]


def run(*arguments: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *arguments]
    if shell:
        command = ["sh", "-c", f'"$@" {shell}', "sh", *command]
    return subprocess.run(command, capture_output=True, env=os.environ | environment, timeout=120)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The miniature's dictionaries with labels that few encodings have."""
    folder = tmp_path_factory.mktemp("labelled") / "saes"
    shutil.copytree(MINIATURES["miniature-sae"], folder)
    labels = json.loads((folder / "labels.json").read_bytes())
    labels = {layer: ["\u65e5\u672c"] * len(texts) for layer, texts in labels.items()}
    (folder / "labels.json").write_text(json.dumps(labels))
    return str(folder)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_labels_that_an_encoding_lacks_are_escaped(encoding: str, labelled: str) -> None:
    done = run(*TABLE, "-d", labelled, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode(encoding)
    assert ("\\u65e5" in text) == (encoding != "utf-8")
    assert "sum = score" in text and "block totals" in text  # to the end


def test_a_mistake_is_told_in_any_encoding() -> None:
    done = run("qk", "\u65e5.pt", "--head", "L1H2", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2 and b"there is no graph file \\u65e5.pt" in done.stderr


@pytest.mark.parametrize(
    ("shell", "status", "message"),
    [
        (">&-", 0, b""),
        ("2>&-", 0, b""),
        ("> /dev/full", 2, b"what is printed cannot be written (No space left on device)"),
    ],
)
def test_streams_that_take_nothing(shell: str, status: int, message: bytes) -> None:
    done = run("dictionaries", shell=shell)
    assert done.returncode == status
    assert message in done.stderr and b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == bool(message)


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    with subprocess.Popen(
        [*COMMAND, "dictionaries"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) in (0, 141)


def test_streams_are_as_they_were_afterwards(run: Callable[..., object]) -> None:
    before = sys.stdout.errors
    run("dictionaries")
    assert sys.stdout.errors == before
