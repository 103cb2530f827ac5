"""A name becomes an exact TransformerLens model.

TransformerLens' own conversion of a local Hugging Face folder is silently wrong for many models
(it ignores rotary bases and scalings, biases and head sizes). Here the configuration is built from
Hugging Face's own fields, only TransformerLens' weight conversions are reused, and the result must
give Hugging Face's logits before anybody sees it. What cannot be done exactly is refused by name.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuit_tracer_qk.errors import UserError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

# TransformerLens keeps an (n_ctx, n_ctx) mask per layer while it builds a model: 64 MB each at
# 8192, 16 GB each at the 131072 positions that some models claim.
MAX_CONTEXT = 8192
# Largest difference between the two models' logits, as a part of the spread of the logits.
LOGITS_TOLERANCE = 1e-3
# Rotary tables: Hugging Face's float32 angles are off by about 1e-3 at position 8192.
ROTARY_TOLERANCE = 1e-2

CONVERTERS = {
    "GPT2LMHeadModel": "convert_gpt2_weights",
    "GPTNeoXForCausalLM": "convert_neox_weights",
    "LlamaForCausalLM": "convert_llama_weights",
    "MistralForCausalLM": "convert_mistral_weights",
    "Qwen2ForCausalLM": "convert_qwen2_weights",
    "Qwen3ForCausalLM": "convert_qwen3_weights",
    "GemmaForCausalLM": "convert_gemma_weights",
    "Gemma2ForCausalLM": "convert_gemma_weights",
    "Gemma3ForCausalLM": "convert_gemma_weights",
}
ACTIVATIONS = {
    name: name for name in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")
} | {"swish": "silu"}
ROPE_SCALINGS = {  # type: the keys that it needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
ALIBI = "its attention adds ALiBi position biases, which QK attributions do not decompose"
REFUSED = {
    "bloom": ALIBI,
    "mpt": ALIBI,
    "t5": "its attention adds relative position biases and it is an encoder-decoder",
    "mt5": "its attention adds relative position biases and it is an encoder-decoder",
    "gpt_oss": "its attention has sinks, a softmax term that no key carries",
    "olmo2": "it norms only after attention and MLP, with a QK norm over whole vectors",
    "olmo3": "it norms only after attention and MLP, with a QK norm over whole vectors",
}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
MODALITIES = ("vision_config", "audio_config")
# Names whose weights TransformerLens keeps in its own format: there is no Hugging Face model.
TRANSFORMER_LENS_ONLY = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"),
    "spiece.model",
)


def load_transformer(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> HookedTransformer:
    """Loads a model whose logits are Hugging Face's.

    Peak memory: the weights once, in float32 (float64 if asked for), plus the embeddings and the
    attention masks; Hugging Face's copy of a tensor is freed as soon as it has been copied. (Twice
    the weights for the architectures that only TransformerLens converts.)

    Args:
        name: a local Hugging Face folder, a hub id ``org/name[@revision]`` (a cached copy is used
            without asking the network) or a TransformerLens name such as ``gpt2``.
        dtype: float32, float64, bfloat16 or float16. The 16-bit ones are compared with Hugging
            Face in float32 and rounded afterwards.
        device: where the model goes; default cuda if there is one, else cpu.

    Returns:
        The unprocessed model (nothing folded, nothing centred) in eval mode, its parameters
        without gradients. ``cfg.tokenizer_name`` is the absolute folder or the hub id. A folder
        without tokenizer files gives ``tokenizer`` and ``cfg.tokenizer_name`` None; such a model
        takes token ids only.

    Raises:
        UserError: the name, the files or the architecture cannot be loaded exactly.
    """
    if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {dtype} is not one of float32, float64, bfloat16 and float16.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = Source.find(str(name))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with _quiet(), torch.no_grad():
        if source.path.startswith(TRANSFORMER_LENS_ONLY):
            model = _by_transformer_lens(source, None, exact)
        else:
            model = _converted(source, exact)
    return _finish(model, dtype, device)


def _converted(source: Source, dtype: torch.dtype) -> HookedTransformer:
    """The model of a Hugging Face source, on the CPU and compared with Hugging Face's."""
    from transformer_lens import HookedTransformer

    config = _read_config(source)
    architecture = _architecture(source, config)
    if architecture in CONVERTERS:
        cfg = build_config(config, architecture)
        cfg.model_name, cfg.dtype = source.title, dtype
        tokenizer = _tokenizer(source)
        cfg.tokenizer_name = None if tokenizer is None else source.path
        hf_model = _load_weights(source, config, dtype)
        reference = Reference.run(hf_model, cfg)
        state = _convert_weights(hf_model, cfg, architecture)
        del hf_model
        gc.collect()
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
        _fill(model, state)
        _set_scaled_rotary(model, config)
    elif source.local:
        supported = ", ".join(CONVERTERS)
        raise UserError(
            f"{source.title} is a {architecture}, which cannot be converted exactly from a local "
            f"folder; use one of {supported}."
        )
    else:
        hf_model = _load_weights(source, config, dtype)
        model = _by_transformer_lens(source, hf_model, dtype)
        reference = Reference.run(hf_model, model.cfg)
    reference.check(model, source.title)
    return model


def _by_transformer_lens(source: Source, hf_model: Any, dtype: torch.dtype) -> HookedTransformer:
    """TransformerLens' own unprocessed loading, for what only TransformerLens knows."""
    from transformer_lens import HookedTransformer

    try:
        return HookedTransformer.from_pretrained_no_processing(
            source.path, hf_model=hf_model, dtype=dtype, device="cpu"
        )
    except Exception as error:
        raise UserError(
            f"TransformerLens cannot load {source.title} ({_first_line(error)}); use a model of "
            f"one of the architectures {', '.join(CONVERTERS)}."
        ) from error


def _finish(
    model: HookedTransformer, dtype: torch.dtype, device: torch.device
) -> HookedTransformer:
    """Rounds to ``dtype``, moves to ``device`` and shares what is equal in all layers."""
    cfg = model.cfg
    gemma = CONVERTERS.get(cfg.original_architecture or "") == "convert_gemma_weights"
    if gemma and dtype != cfg.dtype:
        # Gemma rounds the factor of its embeddings to the dtype it runs in (33.94 -> 34.0).
        scale = cfg.d_model**0.5
        model.embed.W_E.data.mul_(float(torch.tensor(scale, dtype=dtype)) / scale)
    cfg.dtype, cfg.device = dtype, str(device)
    nn.Module.to(model, device=device, dtype=dtype)
    shared: dict[tuple[str, str], Tensor] = {}
    for block in model.blocks:
        attention: Any = block.attn
        for buffer in ("mask", "rotary_sin", "rotary_cos"):
            if buffer in attention._buffers:
                first = shared.setdefault((attention.attn_type, buffer), getattr(attention, buffer))
                setattr(attention, buffer, first)
    return model.requires_grad_(False).eval()


# Where a model is, and reading it -----------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a model is read from.

    Attributes:
        path: what Hugging Face loads: an absolute folder or a hub id.
        title: the name for people: the folder's name or the hub id.
        local: whether ``path`` is a folder.
        revision: the hub revision; None for a folder.
    """

    path: str
    title: str
    local: bool
    revision: str | None = None

    @classmethod
    def find(cls, name: str) -> Source:
        """Tells a folder from a hub id from a TransformerLens name."""
        from transformer_lens.loading_from_pretrained import get_official_model_name

        folder = Path(name).expanduser()
        if folder.is_dir():
            folder = folder.resolve()
            return cls(str(folder), folder.name, local=True)
        hub_id, _, revision = name.partition("@")
        is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_id) and not hub_id.startswith(".")
        if folder.exists() or not is_id:
            raise UserError(
                f"{name} is not a folder; give an existing Hugging Face folder, a hub id "
                "org/name[@revision] or a TransformerLens name such as gpt2."
            )
        try:
            hub_id = get_official_model_name(hub_id)
        except ValueError as error:
            if "/" not in hub_id:
                raise UserError(
                    f"{name} is neither a folder nor a name that TransformerLens knows; give an "
                    "existing Hugging Face folder or a hub id org/name[@revision]."
                ) from error
        return cls(hub_id, hub_id, local=False, revision=revision or None)

    def load(self, loader: Callable[..., Any], **options: Any) -> Any:
        """Calls a ``from_pretrained``: from the disk if it can, else from the hub."""
        load = functools.partial(loader, self.path, revision=self.revision, **options)
        if self.local:
            return load(local_files_only=True)
        try:
            return load(local_files_only=True)
        except (OSError, ValueError):
            return load()

    def failure(self, what: str, error: Exception) -> UserError:
        """The user's message for a hub request that failed, or for a file that is broken."""
        from huggingface_hub import errors

        causes = (error, error.__cause__, error.__context__)
        if self.local:
            return UserError(f"The {what} of {self.path} cannot be read: {_first_line(error)}.")
        if any(isinstance(c, errors.RevisionNotFoundError) for c in causes):
            return UserError(f"{self.title} has no revision {self.revision} on the hub.")
        if any(isinstance(c, errors.GatedRepoError) for c in causes):
            return UserError(
                f"{self.title} is gated on the hub; accept its terms there and run "
                "`huggingface-cli login`, or give a local folder."
            )
        if any(isinstance(c, errors.RepositoryNotFoundError) for c in causes):
            return UserError(
                f"{self.title} is not on the hub (or is private); check the name, run "
                "`huggingface-cli login`, or give a local folder."
            )
        if any(isinstance(c, errors.LocalEntryNotFoundError) for c in causes):
            return UserError(
                f"The {what} of {self.title} is not in the local cache and the Hugging Face hub "
                "cannot be reached; check the name and the network, or give a local folder."
            )
        return UserError(f"The {what} of {self.title} cannot be loaded: {_first_line(error)}.")


def _read_config(source: Source) -> Any:
    """The Hugging Face configuration of ``source``."""
    from transformers import AutoConfig

    if source.local and not (Path(source.path) / "config.json").is_file():
        raise UserError(
            f"The folder {source.path} has no config.json; give a folder written by Hugging "
            "Face's save_pretrained, or a hub id org/name."
        )
    try:
        return source.load(AutoConfig.from_pretrained)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise source.failure("config.json", error) from error


def _architecture(source: Source, config: Any) -> str:
    """The class that Hugging Face's AutoModelForCausalLM makes of ``config``, if not refused."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or kind
    reason = REFUSED.get(kind)
    if reason is None and any((getattr(config, name, None) or 0) > 1 for name in EXPERTS):
        reason = "it is a mixture of experts, whose routing has no fixed MLP"
    if reason is None and any(getattr(config, name, None) for name in MODALITIES):
        reason = "it is multimodal; save its language model alone as a text-only folder"
    if reason is None and getattr(config, "use_bidirectional_attention", False):
        reason = "its attention is bidirectional"
    if reason is None and getattr(config, "quantization_config", None):
        reason = "its weights are quantised; use the unquantised model"
    if reason is not None:
        raise UserError(f"{source.title} ({architecture}) is not supported: {reason}.")
    return architecture


def _tokenizer(source: Source) -> Any | None:
    """The tokenizer, with a BOS put in front by default as TransformerLens wants it; else None."""
    from transformers import AutoTokenizer

    if source.local and not any((Path(source.path) / f).exists() for f in TOKENIZER_FILES):
        return None
    try:
        tokenizer = source.load(AutoTokenizer.from_pretrained)
        # TransformerLens loads the tokenizer a second time by name, without its revision, unless
        # it was made this way.
        if tokenizer.bos_token is not None and not getattr(tokenizer, "add_bos_token", False):
            tokenizer = source.load(AutoTokenizer.from_pretrained, add_bos_token=True)
    except Exception as error:
        raise source.failure("tokenizer", error) from error
    return tokenizer


def _load_weights(source: Source, config: Any, dtype: torch.dtype) -> Any:
    """Hugging Face's model on the CPU in ``dtype``, every weight found, of its shape, finite."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = source.load(
            AutoModelForCausalLM.from_pretrained,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        broken = _broken_file(source)
        if broken is not None:
            raise UserError(
                f"{broken} is truncated or not a safetensors file; copy or download it again."
            ) from error
        raise source.failure("weights", error) from error
    if info["mismatched_keys"]:
        key = sorted(info["mismatched_keys"])[0]
        found = _stored_shape(source, key)
        raise UserError(
            f"The weight {key} of {source.title} should have shape "
            f"{list(model.state_dict()[key].shape)} by its config.json, found {found}; the "
            "configuration and the weights do not belong together."
        )
    if info["missing_keys"]:
        raise UserError(
            f"The weight {sorted(info['missing_keys'])[0]} is missing from {source.title}; copy "
            "or download the model again."
        )
    for key, tensor in model.named_parameters():
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise UserError(
                f"The weight {key} of {source.title} contains NaN or infinity; copy or download "
                "the model again."
            )
    return model.eval().requires_grad_(False)


def _broken_file(source: Source) -> Path | None:
    """The first safetensors file of a folder whose header or length is wrong."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(source.path).glob("*.safetensors")) if source.local else ():
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file
    return None


def _stored_shape(source: Source, key: str) -> list[int] | str:
    """The shape under which a folder stores the weight ``key`` (a prefix may be absent there)."""
    from safetensors import safe_open

    for file in sorted(Path(source.path).glob("*.safetensors")) if source.local else ():
        with safe_open(file, "pt") as tensors:
            for stored in tensors.keys():  # noqa: SIM118 - not a dict
                if key == stored or key.endswith("." + stored):
                    return tensors.get_slice(stored).get_shape()
    return "another"


# Configuration ------------------------------------------------------------------------------------


def build_config(config: Any, architecture: str) -> HookedTransformerConfig:
    """The TransformerLens configuration that Hugging Face's ``config`` means.

    Args:
        config: a Hugging Face configuration of one of the architectures in `CONVERTERS`.
        architecture: its model class.

    Returns:
        The configuration for the CPU, without a name, dtype and tokenizer.

    Raises:
        UserError: the installed TransformerLens cannot express something in ``config``.
    """
    from transformer_lens import HookedTransformerConfig

    builder = {"GPT2LMHeadModel": _gpt2, "GPTNeoXForCausalLM": _neox}.get(architecture, _gated)
    fields = builder(config)
    fields["n_ctx"] = min(config.max_position_embeddings, MAX_CONTEXT)
    fields["d_vocab"] = config.vocab_size
    if fields["act_fn"] not in ACTIVATIONS:
        raise UserError(
            f"The activation function {fields['act_fn']} is not supported; use a model with one "
            f"of {', '.join(ACTIVATIONS)}."
        )
    fields["act_fn"] = ACTIVATIONS[fields["act_fn"]]
    known = HookedTransformerConfig.__dataclass_fields__
    if "rotary_base_local" in fields and "rotary_base_local" not in known:
        raise UserError(
            f"{architecture} has a second rotary base for its local layers, which the installed "
            "TransformerLens cannot express; install transformer-lens 3 or newer."
        )
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise UserError(
            f"The installed TransformerLens lacks {unknown[0]}, which this {architecture} needs; "
            "install a newer transformer-lens."
        )
    return HookedTransformerConfig(
        **fields, original_architecture=architecture, device="cpu", init_weights=False
    )


def _gpt2(config: Any) -> dict[str, Any]:
    """Learned positions, LayerNorm, one MLP matrix each way."""
    return {
        "n_layers": config.n_layer,
        "d_model": config.n_embd,
        "n_heads": config.n_head,
        "d_head": config.n_embd // config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "normalization_type": "LN",
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
    }


def _neox(config: Any) -> dict[str, Any]:
    """LayerNorm, partial rotary, parallel or sequential blocks."""
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "act_fn": config.hidden_act,
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        **_rotary(config, int(d_head * config.rotary_pct), attn_types=None),
    }


def _gated(config: Any) -> dict[str, Any]:
    """RMSNorm, grouped-query attention, rotary and a gated MLP: Llama and all its relatives."""
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = config.model_type
    fields: dict[str, Any] = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "gated_mlp": True,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "final_rms": True,
        "use_qk_norm": kind in ("qwen3", "gemma3_text"),
        "use_normalization_before_and_after": kind in ("gemma2", "gemma3_text"),
    }
    if kind in ("gemma2", "gemma3_text"):
        fields["act_fn"] = config.hidden_activation
        fields["attn_scale"] = config.query_pre_attn_scalar**0.5
        if kind == "gemma2":  # Gemma-3 stores this cap too, but its attention ignores it
            fields["attn_scores_soft_cap"] = config.attn_logit_softcapping or -1.0
        fields["output_logits_soft_cap"] = config.final_logit_softcapping or -1.0
    else:
        fields["act_fn"] = config.hidden_act
    attn_types = _attention_types(config)
    if attn_types is not None:
        fields |= {
            "use_local_attn": True,
            "window_size": config.sliding_window,
            "attn_types": attn_types,
        }
    return fields | _rotary(config, d_head, attn_types)


def _attention_types(config: Any) -> list[str] | None:
    """ "local" or "global" of every layer; None if all are global."""
    types = getattr(config, "layer_types", None)
    if types is None:  # Mistral: all layers or none
        sliding = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    names = {"sliding_attention": "local", "full_attention": "global"}
    for kind in types:
        if kind not in names:
            raise UserError(
                f"A layer has attention of kind {kind}; only full_attention and "
                "sliding_attention are supported."
            )
    if "sliding_attention" not in types:
        return None
    if not config.sliding_window:
        raise UserError("config.json has sliding-attention layers but no sliding_window; set it.")
    return [names[kind] for kind in types]


def _rotary(config: Any, rotary_dim: int, attn_types: list[str] | None) -> dict[str, Any]:
    """Rotary base, dimension and scaling."""
    fields: dict[str, Any] = {
        "positional_embedding_type": "rotary",
        "rotary_dim": rotary_dim,
        "rotary_base": config.rope_theta,
    }
    two_bases = config.model_type == "gemma3_text"
    if two_bases:
        fields["rotary_base_local"] = config.rope_local_base_freq
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    # TransformerLens scales linearly in global layers only and otherwise in all; Hugging Face
    # leaves Gemma-3's local layers alone and scales every layer of any other model.
    mixed = attn_types is not None and two_bases == (kind != "linear")
    if kind == "default":
        return fields
    if kind not in ROPE_SCALINGS or mixed:
        where = " in a model with sliding windows" if mixed else ""
        raise UserError(
            f"rope_scaling of type {kind}{where} cannot be done exactly by the installed "
            "TransformerLens; use a model with default, linear or llama3 rotary positions."
        )
    absent = [key for key in ROPE_SCALINGS[kind] if key not in scaling]
    if absent:
        raise UserError(f"rope_scaling of type {kind} in config.json lacks {absent[0]}; add it.")
    factor = float(scaling["factor"])
    if kind == "linear":
        return fields | {"rotary_scaling_factor": factor}
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "llama3":
        return fields | {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": factor,
            "NTK_by_parts_low_freq_factor": scaling["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": scaling["high_freq_factor"],
            "NTK_original_ctx_len": original,
        }
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return fields | {
        "use_yarn_rope": True,
        "yarn_factor": factor,
        "yarn_attention_factor": ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))[1],
        "yarn_beta_fast": scaling.get("beta_fast") or 32.0,
        "yarn_beta_slow": scaling.get("beta_slow") or 1.0,
        "yarn_original_max_position_embeddings": original,
    }


# Weights ------------------------------------------------------------------------------------------


def _convert_weights(
    hf_model: Any, cfg: HookedTransformerConfig, architecture: str
) -> dict[str, Tensor]:
    """TransformerLens' own conversion, with the biases that it drops or cannot miss put right."""
    from transformer_lens.pretrained import weight_conversions

    if architecture == "GPTNeoXForCausalLM":
        for layer in hf_model.gpt_neox.layers:  # the conversion wants the biases to be there
            for linear in (layer.attention.query_key_value, layer.attention.dense):
                if linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
    state = getattr(weight_conversions, CONVERTERS[architecture])(hf_model, cfg)
    if architecture == "GPT2LMHeadModel":
        state["pos_embed.W_pos"] = state["pos_embed.W_pos"][: cfg.n_ctx]
    if not cfg.gated_mlp:
        return state
    if CONVERTERS[architecture] == "convert_gemma_weights":
        state |= _gemma_gains(hf_model, cfg)
    for i, layer in enumerate(hf_model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        biases = {
            "attn.b_Q": (attention.q_proj.bias, cfg.n_heads),
            "attn._b_K": (attention.k_proj.bias, cfg.n_key_value_heads),
            "attn._b_V": (attention.v_proj.bias, cfg.n_key_value_heads),
            "attn.b_O": (attention.o_proj.bias, None),
            "mlp.b_out": (mlp.down_proj.bias, None),
            "mlp.b_gate": (mlp.gate_proj.bias, None),
            "mlp.b_up": (mlp.up_proj.bias, None),
        }
        for key, (bias, n_heads) in biases.items():
            if bias is not None:
                bias = bias if n_heads is None else bias.reshape(n_heads, cfg.d_head)
                state[f"blocks.{i}.{key}"] = bias
    return state


def _gemma_gains(hf_model: Any, cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """Gemma's gains ``1 + weight`` in the model's dtype; the conversion rounds them to float32."""
    post = cfg.use_normalization_before_and_after
    names = {
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln1_post" if post else "ln2",
        "pre_feedforward_layernorm": "ln2",
        "post_feedforward_layernorm": "ln2_post",
        "self_attn.q_norm": "attn.q_norm",
        "self_attn.k_norm": "attn.k_norm",
    }
    gains = {"ln_final.w": 1 + hf_model.model.norm.weight}
    for i, layer in enumerate(hf_model.model.layers):
        modules = dict(layer.named_modules())
        for theirs, ours in names.items():
            if theirs in modules:
                gains[f"blocks.{i}.{ours}.w"] = 1 + modules[theirs].weight
    return gains


def _set_scaled_rotary(model: HookedTransformer, config: Any) -> None:
    """Rotary tables of llama3 and YaRN from Hugging Face's own frequencies, angles in float64.

    TransformerLens inverts the scaled frequencies twice in float32, which a float64 model shows.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("llama3", "yarn"):
        return
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    angles = torch.arange(model.cfg.n_ctx, dtype=torch.float64)[:, None] * frequencies.double()
    angles = angles.repeat(1, 2)
    for block in model.blocks:
        attention: Any = block.attn
        attention.rotary_cos.copy_(angles.cos() * factor)
        attention.rotary_sin.copy_(angles.sin() * factor)


def _fill(model: HookedTransformer, state: dict[str, Tensor]) -> None:
    """Moves ``state`` into the model's parameters, emptying it so that its memory is freed."""
    for i, block in enumerate(model.blocks):
        if f"blocks.{i}.mlp.b_gate" in state:
            block.mlp = _biased_gated_mlp()(model.cfg)
    model.setup()
    for key, parameter in model.named_parameters():
        value = state.pop(key, None)
        if value is None:
            parameter.zero_()  # GPT-2's unembedding bias; anything else fails the comparison
        elif value.shape != parameter.shape:
            raise UserError(
                f"TransformerLens' conversion of {model.cfg.model_name} gave {key} the shape "
                f"{list(value.shape)}, expected {list(parameter.shape)}; the model's config.json "
                "means something that this package does not know."
            )
        else:
            value = value.to(parameter.dtype)
            parameter.data = value.clone(memory_format=torch.contiguous_format)


@functools.cache
def _biased_gated_mlp() -> type[nn.Module]:
    """TransformerLens' gated MLP with biases on the gate and up projections (Llama's mlp_bias)."""
    from transformer_lens.components.mlps.gated_mlp import GatedMLP

    class BiasedGatedMLP(GatedMLP):
        """``(act(x W_gate + b_gate) * (x W_in + b_up) + b_in) W_out + b_out``."""

        def __init__(self, cfg: HookedTransformerConfig) -> None:
            super().__init__(cfg)
            self.b_gate = nn.Parameter(torch.zeros_like(self.b_in))
            self.b_up = nn.Parameter(torch.zeros_like(self.b_in))

        def forward(self, x: Tensor) -> Tensor:
            """(batch, pos, d_model) to the same shape."""
            gate = self.hook_pre(x @ self.W_gate + self.b_gate)
            up = self.hook_pre_linear(x @ self.W_in + self.b_up)
            return self.hook_post(self.act_fn(gate) * up + self.b_in) @ self.W_out + self.b_out

    return BiasedGatedMLP


# The comparison -----------------------------------------------------------------------------------


@dataclass
class Reference:
    """What Hugging Face's model computes, kept after the model itself is freed.

    Attributes:
        runs: (tokens (1, n), logits (1, n, d_vocab)) of each sequence.
        rotary: attention type -> (cos, sin), each (n_ctx, rotary_dim).
    """

    runs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rotary: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def run(cls, hf_model: Any, cfg: HookedTransformerConfig) -> Reference:
        """Runs 16 fixed tokens, and more than a short window's worth where there is one."""
        lengths = [min(cfg.n_ctx, 16)]
        if cfg.use_local_attn and (cfg.window_size or 0) < 64:
            lengths.append(min(cfg.n_ctx, max(16, (cfg.window_size or 0) + 8)))
        reference = cls()
        for seed, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(cfg.d_vocab, (1, length), generator=generator)
            reference.runs.append((tokens, hf_model(tokens, use_cache=False).logits))
        base = getattr(hf_model, "model", hf_model.base_model)  # Gemma-3's base is itself
        tables = {"global": "rotary_emb", "local": "rotary_emb"}
        if hasattr(base, "rotary_emb_local"):
            tables["local"] = "rotary_emb_local"
        if cfg.original_architecture in CONVERTERS and hasattr(base, "rotary_emb"):
            positions = torch.arange(cfg.n_ctx)[None]
            for kind, name in tables.items():
                cos, sin = getattr(base, name)(torch.zeros((), dtype=cfg.dtype), positions)
                reference.rotary[kind] = (cos[0], sin[0])
        return reference

    def check(self, model: HookedTransformer, title: str) -> None:
        """Refuses a model that differs from Hugging Face's.

        The rotary tables are compared over the whole context, because 16 tokens hardly see a
        wrong base or scaling.

        Raises:
            UserError: the logits or a rotary table differ.
        """
        way_out = "the conversion is not exact for this model, please report it"
        for i, block in enumerate(model.blocks):
            attention: Any = block.attn
            for name, table in zip(
                ("rotary_cos", "rotary_sin"), self.rotary.get(attention.attn_type, ()), strict=False
            ):
                ours = getattr(attention, name)
                if ours.shape != table.shape or (ours - table).abs().max() > ROTARY_TOLERANCE:
                    raise UserError(
                        f"The rotary positions of {title} in layer {i} are not Hugging Face's; "
                        f"{way_out}."
                    )
        for tokens, logits in self.runs:
            difference = float((model(tokens) - logits).abs().max())
            limit = LOGITS_TOLERANCE * float(logits.max() - logits.min())
            if not difference <= limit:
                raise UserError(
                    f"The converted model's logits for {title} differ from Hugging Face's by "
                    f"{difference:.2g} (limit {limit:.2g}) on {tokens.shape[1]} tokens; {way_out}."
                )


# Noise --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the libraries' notices while a model loads and leaves logging as it was."""
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as hf_logging

    handlers = logging.root.handlers[:]
    verbosity, hub_verbosity = hf_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        logging.root.handlers[:] = handlers


def _first_line(error: Exception) -> str:
    """The first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
