"""Patterns and block outputs, rebuilt from our own maps and compared with the model's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.mlp import read_mlp
from circuit_tracer_qk.model.run import freeze
from circuit_tracer_qk.model.supported import read_blocks

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

log = logging.getLogger(__name__)


# What a pattern may differ by: three times the most that SmolLM2, Gemma-3 270M and random models of
# every architecture show where the model's own run rounds.
PATTERN_LIMITS = {torch.bfloat16: 0.1, torch.float16: 0.01}
EXACT_LIMIT = 1e-3


@torch.no_grad()
def pattern_differences(heads: Heads) -> Iterator[float]:
    """By layer, what a run's patterns differ by from those that its stream gives by our own maps."""
    run = heads.run
    for layer in range(run.n_layers):
        block = heads.block(layer)
        visible = block.visible(run.n_pos, run.residual.device)
        scores = block.cap(heads.scores(layer)).masked_fill(~visible, -torch.inf)
        yield float((scores.softmax(-1) - run.pattern[layer]).abs().max())


def check_patterns(heads: Heads, name: str, dtype: torch.dtype) -> None:
    """Rebuild a run's attention patterns from this module's maps and compare.

    Args:
        heads: the heads on the run.
        name: the model's.
        dtype: that it runs in.

    Raises:
        UserError: a pattern differs by more than 1e-3 (.1 in bfloat16, .01 in float16).
    """
    limit = PATTERN_LIMITS.get(dtype, EXACT_LIMIT)
    way_out = "; load it in float32" if dtype in PATTERN_LIMITS else ""
    for layer, off in enumerate(pattern_differences(heads)):
        if not off <= limit:
            raise UserError(
                f"{name} computes something this package does not reproduce: the pattern of layer "
                f"{layer} differs by {off:.1e} (limit {limit:.0e}); its scores cannot be taken "
                f"apart{way_out}."
            )


def say_rounding(heads: Heads, dtype: torch.dtype) -> None:
    """Tell the log what half precision costs a run: how far its patterns are from its stream's."""
    if dtype in PATTERN_LIMITS and log.isEnabledFor(logging.INFO):
        log.info(
            "the model rounds to %s: its patterns differ by up to %.1e from what its stream gives "
            "in float32; terms and scores are off by as much or more (--dtype float32 is exact)",
            str(dtype).removeprefix("torch."),
            max(pattern_differences(heads)),
        )


@torch.no_grad()
def check_exact(model: HookedTransformer) -> None:
    """Rebuild a short run's patterns and block outputs from this module's maps and compare.

    Catches at load time any architecture whose facts were read wrongly, rather than in a graph.

    Raises:
        UserError: a pattern or a block's output differs by more than 1e-3 of its scale (a model
            given in half precision, whose own rounding moves patterns: .1, .01 in float16; and
            .05).
    """
    cfg = model.cfg
    exact = cfg.dtype in (torch.float32, torch.float64)
    tolerance = 1e-3 if exact else 0.05
    n = min(16, cfg.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(cfg.d_vocab, (n,), generator=generator).to(model.W_E.device)
    run = freeze(model, tokens)
    blocks = read_blocks(model, n)
    heads = Heads(blocks, run)

    def compare(what: str, ours: Tensor, theirs: Tensor) -> None:
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        if not difference <= tolerance:
            raise UserError(
                f"{cfg.model_name} ({cfg.original_architecture}) computes something this package "
                f"does not reproduce: {what} differs by {difference:.1e} of its scale (limit "
                f"{tolerance:.0e}); the architecture is not supported."
            )

    check_patterns(heads, f"{cfg.model_name} ({cfg.original_architecture})", cfg.dtype)
    embedding = run.embedding
    if run.position_embedding is not None:
        embedding = embedding + run.position_embedding
    compare("the embedding at checkpoint 0", embedding, run.residual[0])
    for layer, source in enumerate(model.blocks):
        b = heads.block(layer)
        values = heads.value_path(layer, heads.everywhere)(run.residual[layer]) + b.value_bias()
        z = torch.einsum("hqk,khe->qhe", run.pattern[layer], b.shared(values))
        write = torch.einsum("qhe,hed->qd", z, b.W_O) + b.b_O
        out = run.residual[layer] + b.post.apply(write, run.scale("ln1_post", layer))
        mlp = read_mlp(source, run.residual.dtype)
        if mlp is not None:
            out = out + mlp.output(
                run.mlp_input[layer], run.scale("ln2", layer), run.scale("ln2_post", layer)
            )
        compare(f"the output of block {layer}", out, run.residual[layer + 1])
