"""Random dictionaries in the native format, and an independent reading of them.

``decomposition`` recomputes activations, decoder vectors, biases and errors from the files alone,
position by position: the plain meaning of method.md, section 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

POST, PRE = "hook_resid_post", "hook_resid_pre"


def write_sae(
    folder: Path,
    d_model: int,
    layers: list[int],
    *,
    hook: str = POST,
    d_dict: int = 40,
    activation: str = "jumprelu",
    seed: int = 0,
) -> Path:
    """A residual SAE set: about a quarter of its features active at a position."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        tensors = {
            "W_enc": _randn(generator, d_dict, d_model) / d_model**0.5,
            "W_dec": _randn(generator, d_dict, d_model) * 0.4,
            "b_enc": _randn(generator, d_dict) * 0.1 - 0.2,
            "b_dec": _randn(generator, d_model) * 0.3,
        }
        if activation == "jumprelu":
            tensors["activation_function.threshold"] = _randn(generator, d_dict).abs() * 0.3
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    extra = {"activation": "topk", "k": 7} if activation == "topk" else {}
    _config(folder, "residual_sae_set", layers, hook, extra)
    return folder


def write_wcc(
    folder: Path, d_model: int, layers: list[int], *, d_dict: int = 24, seed: int = 1
) -> Path:
    """A weakly causal crosscoder over resid_post of ``layers``."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(layers):
        encoder = {
            f"W_enc_{layer}": _randn(generator, d_dict, d_model) / d_model**0.5,
            f"b_enc_{layer}": _randn(generator, d_dict) * 0.1 - 0.2,
            f"b_dec_{layer}": _randn(generator, d_model) * 0.3,
            f"threshold_{layer}": _randn(generator, d_dict).abs() * 0.3,
        }
        decoder = {f"W_dec_{layer}": _randn(generator, d_dict, len(layers) - i, d_model) * 0.4}
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        save_file(decoder, folder / f"W_dec_{layer}.safetensors")
    _config(folder, "weakly_causal_crosscoder", layers, POST, {})
    return folder


class Site(NamedTuple):
    """One checkpoint taken apart.

    Attributes:
        features: (position, checkpoint read, index) -> its vector ``a_i v_i`` here.
        activations: the same keys -> activation; only of features that read this checkpoint.
        decoder: the same keys -> ``a_i v_i`` at the checkpoint read.
        bias: (d_model,).
        error: (n_pos, d_model).
    """

    features: dict[tuple[int, int, int], Tensor]
    activations: dict[tuple[int, int, int], float]
    bias: Tensor
    error: Tensor


def decomposition(folder: Path, residual: list[Tensor], zero_positions: int = 1) -> dict[int, Site]:
    """Every checkpoint that ``folder`` has a dictionary for, from its files alone.

    Args:
        folder: as written by this module.
        residual: (n_pos, d_model) at every checkpoint, in the dtype wanted.
        zero_positions: how many first positions have no features.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text())
    shift = 1 if config["feature_input_hook"] == POST else 0
    layers: list[int] = config["layers"]
    crosscoder = config["model_kind"] == "weakly_causal_crosscoder"
    sites = {
        layer + shift: Site({}, {}, torch.empty(0), residual[layer + shift].clone())
        for layer in layers
    }
    for i, layer in enumerate(layers):
        c = layer + shift
        names = ("W_enc", "W_dec", "layer") if crosscoder else ("layer",)
        tensors: dict[str, Tensor] = {}
        for name in names:
            path = folder / f"{name}_{layer}.safetensors"
            tensors |= load_file(path) if path.exists() else {}
        tensors = {
            name.removesuffix(f"_{layer}"): t.to(residual[c].dtype) for name, t in tensors.items()
        }
        threshold = tensors.get("activation_function.threshold", tensors.get("threshold"))
        bias = tensors["b_dec"]
        sites[c] = sites[c]._replace(bias=bias)
        sites[c].error.sub_(bias)
        for p in range(zero_positions, len(residual[c])):
            pre = tensors["W_enc"] @ residual[c][p] + tensors["b_enc"]
            allowed = range(len(pre))
            if "k" in config:
                allowed = sorted(allowed, key=lambda f: -float(pre[f]))[: config["k"]]
            for f in allowed:
                if float(pre[f]) <= (0.0 if threshold is None else float(threshold[f])):
                    continue
                sites[c].activations[p, c, f] = float(pre[f])
                for j, at in enumerate(layers[i:] if crosscoder else [layer]):
                    decoder = tensors["W_dec"][f, j] if crosscoder else tensors["W_dec"][f]
                    sites[at + shift].features[p, c, f] = pre[f] * decoder
                    sites[at + shift].error[p] -= pre[f] * decoder
    return sites


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _config(folder: Path, kind: str, layers: list[int], hook: str, extra: dict) -> None:
    config = {
        "model_name": "tiny",
        "model_kind": kind,
        "feature_input_hook": hook,
        "feature_output_hook": hook,
        "layers": layers,
        "scan": folder.name,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config | extra))
