"""Loading takes the memory that the weights need, however long the context."""

import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.loading import peak
from helpers.architectures import save_tiny

from circuit_tracer_qk.model.load import load_transformer

N_CTX = 8192  # a mask of 64 MB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_context_takes_one_mask_and_not_one_a_layer(tmp_path: Path) -> None:
    """24 layers with a mask each took 1.9 GB."""
    save_tiny("llama", tmp_path, num_hidden_layers=24, max_position_embeddings=N_CTX)
    found = peak(tmp_path)
    assert found["peak"] < found["weights"] + found["embeddings"] + 0.5e9
    assert found["held"] < 0.2e9


@pytest.mark.parametrize("name", ["llama3-rope", "gemma2", "gemma3"])
def test_layers_of_one_kind_share_mask_and_rotary_tables(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    model: Any = load_transformer(tmp_path, device="cpu")
    kinds = {block.attn.attn_type for block in model.blocks}
    for buffer in ("mask", "rotary_sin", "rotary_cos"):
        places = {getattr(block.attn, buffer).data_ptr() for block in model.blocks}
        assert len(places) == len(kinds)
    assert {tuple(block.attn.mask.shape) for block in model.blocks} == {(64, 64)}
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
