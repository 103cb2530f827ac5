"""Dictionaries in the layouts of SAELens 6 and Gemma Scope 2, against their own equations.

Files are made here in the real layout (names, shapes, configuration keys as their owners' published
code writes them); what they mean is written out position by position in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import prompt_ids, save_tiny
from random_dictionaries import write_sae
from safetensors.torch import load_file, save_file
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import cli

D, N, K = 24, 40, 7
KINDS = ("standard", "jumprelu", "topk", "topk-rescaled", "gated")


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def write_sae_lens(
    folder: Path, layer: int, kind: str = "jumprelu", seed: int = 0, **more: Any
) -> Path:
    """One SAE as SAELens 6 saves it: ``W_enc`` is [d_in, d_sae]."""
    path = folder / f"blocks.{layer}.hook_resid_post"
    path.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed + layer)
    architecture = kind.split("-")[0]
    tensors = {
        "W_enc": _randn(g, D, N) / D**0.5,
        "W_dec": _randn(g, N, D) * 0.4,
        "b_dec": _randn(g, D) * 0.3,
    }
    if architecture == "gated":
        tensors |= {name: _randn(g, N) * 0.2 - 0.1 for name in ("b_gate", "b_mag", "r_mag")}
    else:
        tensors["b_enc"] = _randn(g, N) * 0.1 - 0.2
    if architecture == "jumprelu":
        tensors["threshold"] = _randn(g, N) * 0.3  # some below zero: a ReLU applies too
    save_file(tensors, path / "sae_weights.safetensors")
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": "tiny",
            "hook_name": f"blocks.{layer}.hook_resid_post",
        },
    }
    if architecture == "topk":
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": kind == "topk-rescaled"}
    (path / "cfg.json").write_text(json.dumps(cfg | more))
    return path


def sae_lens_reads(path: Path, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SAELens' equations: (activations times decoder vectors (P, N, d), b_dec, activations)."""
    cfg = json.loads((path / "cfg.json").read_text())
    t = {k: v.double() for k, v in load_file(path / "sae_weights.safetensors").items()}
    inner = x - t["b_dec"] * cfg["apply_b_dec_to_input"]
    if cfg["architecture"] == "gated":
        gate = inner @ t["W_enc"] + t["b_gate"] > 0
        acts = gate * torch.relu(inner @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    else:
        pre = inner @ t["W_enc"] + t["b_enc"]
        acts = pre.relu()
        if cfg["architecture"] == "jumprelu":
            acts = acts * (pre > t["threshold"])
        if cfg["architecture"] == "topk":
            norm = t["W_dec"].norm(dim=-1) if cfg["rescale_acts_by_decoder_norm"] else 1.0
            pre = pre * norm
            top = pre.topk(cfg["k"], dim=-1)
            acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
            return (acts / norm)[..., None] * t["W_dec"], t["b_dec"], acts
    return acts[..., None] * t["W_dec"], t["b_dec"], acts


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_means_what_sae_lens_computes(tmp_path: Path, kind: str, applied: bool) -> None:
    path = write_sae_lens(tmp_path, 0, kind, apply_b_dec_to_input=applied)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(5)).double()
    dictionary = ctqk.load_dictionaries(path, dtype=torch.float64).by_checkpoint[1]
    vectors, bias, acts = sae_lens_reads(path, x)
    ours = dictionary.encode(x)
    assert torch.equal(ours > 0, acts > 0) and int((acts > 0).sum()) > 20
    assert torch.allclose(ours[..., None] * dictionary.decoders[1], vectors, atol=1e-6)
    assert torch.allclose(ours, acts, atol=1e-6) and torch.equal(dictionary.b_dec, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_itself_agrees(tmp_path: Path, kind: str) -> None:
    """Its own loader on the same files, where it is installed."""
    sae_lens = pytest.importorskip("sae_lens")
    path = write_sae_lens(tmp_path, 0, kind)
    sae = sae_lens.SAE.load_from_disk(str(path))
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(5))
    dictionary = ctqk.load_dictionaries(path).by_checkpoint[1]
    ours = dictionary.encode(x)
    assert torch.allclose(ours, sae.encode(x), atol=1e-6)
    again = ours @ dictionary.decoders[1] + dictionary.b_dec
    assert torch.allclose(again, sae.decode(sae.encode(x)), atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny("llama", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_them_is_a_set_that_graphs_use(tmp_path: Path, tiny: Path, kind: str) -> None:
    """x = features + bias + error at every checkpoint, and edges that are complete."""
    for layer in range(3):
        write_sae_lens(tmp_path / "set", layer, kind)
    model = ctqk.load_model(tiny, tmp_path / "set", device="cpu", dtype=torch.float64)
    assert model.dictionaries.checkpoints == (1, 2, 3) and model.dictionaries.model_name == "tiny"
    assert model.scan == "set"
    graph = ctqk.attribute(prompt_ids("llama", 8), model, max_n_logits=2)
    parts = graph.record.parts
    for c in (1, 2, 3):
        path = tmp_path / "set" / f"blocks.{c - 1}.hook_resid_post"
        vectors, bias, _ = sae_lens_reads(path, parts.run.residual[c])
        vectors[0] = 0  # the BOS has no features
        expected = parts.run.residual[c] - vectors.sum(1) - bias
        assert torch.allclose(parts.errors[c], expected, atol=1e-6)
    assert graph.n_features > 20 and graph.adjacency_matrix.isfinite().all()


def write_gemma_scope_2(folder: Path, native: Path, layer: int) -> Path:
    """The same weights as a native folder's, with Gemma Scope 2's names."""
    path = folder / f"layer_{layer}_width_40_l0_small"
    path.mkdir(parents=True)
    t = load_file(native / f"layer_{layer}.safetensors")
    save_file(
        {
            "w_enc": t["W_enc"].T.contiguous(),
            "w_dec": t["W_dec"],
            "b_enc": t["b_enc"],
            "b_dec": t["b_dec"],
            "threshold": t["activation_function.threshold"],
        },
        path / "params.safetensors",
    )
    hook = f"model.layers.{layer}.output"
    config = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": 40, "l0": 8}
    config |= {"model_name": "tiny", "architecture": "jump_relu", "affine_connection": False}
    (path / "config.json").write_text(json.dumps(config | {"type": "sae"}))
    return path


def test_gemma_scope_2_is_its_native_twin(tmp_path: Path) -> None:
    native = write_sae(tmp_path / "native", D, [0, 2])
    for layer in (0, 2):
        write_gemma_scope_2(tmp_path / "set", native, layer)
    ours, theirs = (ctqk.load_dictionaries(tmp_path / name) for name in ("set", "native"))
    assert ours.checkpoints == theirs.checkpoints == (1, 3)
    x = torch.randn(20, D)
    for c in (1, 3):
        a, b = ours.by_checkpoint[c], theirs.by_checkpoint[c]
        assert torch.equal(a.encode(x), b.encode(x)) and torch.equal(a.decoders[c], b.decoders[c])


def write_crosscoder(folder: Path, layers: list[int], *, acausal: bool = False) -> Path:
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(3)
    for i in range(len(layers)):
        decoder = _randn(g, N, len(layers), D) * 0.4
        if not acausal:
            decoder[:, :i] = 0
        tensors = {"w_enc": _randn(g, D, N) / D**0.5, "w_dec": decoder, "b_dec": _randn(g, D)}
        tensors |= {"b_enc": _randn(g, N) * 0.1, "threshold": _randn(g, N).abs() * 0.3}
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    hook = f"model.layers.{{{','.join(map(str, layers))}}}.output"
    config = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "architecture": "jump_relu"}
    (folder / "config.json").write_text(json.dumps(config | {"type": "crosscoder"}))
    return folder


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
    "normalize_activations is 'layer_norm'": dict(normalize_activations="layer_norm"),
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
    with pytest.raises(ctqk.UserError, match="of hook_resid_pre and of hook_resid_post"):
        ctqk.load_dictionaries(tmp_path / "b")
    acausal = write_crosscoder(tmp_path / "c", [0, 1], acausal=True)
    with pytest.raises(ctqk.UserError, match="acausal"):
        ctqk.load_dictionaries(acausal)
    empty = tmp_path / "d"
    empty.mkdir()
    with pytest.raises(ctqk.UserError, match="no config.yaml"):
        ctqk.load_dictionaries(empty)


@pytest.mark.parametrize("kind", [*KINDS[:-1], "crosscoder"])
def test_converted_sets_are_the_same_sets(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "set", tmp_path / "native"
    if kind == "crosscoder":
        write_crosscoder(source, [0, 2, 3])
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
        assert torch.equal(d.encode(x), other.encode(x)) and torch.equal(d.b_dec, other.b_dec)
        assert d.decoders.keys() == other.decoders.keys()
        assert all(torch.equal(d.decoders[k], other.decoders[k]) for k in d.decoders)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "set"], "nothing half written"


def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sae_lens(tmp_path / "gated", 0, "gated")
    for layer, k in ((0, 3), (1, 4)):
        write_sae_lens(tmp_path / "ks", layer, "topk", k=k)
    for source, target, message in (
        ("gated", "new", "no place for gates"),
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
