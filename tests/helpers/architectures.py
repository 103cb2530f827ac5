"""Tiny random Hugging Face models, one for each thing that real architectures do differently.

Every gain and every bias is random and attention is far from uniform, so that a forgotten norm
gain, bias, soft-cap, window or rotary base shows up as a large error.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

VOCAB = 97
BOS = 1
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": BOS,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
NEOX: dict[str, Any] = dict(
    COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=3, layer_norm_eps=1e-4
)
GATED: dict[str, Any] = dict(
    COMMON,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-4,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"

ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        bos_token_id=BOS,
        eos_token_id=2,
        n_positions=64,
        n_embd=24,
        n_layer=3,
        n_head=3,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-4,
    ),
    "neox": lambda: GPTNeoXConfig(
        **NEOX, num_attention_heads=4, rotary_pct=0.5, hidden_act="gelu", attention_bias=True
    ),
    "neox-sequential": lambda: GPTNeoXConfig(
        **NEOX,
        num_attention_heads=2,
        rotary_pct=0.25,
        rotary_emb_base=500,
        use_parallel_residual=False,
        hidden_act="gelu",
        attention_bias=True,
    ),
    "llama": lambda: LlamaConfig(**GATED, rope_theta=300.0),
    "llama-bias": lambda: LlamaConfig(
        **GATED, rope_theta=5000.0, attention_bias=True, mlp_bias=True
    ),
    "llama3-rope": lambda: LlamaConfig(**GATED, rope_theta=500.0, rope_scaling=dict(LLAMA3_ROPE)),
    "mistral": lambda: MistralConfig(**GATED, rope_theta=1000.0, sliding_window=5),
    "qwen2": lambda: Qwen2Config(
        **COMMON,
        hidden_size=56,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=14,
        num_key_value_heads=2,
        rms_norm_eps=1e-4,
        rope_theta=2000.0,
        tie_word_embeddings=True,
    ),
    "qwen3": lambda: Qwen3Config(**GATED, rope_theta=3000.0),
    "gemma2": lambda: Gemma2Config(
        **GATED,
        rope_theta=400.0,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        sliding_window=6,
        layer_types=[LOCAL, GLOBAL, LOCAL],
        hidden_activation="gelu_pytorch_tanh",
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **dict(GATED, num_hidden_layers=4),
        rope_theta=20000.0,
        rope_local_base_freq=200.0,
        query_pre_attn_scalar=6,
        sliding_window=6,
        layer_types=[LOCAL, GLOBAL, LOCAL, GLOBAL],
    ),
}


def save_tiny(name: str, folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Builds the tiny model `name`, saves it (without a tokenizer) in `folder` and returns it.

    Args:
        name: a key of `ARCHITECTURES`.
        folder: where `config.json` and `model.safetensors` go.
        seed: the weights depend on it and on nothing else.
        changes: other fields of the configuration, such as the number of layers.

    Returns:
        The model in float32 and eval mode, with eager attention.
    """
    config = ARCHITECTURES[name]()
    if changes:
        config = type(config).from_dict({**config.to_dict(), "layer_types": None, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    seen = set()  # a tied unembedding is the embedding, drawn once
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                mean, std = _scale(module_name, module, parameter_name, parameter)
                with torch.no_grad():
                    parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of the tiny models' vocabulary: words ``w0``, ``w1``, ... and a BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCAB - 3))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>"
    ).save_pretrained(folder)


NEOX_VOCAB = 320  # the 256 bytes, special tokens, merges


def save_neox(folder: Path, pad: str | None = None) -> None:
    """A Pythia-shaped model with a byte-level BPE tokenizer as GPT-NeoX has it.

    ``<|endoftext|>``, id 0, is BOS, EOS and UNK; ``<|padding|>``, id 1, is in the vocabulary.

    Args:
        folder: where both go.
        pad: the tokenizer's padding token; Pythia names none.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXTokenizerFast

    save_tiny("neox", folder, vocab_size=NEOX_VOCAB, bos_token_id=0, eos_token_id=0)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NEOX_VOCAB,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["the cat sat on the mat and the dog sat on the cat " * 3], trainer)
    tokenizer = GPTNeoXTokenizerFast(tokenizer_object=inner)
    if pad is not None:
        tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)


def _scale(
    module_name: str, module: torch.nn.Module, parameter_name: str, parameter: torch.Tensor
) -> tuple[float, float]:
    """Mean and standard deviation from which a parameter is drawn."""
    if parameter_name == "bias":
        return 0.0, 0.3
    if parameter.ndim == 1:  # norm gains; those of QK-norm are larger, to sharpen attention
        gain = 1.5 if module_name.endswith(("q_norm", "k_norm")) else 1.0
        return (gain - 1.0 if type(module).__name__.startswith("Gemma") else gain), 0.3
    if isinstance(module, torch.nn.Embedding):
        return 0.0, 0.5
    fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[1]
    sharp = ("q_proj", "k_proj", "c_attn", "query_key_value", "lm_head", "embed_out")
    return 0.0, (1.3 if module_name.endswith(sharp) else 1.0) / math.sqrt(fan_in)


def prompt_ids(name: str, n: int = 12, seed: int = 0) -> list[int]:
    """`n` token ids for the model `name`, the first of them its BOS, the others ordinary tokens."""
    draw = random.Random(f"{name} {seed}")
    return [BOS] + [draw.randrange(3, VOCAB) for _ in range(n - 1)]
