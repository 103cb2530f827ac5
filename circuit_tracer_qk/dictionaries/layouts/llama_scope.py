"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``, one folder an SAE.

As its owners' loader reads it: with ``norm_activation: dataset-wise`` the biases are divided by
sqrt(d_model) / average norm, after which input, activations and threshold are in the model's own
units; with ``sparsity_include_decoder_norm`` decoder vectors have norm 1 before the threshold is
compared; TopK with a threshold is JumpReLU.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import RESID_POST, RESID_PRE, Dictionary, Units
from circuit_tracer_qk.dictionaries.files import Files, joined
from circuit_tracer_qk.dictionaries.layouts.layout import (
    HOOK,
    Hints,
    Layer,
    Layout,
    read_tensors,
    row_norms,
)
from circuit_tracer_qk.dictionaries.tensors import flag, read_json

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
MODEL = "meta-llama/Llama-3.1-8B"


def _layer(files: Files, folder: str, hints: Hints) -> Layer:
    source = files.get(joined(folder, CONFIG))
    config = read_json(source)
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    hook = HOOK.fullmatch(str(hook_in))
    if hook is None or hook_out not in (None, hook_in):
        raise UserError(
            f"{source}: it reads {hook_in} and writes {hook_out}, and residual graphs need "
            f"dictionaries of blocks.N.{RESID_PRE} or blocks.N.{RESID_POST} (Llama Scope's LXR)."
        )
    if config.get("use_glu_encoder"):
        raise UserError(f"{source}: use_glu_encoder, a gated linear encoder, is not read here.")
    read = partial(_read, source=source, config=config, how=_how(source, config))
    model = MODEL if "Llama3_1-8B" in source.as_posix() else None
    return Layer(int(hook[1]), hook[2], folder, joined(folder, WEIGHTS), read, model)


LAYOUT = Layout("llama-scope", (CONFIG, WEIGHTS), _layer)


def _how(source: Path, config: dict[str, Any]) -> tuple[float | None, int | None]:
    """(threshold, k) of the activation function; both None for a plain ReLU."""
    name = str(config.get("act_fn", "relu")).lower()
    threshold, k = config.get("jump_relu_threshold"), config.get("top_k")
    if threshold is not None and type(threshold) not in (int, float):
        raise UserError(f"{source}: jump_relu_threshold should be a number, found {threshold!r}.")
    if name == "jumprelu" or (name == "topk" and (threshold or 0) > 0):
        if not isinstance(threshold, int | float):
            raise UserError(
                f"{source}: a jumprelu SAE needs jump_relu_threshold, has {threshold!r}."
            )
        return max(float(threshold), 0.0), None
    if name == "topk":
        if type(k) is not int:
            raise UserError(f"{source}: a topk SAE needs top_k, a whole number, and has {k!r}.")
        return None, k
    if name != "relu":
        raise UserError(f"{source}: act_fn {name!r} is not read here: relu, topk and jumprelu are.")
    return None, None


def _read(
    path: Path,
    at: int,
    title: str,
    *,
    source: Path,
    config: dict[str, Any],
    how: tuple[float | None, int | None],
) -> Dictionary:
    biased = flag(source, config, "use_decoder_bias", True)
    shapes = {"encoder.weight": "dict model", "decoder.weight": "model dict"}
    shapes |= {"encoder.bias": "dict"} | ({"decoder.bias": "model"} if biased else {})
    t = read_tensors(path, shapes)
    W_dec, units = t["decoder.weight"].T, Units()
    d_dict, d_model = W_dec.shape
    s_in, s_out, mode = 1.0, 1.0, config.get("norm_activation", "none")
    if mode == "dataset-wise":
        norms = config.get("dataset_average_activation_norm")
        if not isinstance(norms, dict) or not all(
            isinstance(norms.get(side), int | float) and norms[side] > 0 for side in ("in", "out")
        ):
            raise UserError(
                f"{source}: norm_activation dataset-wise needs dataset_average_activation_norm with "
                f"numbers `in` and `out`, found {norms!r}."
            )
        s_in, s_out = (d_model**0.5 / norms[side] for side in ("in", "out"))
    elif mode == "token-wise":
        units = Units("constant_norm_rescale")
    elif mode not in (None, "none", "inference"):
        raise UserError(
            f"{source}: norm_activation {mode!r} depends on the whole batch: no position's "
            "reconstruction is its own."
        )
    b_dec = t["decoder.bias"] if biased else torch.zeros(d_model)
    encoder_scale, decoder_scale = None, torch.full((d_dict,), s_in / s_out, dtype=torch.float64)
    if flag(source, config, "sparsity_include_decoder_norm"):
        norm = row_norms(W_dec) * (s_in / s_out)
        encoder_scale, decoder_scale = norm, decoder_scale / norm.clamp(min=1e-8)
    threshold, k = how
    minus = flag(source, config, "apply_decoder_bias_to_pre_encoder")
    return Dictionary(
        at,
        t["encoder.weight"],
        t["encoder.bias"] / s_in,
        b_dec / s_out,
        {at: W_dec},
        threshold=None if threshold is None else torch.full((d_dict,), threshold),
        k=k,
        subtract=b_dec / s_in if minus else None,
        encoder_scale=encoder_scale,
        decoder_scale=decoder_scale,
        units=units,
        title=title,
    )
