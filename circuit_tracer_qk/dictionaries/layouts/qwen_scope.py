"""Qwen Scope: one ``layerN.sae.pt`` a layer, TopK whose k is in the repository's name.

``W_enc`` is [d_sae, d_model] and ``W_dec`` [d_model, d_sae]; nothing is subtracted from the input.
"""

from __future__ import annotations

import re
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import RESID_POST, Dictionary
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.files import Files, joined
from circuit_tracer_qk.dictionaries.layouts.layout import (
    Hints,
    Layer,
    Layout,
    assemble,
    from_tensors,
    read_tensors,
)

FILES = "layer*.sae.pt"
_SHAPES = {"W_enc": "dict model", "W_dec": "model dict", "b_enc": "dict", "b_dec": "model"}
_FILE = re.compile(r"layer([0-9]+)\.sae\.pt")
_NAME = re.compile(r"SAE-Res-(?P<model>.+)-W[0-9]+K-L0_(?P<k>[0-9]+)")


def _load(files: Files, folder: str, hints: Hints) -> DictionarySet:
    repository = _NAME.search(joined(files.full_path, folder))
    if repository is None:
        raise UserError(
            f"{files.title}: the k of Qwen Scope's TopK is in the name of its repository, "
            "SAE-Res-MODEL-W32K-L0_50: keep that name for the folder."
        )
    k, model = int(repository["k"]), f"Qwen/{repository['model']}"

    def read(path: Path, at: int, title: str) -> Dictionary:
        t = read_tensors(path, _SHAPES)
        decoders = {at: t["W_dec"].T}
        return from_tensors(at, "topk", t["W_enc"], decoders, t, k=k, minus=False, title=title)

    names = files.numbered(folder, _FILE)
    layers = [Layer(n, RESID_POST, name, name, read, model) for n, name in names.items()]
    return assemble(files, layers, hints)


LAYOUT = Layout("qwen-scope", (FILES,), read_set=_load)
