"""One clean forward pass, frozen: what every attribution in this package is a function of.

Attention patterns and the denominators of all norms are read once, from the model's own run, and
held fixed (paper, "The problem"; attribution/README.md, section 3). Nothing here knows what the numbers mean;
:mod:`circuit_tracer_qk.model.heads` does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


_LOCKS: WeakKeyDictionary[HookedTransformer, RLock] = WeakKeyDictionary()
_LOCKS_LOCK = RLock()


def alone(model: HookedTransformer) -> RLock:
    """The lock to hold while a model has hooks: two threads' runs would read each other's."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, RLock())


@dataclass(frozen=True, eq=False)
class FrozenRun:
    """The clean run of one prompt, in the dtype that everything is contracted in.

    Checkpoint ``c`` in ``0..n_layers`` is the residual stream entering block ``c``;
    ``c = n_layers`` enters the final norm.

    Attributes:
        tokens: (n_pos,) token ids.
        residual: (n_layers + 1, n_pos, d_model), the checkpoints.
        mlp_input: (n_layers, n_pos, d_model), the stream that each block's MLP norm reads:
            ``resid_mid``, or the block's own checkpoint where attention and MLP are parallel.
        embedding: (n_pos, d_model) token embeddings, scaled as the model scales them.
        position_embedding: (n_pos, d_model) learned positions; None where the model has none.
        pattern: (n_layers, n_heads, n_pos, n_pos) attention patterns, rows are queries.
        scales: norm name (``ln1``, ``ln2``, ``ln1_post``, ``ln2_post``) -> (n_layers, n_pos)
            frozen denominators; only the norms that the model has.
        final_scale: (n_pos,) denominator of the final norm (ones where there is none).
        logits: (d_vocab,) of the last position.

    >>> run = graph.run
    >>> tuple(run.residual.shape), tuple(run.pattern.shape)
    ((5, 15, 128), (4, 8, 15, 15))
    """

    tokens: Tensor
    residual: Tensor
    mlp_input: Tensor
    embedding: Tensor
    position_embedding: Tensor | None
    pattern: Tensor
    scales: dict[str, Tensor]
    final_scale: Tensor
    logits: Tensor

    @property
    def n_layers(self) -> int:
        return self.pattern.shape[0]

    @property
    def n_pos(self) -> int:
        return len(self.tokens)

    def scale(self, norm: str, layer: int) -> Tensor:
        """(n_pos,) frozen denominator of one norm of one block; ones where the block has none."""
        if norm in self.scales:
            return self.scales[norm][layer]
        return self.residual.new_ones(self.n_pos)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a flat name, for saving; :meth:`from_tensors` is its inverse."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scales"}
        named |= {f"scales.{name}": scale for name, scale in self.scales.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> FrozenRun:
        """The run whose :meth:`tensors` are ``named``."""
        prefix = "scales."
        scales = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
        plain = {n: t for n, t in named.items() if not n.startswith(prefix)}
        return cls(**{"position_embedding": None, **plain, "scales": scales})


def contraction_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 models, float32 for every other: sums that cancel need no less."""
    return torch.float64 if model_dtype == torch.float64 else torch.float32


def refuse_split_inputs(model: HookedTransformer) -> None:
    """Refuse a model whose hooks give every head an input of its own: its norms have other shapes.

    Raises:
        UserError: the setting, and how to turn it off.
    """
    for name in ("use_split_qkv_input", "use_attn_in"):
        if getattr(model.cfg, name, False):
            raise UserError(
                f"{model.cfg.model_name} has {name} on, which changes the hooks that are read here: "
                f"turn it off with model.set_{name}(False)."
            )


@torch.no_grad()
def freeze(model: HookedTransformer, tokens: Tensor) -> FrozenRun:
    """Run the model once on ``tokens`` and keep what attributions need.

    Args:
        model: the model, unmodified.
        tokens: (n_pos,) ids; the checks of their range and number are made here.

    Raises:
        UserError: fewer than two tokens, more than the context, or an id out of range.
    """
    cfg = model.cfg
    refuse_split_inputs(model)
    if tokens.ndim != 1 or len(tokens) < 2:
        raise UserError(
            f"The prompt has {tokens.numel()} token{'' if tokens.numel() == 1 else 's'} after "
            "tokenisation; attention needs at least two (a BOS and one more): give a longer prompt."
        )
    if len(tokens) > cfg.n_ctx:
        raise UserError(
            f"The prompt has {len(tokens)} tokens and the model's context is {cfg.n_ctx}: "
            "shorten the prompt."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= cfg.d_vocab:
        raise UserError(
            f"Token id {low if low < 0 else high} is out of range: the model's vocabulary has ids "
            f"0 to {cfg.d_vocab - 1}; check that the prompt was tokenised for this model."
        )
    dtype = contraction_dtype(cfg.dtype)
    norms = ("ln1", "ln2", "ln1_post", "ln2_post")
    hooks = {"hook_resid_pre", "hook_resid_mid", "attn.hook_pattern"}
    hooks |= {f"{norm}.hook_scale" for norm in norms}
    kept = {f"blocks.{layer}.{hook}" for layer in range(cfg.n_layers) for hook in hooks}
    last = f"blocks.{cfg.n_layers - 1}.hook_resid_post"
    kept |= {"hook_embed", "hook_pos_embed", "ln_final.hook_scale", last}
    with alone(model):
        output, cache = model.run_with_cache(tokens[None], names_filter=lambda name: name in kept)

    logits: Tensor = output  # type: ignore[assignment]

    def read(name: str) -> Tensor:
        return cache[name][0].to(dtype)

    def stacked(hook: str) -> Tensor:
        return torch.stack([read(f"blocks.{layer}.{hook}") for layer in range(cfg.n_layers)])

    residual = torch.cat([stacked("hook_resid_pre"), read(last)[None]])
    if not bool(residual.isfinite().all()):
        bad = int((~residual.isfinite()).flatten(1).any(1).nonzero()[0])
        raise UserError(
            f"The model's residual stream holds NaN or infinity at checkpoint {bad}: check its "
            "weights, or load it in float32."
        )
    position = read("hook_pos_embed") if "hook_pos_embed" in cache else None
    if position is not None and cfg.dtype not in (torch.float32, torch.float64):
        # half precision rounds the sum: what position added is the rest of the stream
        position = residual[0] - read("hook_embed")
    sequential, has_final = "blocks.0.hook_resid_mid" in cache, "ln_final.hook_scale" in cache
    final_scale = read("ln_final.hook_scale").squeeze(-1) if has_final else None
    return FrozenRun(
        tokens=tokens,
        residual=residual,
        mlp_input=stacked("hook_resid_mid") if sequential else residual[:-1],
        embedding=read("hook_embed"),
        position_embedding=position,
        pattern=stacked("attn.hook_pattern"),
        scales={
            norm: stacked(f"{norm}.hook_scale").squeeze(-1)
            for norm in norms
            if f"blocks.0.{norm}.hook_scale" in cache
        },
        final_scale=residual.new_ones(len(tokens)) if final_scale is None else final_scale,
        logits=logits[0, -1].to(dtype),
    )
