"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``, one folder a hookpoint.

A folder is called after the module whose output it reads: ``layers.5`` is the residual stream
after block 5, ``layers.5.mlp`` is not. The encoder subtracts ``b_dec`` from its input.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import torch

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import RESID_POST, Dictionary
from circuit_tracer_qk.dictionaries.files import Files, joined
from circuit_tracer_qk.dictionaries.layouts.layout import (
    Hints,
    Layer,
    Layout,
    from_tensors,
    read_tensors,
)
from circuit_tracer_qk.dictionaries.tensors import read_json

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_SHAPES = {"encoder.weight": "dict model", "W_dec": "dict model", "b_dec": "model"}
_RESIDUAL = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.([0-9]+)")


def _layer(files: Files, folder: str, hints: Hints) -> Layer | None:
    module = (folder or files.full_path).rsplit("/", 1)[-1]
    match = _RESIDUAL.fullmatch(module)
    if match is None:
        if folder:
            return None  # another module's, or the embedding's, beside those of the residual
        raise UserError(
            f"{files.title} is of the module {module!r}, and residual graphs need the output of a "
            "block: sparsify calls it layers.N (or h.N)."
        )
    source = files.get(joined(folder, CONFIG))
    config = read_json(source)
    for name, reason in (
        ("transcode", "it is a transcoder, use -t"),
        ("signed", "its latents may be negative, which is not read here"),
        ("skip_connection", "it has a skip connection, which no feature carries"),
    ):
        if config.get(name):
            raise UserError(f"{source}: {name} is set: {reason}.")
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{source}: activation {config['activation']!r} is not read here: topk is.")
    k = config.get("k")
    if type(k) is not int or k < 1:
        raise UserError(f"{source}: k should be a whole number, found {k!r}.")
    read = partial(_read, source=source, k=k)
    return Layer(int(match[1]), RESID_POST, folder, joined(folder, WEIGHTS), read)


LAYOUT = Layout("sparsify", (CONFIG, WEIGHTS), _layer)


def _read(path: Path, at: int, title: str, *, source: Path, k: int) -> Dictionary:
    t = read_tensors(path, _SHAPES, {"encoder.bias": "dict"})
    W_enc = t["encoder.weight"]
    if k > len(W_enc):
        raise UserError(f"{source}: k is {k}, and {path} has {len(W_enc)} latents.")
    biases = t | {"b_enc": t.get("encoder.bias", torch.zeros(len(W_enc)))}
    return from_tensors(at, "topk", W_enc, {at: t["W_dec"]}, biases, k=k, title=title)
