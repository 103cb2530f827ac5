"""Qwen Scope: one ``layerN.sae.pt`` a layer, TopK whose k is in the repository's name.

``W_enc`` is [d_sae, d_model] and ``W_dec`` [d_model, d_sae]; nothing is subtracted from the input.
"""

from __future__ import annotations

import re

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import RESID_POST, Dictionary
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.files import Files, joined
from circuit_tracer_qk.dictionaries.layouts.layout import (
    Hints,
    Layer,
    Layout,
    assemble,
    with_biases,
)
from circuit_tracer_qk.dictionaries.tensors import mapped, validate_tensors

FILES = "layer*.sae.pt"
_FILE = re.compile(r"layer([0-9]+)\.sae\.pt")
_NAME = re.compile(r"SAE-Res-(?P<model>.+)-W[0-9]+K-L0_(?P<k>[0-9]+)")


def _load(files: Files, folder: str, hints: Hints) -> DictionarySet:
    root = files.full_path
    repository = _NAME.search(joined(root, folder))
    if repository is None:
        raise UserError(
            f"{files.title}: the k of Qwen Scope's TopK is in the name of its repository, "
            "SAE-Res-MODEL-W32K-L0_50: keep that name for the folder."
        )
    k, start = int(repository["k"]), len(joined(folder, ""))
    names = {
        int(match[1]): name
        for name in files.names
        if name.startswith(joined(folder, "layer")) and (match := _FILE.fullmatch(name[start:]))
    }

    def read(layer: int) -> Dictionary:
        path = files.get(names[layer])
        shapes = {"W_enc": "dict model", "W_dec": "model dict", "b_enc": "dict", "b_dec": "model"}
        t = with_biases(validate_tensors(path, mapped(path), shapes))
        return Dictionary(
            layer + 1,
            t["W_enc"],
            t["b_enc"],
            t["b_dec"],
            {layer + 1: t["W_dec"].T},
            k=k,
            title=names[layer],
        )

    layers = [
        Layer(n, RESID_POST, name, (name,), lambda n=n: read(n), f"Qwen/{repository['model']}")
        for n, name in names.items()
    ]
    return assemble(files, layers, hints)


LAYOUT = Layout("qwen-scope", (FILES,), read_set=_load)
