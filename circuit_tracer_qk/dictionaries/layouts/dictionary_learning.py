"""dictionary_learning: ``config.json`` with a ``trainer``, and ``ae.pt``, one folder an SAE.

Its classes differ in what their encoders subtract and in which activation applies; the class is
named in the configuration. Decoder vectors are taken as stored: the owner's ``from_pretrained``
rescales some to norm 1 and their activations with them, which leaves every product as it is.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

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
from circuit_tracer_qk.dictionaries.tensors import mapped, read_json

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "dict model", "decoder.weight": "model dict"}
_BIASED = _LINEAR | {"encoder.bias": "dict"}
_PLAIN = {"W_enc": "model dict", "W_dec": "dict model", "b_enc": "dict", "b_dec": "model"}
_GATES = {"r_mag": "dict", "gate_bias": "dict", "mag_bias": "dict", "decoder_bias": "model"}
# class -> architecture, tensors, whether the encoder subtracts the decoder's bias
_CLASSES: dict[str, tuple[str, dict[str, str], bool]] = {
    "AutoEncoder": ("standard", _BIASED | {"bias": "model"}, True),
    "AutoEncoderNew": ("standard", _BIASED | {"decoder.bias": "model"}, False),
    "AutoEncoderTopK": ("topk", _BIASED | {"b_dec": "model"}, True),
    "BatchTopKSAE": ("jumprelu", _BIASED | {"b_dec": "model"}, True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", _PLAIN, True),
    "JumpReluAutoEncoder": ("jumprelu", _PLAIN | {"threshold": "dict"}, False),
    "GatedAutoEncoder": ("gated", _LINEAR | _GATES, True),
}
_OURS = {
    "encoder.bias": "b_enc",
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}


def _layer(files: Files, folder: str, hints: Hints) -> Layer | None:
    source = files.get(joined(folder, CONFIG))
    trainer = read_json(source).get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise UserError(f"{source}: it has no trainer with a dict_class, by which it is read.")
    name = str(trainer["dict_class"])
    if name not in _CLASSES:
        raise UserError(
            f"{source}: dict_class {name} is not read exactly here: {', '.join(_CLASSES)} are."
        )
    layer, module = trainer.get("layer"), trainer.get("submodule_name")
    if type(layer) is not int:
        raise UserError(f"{source}: its trainer names no layer, found {layer!r}.")
    description = f"{module or ''} {folder}"
    residual = re.search(rf"resid(?:_post|_out)?_(?:layer_?)?{layer}(?![0-9])", description)
    if residual is None and (module or not hints.named):
        raise UserError(
            f"{source}: it does not say that it is of the residual stream after layer {layer} "
            f"(submodule_name {module!r}, folder {folder or files.title!r}): residual graphs need "
            f"resid_post_layer_{layer}; if it is, name the format, dictionary-learning:FOLDER."
        )
    k = trainer.get("k")
    if _CLASSES[name][0] == "topk" and type(k) is not int:
        raise UserError(f"{source}: {name} needs k, a whole number, and has {k!r}.")
    read, weights = partial(_read, source=source, name=name, k=k), joined(folder, WEIGHTS)
    return Layer(layer, RESID_POST, folder, weights, read, trainer.get("lm_name"))


LAYOUT = Layout("dictionary-learning", (CONFIG, WEIGHTS), _layer)


def _read(path: Path, at: int, title: str, *, source: Path, name: str, k: Any) -> Dictionary:
    architecture, shapes, minus = _CLASSES[name]
    stored = mapped(path)
    t = read_tensors(path, shapes, stored=stored)
    plain = "W_enc" in shapes
    W_enc = t["W_enc"].T if plain else t["encoder.weight"]
    W_dec = t["W_dec"] if plain else t["decoder.weight"].T
    biases = {_OURS.get(key, key): value for key, value in t.items()}
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = stored.get("threshold")
        plain_number = threshold is not None and threshold.numel() == 1 and threshold.isreal().all()
        if threshold is None or not plain_number or not float(threshold) >= 0:
            raise UserError(
                f"{path}: {name} needs its trained threshold, a number not below 0, and has "
                f"{None if threshold is None else threshold.flatten()[:1].tolist()}: without it "
                "activations depend on the whole batch."
            )
        biases["threshold"] = threshold.float().reshape(1).repeat(len(W_enc))
    if architecture == "topk":
        stored_k = stored.get("k")
        if stored_k is not None and stored_k.flatten().tolist() != [k]:
            raise UserError(f"{source}: k is {k}, and {path} has k = {stored_k.tolist()}.")
    k = k if architecture == "topk" else None
    return from_tensors(at, architecture, W_enc, {at: W_dec}, biases, k=k, minus=minus, title=title)
