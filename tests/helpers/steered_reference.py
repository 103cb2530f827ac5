"""An independent steered forward pass: `reference.py`'s model with edited queries and keys.

Every head projects its own edited copy of the stream, so what an edit touches is plain to see.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.reference import Block, Reference, Run, rotate, softcap

# (layer, head, "query" or "key") -> (P, d): what is added to the stream that side reads
Moves = Mapping[tuple[int, int, str], Tensor]


class SteeredReference(NamedTuple):
    """Lists are indexed by layer."""

    scores: list[Tensor]  # (H, P, P), before soft-cap and mask
    pattern: list[Tensor]  # (H, P, P)
    logits: Tensor  # (P, V)


def steered(
    reference: Reference,
    ids: list[int],
    moves: Moves,
    *,
    frozen_norms: bool,
    keep: Run | None = None,
    outputs: Mapping[tuple[int, int], Tensor] | None = None,
) -> SteeredReference:
    """A pass with edited queries and keys.

    Args:
        reference: the model.
        ids: the prompt.
        moves: additions to what heads read.
        frozen_norms: scores change by what the edit changes at the clean run's vectors and
            denominators; else ln1 and the QK-norm are those of the edited live stream.
        keep: a clean run whose patterns all heads without moves or outputs keep.
        outputs: (layer, head) -> (P,) factors of a head's write.
    """
    clean, outputs = reference.run(ids), outputs or {}
    result = SteeredReference([], [], torch.empty(0))
    per_group = reference.n_heads // reference.n_kv_heads
    x = reference.W_E[ids] + reference.W_pos[: len(ids)]
    for layer, block in enumerate(reference.blocks):
        n = block.ln1(x, block.ln1.denominator(x))
        scores, moved = [], set()
        for head in range(reference.n_heads):
            dq, dk = (moves.get((layer, head, side)) for side in ("query", "key"))
            zero = torch.zeros_like(x)
            dq, dk = (zero if d is None else d for d in (dq, dk))

            def product(
                stream: Tensor, dq: Tensor, dk: Tensor, fixed: bool, head: int = head
            ) -> Tensor:
                q = _vector(block, stream + dq, clean, layer, head, 0, fixed)
                k = _vector(block, stream + dk, clean, layer, head // per_group, 1, fixed)
                return q @ k.T / reference.attn_scale

            if (layer, head, "query") in moves or (layer, head, "key") in moves:
                moved.add(head)
            if frozen_norms and head in moved:
                base = clean.residual[layer]
                change = product(base, dq, dk, True) - product(base, zero, zero, True)
                scores.append(product(x, zero, zero, False) + change)
            else:
                scores.append(product(x, dq, dk, False))
        raw = torch.stack(scores)
        capped = softcap(raw, reference.softcap)
        pattern = capped.masked_fill(~clean.mask[layer], -math.inf).softmax(-1)
        if keep is not None:
            free = [h for h in range(reference.n_heads) if h in moved or (layer, h) in outputs]
            frozen = keep.pattern[layer].clone()
            frozen[free] = pattern[free]
            pattern = frozen
        result.scores.append(raw)
        result.pattern.append(pattern)
        W_V, b_V = (t.repeat_interleave(per_group, 0) for t in (block.W_V, block.b_V))
        z = pattern @ (n @ W_V + b_V[:, None])
        for (at, head), factors in outputs.items():
            if at == layer:
                z[head] = z[head] * factors[:, None]
        write = (z @ block.W_O).sum(0) + block.b_O
        write = block.post1(write, block.post1.denominator(write))
        mid = x if reference.parallel else x + write
        mlp = block.mlp(block.ln2(mid, block.ln2.denominator(mid)))
        x = x + write + block.post2(mlp, block.post2.denominator(mlp))
    final = reference.final_norm(x, reference.final_norm.denominator(x))
    logits = softcap(final @ reference.W_U, reference.final_softcap)
    return result._replace(logits=logits)


def _vector(
    block: Block, x: Tensor, clean: Run, layer: int, head: int, side: int, fixed: bool
) -> Tensor:
    """(P, e): a query head's queries (0) or a key-value head's keys (1) of the streams x."""
    W, b, norm, taus = (
        (block.W_Q, block.b_Q, block.q_norm, clean.tau_q),
        (block.W_K, block.b_K, block.k_norm, clean.tau_k),
    )[side]
    y = block.ln1(x, clean.ln1[layer] if fixed else block.ln1.denominator(x)) @ W[head] + b[head]
    y = norm(y, taus[layer][:, head] if fixed else norm.denominator(y))
    return rotate(y, torch.arange(len(x))[:, None][:, 0], block.inv_freq)
