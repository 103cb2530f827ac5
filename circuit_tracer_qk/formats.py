"""Dictionaries in the layouts that others save them in, read as their owners mean them.

A local folder is recognised by its files; each layout's activations and decoder vectors are folded
into the model's own units, so that everything after this module sees one kind of dictionary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk import dictionaries as native
from circuit_tracer_qk.dictionaries import (
    RESID_POST,
    RESID_PRE,
    SAE,
    WCC,
    Dictionary,
    DictionarySet,
)
from circuit_tracer_qk.errors import UserError

_HOOK = re.compile(rf"blocks\.(\d+)\.({RESID_PRE}|{RESID_POST})")
_HF_OUTPUT = re.compile(r"model\.layers\.(\d+|\{\d+(?:,\d+)*\})\.output")
_PARAMS = re.compile(r"params_layer_(\d+)\.safetensors")


class _Entry(NamedTuple):
    """One layer's SAE: where it stands, and how to read it."""

    layer: int
    hook: str
    title: str
    model_name: str | None
    read: Callable[[], Dictionary]


def load_dictionaries(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DictionarySet:
    """Load residual SAEs or a weakly causal crosscoder.

    Local folders in the native format (:func:`circuit_tracer_qk.dictionaries.load_dictionaries`),
    of SAELens 6 (``cfg.json`` and ``sae_weights.safetensors``, one SAE or a folder of them) and of
    Gemma Scope 2 (``config.json`` with ``params.safetensors``, or a crosscoder's
    ``params_layer_*.safetensors``) are recognised by their files; hub ids are native.

    Args:
        ref: a built-in name, a local folder or a hub id ``org/name[@revision]``.
        device: where the weights go.
        dtype: what they are cast to.

    Raises:
        UserError: the dictionaries cannot be had, or cannot be read exactly.
    """
    folder = Path(ref).expanduser()
    if str(ref) in native.BUILT_IN or not folder.is_dir() or (folder / "config.yaml").is_file():
        return native.load_dictionaries(ref, device=device, dtype=dtype)
    crosscoder = _crosscoder(folder)
    if crosscoder is not None:
        return crosscoder.to(device, dtype)
    entries = [e for path in _candidates(folder) for e in _entries(path)]
    if not entries:
        return native.load_dictionaries(ref, device=device, dtype=dtype)  # which says what it wants
    return _set(folder, entries).to(device, dtype)


def _candidates(folder: Path) -> list[Path]:
    """The folder itself, or its folders."""
    if any((folder / name).is_file() for name in ("cfg.json", "config.json")):
        return [folder]
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _entries(path: Path) -> Iterable[_Entry]:
    if (path / "cfg.json").is_file():
        yield _sae_lens(path)
    elif (path / "config.json").is_file() and (path / "params.safetensors").is_file():
        yield _gemma_scope_2(path)


def _set(folder: Path, entries: list[_Entry]) -> DictionarySet:
    """One set of the SAEs of a folder, one a layer."""
    hooks = {entry.hook for entry in entries}
    if len(hooks) > 1:
        raise UserError(
            f"{folder} holds SAEs of {RESID_PRE} and of {RESID_POST}: give a folder with those of "
            "one of them."
        )
    by_layer: dict[int, _Entry] = {}
    for entry in entries:
        other = by_layer.setdefault(entry.layer, entry)
        if other is not entry:
            raise UserError(
                f"{folder} holds several SAEs of layer {entry.layer} ({other.title} and "
                f"{entry.title}): give a folder with one for each layer."
            )
    [hook] = hooks
    shift = 1 if hook == RESID_POST else 0
    layers = sorted(by_layer)
    read = tqdm(layers, "Loading dictionaries", leave=False, delay=2, disable=None)
    found = {layer + shift: by_layer[layer].read() for layer in read}
    widths = {len(d.b_dec) for d in found.values()}
    if len(widths) > 1:
        raise UserError(
            f"the SAEs of {folder} are of different widths d_model ({sorted(widths)}): they do not "
            "belong to one model."
        )
    names = {entry.model_name for entry in entries if entry.model_name}
    return DictionarySet(
        kind=SAE,
        hook=hook,
        scan=folder.resolve().name,
        model_name=names.pop() if len(names) == 1 else None,
        by_checkpoint=found,
        folder=folder,
        entries={layer + shift: layer for layer in layers},
    )


# SAELens ------------------------------------------------------------------------------------------


def _sae_lens(path: Path) -> _Entry:
    """A SAELens SAE, refused where its configuration asks for what is not folded here."""
    where = path / "cfg.json"
    cfg = _json(where)
    metadata = cfg.get("metadata")
    about: dict[str, Any] = metadata if isinstance(metadata, dict) else cfg  # before SAELens 6
    hook_name = about.get("hook_name", about.get("hook_point"))
    hook = _HOOK.fullmatch(str(hook_name))
    if hook is None:
        raise UserError(
            f"{where}: hook_name is {hook_name!r}, and residual graphs need "
            f"dictionaries of blocks.N.{RESID_PRE} or blocks.N.{RESID_POST}."
        )
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    architecture, k = cfg.get("architecture", "standard"), cfg.get("k")
    if activation == "topk" and "k" in (cfg.get("activation_fn_kwargs") or {}):
        architecture, k = "topk", cfg["activation_fn_kwargs"]["k"]  # before SAELens 6
    if architecture not in ("standard", "jumprelu", "topk", "gated"):
        raise UserError(
            f"{where}: architecture {architecture!r} is not read exactly here: standard, jumprelu, "
            "topk and gated are (SAELens saves batchtopk and matryoshka SAEs as jumprelu)."
        )
    normalised = cfg.get("normalize_activations", "none")
    if normalised not in (None, "none", False):
        raise UserError(
            f"{where}: normalize_activations is {normalised!r}, so its reconstruction is not in the "
            "model's units: fold it in with SAELens first (fold_activation_norm_scaling_factor or "
            "fold_activation_whitening), or use an SAE without it."
        )
    if cfg.get("reshape_activations", "none") not in (None, "none"):
        raise UserError(f"{where}: reshape_activations is for head outputs, not the residual.")
    if activation not in ("relu", "topk"):
        raise UserError(
            f"{where}: the activation {activation!r} is not read exactly: relu and topk are."
        )
    layer, name = int(hook[1]), about.get("model_name")
    checkpoint = layer + (1 if hook[2] == RESID_POST else 0)

    def read() -> Dictionary:
        file = path / "sae_weights.safetensors"
        names = ["W_enc", "W_dec", "b_dec"]
        names += ["b_gate", "b_mag", "r_mag"] if architecture == "gated" else ["b_enc"]
        names += ["threshold"] if architecture == "jumprelu" else []
        t = _tensors(file, names, transposed="W_enc")
        _check_no_scaling(file)
        W_enc, W_dec = t["W_enc"].T.contiguous(), t["W_dec"]
        # what the encoder subtracts from its input is part of its bias
        minus = W_enc @ t["b_dec"] if cfg.get("apply_b_dec_to_input", True) else 0.0
        if architecture == "gated":
            gain = t["r_mag"].exp()
            return Dictionary(
                checkpoint,
                W_enc,
                t["b_gate"] - minus,
                t["b_dec"],
                {checkpoint: W_dec},
                gain=gain,
                b_mag=t["b_mag"] - minus * gain,
            )
        b_enc = t["b_enc"] - minus
        if architecture == "topk" and cfg.get("rescale_acts_by_decoder_norm", False):
            norm = W_dec.norm(dim=1)
            W_enc, b_enc = W_enc * norm[:, None], b_enc * norm
            W_dec = W_dec / norm[:, None]
        threshold = t.get("threshold")
        if threshold is not None:  # SAELens applies a ReLU too
            threshold = threshold.clamp(min=0)
        return Dictionary(checkpoint, W_enc, b_enc, t["b_dec"], {checkpoint: W_dec}, threshold, top)

    if architecture == "topk" and not isinstance(k, int):
        raise UserError(f"{where}: a topk SAE needs k, a whole number, and has {k!r}.")
    top = k if architecture == "topk" else None
    return _Entry(layer, hook[2], path.name, name if isinstance(name, str) else None, read)


def _check_no_scaling(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name in ("scaling_factor", "finetuning_scaling_factor"):
            if name in file.keys() and not bool((file.get_tensor(name) == 1).all()):
                raise UserError(
                    f"{path} has the tensor {name}, a finetuned output scale that is not read here: "
                    "fold it into W_dec."
                )


# Gemma Scope 2 ------------------------------------------------------------------------------------


def _gemma_scope_2(path: Path) -> _Entry:
    """A residual SAE of Gemma Scope 2: JumpReLU, ``w_enc`` [d_model, d_sae]."""
    config = _json(path / "config.json")
    [layer] = _gemma_layers(path, config)

    def read() -> Dictionary:
        names = ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"]
        t = _tensors(path / "params.safetensors", names, transposed="w_enc")
        return Dictionary(
            layer + 1,
            t["w_enc"].T.contiguous(),
            t["b_enc"],
            t["b_dec"],
            {layer + 1: t["w_dec"]},
            t["threshold"],
        )

    name = config.get("model_name")
    return _Entry(layer, RESID_POST, path.name, name if isinstance(name, str) else None, read)


def _crosscoder(folder: Path) -> DictionarySet | None:
    """A weakly causal crosscoder of Gemma Scope 2; None where the folder is none."""
    if not (folder / "config.json").is_file() or (folder / "params.safetensors").is_file():
        return None
    numbers = sorted(
        int(match[1]) for p in folder.iterdir() if (match := _PARAMS.fullmatch(p.name))
    )
    if not numbers:
        return None
    config = _json(folder / "config.json")
    layers = _gemma_layers(folder, config)
    if numbers not in (list(range(len(layers))), layers):
        raise UserError(
            f"{folder} has params_layer files {numbers}, and its config names layers {layers}: one "
            "for each is needed."
        )
    found: dict[int, Dictionary] = {}
    for at, (number, layer) in enumerate(zip(numbers, layers, strict=True)):
        file = folder / f"params_layer_{number}.safetensors"
        names = ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"]
        t = _tensors(file, names, transposed="w_enc", n_sites=len(layers))
        if bool(t["w_dec"][:, :at].any()):
            raise UserError(f"{file}: {native.ACAUSAL_REASON}")
        found[layer + 1] = Dictionary(
            layer + 1,
            t["w_enc"].T.contiguous(),
            t["b_enc"],
            t["b_dec"],
            {later + 1: t["w_dec"][:, at + i].contiguous() for i, later in enumerate(layers[at:])},
            t["threshold"],
        )
    name = config.get("model_name")
    return DictionarySet(
        kind=WCC,
        hook=RESID_POST,
        scan=folder.resolve().name,
        model_name=name if isinstance(name, str) else None,
        by_checkpoint=found,
        folder=folder,
        entries={layer + 1: layer for layer in layers},
    )


def _gemma_layers(path: Path, config: dict[str, Any]) -> list[int]:
    """The layers whose output a Gemma Scope 2 dictionary reads and writes."""
    where = path / "config.json"
    if config.get("architecture") != "jump_relu":
        raise UserError(
            f"{where}: architecture is {config.get('architecture')!r}, and what is read here is "
            "jump_relu."
        )
    hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    found = _HF_OUTPUT.fullmatch(str(hook_in))
    if found is None or hook_out not in (None, hook_in):
        raise UserError(
            f"{where}: it reads {hook_in} and writes {hook_out}, and residual graphs need "
            "dictionaries of model.layers.N.output (resid_post_all)."
        )
    if config.get("affine_connection"):
        raise UserError(f"{where}: it has an affine connection: that is a transcoder, use -t.")
    layers = [int(n) for n in found[1].strip("{}").split(",")]
    if layers != sorted(set(layers)):
        raise UserError(f"{where}: its layers {layers} do not ascend.")
    return layers


# Files --------------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} should be a JSON object.")
    return document


def _tensors(
    path: Path, names: list[str], *, transposed: str, n_sites: int | None = None
) -> dict[str, Tensor]:
    """A layer's tensors in float32, their shapes checked against one another.

    Args:
        path: the file.
        names: what it has to hold.
        transposed: the encoder, stored [d_model, d_dict].
        n_sites: of a crosscoder's decoder, [d_dict, n_sites, d_model].

    Raises:
        UserError: naming the file and the tensor that is wrong.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: fetch it again.")
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            found = {name: file.get_tensor(name) for name in names if name in stored}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}): fetch it again."
        ) from error
    for name in names:
        if name not in found:
            raise UserError(f"{path} lacks the tensor {name}; it has {', '.join(sorted(stored))}.")
    width = len(found["b_dec"]) if found["b_dec"].ndim == 1 else -1
    d_dict = found[transposed].shape[-1]
    for name, tensor in found.items():
        expected: tuple[int, ...] = (d_dict,)
        if name == transposed:
            expected = (width, d_dict)
        elif name.lower() == "w_dec":
            expected = (d_dict, width) if n_sites is None else (d_dict, n_sites, width)
        elif name == "b_dec":
            expected = (width,)
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"the tensor {name} of {path} should be {list(expected)} and is "
                f"{list(tensor.shape)}."
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"the tensor {name} of {path} holds no finite floating-point numbers.")
    return {name: tensor.float() for name, tensor in found.items()}
