"""Models by hub name, offline from a hand-made cache: what a local folder gives, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, prompt_ids, save_tiny, save_tokenizer
from hub_cache import COMMIT, HubCache
from random_dictionaries import write_sae
from transformer_lens import HookedTransformerConfig
from transformers import AutoConfig

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import cli

MODEL = "someone/tiny"


def saes(folder: Path, model: Path) -> Path:
    """Random SAEs at every layer of a model folder."""
    config = AutoConfig.from_pretrained(model)
    return write_sae(folder, config.hidden_size, list(range(config.num_hidden_layers)))


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "cache")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hub_id_is_the_folder_that_it_caches(
    tmp_path: Path, name: str, cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_tiny(name, folder)
    save_tokenizer(folder)
    dictionaries = saes(tmp_path / "saes", folder)
    cache.add(MODEL, folder)
    cache.add(MODEL, folder, revision="v2")
    cache.use(monkeypatch)
    ids = prompt_ids(name, 8)

    def adjacency(model: str | Path) -> torch.Tensor:
        loaded = ctqk.load_model(model, dictionaries, device="cpu")
        return ctqk.attribute(ids, loaded, max_n_logits=2).adjacency_matrix

    local = adjacency(folder)
    for ref in (MODEL, f"{MODEL}@v2", f"{MODEL}@{COMMIT}"):
        assert torch.equal(adjacency(ref), local)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_half_precision_is_contracted_in_float32(
    tmp_path: Path, name: str, dtype: torch.dtype, cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own forward pass rounds; everything that is made of that pass sums in float32."""
    folder = tmp_path / "model"
    save_tiny(name, folder)
    save_tokenizer(folder)
    dictionaries = saes(tmp_path / "saes", folder)
    cache.add(MODEL, folder)
    cache.use(monkeypatch)
    model = ctqk.load_model(MODEL, dictionaries, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.transformer.parameters()} == {dtype}
    graph = ctqk.attribute(prompt_ids(name, 8), model, max_n_logits=2)
    run = graph.record.parts.run
    assert {t.dtype for t in run.tensors().values() if t.is_floating_point()} == {torch.float32}
    assert graph.adjacency_matrix.isfinite().all() and graph.n_features > 20
    table = graph.qk(1, 0, 7, 4)
    scale = float(table.terms.abs().sum())
    assert abs(float(table.terms.sum()) - table.score) <= 1e-5 * scale
    # the pattern is the model's own, the scores are ours: they belong together to its rounding
    row = graph.qk_row(1, 0, 7)
    ours = torch.softmax(torch.as_tensor(row.scores, dtype=torch.float32), -1)
    theirs = torch.as_tensor(row.pattern, dtype=torch.float32)
    assert float((ours - theirs).abs().max()) < (0.15 if dtype == torch.bfloat16 else 0.02)


def refusal(capsys: pytest.CaptureFixture[str], ref: str, dictionaries: Path) -> str:
    """The one line with which the command line refuses a model."""
    arguments = ["qk", "-m", ref, "-d", str(dictionaries), "-p", "a", "--head", "L1H0"]
    assert cli.main(arguments) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1
    return out.err


@pytest.mark.parametrize("silent", [False, True])
def test_models_that_cannot_be_had(
    tmp_path: Path,
    cache: HubCache,
    silent: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Offline, and with a hub that answers nothing."""
    folder = tmp_path / "model"
    save_tiny("llama", folder)
    save_tokenizer(folder)
    dictionaries = saes(tmp_path / "saes", folder)
    snapshot = cache.add(MODEL, folder)
    (cache.unreachable if silent else cache.use)(monkeypatch)
    said = refusal(capsys, "nobody/nothing", dictionaries)
    assert "nobody/nothing is not in the local cache" in said and "cannot be reached" in said
    said = refusal(capsys, f"{MODEL}@v3", dictionaries)
    assert f"the local cache holds {MODEL} at main" in said and "not at v3" in said
    weights = snapshot / "model.safetensors"
    content = weights.read_bytes()
    weights.resolve().write_bytes(content[: len(content) // 2])
    said = refusal(capsys, MODEL, dictionaries)
    assert "model.safetensors is truncated" in said and "download it again" in said


def test_an_old_transformer_lens_refuses_what_it_cannot_express(tmp_path: Path) -> None:
    """Gemma 3's two rotary bases: before TransformerLens 3 by name, from then on exactly."""
    folder = tmp_path / "model"
    save_tiny("gemma3", folder)  # the folder's name says nothing of it
    dictionaries = saes(tmp_path / "saes", folder)
    if "rotary_base_local" in HookedTransformerConfig.__dataclass_fields__:
        assert ctqk.load_model(folder, dictionaries, device="cpu").cfg.n_layers == 4
    else:
        with pytest.raises(ctqk.UserError, match="second rotary base.*install transformer-lens 3"):
            ctqk.load_model(folder, dictionaries, device="cpu")
