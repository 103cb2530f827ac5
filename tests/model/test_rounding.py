"""Half precision: how far a model's patterns may be from its stream's, and what -v says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import save_tiny
from helpers.random_dictionaries import write_sae

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT
from circuit_tracer_qk.model.load import load_transformer


@pytest.mark.parametrize(
    "dtype, share", [(torch.bfloat16, 0.15), (torch.float16, 0.015), (torch.float32, 0.002)]
)
def test_a_pattern_that_no_rounding_explains_is_refused(
    tmp_path: Path, dtype: torch.dtype, share: float
) -> None:
    save_tiny("llama", tmp_path / "model")
    saes = write_sae(tmp_path / "saes", 24, [0, 1, 2])
    model: Any = load_transformer(tmp_path / "model", dtype=dtype, device="cpu")
    ctqk.load_model(model, saes)  # its own rounding is let through

    def smoothed(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return (1 - share) * pattern + share / pattern.shape[-1]

    model.blocks[1].attn.hook_pattern.add_hook(smoothed, is_permanent=True)
    wanted = r"the pattern of layer 1 differs by .* cannot be taken apart"
    if dtype != torch.float32:
        wanted += "; load it in float32"
    with pytest.raises(ctqk.UserError, match=wanted):
        ctqk.load_model(model, saes)


def test_verbose_says_what_half_precision_costs(tmp_path: Path, run: Any) -> None:
    asked = ("attribute", "-p", DEMO_PROMPT, "-d", "miniature-sae", "-o", tmp_path / "g.pt")
    done = run(*asked, "-v", "--dtype", "bfloat16")
    assert done.status == 0, done.err
    assert "the model rounds to bfloat16: its patterns differ by up to" in done.err
    assert "rounds to" not in run(*asked, "-v").err
    assert "rounds to" not in run(*asked, "--dtype", "bfloat16").err
