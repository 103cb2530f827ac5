"""Frozen blocks without MLPs from Hugging Face's weights: what carrying is held to."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.transcoder.hookpoints import READS, WRITES, read_hook_points
from circuit_tracer_qk.attribution.transcoder.propagate import FrozenBlocks
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.load import load_transformer
from circuit_tracer_qk.model.run import FrozenRun, freeze
from circuit_tracer_qk.model.supported import read_blocks
from helpers.architectures import prompt_ids, save_tiny
from helpers.reference import Norm, Reference, Run

N = 9


class Case(NamedTuple):
    """A model read twice, with the same random skips."""

    reference: Reference
    run: Run
    blocks: FrozenBlocks
    reads: str
    writes: str
    skips: list[Tensor | None]


class Cases:
    """Cases by architecture and kind of transcoder; each model is loaded once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: dict[str, tuple[Reference, Run, Any, FrozenRun]] = {}

    def __call__(self, name: str, reads: str, writes: str, skip: bool) -> Case:
        if name not in self.loaded:
            hf_model = save_tiny(name, self.folder / name)
            reference, ids = Reference(hf_model), prompt_ids(name, N)
            model = load_transformer(self.folder / name, dtype=torch.float64, device="cpu")
            frozen = freeze(model, torch.tensor(ids))
            self.loaded[name] = reference, reference.run(ids), model, frozen
        reference, run, model, frozen = self.loaded[name]
        if reference.parallel and reads == "hook_resid_mid":  # parallel blocks have none
            reads = READS[0]
        generator = torch.Generator().manual_seed(7)
        d, n_layers = frozen.residual.shape[2], frozen.n_layers
        skips: list[Tensor | None] = [None] * n_layers
        if skip:
            skips = [
                torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
                for _ in range(n_layers)
            ]
        points = read_hook_points(model.blocks, frozen, reads, writes, skips)
        heads = Heads(read_blocks(model, N), frozen)
        return Case(reference, run, FrozenBlocks(heads, points), reads, writes, skips)


@cache
def hooked_after_gain() -> bool:
    """Whether the installed TransformerLens' LayerNorm has its hook behind the gain, as before 3."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.components.layer_norm import LayerNorm

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=4, n_ctx=4, d_head=4, n_heads=1, d_vocab=4, attn_only=True, seed=0
    )
    ln, seen = LayerNorm(cfg, 4), []
    ln.w.data.fill_(3.0)
    ln.hook_normalized.register_forward_hook(lambda _, __, out: seen.append(out))
    return torch.equal(ln(torch.arange(4.0)[None, None]), seen[0])


def linear_block(case: Case, layer: int, x: Tensor, without: int | None = None) -> Tensor:
    """What leaves the block as a function of what enters, MLP cut out: x (P, d) -> (mid, out)."""
    block, run = case.reference.blocks[layer], case.run
    if without is not None:
        W_O = block.W_O.clone()
        W_O[without] = 0
        block = replace(block, W_O=W_O)

    def attention(x: Tensor) -> Tensor:
        n = block.ln1(x, run.ln1[layer]).expand(case.reference.n_heads, -1, -1)
        return block.post1(block.heads_write(n, run.pattern[layer]), run.post1[layer])

    write = attention(x) - attention(torch.zeros_like(x))  # what biases write is no part of x
    mid = x if case.reference.parallel else x + write
    out, skip = x + write, case.skips[layer]
    if skip is not None:
        read = mid
        if case.reads != "hook_resid_mid":
            norm = block.ln2
            centred = norm.kind == "layer"
            if case.reads == "ln2.hook_normalized" and not (centred and hooked_after_gain()):
                norm = Norm(norm.kind, torch.ones_like(norm.gain), norm.bias, norm.eps)
            read = norm.linear(mid, run.ln2[layer])
        written = read @ skip
        if case.writes == "mlp.hook_out":
            written = block.post2.linear(written, run.post2[layer])
        out = out + written
    return torch.stack([mid, out])


KINDS = [
    (reads, writes, skip)
    for reads, writes, skip in product(READS, WRITES, (True, False))
    if skip or (reads, writes) == (READS[0], WRITES[0])
]
