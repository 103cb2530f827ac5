"""Models in GGUF files: the same logits as the model that was written, and what is refused."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.architectures import prompt_ids, save_tiny
from helpers.random_dictionaries import write_sae

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.model import huggingface

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def paired(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order, in which rotated dimensions are neighbours."""
    n, width = weight.shape
    return weight.reshape(n_heads, 2, n // n_heads // 2, width).swapaxes(1, 2).reshape(n, width)


def write_gguf(model: Any, path: Path) -> None:
    """A tiny Llama as llama.cpp's own converter writes it, in float32."""
    cfg = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_vocab_size(cfg.vocab_size)
    letters = ["<unk>", "<s>", "</s>", "\u2581", *"w0123456789"]
    words = letters + [f"<more {i}>" for i in range(cfg.vocab_size - len(letters))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3, *([1] * (len(words) - 3))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        if name.startswith("model.layers."):
            n_heads = {"self_attn.q_proj.weight": cfg.num_attention_heads}
            n_heads |= {"self_attn.k_proj.weight": cfg.num_key_value_heads}
            if rest in n_heads:
                weight = paired(weight, n_heads[rest])
            name = f"blk.{head}.{NAMES[rest]}"
        else:
            name = NAMES[name]
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    model = save_tiny("llama", folder / "hf")
    (folder / "model").mkdir()
    path = folder / "model" / "tiny.gguf"
    write_gguf(model, path)
    write_sae(
        folder / "saes", model.config.hidden_size, list(range(model.config.num_hidden_layers))
    )
    return model, path


@pytest.mark.parametrize("by", ["file", "folder", "relative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_model_that_was_written(
    written: tuple[Any, Path], by: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = written
    monkeypatch.chdir(path.parent)
    name = {"file": path, "folder": path.parent, "relative": path.name}[by]
    loaded = ctqk.load_model(name, path.parents[1] / "saes", dtype=dtype, device="cpu")
    ids = torch.tensor([prompt_ids("llama")])
    with torch.no_grad():
        theirs = model.to(dtype)(ids).logits
        ours = loaded.transformer(ids)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert loaded.tokenizer is not None and loaded.tokenizer.bos_token_id == 1
    tokens = loaded.ensure_tokenized("w3 w5").tolist()
    assert tokens[0] == 1 and loaded.tokenizer.decode(tokens[1:]).strip() == "w3 w5"


def test_a_graph_of_it_is_saved_and_loaded(written: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = written
    loaded = ctqk.load_model(path, path.parents[1] / "saes", device="cpu")
    graph = ctqk.attribute("w3 w5 w3", loaded, max_n_logits=1)
    graph.to_pt(tmp_path / "g.pt")
    assert ctqk.load_graph(tmp_path / "g.pt").qk(1, 0, 3, 1).score == graph.qk(1, 0, 3, 1).score
    assert ctqk.create_graph_files(graph, "g", tmp_path / "graphs").is_file()
    assert not list(path.parent.glob("*.model"))  # nothing is written beside the file


def refusal(name: Path) -> str:
    with pytest.raises(ctqk.UserError) as refused:
        ctqk.load_model(name, "miniature-sae", device="cpu")
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_what_is_no_whole_file_is_refused(written: tuple[Any, Path], tmp_path: Path) -> None:
    data = written[1].read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK" + data)
    assert "does not begin with GGUF" in refusal(other)
    for n in (4, 20, 400, len(data) // 2, len(data) - 100):
        other.write_bytes(data[:n])
        assert f"{other} cannot be read (" in refusal(other)
    other.write_bytes(data.replace(b"llama", b"lamma", 1))
    assert f"{other} cannot be read (" in refusal(other)
    assert "is no regular file" in refusal(tmp_path / "none.gguf") or "is not a folder" in refusal(
        tmp_path / "none.gguf"
    )
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is no regular file" in refusal(tmp_path / "pipe.gguf")
    (tmp_path / "big-00001-of-00002.gguf").write_bytes(data)
    assert "is one part of several" in refusal(tmp_path / "big-00001-of-00002.gguf")


def test_a_folder_with_several_files_is_refused(written: tuple[Any, Path], tmp_path: Path) -> None:
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(written[1].read_bytes())
    assert "holds several GGUF files (a.gguf, b.GGUF)" in refusal(tmp_path)


def test_without_its_package_it_says_what_to_install(
    written: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = lambda name: None if name == "gguf" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(huggingface, "find_spec", without)
    assert "pip install 'circuit-tracer-qk[gguf]'" in refusal(written[1])
