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
    Layer,
    Layout,
    Options,
    assemble,
    with_biases,
)
from circuit_tracer_qk.dictionaries.tensors import mapped, taken

FILES = "layer*.sae.pt"
_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_NAME = re.compile(r"SAE-Res-(?P<model>.+)-W\d+K-L0_(?P<k>\d+)")


def _load(files: Files, place: str, options: Options) -> DictionarySet:
    root = files.where
    told = _NAME.search(joined(root, place))
    if told is None:
        raise UserError(
            f"{files.title}: the k of Qwen Scope's TopK is in the name of its repository, "
            "SAE-Res-MODEL-W32K-L0_50: keep that name for the folder."
        )
    k, start = int(told["k"]), len(joined(place, ""))
    names = {
        int(match[1]): name
        for name in files.names
        if name.startswith(joined(place, "layer")) and (match := _FILE.fullmatch(name[start:]))
    }

    def read(layer: int) -> Dictionary:
        path = files.get(names[layer])
        shapes = {"W_enc": "dict model", "W_dec": "model dict", "b_enc": "dict", "b_dec": "model"}
        t = with_biases(taken(path, mapped(path), shapes))
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
        Layer(n, RESID_POST, name, (name,), lambda n=n: read(n), f"Qwen/{told['model']}")
        for n, name in names.items()
    ]
    return assemble(files, layers, options)


LAYOUT = Layout("qwen-scope", (FILES,), whole=_load)
