"""Gemma Scope: ``params.npz`` in ``layer_N/width_W/average_l0_L``, JumpReLU.

The arrays are the same for residual, MLP and transcoder dictionaries; only the repository's name
says which they are. A folder that does not carry it has to be called residual: ``gemma-scope:``.
"""

from __future__ import annotations

import re
from pathlib import Path

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
from circuit_tracer_qk.dictionaries.tensors import mapped

WEIGHTS = "params.npz"
_REPOSITORY = re.compile(
    r"gemma-scope-(?P<model>[0-9]+b)-(?P<tuned>pt|it)-(?P<of>res|mlp|att|transcoders)"
)
_SHAPES = {"W_enc": "model dict", "W_dec": "dict model"}
_SHAPES |= {"b_enc": "dict", "b_dec": "model", "threshold": "dict"}
_LAYER = re.compile(r"(?:^|/)layer_([0-9]+)(?:/|$)")


def _layer(files: Files, folder: str, hints: Hints) -> Layer | None:
    root = files.full_path
    whole = joined(f"{root}/{folder}" if folder else root, WEIGHTS)
    if re.search(r"(^|/)embedding(/|$)", folder):
        return None  # of the token embeddings, which no block has written to
    number = _LAYER.search(folder) or _LAYER.search(root)
    if number is None:
        raise UserError(
            f"{whole}: its layer is not known: Gemma Scope's folders are layer_N/width_W/"
            "average_l0_L; keep these names."
        )
    repository = _REPOSITORY.search(whole)
    if repository is not None and repository["of"] != "res":
        raise UserError(
            f"{whole} belongs to {repository[0]}, whose dictionaries are not of the residual "
            "stream: residual graphs need gemma-scope-*-res."
        )
    if repository is None and not hints.named:
        raise UserError(
            f"{whole} does not say whether it is of the residual stream (Gemma Scope stores MLP "
            f"and attention SAEs alike): if it is, name the format, gemma-scope:{files.title}, or "
            "say `format: gemma-scope` in a config.yaml in the folder."
        )
    name = None
    if repository is not None:
        tuned = "-it" if repository["tuned"] == "it" else ""
        name = f"google/gemma-2-{repository['model']}{tuned}"
    return Layer(int(number[1]), RESID_POST, folder, joined(folder, WEIGHTS), _read, name)


LAYOUT = Layout("gemma-scope", (WEIGHTS,), _layer)


def _read(path: Path, at: int, title: str) -> Dictionary:
    stored = {name.replace("w_", "W_"): tensor for name, tensor in mapped(path).items()}
    t = read_tensors(path, _SHAPES, stored=stored)
    return from_tensors(at, "jumprelu", t["W_enc"].T, {at: t["W_dec"]}, t, minus=False, title=title)
