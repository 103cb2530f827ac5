"""From Hugging Face's configuration and weights to TransformerLens', exactly.

The configuration is built from Hugging Face's own fields; TransformerLens' weight conversions are
reused, and what they drop or round is put right.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuit_tracer_qk.base.errors import UserError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

# A model keeps an (n_ctx, n_ctx) mask for each kind of attention: 64 MB at 8192, 16 GB at the
# 131072 positions that some models claim.
MAX_CONTEXT = 8192
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
ROPE_SCALINGS = {  # a type -> the keys that it needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


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
            "TransformerLens; use a model with default, linear, llama3 or YaRN rotary positions."
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


def convert_weights(
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
        if hf_model.lm_head.weight is hf_model.model.embed_tokens.weight:
            del state["embed.W_E"]  # `fill` makes it when Hugging Face's is freed: one copy less
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


def set_scaled_rotary(model: HookedTransformer, config: Any) -> None:
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


def empty_model(cfg: HookedTransformerConfig, tokenizer: Any) -> HookedTransformer:
    """A model whose parameters take no memory, for :func:`fill`.

    TransformerLens would make a mask and rotary tables for every layer. Layers of one kind of
    attention ("global", "local") share them here.
    """
    from transformer_lens import HookedTransformer

    with torch.device("meta"):
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    of_kind: dict[str, nn.Module] = {}
    for i, block in enumerate(model.blocks):
        attention: Any = block.attn
        kind = attention.attn_type
        if kind not in of_kind:
            of_kind[kind] = type(attention)(cfg, kind, i)
        for name, buffer in of_kind[kind].named_buffers(recurse=False):
            setattr(attention, name, buffer)
    return model


def fill(model: HookedTransformer, state: dict[str, Tensor]) -> None:
    """Moves ``state`` into the model's parameters, emptying it so that its memory is freed."""
    cfg = model.cfg
    for i, block in enumerate(model.blocks):
        if f"blocks.{i}.mlp.b_gate" in state:
            with torch.device("meta"):
                block.mlp = _biased_gated_mlp()(cfg)
    model.setup()
    # the last first: an embedding may be made of the unembedding
    for key, parameter in reversed(list(model.named_parameters())):
        value = state.pop(key, None)
        if value is None and key == "embed.W_E":
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            torch.mul(
                model.unembed.W_U.T, torch.tensor(cfg.d_model**0.5, dtype=cfg.dtype), out=value
            )
        elif value is None:
            # GPT-2's unembedding bias; anything else fails the comparison
            value = torch.zeros(parameter.shape, dtype=parameter.dtype)
        elif value.shape != parameter.shape:
            raise UserError(
                f"TransformerLens' conversion of {cfg.model_name} gave {key} the shape "
                f"{list(value.shape)}, expected {list(parameter.shape)}; the model's config.json "
                "means something that this package does not know."
            )
        else:
            value = value.to(parameter.dtype)
            value = value.clone(memory_format=torch.contiguous_format)
        module, _, name = key.rpartition(".")
        setattr(model.get_submodule(module), name, nn.Parameter(value, requires_grad=False))


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
