"""Tiny dictionaries in the layouts of their owners, and what their owners compute with them.

Names, shapes, dtypes and configuration keys are those of the published code. The equations are
written out per layout, in float64, and share nothing with the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

D, N, K = 24, 40, 7
MODEL = "tiny/model"


class Read(NamedTuple):
    """What an SAE says of a stream.

    Attributes:
        vectors: (n_pos, N, D), each feature's part of the reconstruction.
        bias: (n_pos, D), the rest of it.
        acts: (n_pos, N), the owner's activations.
    """

    vectors: Tensor
    bias: Tensor
    acts: Tensor


def draw(layer: int, *, thresholds: bool = True, n: int = N) -> dict[str, Tensor]:
    """Random weights; encoder and decoder [n, D]."""
    g = torch.Generator().manual_seed(100 + layer)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    tensors = {
        "W_enc": randn(n, D) / D**0.5,
        "W_dec": randn(n, D) * 0.4,
        "b_enc": randn(n) * 0.1 - 0.2,
        "b_dec": randn(D) * 0.3,
    }
    return tensors | ({"threshold": randn(n).abs() * 0.3} if thresholds else {})


def _linear(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Read:
    return Read(acts[..., None] * W_dec, b_dec.expand(len(acts), -1), acts)


def _topk(pre: Tensor, k: int) -> Tensor:
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


def _double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in tensors.items()}


# SAELens ------------------------------------------------------------------------------------------

SAE_LENS = ("standard", "jumprelu", "topk", "topk-rescaled", "gated")


def write_sae_lens(
    folder: Path,
    layer: int,
    kind: str = "jumprelu",
    hook: str = "hook_resid_post",
    about: dict[str, Any] | None = None,
    **more: Any,
) -> Path:
    """One SAE as SAELens 6 saves it: ``W_enc`` is [d_in, d_sae]."""
    path = folder / f"blocks.{layer}.{hook}"
    path.mkdir(parents=True)
    architecture = kind.split("-")[0]
    t = draw(layer)
    tensors = {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if architecture == "gated":
        g = torch.Generator().manual_seed(layer)
        gates = ("b_gate", "b_mag", "r_mag")
        tensors |= {name: torch.randn(N, generator=g) * 0.2 - 0.1 for name in gates}
    else:
        tensors["b_enc"] = t["b_enc"]
    if architecture == "jumprelu":
        tensors["threshold"] = t["threshold"] - 0.1  # some below zero: a ReLU applies too
    save_file(tensors, path / "sae_weights.safetensors")
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": MODEL,
            "hook_name": f"blocks.{layer}.{hook}",
            **(about or {}),
        },
    }
    if architecture == "topk":
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": kind == "topk-rescaled"}
    (path / "cfg.json").write_text(json.dumps(cfg | more))
    return path


def sae_lens_reads(path: Path, x: Tensor, factor: float = 1.0) -> Read:
    """SAELens' equations; ``factor`` is what expected_average_only_in multiplies the input with."""
    cfg = json.loads((path / "cfg.json").read_text())
    t = _double(load_file(path / "sae_weights.safetensors"))
    kwargs = cfg["metadata"].get("model_from_pretrained_kwargs", {})
    scale, shift = torch.ones(len(x), 1).double(), torch.zeros(len(x), 1).double()
    if kwargs.get("center_writing_weights"):  # such a model's stream has mean 0
        shift = x.mean(-1, keepdim=True)
        x = x - shift
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        scale = (x - mean).std(-1, keepdim=True)
        x, shift = (x - mean) / (scale + 1e-5), shift + mean
    if cfg["normalize_activations"] == "constant_norm_rescale":
        scale = x.norm(dim=-1, keepdim=True) / D**0.5
        x = x / scale
    x = x * factor
    inner = x - t["b_dec"] * cfg["apply_b_dec_to_input"]
    W_dec = t["W_dec"]
    if cfg["architecture"] == "gated":
        gate = inner @ t["W_enc"] + t["b_gate"] > 0
        acts = gate * torch.relu(inner @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    else:
        pre = inner @ t["W_enc"] + t["b_enc"]
        acts = pre.relu()
        if cfg["architecture"] == "jumprelu":
            acts = acts * (pre > t["threshold"])
        if cfg["architecture"] == "topk":
            norm = W_dec.norm(dim=-1) if cfg["rescale_acts_by_decoder_norm"] else torch.ones(N)
            acts, W_dec = _topk(pre * norm, cfg["k"]), W_dec / norm[:, None]
    vectors, bias, acts = _linear(acts, W_dec, t["b_dec"])
    back = scale / factor
    return Read(vectors * back[..., None], bias * back + shift, acts)


# Gemma Scope --------------------------------------------------------------------------------------


def write_gemma_scope(
    folder: Path, layer: int, *, l0: int = 71, lower: bool = False, compressed: bool = False
) -> Path:
    """``params.npz``; some repositories write ``w_enc``, most ``W_enc`` [d_model, d_sae]."""
    path = folder / f"layer_{layer}" / "width_16k" / f"average_l0_{l0}"
    path.mkdir(parents=True)
    t = {name: tensor.numpy() for name, tensor in draw(layer).items()}
    t["W_enc"] = np.ascontiguousarray(t["W_enc"].T)
    if lower:
        t = {name.replace("W_", "w_"): array for name, array in t.items()}
    save: Callable[..., None] = np.savez_compressed if compressed else np.savez
    save(path / "params.npz", **t)
    return path


def gemma_scope_reads(path: Path, x: Tensor) -> Read:
    with np.load(path / "params.npz") as data:
        t = {name.replace("w_", "W_"): torch.tensor(data[name]).double() for name in data}
    pre = x @ t["W_enc"] + t["b_enc"]
    return _linear((pre > t["threshold"]) * pre.relu(), t["W_dec"], t["b_dec"])


def write_gemma_scope_2(
    folder: Path, layer: int, size: str = "small", *, config: bool = True
) -> Path:
    path = folder / f"layer_{layer}_width_16k_l0_{size}"
    path.mkdir(parents=True)
    t = draw(layer)
    tensors = {"w_enc": t["W_enc"].T.contiguous(), "w_dec": t["W_dec"]}
    tensors |= {name: t[name] for name in ("b_enc", "b_dec", "threshold")}
    save_file(tensors, path / "params.safetensors")
    if config:
        hook = f"model.layers.{layer}.output"
        about = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": N, "l0": 8}
        about |= {"model_name": MODEL, "architecture": "jump_relu", "affine_connection": False}
        (path / "config.json").write_text(json.dumps(about | {"type": "sae"}))
    return path


def gemma_scope_2_reads(path: Path, x: Tensor) -> Read:
    t = _double(load_file(path / "params.safetensors"))
    pre = x @ t["w_enc"] + t["b_enc"]
    return _linear((pre > t["threshold"]) * pre.relu(), t["w_dec"], t["b_dec"])


def write_crosscoder(folder: Path, layers: list[int], *, acausal: bool = False) -> Path:
    """Gemma Scope 2's weakly causal crosscoder: ``w_dec`` [latents, sites, d_model]."""
    folder.mkdir(parents=True)
    for i in range(len(layers)):
        t = draw(i)
        g = torch.Generator().manual_seed(i)
        decoder = torch.randn(N, len(layers), D, generator=g) * 0.4
        if not acausal:
            decoder[:, :i] = 0
        tensors = {"w_enc": t["W_enc"].T.contiguous(), "w_dec": decoder}
        tensors |= {name: t[name] for name in ("b_enc", "b_dec", "threshold")}
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    hook = f"model.layers.{{{','.join(map(str, layers))}}}.output"
    config = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "architecture": "jump_relu"}
    config |= {"model_name": MODEL, "type": "crosscoder"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Llama Scope --------------------------------------------------------------------------------------


def write_llama_scope(folder: Path, layer: int, expansion: str = "8x", **more: Any) -> Path:
    path = folder / f"Llama3_1-8B-Base-L{layer}R-{expansion}"
    (path / "checkpoints").mkdir(parents=True)
    t = draw(layer)
    tensors = {
        "encoder.weight": t["W_enc"],
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(),
        "decoder.bias": t["b_dec"],
    }
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, path / "checkpoints" / "final.safetensors")
    hyperparams = {
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
        "hook_point_out": f"blocks.{layer}.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.25,
        "top_k": K,
        "d_model": D,
        "d_sae": N,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 3.0 + layer, "out": 3.0 + layer},
        "sparsity_include_decoder_norm": True,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
    }
    (path / "hyperparams.json").write_text(json.dumps(hyperparams | more))
    return path


def llama_scope_reads(path: Path, x: Tensor) -> Read:
    """The owners' loader: statistics into the biases, decoder norms to 1, then the threshold."""
    cfg = json.loads((path / "hyperparams.json").read_text())
    t = _double(load_file(path / "checkpoints" / "final.safetensors"))
    W_enc, b_enc = t["encoder.weight"], t["encoder.bias"]
    W_dec, b_dec = t["decoder.weight"].T, t["decoder.bias"]
    scale = torch.ones(len(x), 1).double()
    if cfg["norm_activation"] == "dataset-wise":
        s_in, s_out = (
            D**0.5 / cfg["dataset_average_activation_norm"][side] for side in ("in", "out")
        )
        b_enc, b_dec, W_dec = b_enc / s_in, b_dec / s_out, W_dec * s_in / s_out
    if cfg["norm_activation"] == "token-wise":
        scale = x.norm(dim=-1, keepdim=True) / D**0.5
        x = x / scale
    if cfg["sparsity_include_decoder_norm"]:
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    if cfg["apply_decoder_bias_to_pre_encoder"]:
        x = x - b_dec
    pre = x @ W_enc.T + b_enc
    if cfg["act_fn"] == "topk" and not cfg["jump_relu_threshold"] > 0:
        acts = _topk(pre, cfg["top_k"])
    elif cfg["act_fn"] == "relu":
        acts = pre.relu()
    else:
        acts = pre.where(pre > cfg["jump_relu_threshold"], 0)
    vectors, bias, acts = _linear(acts, W_dec, b_dec)
    return Read(vectors * scale[..., None], bias * scale, acts)


# sparsify -----------------------------------------------------------------------------------------


def write_sparsify(
    folder: Path, layer: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, **more: Any
) -> Path:
    path = folder / f"layers.{layer}"
    path.mkdir(parents=True)
    t = draw(layer)
    tensors = {"encoder.weight": t["W_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    tensors |= {"encoder.bias": t["b_enc"]} if bias else {}
    save_file({n: t.to(dtype) for n, t in tensors.items()}, path / "sae.safetensors")
    cfg = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": K}
    cfg |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
    (path / "cfg.json").write_text(json.dumps(cfg | {"activation": "topk"} | more))
    return path


def sparsify_reads(path: Path, x: Tensor) -> Read:
    t = _double(load_file(path / "sae.safetensors"))
    pre = (x - t["b_dec"]) @ t["encoder.weight"].T + t.get("encoder.bias", torch.zeros(N))
    return _linear(_topk(pre.relu(), K), t["W_dec"], t["b_dec"])


# dictionary_learning ------------------------------------------------------------------------------

DICTIONARY_LEARNING = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
    "GatedAutoEncoder",
)


def write_dictionary_learning(
    folder: Path,
    layer: int,
    name: str = "BatchTopKSAE",
    said: dict[str, Any] | None = None,
) -> Path:
    path = folder / f"resid_post_layer_{layer}" / "trainer_0"
    path.mkdir(parents=True)
    t = draw(layer)
    plain = {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"]}
    plain |= {"b_enc": t["b_enc"], "b_dec": t["b_dec"]}
    linear = {"encoder.weight": t["W_enc"], "decoder.weight": t["W_dec"].T.contiguous()}
    biased = linear | {"encoder.bias": t["b_enc"]}
    top = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.3)}
    gates = {"r_mag": t["threshold"], "gate_bias": t["b_enc"], "mag_bias": t["b_enc"] + 0.1}
    state = {
        "AutoEncoder": biased | {"bias": t["b_dec"]},
        "AutoEncoderNew": biased | {"decoder.bias": t["b_dec"]},
        "AutoEncoderTopK": biased | {"b_dec": t["b_dec"]} | top,
        "BatchTopKSAE": biased | {"b_dec": t["b_dec"]} | top,
        "MatryoshkaBatchTopKSAE": plain | top | {"group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": plain | {"threshold": t["threshold"]},
        "GatedAutoEncoder": linear | gates | {"decoder_bias": t["b_dec"]},
    }[name]
    torch.save(state, path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": N, "layer": layer}
    trainer |= {"lm_name": MODEL, "submodule_name": f"resid_post_layer_{layer}"}
    trainer |= {"k": K} if "k" in state else {}
    config = {"trainer": trainer | (said or {}), "buffer": {"d_submodule": D, "ctx_len": 128}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def dictionary_learning_reads(path: Path, x: Tensor) -> Read:
    name = json.loads((path / "config.json").read_text())["trainer"]["dict_class"]
    t = _double(torch.load(path / "ae.pt"))
    if name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        inner = x - t["b_dec"] * (name != "JumpReluAutoEncoder")
        pre = inner @ t["W_enc"] + t["b_enc"]
        acts = pre.relu() * (pre > t["threshold"])
        return _linear(acts, t["W_dec"], t["b_dec"])
    W_enc, W_dec = t["encoder.weight"].T, t["decoder.weight"].T
    if name == "GatedAutoEncoder":
        inner = (x - t["decoder_bias"]) @ W_enc
        magnitude = (t["r_mag"].exp() * inner + t["mag_bias"]).relu()
        acts = (inner + t["gate_bias"] > 0) * magnitude
        return _linear(acts, W_dec, t["decoder_bias"])
    if name == "AutoEncoderNew":
        acts = (x @ W_enc + t["encoder.bias"]).relu()
        return _linear(acts, W_dec, t["decoder.bias"])
    b_dec = t["bias"] if name == "AutoEncoder" else t["b_dec"]
    acts = ((x - b_dec) @ W_enc + t["encoder.bias"]).relu()
    if name == "AutoEncoderTopK":
        acts = _topk(acts, int(t["k"]))
    if name == "BatchTopKSAE":
        acts = acts * (acts > t["threshold"])
    return _linear(acts, W_dec, b_dec)


# Qwen Scope ---------------------------------------------------------------------------------------


def write_qwen_scope(folder: Path, layer: int) -> Path:
    """One file a layer, in a repository whose name ends in ``W32K-L0_7``."""
    folder.mkdir(parents=True, exist_ok=True)
    t = draw(layer, thresholds=False, n=128)
    t["W_dec"] = t["W_dec"].T.contiguous()
    torch.save(t, folder / f"layer{layer}.sae.pt")
    return folder / f"layer{layer}.sae.pt"


def qwen_scope_reads(path: Path, x: Tensor) -> Read:
    t = _double(torch.load(path))
    return _linear(_topk(x @ t["W_enc"].T + t["b_enc"], K), t["W_dec"].T, t["b_dec"])


# Every layout -------------------------------------------------------------------------------------

Writer = Callable[[Path, int], Path]
Reader = Callable[[Path, Tensor], Read]
QWEN = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_7"

# layout -> (folder of a set, writer of one layer, the owner's equations)
LAYOUTS: dict[str, tuple[str, Writer, Reader]] = {
    "sae-lens": ("set", write_sae_lens, sae_lens_reads),
    "gemma-scope": ("gemma-scope-2b-pt-res", write_gemma_scope, gemma_scope_reads),
    "gemma-scope-2": ("resid_post_all", write_gemma_scope_2, gemma_scope_2_reads),
    "llama-scope": ("Llama3_1-8B-Base-LXR-8x", write_llama_scope, llama_scope_reads),
    "sparsify": ("sae-smol-32x", write_sparsify, sparsify_reads),
    "dictionary-learning": ("saes", write_dictionary_learning, dictionary_learning_reads),
    "qwen-scope": (QWEN, write_qwen_scope, qwen_scope_reads),
}
