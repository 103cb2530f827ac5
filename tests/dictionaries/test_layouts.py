"""Dictionaries in the layouts that people have, against their owners' equations.

Files are made by ``layout_files`` in the real layouts; what they mean is written out there position
by position in float64.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.architectures import prompt_ids, save_tiny
from helpers.layout_files import (
    DICTIONARY_LEARNING,
    LAYOUTS,
    MODEL,
    SAE_LENS,
    D,
    N,
    Read,
    sae_lens_reads,
    write_crosscoder,
    write_dictionary_learning,
    write_gemma_scope,
    write_gemma_scope_2,
    write_llama_scope,
    write_qwen_scope,
    write_sae_lens,
    write_sparsify,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.dictionaries import files as dictionary_files
from circuit_tracer_qk.dictionaries import tensors as weight_files
from circuit_tracer_qk.dictionaries.dictionary import Dictionary, Units
from circuit_tracer_qk.dictionaries.layouts.gemma_scope_2 import CROSSCODER
from circuit_tracer_qk.dictionaries.load import load_dictionaries
from circuit_tracer_qk.dictionaries.native_writer import write_dictionaries


def stream(n_pos: int = 20, seed: int = 5) -> Tensor:
    """A residual stream whose mean over d_model is far from 0."""
    return torch.randn(n_pos, D, generator=torch.Generator().manual_seed(seed)).double() + 0.4


def held(dictionary: Dictionary, x: Tensor, read: Read, tolerance: float = 1e-6) -> None:
    """The dictionary says what its owner's equations say, in the model's units."""
    acts = dictionary.encode(x)
    [checkpoint] = dictionary.decoders
    vectors = dictionary.vectors(checkpoint, torch.arange(acts.shape[1])).to(x.dtype)
    ours = acts[..., None] * vectors
    assert torch.equal(acts > 0, read.acts > 0) and int((acts > 0).sum()) > 20
    assert float((ours - read.vectors).abs().max()) <= tolerance * float(read.vectors.abs().max())
    bias = dictionary.bias(x)
    assert float((bias - read.bias).abs().max()) <= tolerance * float(read.bias.abs().max())


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("kind", SAE_LENS)
def test_sae_lens_means_what_sae_lens_computes(tmp_path: Path, kind: str, applied: bool) -> None:
    path = write_sae_lens(tmp_path, 0, kind, apply_b_dec_to_input=applied)
    x = stream()
    dictionary = ctqk.load_dictionaries(path, dtype=torch.float64).by_checkpoint[1]
    read = sae_lens_reads(path, x)
    held(dictionary, x, read)
    assert torch.allclose(dictionary.encode(x), read.acts, atol=1e-6), "activations are SAELens'"


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("mode", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("kind", SAE_LENS)
def test_normalised_inputs_come_back_in_the_models_units(
    tmp_path: Path, kind: str, mode: str, centred: bool
) -> None:
    about = {"model_from_pretrained_kwargs": {"center_writing_weights": centred}}
    path = write_sae_lens(tmp_path, 0, kind, about=about, normalize_activations=mode)
    x = stream()
    dictionary = ctqk.load_dictionaries(path, dtype=torch.float64).by_checkpoint[1]
    held(dictionary, x, sae_lens_reads(path, x))


@pytest.mark.parametrize("kind", SAE_LENS)
def test_a_scaling_factor_that_the_files_lack_is_asked_for(tmp_path: Path, kind: str) -> None:
    path = write_sae_lens(tmp_path, 0, kind, normalize_activations="expected_average_only_in")
    with pytest.raises(ctqk.UserError, match="norm_scaling_factor: NUMBER"):
        ctqk.load_dictionaries(path)
    x = stream()
    for said in (1.7, {0: 1.7}):
        config = {"format": "sae-lens", "norm_scaling_factor": said}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        dictionary = ctqk.load_dictionaries(path, dtype=torch.float64).by_checkpoint[1]
        read = sae_lens_reads(path, x, 1.7)
        held(dictionary, x, read)
        assert torch.allclose(dictionary.encode(x), read.acts, atol=1e-6), "as SAELens folds it"


@pytest.mark.parametrize("centred", [True, False])
def test_centred_writing_weights_are_the_same_model(tmp_path: Path, centred: bool) -> None:
    """Read on the plain model, a dictionary of a centred one finds the centred stream's features."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=8, n_heads=3, d_vocab=30, act_fn="gelu_new",
        d_mlp=40, normalization_type="LN", seed=0, dtype=torch.float64,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ids = torch.randint(0, 30, (1, 12))
    hook = "blocks.0.hook_resid_post"
    plain = model.run_with_cache(ids, names_filter=hook)[1][hook][0]
    state = model.center_writing_weights(dict(model.state_dict()))
    model.load_state_dict(state)
    writing = model.run_with_cache(ids, names_filter=hook)[1][hook][0]
    assert float(writing.mean(-1).abs().max()) < 1e-12 < float(plain.mean(-1).abs().max())

    about = {"model_from_pretrained_kwargs": {"center_writing_weights": centred}}
    path = write_sae_lens(tmp_path, 0, about=about)
    dictionary = ctqk.load_dictionaries(path, dtype=torch.float64).by_checkpoint[1]
    read = sae_lens_reads(path, writing if centred else plain)
    assert torch.allclose(dictionary.encode(plain), read.acts, atol=1e-9)
    if centred:  # on either model
        assert torch.allclose(dictionary.encode(writing), read.acts, atol=1e-9)
        assert torch.allclose(dictionary.bias(plain) - dictionary.bias(writing), plain - writing)


def test_gpt2_files_that_do_not_say_whether_they_were_centred(tmp_path: Path) -> None:
    """gpt2-small-res-jb's own files are silent: neither reading is guessed."""
    path = write_sae_lens(tmp_path, 0, "standard")
    cfg = json.loads((path / "cfg.json").read_text())
    del cfg["metadata"]
    old = {"hook_point": "blocks.0.hook_resid_post", "model_name": "gpt2-small", "d_sae": N}
    (path / "cfg.json").write_text(json.dumps(cfg | old))
    with pytest.raises(ctqk.UserError, match="centred: true` or `false`"):
        ctqk.load_dictionaries(path)
    x = stream()
    for centred in (True, False):
        (path / "config.yaml").write_text(f"format: sae-lens\ncentred: {centred}\n")
        dictionary = ctqk.load_dictionaries(path, dtype=torch.float64).by_checkpoint[1]
        assert torch.allclose(dictionary.bias(x) - dictionary.b_dec, x.mean(-1)[:, None] * centred)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lazy", [False, True])
def test_every_layout_means_what_its_owner_computes(
    tmp_path: Path, layout: str, lazy: bool
) -> None:
    name, write, reads = LAYOUTS[layout]
    paths = {layer: write(tmp_path / name, layer) for layer in (0, 2)}
    found = ctqk.load_dictionaries(tmp_path / name, dtype=torch.float64, lazy=lazy)
    assert found.kind == "residual_sae_set" and found.checkpoints == (1, 3)
    assert found.scan == name
    for layer, path in paths.items():
        x = stream(seed=layer)
        held(found.by_checkpoint[layer + 1], x, reads(path, x))
    single = stream().float()
    ours = ctqk.load_dictionaries(tmp_path / name, lazy=lazy).by_checkpoint[3].encode(single)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("more", [{"lower": True}, {"compressed": True}])
def test_gemma_scope_in_its_variants(tmp_path: Path, more: dict[str, bool]) -> None:
    path = write_gemma_scope(tmp_path / "gemma-scope-9b-it-res", 9, **more)
    found = ctqk.load_dictionaries(tmp_path / "gemma-scope-9b-it-res", dtype=torch.float64)
    assert found.model_name == "google/gemma-2-9b-it" and found.checkpoints == (10,)
    x = stream()
    held(found.by_checkpoint[10], x, LAYOUTS["gemma-scope"][2](path, x))


def test_gemma_scope_has_to_be_called_residual(tmp_path: Path) -> None:
    """MLP and attention SAEs are stored alike: the repository's name tells, or the user does."""
    path = write_gemma_scope(tmp_path / "mine", 3)
    with pytest.raises(ctqk.UserError, match=r"name the format, gemma-scope:.*mine"):
        ctqk.load_dictionaries(tmp_path / "mine")
    assert ctqk.load_dictionaries(f"gemma-scope:{tmp_path / 'mine'}").checkpoints == (4,)
    assert ctqk.load_dictionaries(f"gemma-scope:{path}").checkpoints == (4,)
    (tmp_path / "mine" / "config.yaml").write_text(
        "format: gemma-scope\nmodel_name: google/gemma-2-2b\nscan: res\n"
    )
    found = ctqk.load_dictionaries(tmp_path / "mine")
    assert (found.model_name, found.scan) == ("google/gemma-2-2b", "res")
    write_gemma_scope(tmp_path / "gemma-scope-2b-pt-mlp", 3)
    with pytest.raises(ctqk.UserError, match="not of the residual stream"):
        ctqk.load_dictionaries(tmp_path / "gemma-scope-2b-pt-mlp")


@pytest.mark.parametrize(
    "more",
    [
        {"act_fn": "topk", "jump_relu_threshold": 0.0},
        {"act_fn": "topk"},
        {"act_fn": "relu"},
        {"sparsity_include_decoder_norm": False},
        {"norm_activation": "token-wise"},
        {"norm_activation": "inference"},
        {"apply_decoder_bias_to_pre_encoder": True},
        {"dataset_average_activation_norm": {"in": 2.0, "out": 5.0}},
    ],
    ids=lambda more: " ".join(f"{k}={v}" for k, v in more.items()),
)
def test_llama_scope_in_its_variants(tmp_path: Path, more: dict[str, Any]) -> None:
    path = write_llama_scope(tmp_path, 4, **more)
    dictionary = ctqk.load_dictionaries(path, dtype=torch.float64).by_checkpoint[5]
    x = stream()
    held(dictionary, x, LAYOUTS["llama-scope"][2](path, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparsify_in_its_variants(tmp_path: Path, bias: bool, dtype: torch.dtype) -> None:
    path = write_sparsify(tmp_path / "set", 1, bias=bias, dtype=dtype)
    (tmp_path / "set" / "layers.1.mlp").mkdir()
    for name in ("cfg.json", "sae.safetensors"):  # another module's, beside it
        (tmp_path / "set" / "layers.1.mlp" / name).write_bytes((path / name).read_bytes())
    x = stream()
    for ref in (tmp_path / "set", path):
        [dictionary] = ctqk.load_dictionaries(ref, dtype=torch.float64).by_checkpoint.values()
        held(dictionary, x, LAYOUTS["sparsify"][2](path, x))


@pytest.mark.parametrize("name", DICTIONARY_LEARNING)
def test_dictionary_learning_in_its_classes(tmp_path: Path, name: str) -> None:
    path = write_dictionary_learning(tmp_path, 1, name)
    found = ctqk.load_dictionaries(tmp_path, dtype=torch.float64)
    assert found.model_name == MODEL
    x = stream()
    held(found.by_checkpoint[2], x, LAYOUTS["dictionary-learning"][2](path, x))


@pytest.mark.parametrize("kind", [*SAE_LENS, "layer_norm"])
def test_sae_lens_itself_agrees(tmp_path: Path, kind: str) -> None:
    """Its own loader on the same files, where it is installed."""
    sae_lens = pytest.importorskip("sae_lens")
    more: dict[str, Any] = {"normalize_activations": kind} if kind == "layer_norm" else {}
    path = write_sae_lens(tmp_path, 0, "jumprelu" if more else kind, **more)
    sae = sae_lens.SAE.load_from_disk(str(path))
    x = stream().float()
    dictionary = ctqk.load_dictionaries(path).by_checkpoint[1]
    ours, theirs = dictionary.encode(x), sae.encode(x)
    if not more:  # with layer_norm its activations are in the norm's units
        assert torch.allclose(ours, theirs, atol=1e-6)
    again = ours @ dictionary.vectors(1, torch.arange(N)).float() + dictionary.bias(x)
    assert torch.allclose(again, sae.decode(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["gemma_2", "llama_scope", "dictionary_learning_1", "qwen_scope"])
def test_sae_lens_own_loaders_agree(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAELens' converters of other layouts, on the same files."""
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    from sae_lens import SAE  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(tmp_path / repo_id / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    repo, path, folder = {
        "gemma_2": ("gemma-scope-2b-pt-res", write_gemma_scope, "layer_3/width_16k/average_l0_71"),
        "llama_scope": ("LXR-8x", write_llama_scope, "Llama3_1-8B-Base-L3R-8x"),
        "dictionary_learning_1": ("x", write_dictionary_learning, "resid_post_layer_3/trainer_0"),
        "qwen_scope": (
            "SAE-Res-Qwen3-1.7B-Base-W32K-L0_7",
            write_qwen_scope,
            "layer3.sae.pt",
        ),
    }[name]
    path(tmp_path / repo, 3)
    override = {"d_in": D, "d_sae": 128 if name == "qwen_scope" else N, "dtype": "float32"}
    if name == "llama_scope":  # where decoder vectors have norm 1, the two readings are one
        file = tmp_path / repo / folder / "checkpoints" / "final.safetensors"
        t = load_file(file)
        t["decoder.weight"] = (t["decoder.weight"] / t["decoder.weight"].norm(dim=0)).contiguous()
        save_file({k: v.float() for k, v in t.items()}, file)
    load = loaders.NAMED_PRETRAINED_SAE_LOADERS[name]
    cfg, state, _ = load(repo, folder, "cpu", False, override)
    cfg = loaders.handle_config_defaulting(cfg)
    sae = SAE.get_sae_class_for_architecture(cfg["architecture"]).from_dict(cfg)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if name == "llama_scope":
        sae.fold_activation_norm_scaling_factor(D**0.5 / 6.0)
    x = stream().float()
    found = ctqk.load_dictionaries(
        tmp_path / repo / (folder if name != "qwen_scope" else "")
    ).by_checkpoint[4]
    theirs = sae.decode(sae.encode(x))
    ours = found.encode(x) @ found.vectors(4, torch.arange(len(found.b_enc))).float() + found.bias(
        x
    )
    assert torch.equal(found.encode(x) > 0, sae.encode(x) > 0)
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max()) + 1e-6


@pytest.mark.parametrize("architecture", ["abstopk", "matching_pursuit", "temporal"])
def test_other_architectures_go_through_sae_lens(tmp_path: Path, architecture: str) -> None:
    """With SAELens their own encode is used, where a reconstruction is a sum at all."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class  # pyright: ignore[reportMissingImports]

    kind, config = get_sae_class(architecture)
    more = {"abstopk": {"k": 5}, "matching_pursuit": {}, "temporal": {"bottleneck_factor": 1}}[
        architecture
    ]
    torch.manual_seed(0)
    sae = kind(config(d_in=D, d_sae=N, **more))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(std=0.3)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    sae.save_model(tmp_path / "sae")
    if architecture == "temporal":
        with pytest.raises(ctqk.UserError, match=r"temporal.*(together|does not reconstruct)"):
            ctqk.load_dictionaries(tmp_path / "sae")
        return
    dictionary = ctqk.load_dictionaries(tmp_path / "sae").by_checkpoint[1]
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    x = stream().float()
    acts = dictionary.encode(x)
    assert torch.allclose(acts, theirs.encode(x), atol=1e-6) and bool((acts != 0).any())
    again = acts @ dictionary.vectors(1, torch.arange(N)) + dictionary.bias(x)
    assert torch.allclose(again, theirs.decode(theirs.encode(x)), atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny("llama", folder)
    return folder


@pytest.mark.parametrize("layout", [*LAYOUTS, "layer_norm", "gated", "centred"])
def test_a_folder_of_them_is_a_set_that_graphs_use(tmp_path: Path, tiny: Path, layout: str) -> None:
    """x = features + bias + error at every checkpoint, and edges that are complete."""
    name, write, reads = LAYOUTS.get(layout, LAYOUTS["sae-lens"])
    how: dict[str, Any] = {
        "layer_norm": {"normalize_activations": "layer_norm"},
        "gated": {"kind": "gated"},
        "centred": {"about": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
    }.get(layout, {})
    paths = [write(tmp_path / name, layer, **how) for layer in range(3)]
    model = ctqk.load_model(tiny, tmp_path / name, device="cpu", dtype=torch.float64)
    assert model.dictionaries.checkpoints == (1, 2, 3)
    graph = ctqk.attribute(prompt_ids("llama", 8), model, max_n_logits=2)
    parts = graph.record.parts
    for c, path in enumerate(paths, 1):
        read = reads(path, parts.run.residual[c])
        read.vectors[0] = 0  # the BOS has no features
        expected = parts.run.residual[c] - read.vectors.sum(1) - read.bias
        assert torch.allclose(parts.errors[c], expected, atol=1e-5)
        whole = parts.at(c).vectors()
        summed = torch.zeros_like(expected).index_add(0, parts.at(c).position, whole)
        assert torch.allclose(summed, parts.run.residual[c], atol=1e-9)
    assert graph.n_features > 20 and graph.adjacency_matrix.isfinite().all()
    rows = graph.adjacency_matrix[: len(graph.selected_features)]
    target, source = divmod(int(rows.abs().argmax()), rows.shape[1])
    edge = graph.edge(source, target)
    total = edge.residual + edge.mlp + float(edge.heads.total.sum())
    assert edge.weight == pytest.approx(total, abs=1e-6)
    run = ctqk.steer(
        model,
        prompt_ids("llama", 8),
        ctqk.QKEdit((1, 0), "key", 1, "bias", 4, factor=0.0),
        norms="frozen",
        controls=0,
    )
    table = graph.qk(1, 0, 7, 4)
    bias = next(i for i, c in enumerate(table.key) if c.kind == "bias")
    moved = run.scores[1, 0][7, 4] - run.clean.scores[1, 0][7, 4]
    assert float(moved) == pytest.approx(-float(table.key_marginal[bias]), rel=1e-8)


def test_a_weakly_causal_crosscoder_of_four_depths(tmp_path: Path, tiny: Path) -> None:
    """QK attributions and steering work at its checkpoints; a graph is refused with the reason."""
    path = write_crosscoder(tmp_path / "layer_0_2_width_40", [0, 2])
    model = ctqk.load_model(tiny, path, device="cpu", dtype=torch.float64)
    assert model.dictionaries.kind == "weakly_causal_crosscoder"
    assert {c: sorted(d.decoders) for c, d in model.dictionaries.by_checkpoint.items()} == {
        1: [1, 3],
        3: [3],
    }
    ids = prompt_ids("llama", 8)
    table = ctqk.explain(ids, model).table(1, 0, 7, 4)
    assert float(table.terms.sum()) == pytest.approx(table.score, rel=1e-9)
    feature = next(c for c in table.key if c.kind == "feature")
    edit = ctqk.QKEdit((1, 0), "key", 1, feature.feature or 0, 4, factor=0.0)
    assert ctqk.steer(model, ids, edit, controls=1).changes
    with pytest.raises(ctqk.UserError, match="have none at checkpoint 2"):
        ctqk.attribute(ids, model)


def _no_threshold(path: Path) -> None:
    tensors = load_file(path / "sae_weights.safetensors")
    del tensors["threshold"]
    save_file(tensors, path / "sae_weights.safetensors")


def _native_encoder(path: Path) -> None:
    tensors = load_file(path / "sae_weights.safetensors")
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    save_file(tensors, path / "sae_weights.safetensors")


REFUSALS: dict[str, Any] = {
    "hook_name is 'blocks.0.hook_mlp_out'": dict(metadata={"hook_name": "blocks.0.hook_mlp_out"}),
    "architecture 'temporal'": dict(architecture="temporal"),
    "normalize_activations is 'covariance_whitening'": dict(
        normalize_activations="covariance_whitening"
    ),
    "normalize_activations is 'expected_average_only_in'": dict(
        normalize_activations="expected_average_only_in"
    ),
    "reshape_activations": dict(reshape_activations="hook_z"),
    "the activation 'tanh-relu'": dict(activation_fn="tanh-relu"),
    "needs k": dict(architecture="topk", k=None),
    "lacks the tensor threshold": _no_threshold,
    "W_enc of .* should be": _native_encoder,
    "is truncated": lambda path: (path / "sae_weights.safetensors").write_bytes(b"x"),
    "is missing": lambda path: (path / "sae_weights.safetensors").unlink(),
    "not valid JSON": lambda path: (path / "cfg.json").write_text("{"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_is_not_read_exactly_is_refused(tmp_path: Path, message: str) -> None:
    how = REFUSALS[message]
    path = write_sae_lens(tmp_path, 0, **({} if callable(how) else how))
    if callable(how):
        how(path)
    with pytest.raises(ctqk.UserError, match=message):
        ctqk.load_dictionaries(tmp_path)


def test_folders_that_hold_several_sets_are_refused(tmp_path: Path) -> None:
    write_sae_lens(tmp_path / "a", 0)
    write_sae_lens(tmp_path / "a" / "x", 0)
    (tmp_path / "a" / "x" / "blocks.0.hook_resid_post").rename(tmp_path / "a" / "again")
    with pytest.raises(ctqk.UserError, match="several SAEs of layer 0"):
        ctqk.load_dictionaries(tmp_path / "a")
    write_sae_lens(tmp_path / "b", 0)
    write_sae_lens(tmp_path / "b", 1, metadata={"hook_name": "blocks.1.hook_resid_pre"})
    with pytest.raises(ctqk.UserError, match="several SAEs of layer 1 at hook_resid_pre"):
        ctqk.load_dictionaries(tmp_path / "b")
    acausal = write_crosscoder(tmp_path / "c", [0, 1], acausal=True)
    with pytest.raises(ctqk.UserError, match="acausal"):
        ctqk.load_dictionaries(acausal)
    empty = tmp_path / "d"
    empty.mkdir()
    with pytest.raises(ctqk.UserError, match="no config.yaml"):
        ctqk.load_dictionaries(empty)


@pytest.mark.parametrize("kind", [*SAE_LENS[:-1], "crosscoder", *list(LAYOUTS)[1:]])
def test_converted_sets_are_the_same_sets(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "set", tmp_path / "native"
    if kind == "crosscoder":
        write_crosscoder(source, [0, 2, 3])
    elif kind in LAYOUTS:
        source = tmp_path / LAYOUTS[kind][0]
        for layer in (0, 2):
            LAYOUTS[kind][1](source, layer)
    else:
        for layer in (0, 2):
            write_sae_lens(source, layer, kind)
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert "written to" in capsys.readouterr().out
    before, after = ctqk.load_dictionaries(source), ctqk.load_dictionaries(target)
    assert (after.kind, after.hook, after.scan) == (before.kind, before.hook, before.scan)
    assert after.model_name == before.model_name and after.checkpoints == before.checkpoints
    x = torch.randn(20, D)
    for c, d in before.by_checkpoint.items():
        other = after.by_checkpoint[c]
        assert torch.allclose(d.encode(x), other.encode(x), atol=1e-5)
        assert torch.equal(d.b_dec, other.b_dec)
        assert d.decoders.keys() == other.decoders.keys()
        every = torch.arange(len(d.b_enc))
        assert all(torch.allclose(d.vectors(k, every), other.vectors(k, every)) for k in d.decoders)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["native", source.name])


def test_labels_and_examples_are_converted_too(tmp_path: Path) -> None:
    source = ctqk.load_dictionaries("miniature-sae")
    write_dictionaries(source, tmp_path / "copy")
    copy = ctqk.load_dictionaries(tmp_path / "copy")
    for c, d in source.by_checkpoint.items():
        named = [source.label(c, f) for f in range(len(d.b_enc))]
        assert any(named) and named == [copy.label(c, f) for f in range(len(d.b_enc))]
        assert copy.examples(c, 5) == source.examples(c, 5) is not None


def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sae_lens(tmp_path / "gated", 0, "gated")
    for layer, k in ((0, 3), (1, 4)):
        write_sae_lens(tmp_path / "ks", layer, "topk", k=k)
    for source, target, message in (
        ("gated", "new", "is gated"),
        ("ks", "new", "one k"),
        ("gated", "ks", "exists already"),
        ("nowhere", "new", "does not exist"),
    ):
        assert cli.main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gated", "ks"]


@pytest.mark.parametrize("of", ["sae", "wcc"])
def test_the_three_layouts_of_stories260K_give_one_graph(shared: Path, of: str) -> None:
    folder = shared / "stories260K"
    if not folder.is_dir():
        pytest.skip("needs shared/stories260K")
    prompt = 'Once upon a time, there was a little boy named Bob. One day, a man said, "Hello, B'
    theirs = "gemma_scope_2_style"
    others = {
        "sae": ["sae_lens", f"{theirs}/resid_post_all"],
        "wcc": [f"{theirs}/crosscoder/layer_0_1_2_3_4_width_2560_l0_big"],
    }[of]

    def made(name: str) -> ctqk.ResidualGraph:
        model = ctqk.load_model(folder / "model", dictionaries=folder / name, device="cpu")
        return ctqk.attribute(prompt, model)

    first = made(of)
    for name in others:
        graph = made(name)
        assert torch.equal(graph.active_features, first.active_features)
        scale = first.adjacency_matrix.abs().max()
        assert (graph.adjacency_matrix - first.adjacency_matrix).abs().max() <= 1e-6 * scale
        for layer in range(5):
            a, b = (g.qk(layer, 1, g.n_pos - 1, 15).terms for g in (graph, first))
            assert float((a - b).abs().max()) <= 1e-6 * float(b.abs().sum())


def test_a_dictionary_that_does_not_fit_is_named_with_its_likely_cause(tmp_path: Path) -> None:
    """The miniature's SAEs with two layers swapped: the warning says where each would fit."""
    from circuit_tracer_qk.attribution.residual.attribution import read
    from circuit_tracer_qk.attribution.residual.fvu import ReconstructionWarning, explained

    prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    model = ctqk.load_model()
    parts, _ = read(prompt, model)
    found = explained(parts, model.zero_positions)
    for c, value in found.items():
        x, error = parts.run.residual[c][1:], parts.errors[c][1:]
        by_hand = float((error**2).sum() / ((x - x.mean(0)) ** 2).sum())
        assert value == pytest.approx(by_hand, rel=1e-5) and value < 0.1

    known = dict(model.dictionaries.by_checkpoint)
    swapped = dataclasses.replace(known[4], checkpoint=1, decoders={1: known[4].decoders[4]})
    mixed = dataclasses.replace(model.dictionaries, by_checkpoint={**known, 1: swapped})
    with pytest.warns(
        ReconstructionWarning, match=r"1 \(1.6.*it fits checkpoint 4.*wrong layer or hook"
    ):
        ctqk.explain(prompt, dataclasses.replace(model, dictionaries=mixed))


def test_a_missing_normalisation_is_named(tmp_path: Path) -> None:
    """An SAE trained on normalised inputs whose configuration does not say so."""
    from circuit_tracer_qk.attribution.residual.attribution import read
    from circuit_tracer_qk.attribution.residual.fvu import ReconstructionWarning

    prompt = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
    model = ctqk.load_model()
    parts, _ = read(prompt, model)
    x = parts.run.residual[2]
    z = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    lookup = torch.cat([z, -z])  # positions as features: it explains them all, and nothing else
    d = x.shape[1]
    trained = Dictionary(
        2, lookup, torch.full((len(lookup),), -0.98 * d), torch.zeros(d), {2: lookup / (0.02 * d)}
    )
    good = dataclasses.replace(trained, units=Units("layer_norm"))
    known = model.dictionaries.by_checkpoint
    for dictionary, fits in ((good, True), (trained, False)):
        mixed = dataclasses.replace(model.dictionaries, by_checkpoint={**known, 2: dictionary})
        one = dataclasses.replace(model, dictionaries=mixed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ctqk.explain(prompt, one)
        said = [str(w.message) for w in caught if w.category is ReconstructionWarning]
        assert (not said) == fits
        assert fits or "it fits with normalize_activations layer_norm" in said[0]


def test_fvu_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """-v prints every checkpoint's; above 1 a warning is one line whether or not it is asked for."""
    assert cli.main(["qk", "--layer", "1", "--head", "2", "-v"]) == 0
    assert "FVU of miniature-sae on this prompt, by checkpoint: 1: 0.0" in capsys.readouterr().err
    assert cli.main(["qk", "--layer", "1", "--head", "2"]) == 0
    assert capsys.readouterr().err == ""
    source, target = ctqk.load_dictionaries("miniature-sae"), tmp_path / "set"
    write_dictionaries(source, target)
    for layer, other in ((0, 3), (3, 0)):
        file = target / f"layer_{layer}.safetensors"
        (target / f"swapped_{other}").write_bytes(file.read_bytes())
    for layer in (0, 3):
        (target / f"swapped_{layer}").rename(target / f"layer_{layer}.safetensors")
    arguments = ["-m", str(Path(ctqk.__file__).parent / "miniature" / "model"), "-d", str(target)]
    assert (
        cli.main(["qk", "--layer", "1", "--head", "2", "-p", "Aunt Sally. Aunt", *arguments]) == 0
    )
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("circuit-tracer-qk: warning: ") and "FVU above 1" in line


# Files --------------------------------------------------------------------------------------------


def test_weights_stay_in_their_files_until_they_are_used(tmp_path: Path) -> None:
    """Mapped, in the dtype they are stored in; only rows that are asked for are converted."""
    write_llama_scope(tmp_path / "set", 0)
    mapped = ctqk.load_dictionaries(tmp_path / "set", lazy=True).by_checkpoint[1]
    assert mapped.W_enc.dtype == mapped.decoders[1].dtype == torch.bfloat16
    copied = ctqk.load_dictionaries(tmp_path / "set").by_checkpoint[1]
    assert copied.W_enc.dtype == torch.float32
    for path in (write_gemma_scope(tmp_path / "a-res" / "gemma-scope-2b-pt-res", 1),):
        dictionary = ctqk.load_dictionaries(path, lazy=True).by_checkpoint[2]
        size = (path / "params.npz").stat().st_size
        rows = dictionary.vectors(2, torch.tensor([3, 5]))
        assert rows.shape == (2, D) and dictionary.decoders[2].untyped_storage().nbytes() <= size


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_in_a_large_file_is_found_where_it_is_used(
    tmp_path: Path, name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small tensors are searched at once; large ones cost nothing until they are read."""
    path = write_sae_lens(tmp_path, 0)
    tensors = load_file(path / "sae_weights.safetensors")
    tensors[name][2 if name == "W_dec" else (1, 2)] = value
    save_file(tensors, path / "sae_weights.safetensors")
    with pytest.raises(ctqk.UserError, match=f"{name} of .* holds NaN or infinite"):
        ctqk.load_dictionaries(path)
    monkeypatch.setattr(weight_files, "CHECKED_AT_ONCE", 0)
    dictionary = ctqk.load_dictionaries(path).by_checkpoint[1]
    with pytest.raises(ctqk.UserError, match=r"blocks.0.hook_resid_post.* NaN or\s+infinite"):
        if name == "W_enc":
            dictionary.encode(stream())
        else:
            dictionary.vectors(1, torch.tensor([0, 2]))
    assert dictionary.vectors(1, torch.tensor([0, 3])).isfinite().all()


class _Mischief:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_pickles_hold_tensors_and_run_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_dictionary_learning(tmp_path, 1)
    state = torch.load(path / "ae.pt")
    torch.save(state, path / "ae.pt", _use_new_zipfile_serialization=False)  # cannot be mapped
    old = ctqk.load_dictionaries(tmp_path).by_checkpoint[2]
    assert torch.equal(old.W_enc, state["encoder.weight"])
    for content in ({"encoder.weight": _Mischief()}, [1, 2]):
        torch.save(content, path / "ae.pt")
        with pytest.raises(ctqk.UserError, match=r"ae.pt is truncated or no PyTorch file"):
            ctqk.load_dictionaries(tmp_path)
    for junk in (b"", b"hello", b"x" * 500):
        (path / "ae.pt").write_bytes(junk)
        with pytest.raises(ctqk.UserError, match=r"ae.pt is truncated or no PyTorch file"):
            ctqk.load_dictionaries(tmp_path)
    assert "must not run" not in capsys.readouterr().out


def test_a_folder_of_everything_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sae_lens(tmp_path, 0)
    monkeypatch.setattr(dictionary_files, "MOST", 1)
    with pytest.raises(ctqk.UserError, match="holds more than 1 files: name the folder"):
        ctqk.load_dictionaries(tmp_path)


def test_formats_are_named_where_files_allow_two_readings(tmp_path: Path) -> None:
    write_sae_lens(tmp_path, 0)
    write_sparsify(tmp_path, 1)
    with pytest.raises(ctqk.UserError, match=r"several layouts, sae-lens and sparsify.*sae-lens:"):
        ctqk.load_dictionaries(tmp_path)
    assert ctqk.load_dictionaries(f"sparsify:{tmp_path}").checkpoints == (2,)
    assert ctqk.load_dictionaries(f"sae-lens:{tmp_path}").checkpoints == (1,)
    assert ctqk.load_dictionaries(f"{tmp_path}/layers.*").checkpoints == (2,)
    with pytest.raises(ctqk.UserError, match="holds no dictionaries of llama-scope"):
        ctqk.load_dictionaries(f"llama-scope:{tmp_path}")
    with pytest.raises(ctqk.UserError, match="does not exist"):
        ctqk.load_dictionaries(f"no-such-format:{tmp_path}")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": "saelens"}, "format 'saelens' is not one of native, sae-lens"),
        ({"format": "sae-lens", "centred": "yes"}, "centred should be true or false, found 'yes'"),
        ({"format": "sae-lens", 3: 4}, "3 is unknown here"),
        (
            {"format": "sae-lens", "layers": [0]},
            "layers is unknown here: known are format, model_name",
        ),
        ({"format": "sae-lens", "norm_scaling_factor": "x"}, "norm_scaling_factor"),
        ({"format": "sae-lens", "norm_scaling_factor": 0}, "should be a number above 0"),
        ({"format": "sae-lens", "norm_scaling_factor": {0: "a"}}, "should be a number above 0"),
    ],
)
def test_what_a_config_says_is_checked(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    write_sae_lens(tmp_path, 0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(ctqk.UserError, match=message):
        ctqk.load_dictionaries(tmp_path)


OTHER_REFUSALS: dict[str, tuple[Any, dict[str, Any]]] = {
    "signed is set": (write_sparsify, {"signed": True}),
    "transcode is set: it is a transcoder, use -t": (write_sparsify, {"transcode": True}),
    "skip_connection is set": (write_sparsify, {"skip_connection": True}),
    "activation 'groupmax'": (write_sparsify, {"activation": "groupmax"}),
    "k should be a whole number": (write_sparsify, {"k": None}),
    "use_glu_encoder": (write_llama_scope, {"use_glu_encoder": True}),
    "batch-wise' depends on the whole batch": (
        write_llama_scope,
        {"norm_activation": "batch-wise"},
    ),
    "needs dataset_average_activation_norm": (
        write_llama_scope,
        {"dataset_average_activation_norm": None},
    ),
    r"writes blocks\.0\.hook_mlp_out": (
        write_llama_scope,
        {"hook_point_out": "blocks.0.hook_mlp_out"},
    ),
    "act_fn 'tanh'": (write_llama_scope, {"act_fn": "tanh"}),
    "dict_class CrossCoder": (write_dictionary_learning, {"said": {"dict_class": "CrossCoder"}}),
    "does not say that it is of the residual stream": (
        write_dictionary_learning,
        {"said": {"layer": 4, "submodule_name": "mlp_out_layer_4"}},
    ),
    "names no layer": (write_dictionary_learning, {"said": {"layer": None}}),
}


@pytest.mark.parametrize("message", OTHER_REFUSALS)
def test_what_other_layouts_ask_for_and_is_not_read_is_refused(
    tmp_path: Path, message: str
) -> None:
    write, more = OTHER_REFUSALS[message]
    write(tmp_path, 0, **more)
    with pytest.raises(ctqk.UserError, match=message):
        ctqk.load_dictionaries(tmp_path)


def test_batch_topk_needs_its_trained_threshold(tmp_path: Path) -> None:
    path = write_dictionary_learning(tmp_path, 1)
    state = torch.load(path / "ae.pt")
    for threshold in (
        None,
        torch.tensor(float("nan")),
        torch.tensor(-1.0),
    ):  # -1 is what it has before training
        changed = {name: t for name, t in state.items() if name != "threshold"}
        torch.save(
            changed | ({} if threshold is None else {"threshold": threshold}), path / "ae.pt"
        )
        with pytest.raises(ctqk.UserError, match="depend on the whole batch"):
            ctqk.load_dictionaries(tmp_path)


def test_gemma_scope_2_without_a_config_says_by_its_folders(tmp_path: Path) -> None:
    """Some of its folders have none; resid_post/layer_N is what is left to go by."""
    for name in ("resid_post_all", "elsewhere"):
        for layer in (0, 1):
            write_gemma_scope_2(tmp_path / name, layer, config=False)
    found = ctqk.load_dictionaries(tmp_path / "resid_post_all")
    assert found.checkpoints == (1, 2) and found.model_name is None
    with pytest.raises(ctqk.UserError, match="does not say what it reads"):
        ctqk.load_dictionaries(tmp_path / "elsewhere")


def test_qwen_scopes_k_is_in_its_name(tmp_path: Path) -> None:
    write_qwen_scope(tmp_path / "mine", 0)
    with pytest.raises(ctqk.UserError, match="keep that name for the folder"):
        ctqk.load_dictionaries(tmp_path / "mine")


def test_a_missing_layer_is_noticed_however_deep_it_lies(tmp_path: Path) -> None:
    for layer in range(3):
        write_dictionary_learning(tmp_path / "a", layer)
        write_sae_lens(tmp_path / "b" / f"L{layer}", layer)
    (tmp_path / "a" / "resid_post_layer_1" / "trainer_0" / "ae.pt").unlink()
    (tmp_path / "b" / "L2" / "blocks.2.hook_resid_post" / "sae_weights.safetensors").unlink()
    with pytest.raises(ctqk.UserError, match=r"layer_1/trainer_0/ae.pt is missing"):
        ctqk.load_dictionaries(tmp_path / "a")
    with pytest.raises(ctqk.UserError, match=r"sae_weights.safetensors is missing"):
        ctqk.load_dictionaries(tmp_path / "b")
    assert ctqk.load_dictionaries(tmp_path / "a", checkpoints=[3]).checkpoints == (3,)


def test_links_are_followed_and_go_by_their_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in range(2):
        write_sparsify(tmp_path / "store", layer).rename(tmp_path / "store" / f"blob{layer}")
    (tmp_path / "set").mkdir()
    for layer in range(2):
        (tmp_path / "set" / f"layers.{layer}").symlink_to(tmp_path / "store" / f"blob{layer}")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert ctqk.load_dictionaries(tmp_path / "set").checkpoints == (1, 2)
    assert ctqk.load_dictionaries(tmp_path / "set" / "layers.1").checkpoints == (2,)
    monkeypatch.chdir(tmp_path / "set")
    assert ctqk.load_dictionaries("layers.*").checkpoints == (1, 2)


def test_what_a_layout_does_not_know_of_is_not_ignored(tmp_path: Path) -> None:
    write_sparsify(tmp_path, 0)
    (tmp_path / "config.yaml").write_text("format: sparsify\ncentred: true\n")
    with pytest.raises(ctqk.UserError, match="are for sae-lens, and the format is sparsify"):
        ctqk.load_dictionaries(tmp_path)


def test_each_layer_of_a_set_may_have_its_own_factor(tmp_path: Path) -> None:
    x = stream()
    for layer, factor in enumerate((1.5, 0.5)):
        path = write_sae_lens(tmp_path, layer, normalize_activations="expected_average_only_in")
        said = {"format": "sae-lens", "norm_scaling_factor": factor}
        (path / "config.yaml").write_text(yaml.safe_dump(said))
    found = ctqk.load_dictionaries(tmp_path, dtype=torch.float64)
    for layer, factor in enumerate((1.5, 0.5)):
        path = tmp_path / f"blocks.{layer}.hook_resid_post"
        held(found.by_checkpoint[layer + 1], x, sae_lens_reads(path, x, factor))


def test_input_and_output_of_the_last_layer_have_labels_of_their_own(tmp_path: Path) -> None:
    for layer in range(3):
        write_sae_lens(tmp_path, layer, hook="hook_resid_pre")
    write_sae_lens(tmp_path, 2)
    labels = {str(i): [f"{i}-{f}" for f in range(N)] for i in range(4)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    found = ctqk.load_dictionaries(tmp_path)
    assert [found.label(c, 5) for c in found.checkpoints] == ["0-5", "1-5", "2-5", "3-5"]


def test_dead_decoder_vectors_stay_zero(tmp_path: Path) -> None:
    path = write_sae_lens(tmp_path / "set", 0, "topk-rescaled")
    tensors = load_file(path / "sae_weights.safetensors")
    tensors["W_dec"][3] = 0
    save_file(tensors, path / "sae_weights.safetensors")
    found = ctqk.load_dictionaries(tmp_path / "set")
    write_dictionaries(found, tmp_path / "copy")
    for dictionaries in (found, ctqk.load_dictionaries(tmp_path / "copy")):
        rows = dictionaries.by_checkpoint[1].vectors(1, torch.tensor([3, 4]))
        assert not rows[0].any() and rows[1].any()


@pytest.mark.parametrize(
    "said",
    ["format: [1]", "format: sae-lens\nneuronpedia: 'a{x}'", "model_name: 2024-13-45", "- a"],
)
def test_odd_yaml_is_one_sentence(tmp_path: Path, said: str) -> None:
    write_sae_lens(tmp_path, 0)
    (tmp_path / "config.yaml").write_text(said)
    with pytest.raises(ctqk.UserError):
        ctqk.load_dictionaries(tmp_path)


@pytest.mark.parametrize("ref", ["~nosuchuser/saes", "x" * 300, "miniature-sae@v7"])
def test_odd_references_are_one_sentence(ref: str) -> None:
    with pytest.raises(ctqk.UserError):
        ctqk.load_dictionaries(ref)


def test_text_is_no_truth_value(tmp_path: Path) -> None:
    path = write_sae_lens(tmp_path, 0, apply_b_dec_to_input="false")
    with pytest.raises(ctqk.UserError, match="apply_b_dec_to_input should be true or false"):
        ctqk.load_dictionaries(path)


def test_a_missing_file_is_named_where_a_layout_has_patterns(tmp_path: Path) -> None:
    """What is there by a pattern is not called missing."""
    config, params = CROSSCODER.files
    (tmp_path / params.replace("*", "0")).write_bytes(b"")
    with pytest.raises(ctqk.UserError) as refusal:
        load_dictionaries(tmp_path)
    message = str(refusal.value)
    assert f"{config} (gemma-scope-2-crosscoder) is missing" in message
    assert f"{tmp_path} has" in message and f"{params} (gemma-scope-2-crosscoder)" not in message


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("shape", "descr"),
    [
        ("(-40,)", "<f4"),
        ("(True, 40)", "<f4"),
        ("(-1, -40)", "<f4"),
        ("(1000000000000,)", "<f4"),
        ("(41,)", "<f4"),  # one number more than the file has
        ("(0, 99999999999999999999)", "<f4"),
        ("(40.0,)", "<f4"),
        ("40", "<f4"),
        ("(40,)", "|O"),
        ("(40,)", ">f4"),
        ("(40,)", "nonesuch"),
        ("(((((", "<f4"),
    ],
)
def test_an_npz_whose_header_is_no_shape(
    tmp_path: Path, shape: str, descr: str, compressed: bool
) -> None:
    """Refused before memory is asked for, and never read beyond the array's own bytes."""
    path = write_gemma_scope(tmp_path, 1) / "params.npz"
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(160)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()} | {"b_enc.npy": array}
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as new:
        for name, data in members.items():
            new.writestr(name, data)
    with pytest.raises(ctqk.UserError, match=f"{path} is truncated or no NumPy archive") as refusal:
        ctqk.load_dictionaries(f"gemma-scope:{tmp_path}")
    assert "\n" not in str(refusal.value)
