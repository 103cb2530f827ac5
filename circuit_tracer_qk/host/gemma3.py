"""Gemma-3 as it is, where circuit-tracer goes by a folder's name or shares what differs.

- Its TransformerLens backend shares one pair of rotary tables among all layers: Gemma-3's local and
  global layers have different ones (:func:`put_back`).
- An instruction-tuned model begins with its chat prefix, and its first four positions have no
  features. circuit-tracer tells one by its name; here its tokenizer's chat template does
  (:func:`name_for_rules`).
- The token edges of its nnsight backend lack the factor of Gemma-3's embeddings
  (:class:`EmbeddingScaleWarning`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TABLES = ("rotary_cos", "rotary_sin")


class EmbeddingScaleWarning(UserWarning):
    """A graph of the nnsight backend had its token edges put right."""


class RotaryTables(NamedTuple):
    """The rotary tables of one block."""

    attn_type: str
    tables: dict[str, Tensor]


def is_gemma_3(cfg: Any) -> bool:
    """Whether a TransformerLens configuration is that of a Gemma-3, or of its text part."""
    return str(getattr(cfg, "original_architecture", None)).startswith("Gemma3")


def names_gemma_3(name: str) -> bool:
    """Whether a folder is a Gemma-3's, or TransformerLens makes one of this name of a model."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    if os.path.isdir(name):
        try:
            config = json.loads((Path(name) / "config.json").read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and str(config.get("model_type")).startswith("gemma3")
    try:
        official = get_official_model_name(name).lower()
    except ValueError:
        return False
    return "gemma-3" in official or "medgemma" in official


def name_for_rules(cfg: Any, tokenizer: Any) -> str:
    """The name by which circuit-tracer's rules treat a model as what it is.

    It takes ``gemma-3...-it`` for instruction-tuned, whatever the weights. A Gemma-3 that is has a
    chat template, and one that is not has none; without a tokenizer the name decides.
    """
    name = str(cfg.model_name)
    if not is_gemma_3(cfg) or tokenizer is None:
        return name
    is_chat = bool(getattr(tokenizer, "chat_template", None))
    if is_chat == _is_chat_name(name):
        return name
    return f"{name}, a gemma-3-it" if is_chat else f"{name}, pretrained"


def zero_positions(cfg: Any, tokenizer: Any) -> slice:
    """The first positions, which have no features: one, or the chat prefix of a gemma-3-it."""
    return slice(0, 4 if _is_chat_name(name_for_rules(cfg, tokenizer)) else 1)


def _is_chat_name(name: str) -> bool:
    return "gemma-3" in name and name.endswith("-it")


def rotary_tables(model: Any) -> list[RotaryTables]:
    """Every block's own tables; none where a model has no rotary."""
    return [
        RotaryTables(
            block.attn.attn_type,
            {name: getattr(block.attn, name) for name in TABLES if hasattr(block.attn, name)},
        )
        for block in model.blocks
    ]


def put_back(model: Any, own: list[RotaryTables]) -> None:
    """Give blocks their own tables again, where those that they share now are others.

    Blocks of one kind of attention share one pair.
    """
    of_kind: dict[tuple[str, str], Tensor] = {}
    for block, (kind, tables) in zip(model.blocks, own, strict=True):
        for name, table in tables.items():
            now = getattr(block.attn, name)
            if now is table or torch.equal(now, table):
                continue
            shared = of_kind.setdefault((kind, name), table)
            setattr(block.attn, name, shared if torch.equal(shared, table) else table)


def embedding_factor(cfg: Any) -> float:
    """What Gemma-3 multiplies its token embeddings by, rounded as the model rounds it."""
    return float(torch.tensor(cfg.d_model**0.5, dtype=cfg.dtype))
