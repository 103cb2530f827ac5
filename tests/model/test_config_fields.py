"""Configurations whose fields are of the wrong type, and models whose settings change the hooks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import prompt_ids, save_tiny
from helpers.random_dictionaries import write_sae

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.model.load import load_transformer

WRONG: list[tuple[str, str, Any]] = [
    ("gpt2", field, value)
    for field in ("n_layer", "n_embd", "n_head", "n_positions", "vocab_size")
    for value in ("12", None, True, -1, 0, [1], {"a": 1}, 1.5, float("nan"))
]
WRONG += [
    ("gpt2", "n_layer", 10**12),
    ("gpt2", "n_inner", "96"),
    ("gpt2", "n_inner", 0),
    ("gpt2", "layer_norm_epsilon", None),
    ("gpt2", "layer_norm_epsilon", -1),
    ("gpt2", "layer_norm_epsilon", float("inf")),
    ("gpt2", "activation_function", None),
    ("gpt2", "activation_function", 3),
    ("gpt2", "scale_attn_weights", "false"),
    ("gpt2", "attn_pdrop", float("nan")),
    ("gpt2", "initializer_range", []),
    ("neox", "rotary_pct", 2),
    ("neox", "use_parallel_residual", None),
    ("llama", "num_key_value_heads", 3),
    ("llama", "hidden_act", ["silu"]),
    ("llama", "rms_norm_eps", "1e-5"),
    ("llama", "rope_theta", None),
    ("llama", "head_dim", -8),
    ("llama", "mlp_bias", 2),
    ("llama", "pad_token_id", True),
    ("mistral", "sliding_window", "5"),
    ("gemma2", "layer_types", [1, 2, 3]),
    ("gemma2", "attn_logit_softcapping", -1),
    ("gemma3", "query_pre_attn_scalar", "6"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = dict.fromkeys(name for name, *_ in WRONG)
    for name in names:
        save_tiny(name, folder / name)
    return {name: folder / name for name in names}


def changed(source: Path, folder: Path, **fields: Any) -> Path:
    """A copy of a model's folder with other fields in its config.json."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_a_field_of_the_wrong_type_is_named(
    saved: dict[str, Path], tmp_path: Path, name: str, field: str, value: Any
):
    folder = changed(saved[name], tmp_path / "wrong", **{field: value})
    with pytest.raises(ctqk.UserError, match=field) as refusal:
        load_transformer(folder, device="cpu")
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gpt2", {"n_head": 5}, "hidden_size 24 is no multiple of its 5 heads"),
        ("llama", {"num_attention_heads": 5}, "is no multiple of num_key_value_heads 2"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "rope_scaling.*factor"),
        ("llama", {"rope_scaling": "linear"}, "config.json"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types|layer types"),
        ("llama", {"model_type": []}, "config.json"),
        ("llama", {"intermediate_size": 10**12}, "does not fit into memory"),
        ("llama", {"vocab_size": 10**12}, "does not fit into memory"),
    ],
)
def test_fields_that_do_not_go_together(
    saved: dict[str, Path], tmp_path: Path, name: str, fields: dict[str, Any], message: str
):
    with pytest.raises(ctqk.UserError, match=message):
        load_transformer(changed(saved[name], tmp_path / "wrong", **fields), device="cpu")


@pytest.mark.parametrize("content", ["[]", "1", '"text"', "[" * 5000, '{"a": ' * 5000])
def test_a_config_that_is_no_object(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ctqk.UserError, match="config.json"):
        load_transformer(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_device_in_the_place_of_a_file(
    saved: dict[str, Path], tmp_path: Path, name: str, kind: str
):
    folder = changed(saved["llama"], tmp_path / "wrong")
    (folder / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises(ctqk.UserError, match=f"{name}.* regular file|no config.json"):
        load_transformer(folder, device="cpu")


def test_gpt2_that_orders_its_attention_anew_is_exact_in_float64(tmp_path: Path):
    """Hugging Face's own code fails there; its scores are those of the plain order."""
    plain = save_tiny("gpt2", tmp_path / "plain").double()
    save_tiny("gpt2", tmp_path / "upcast", reorder_and_upcast_attn=True)
    ids = torch.tensor([prompt_ids("gpt2")])
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        model = load_transformer(tmp_path / "upcast", dtype=dtype, device="cpu")
        with torch.no_grad():
            assert float((model(ids) - plain(ids).logits).abs().max()) < limit


@pytest.mark.parametrize("setting", ["use_split_qkv_input", "use_attn_in"])
def test_inputs_of_every_heads_own_are_refused(tmp_path: Path, setting: str):
    save_tiny("gpt2", tmp_path / "model")
    model: Any = load_transformer(tmp_path / "model", device="cpu")
    write_sae(tmp_path / "sae", model.cfg.d_model, list(range(model.cfg.n_layers)))
    loaded = ctqk.load_model(model, tmp_path / "sae")
    ids = prompt_ids("gpt2")
    before = ctqk.attribute(ids, loaded).adjacency_matrix
    getattr(model, f"set_{setting}")(True)
    for refused in (
        lambda: ctqk.load_model(model, tmp_path / "sae"),
        lambda: ctqk.attribute(ids, loaded),
        lambda: ctqk.explain(ids, loaded),
    ):
        with pytest.raises(ctqk.UserError, match=rf"{setting} on.*set_{setting}\(False\)"):
            refused()
    getattr(model, f"set_{setting}")(False)
    for harmless in ("use_hook_mlp_in", "use_attn_result"):
        getattr(model, f"set_{harmless}")(True)
    assert torch.allclose(ctqk.attribute(ids, loaded).adjacency_matrix, before, atol=1e-5)
