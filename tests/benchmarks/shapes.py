"""Random models of real shapes, and random dictionaries with as many active features as asked."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from circuit_tracer_qk.attribution.residual.decompose import Decomposition, decompose
from circuit_tracer_qk.dictionaries.dictionary import Dictionary
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.run import freeze
from circuit_tracer_qk.model.supported import read_blocks

VOCAB = 100

GPT2 = {
    "d_model": 768,
    "n_heads": 12,
    "d_head": 64,
    "d_mlp": 3072,
    "act_fn": "gelu_pytorch_tanh",
    "normalization_type": "LN",
    "positional_embedding_type": "standard",
}
GEMMA2_2B = {
    "d_model": 2304,
    "n_heads": 8,
    "n_key_value_heads": 4,
    "d_head": 256,
    "d_mlp": 9216,
    "act_fn": "gelu_pytorch_tanh",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 256,
    "use_normalization_before_and_after": True,
    "attn_scores_soft_cap": 50.0,
    "ungroup_grouped_query_attention": False,
}
LLAMA32_1B = {
    "d_model": 2048,
    "n_heads": 32,
    "n_key_value_heads": 8,
    "d_head": 64,
    "d_mlp": 8192,
    "act_fn": "silu",
    "gated_mlp": True,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 64,
    "ungroup_grouped_query_attention": False,
}
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2-small": (12, GPT2),
    "Gemma-2-2B, a quarter": (6, GEMMA2_2B),
    "Llama-3.2-1B, a quarter": (4, LLAMA32_1B),
}


def random_model(
    n_pos: int, n_layers: int = 2, device: str = "cpu", **shape: Any
) -> HookedTransformer:
    """A random model, every gain and bias random."""
    cfg = HookedTransformerConfig(
        n_layers=n_layers, n_ctx=n_pos, d_vocab=VOCAB, seed=0, device=device, **shape
    )
    model = HookedTransformer(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name or name.endswith(".b"):
                # RMSNorm models get no constants, so that a table has features, b_dec, error only
                parameter.normal_(0, 0.1 if cfg.normalization_type == "LN" else 0.0)
            elif name.endswith(".w"):
                parameter.normal_(1, 0.2)
    return model.requires_grad_(False)


def random_dictionaries(
    model: HookedTransformer, active: int, d_dict: int, checkpoints: list[int]
) -> DictionarySet:
    """TopK SAEs: ``active`` features at every position."""
    d_model, device = model.cfg.d_model, model.W_E.device
    by_checkpoint = {}
    for c in checkpoints:
        W_enc, W_dec = (
            torch.randn(d_dict, d_model, device=device) / d_model**0.5 for _ in range(2)
        )
        by_checkpoint[c] = Dictionary(
            checkpoint=c,
            W_enc=W_enc,
            b_enc=torch.zeros(d_dict, device=device),
            b_dec=torch.randn(d_model, device=device) * 0.1,
            decoders={c: W_dec},
            k=active,
        )
    return DictionarySet("residual_sae_set", "hook_resid_post", "rnd", None, by_checkpoint)


def random_decomposition(
    model: HookedTransformer, n_pos: int, active: int, d_dict: int
) -> tuple[Decomposition, Heads]:
    """A random prompt with TopK SAEs at checkpoints 1 and 2; no features at the first position."""
    dictionaries = random_dictionaries(model, active, d_dict, [1, 2])
    run = freeze(model, torch.randint(VOCAB, (n_pos,), device=model.W_E.device))
    return decompose(run, dictionaries, slice(0, 1)), Heads(read_blocks(model, n_pos), run)
