"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, one folder an SAE.

``W_enc`` is [d_in, d_sae]. Standard, JumpReLU, TopK and gated SAEs are read here; every other
architecture through SAELens itself where it is installed, with its own ``encode``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.dictionaries.dictionary import RESID_POST, RESID_PRE, Dictionary, Units
from circuit_tracer_qk.dictionaries.files import Files, joined
from circuit_tracer_qk.dictionaries.layouts.layout import (
    HOOK,
    Hints,
    Layer,
    Layout,
    from_tensors,
    read_tensors,
)
from circuit_tracer_qk.dictionaries.tensors import flag, mapped, read_json

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
_SHAPES = {"W_enc": "model dict", "W_dec": "dict model", "b_dec": "model"}
_BIASES = {
    "gated": {"b_gate": "dict", "b_mag": "dict", "r_mag": "dict"},
    "jumprelu": {"b_enc": "dict", "threshold": "dict"},
}


def _layer(files: Files, folder: str, hints: Hints) -> Layer:
    """One SAE, refused where its configuration asks for what cannot be done exactly."""
    source = files.get(joined(folder, CONFIG))
    cfg = read_json(source)
    metadata = cfg.get("metadata")
    about: dict[str, Any] = metadata if isinstance(metadata, dict) else cfg  # before SAELens 6
    hook_name = about.get("hook_name", about.get("hook_point"))
    hook = HOOK.fullmatch(str(hook_name))
    if hook is None:
        raise UserError(
            f"{source}: hook_name is {hook_name!r}, and residual graphs need "
            f"dictionaries of blocks.N.{RESID_PRE} or blocks.N.{RESID_POST}."
        )
    layer = int(hook[1])
    if cfg.get("reshape_activations", "none") not in (None, "none"):
        raise UserError(f"{source}: reshape_activations is for head outputs, not the residual.")
    units = _units(source, cfg, about, hints, layer)
    architecture, k = _architecture(source, cfg)
    if architecture not in _ARCHITECTURES:
        read = partial(_through_sae_lens, architecture=architecture, units=units)
    else:
        read = partial(
            _read,
            architecture=architecture,
            k=k,
            minus=flag(source, cfg, "apply_b_dec_to_input", True),
            rescaled=flag(source, cfg, "rescale_acts_by_decoder_norm") and architecture == "topk",
            units=units,
        )
    weights = joined(folder, WEIGHTS)
    return Layer(layer, hook[2], folder, weights, read, about.get("model_name"))


LAYOUT = Layout("sae-lens", (CONFIG, WEIGHTS), _layer)


def _architecture(source: Path, cfg: dict[str, Any]) -> tuple[str, int | None]:
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    architecture, k = cfg.get("architecture", "standard"), cfg.get("k")
    more = cfg.get("activation_fn_kwargs")
    if activation == "topk" and isinstance(more, dict) and "k" in more:
        architecture, k = "topk", more["k"]  # before SAELens 6
    if activation not in ("relu", "topk"):
        raise UserError(
            f"{source}: the activation {activation!r} is not read exactly: relu and topk are."
        )
    if architecture == "topk" and type(k) is not int:
        raise UserError(f"{source}: a topk SAE needs k, a whole number, and has {k!r}.")
    return str(architecture), k if architecture == "topk" else None


def _units(
    source: Path, cfg: dict[str, Any], about: dict[str, Any], hints: Hints, layer: int
) -> Units:
    """What the SAE was trained to see."""
    centred = hints.centred
    asked = about.get("model_from_pretrained_kwargs")
    if centred is None and isinstance(asked, dict) and "center_writing_weights" in asked:
        centred = bool(asked["center_writing_weights"])
    mode = cfg.get("normalize_activations", "none")
    if isinstance(mode, bool):  # before SAELens 6
        mode = "expected_average_only_in" if mode else "none"
    if centred is None and mode != "layer_norm" and _may_be_centred(cfg, about):
        raise UserError(
            f"{source} does not say whether this SAE was trained on GPT-2 with centred writing "
            "weights, as SAELens once did (gpt2-small-res-jb is), and the two differ: say `centred:"
            " true` or `false`, beside `format: sae-lens`, in a config.yaml in its folder."
        )
    centred = bool(centred)
    if mode in (None, "none"):
        return Units(centred=centred)
    if mode in ("layer_norm", "constant_norm_rescale"):
        return Units(mode, centred=centred)
    factor = hints.factor(layer)
    if mode == "expected_average_only_in" and factor is not None:
        return Units(factor=factor, centred=centred)
    raise UserError(
        f"{source}: normalize_activations is {mode!r}, whose statistics are not in its files: "
        + (
            "say `norm_scaling_factor: NUMBER`, beside `format: sae-lens`, in a config.yaml in its "
            "folder, or fold it in with SAELens (fold_activation_norm_scaling_factor)."
            if mode == "expected_average_only_in"
            else "fold it in with SAELens first (fold_activation_whitening), or use another SAE."
        )
    )


def _may_be_centred(cfg: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether the file is of the time when SAELens centred GPT-2 and did not write it down."""
    old = "hook_point" in cfg and "model_from_pretrained_kwargs" not in about
    return old and str(about.get("model_name", "")).startswith("gpt2")


def _read(path: Path, at: int, title: str, *, architecture: str, **how: Any) -> Dictionary:
    stored = mapped(path)
    for scaling in ("scaling_factor", "finetuning_scaling_factor"):
        if scaling in stored and not bool((stored[scaling] == 1).all()):
            raise UserError(
                f"{path} has the tensor {scaling}, a finetuned output scale that is not read here: "
                "fold it into W_dec."
            )
    shapes = _SHAPES | _BIASES.get(architecture, {"b_enc": "dict"})
    t = read_tensors(path, shapes, stored=stored)
    return from_tensors(at, architecture, t["W_enc"].T, {at: t["W_dec"]}, t, title=title, **how)


def _through_sae_lens(
    path: Path, at: int, title: str, *, architecture: str, units: Units
) -> Dictionary:
    """Any other architecture, by SAELens' own code; its decoder has to be linear.

    Raises:
        UserError: SAELens is not installed or cannot read it, or its reconstruction is not a sum
            of activations times decoder vectors, position by position.
    """
    try:
        from sae_lens import SAE  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    except ImportError as error:
        raise UserError(
            f"{title}: SAEs of the architecture {architecture!r} are read through SAELens: `pip "
            "install 'circuit-tracer-qk[sae-lens]'`. (standard, jumprelu, topk and gated need no "
            "SAELens, which saves batchtopk and matryoshka SAEs as jumprelu.)"
        ) from error
    local = path.parent
    try:
        sae: Any = SAE.load_from_disk(str(local), device="cpu", dtype="float32")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{title}: SAELens cannot read the architecture {architecture!r} of {local}: {reason}."
        ) from error
    sae.run_time_activation_norm_fn_in = lambda x: x  # which Units do
    sae.run_time_activation_norm_fn_out = lambda x: x
    moved: dict[Any, Any] = {}

    def encode(z: Tensor) -> Tensor:
        key = (z.device, z.dtype)
        if key not in moved:
            moved.clear()
            moved[key] = sae.to(device=z.device, dtype=z.dtype)
        acts = moved[key].encode(z)
        return acts.to_dense() if acts.is_sparse else acts

    W_dec, b_dec = sae.W_dec.detach().clone(), sae.b_dec.detach().clone()
    _check_linear(sae, encode, W_dec, b_dec, f"{title}: the architecture {architecture!r}")
    return Dictionary(
        at,
        sae.W_enc.detach().T if hasattr(sae, "W_enc") else W_dec,
        W_dec.new_zeros(len(W_dec)),
        b_dec / units.factor,
        {at: W_dec / units.factor},
        units=units,
        encoder=encode,
        title=title,
    )


@torch.no_grad()
def _check_linear(sae: Any, encode: Any, W_dec: Tensor, b_dec: Tensor, what: str) -> None:
    """Refuse an SAE whose features are no terms of one position's residual stream."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, len(b_dec), generator=g) * b_dec.norm().clamp(min=1)
    try:
        acts = encode(x)
        alone = torch.cat([encode(row[None]) for row in x])
        together = float((alone - acts).abs().max()) > 1e-5 * float(acts.abs().max())
    except Exception:  # it wants a whole prompt
        together = True
    if together:
        raise UserError(f"{what} encodes positions together, so its features are no one's own.")
    by_hand, itself = acts @ W_dec + b_dec, sae.decode(acts)
    if float((by_hand - itself).abs().max()) > 1e-5 * float(by_hand.abs().max().clamp(min=1e-6)):
        raise UserError(
            f"{what} does not reconstruct by activations times decoder vectors, so its features "
            "are no terms of the residual stream."
        )
