"""Gemma Scope 2: ``config.json`` with ``params.safetensors``, or a crosscoder's
``params_layer_*.safetensors`` with decoders ``w_dec`` [latents, sites, d_model].

The crosscoders are weakly causal at four depths: QK attributions and steering work at those
checkpoints, a graph across the blocks between them is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import ACAUSAL_REASON, RESID_POST, WCC, Dictionary
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.files import Files, joined
from circuit_tracer_qk.dictionaries.layouts.layout import (
    Hints,
    Layer,
    Layout,
    from_tensors,
    neuronpedia,
    read_tensors,
    scan_of,
)
from circuit_tracer_qk.dictionaries.tensors import read_json

CONFIG, WEIGHTS = "config.json", "params.safetensors"
PARAMS = "params_layer_*.safetensors"
_HF_OUTPUT = re.compile(r"model\.layers\.([0-9]+|\{[0-9]+(?:,[0-9]+)*\})\.output")
_PARAMS = re.compile(r"params_layer_([0-9]+)\.safetensors")
_FOLDER = re.compile(r"resid_post(?:_all)?/layer_([0-9]+)_width")
_SHAPES = {"b_enc": "dict", "b_dec": "model", "threshold": "dict", "w_enc": "model dict"}


def _layer(files: Files, folder: str, hints: Hints) -> Layer:
    """A residual SAE of Gemma Scope 2: JumpReLU, ``w_enc`` [d_model, d_sae]."""
    config, source = _config(files, folder)
    layers = _layers(source, config)
    if len(layers) != 1:
        raise UserError(f"{source}: one SAE is of one layer, and it names layers {layers}.")
    weights = joined(folder, WEIGHTS)
    return Layer(layers[0], RESID_POST, folder, weights, _read, _model(config))


def _config(files: Files, folder: str) -> tuple[dict[str, Any], str]:
    """The configuration; where a folder of resid_post has none, what its name says."""
    if joined(folder, CONFIG) in files.names:
        source = files.get(joined(folder, CONFIG))
        return read_json(source), str(source)
    whole = joined(files.full_path, folder)
    match = _FOLDER.search(whole)
    if match is None:
        raise UserError(
            f"{whole} has no config.json, and is not called resid_post/layer_N_...: it does not say "
            "what it reads."
        )
    hook = f"model.layers.{match[1]}.output"
    return {"architecture": "jump_relu", "hf_hook_point_in": hook}, whole


def _read(path: Path, at: int, title: str) -> Dictionary:
    t = read_tensors(path, _SHAPES | {"w_dec": "dict model"})
    return from_tensors(at, "jumprelu", t["w_enc"].T, {at: t["w_dec"]}, t, minus=False, title=title)


def _crosscoder(files: Files, folder: str, hints: Hints) -> DictionarySet:
    """A weakly causal crosscoder.

    Raises:
        UserError: it decodes to earlier sites, or its files do not fit its configuration.
    """
    source = files.get(joined(folder, CONFIG))
    config = read_json(source)
    layers = _layers(str(source), config)
    numbers = sorted(files.numbered(folder, _PARAMS))
    if numbers not in (list(range(len(layers))), layers):
        raise UserError(
            f"{files.title} has params_layer files {numbers}, and its config names layers {layers}:"
            " one for each is needed."
        )
    names = [joined(folder, f"params_layer_{number}.safetensors") for number in numbers]
    files.fetch(names)
    by_checkpoint: dict[int, Dictionary] = {}
    for at, (name, layer) in enumerate(zip(names, layers, strict=True)):
        path = files.get(name)
        shapes = _SHAPES | {"w_dec": "dict sites model"}
        t = read_tensors(path, shapes, sizes={"sites": len(layers)})
        if any(bool(piece.any()) for piece in t["w_dec"][:, :at].split(1024)):
            raise UserError(f"{path}: {ACAUSAL_REASON}")
        decoders = {later + 1: t["w_dec"][:, at + i] for i, later in enumerate(layers[at:])}
        by_checkpoint[layer + 1] = from_tensors(
            layer + 1, "jumprelu", t["w_enc"].T, decoders, t, minus=False, title=name
        )
    entries = {layer + 1: layer for layer in layers}
    title = joined(files.title, folder)
    return DictionarySet(
        kind=WCC,
        hook=RESID_POST,
        scan=hints.scan or (scan_of(files) if not folder else title.rsplit("/", 1)[-1]),
        model_name=hints.model_name or _model(config),
        by_checkpoint=by_checkpoint,
        folder=files.root,
        entries=entries,
        neuronpedia=neuronpedia(hints, entries),
    )


LAYOUT = Layout("gemma-scope-2", (WEIGHTS,), _layer, optional=(CONFIG,))
CROSSCODER = Layout("gemma-scope-2-crosscoder", (CONFIG, PARAMS), read_set=_crosscoder)


def _layers(source: str, config: dict[str, Any]) -> list[int]:
    """The layers whose output a Gemma Scope 2 dictionary reads and writes."""
    if config.get("architecture") != "jump_relu":
        raise UserError(
            f"{source}: architecture is {config.get('architecture')!r}, and what is read here is "
            "jump_relu."
        )
    hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    match = _HF_OUTPUT.fullmatch(str(hook_in))
    if match is None or hook_out not in (None, hook_in):
        raise UserError(
            f"{source}: it reads {hook_in} and writes {hook_out}, and residual graphs need "
            "dictionaries of model.layers.N.output (resid_post_all)."
        )
    if config.get("affine_connection"):
        raise UserError(f"{source}: it has an affine connection: that is a transcoder, use -t.")
    layers = [int(n) for n in match[1].strip("{}").split(",")]
    if layers != sorted(set(layers)):
        raise UserError(f"{source}: its layers {layers} do not ascend.")
    return layers


def _model(config: dict[str, Any]) -> str | None:
    """The model's id on the hub, which some of the configurations write otherwise."""
    name = config.get("model_name")
    if not isinstance(name, str):
        return None
    if "/" not in name:
        name = f"google/{name}"
    return name.replace("gemma-v3", "gemma-3").replace("-270m-pt", "-270m")
