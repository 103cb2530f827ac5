"""Dictionary folders: what is read, and how bad ones are refused."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT
from circuit_tracer_qk.dictionaries import catalogue
from circuit_tracer_qk.dictionaries.dictionary import Dictionary
from circuit_tracer_qk.dictionaries.features import FeatureExamples
from circuit_tracer_qk.dictionaries.files import natural
from circuit_tracer_qk.dictionaries.load import load_dictionaries
from circuit_tracer_qk.dictionaries.native_writer import write_dictionaries

D_DICT, D_MODEL = 6, 4


def write_config(folder: Path, **changes: Any) -> None:
    """Write config.yaml; a change to None leaves the key out."""
    config = {
        "model_name": "tiny",
        "model_kind": "residual_sae_set",
        "feature_input_hook": "hook_resid_post",
        "feature_output_hook": "hook_resid_post",
        "layers": [0, 1, 2],
        "scan": "tiny-scan",
    } | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def sae_tensors(seed: int, threshold: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(D_DICT, D_MODEL, generator=g),
        "W_dec": torch.randn(D_DICT, D_MODEL, generator=g),
        "b_enc": torch.randn(D_DICT, generator=g),
        "b_dec": torch.randn(D_MODEL, generator=g),
    }
    if threshold:
        tensors["activation_function.threshold"] = torch.rand(D_DICT, generator=g)
    return tensors


def write_sae(folder: Path, layers=(0, 1, 2), threshold: bool = True, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(folder, **{"layers": list(layers)} | changes)
    for i in layers:
        save_file(sae_tensors(i, threshold), folder / f"layer_{i}.safetensors")
    return folder


def write_wcc(folder: Path, layers=(0, 1, 2), **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    kind = {"model_kind": "weakly_causal_crosscoder", "layers": list(layers)}
    write_config(folder, **kind | changes)
    for s, i in enumerate(layers):
        t = sae_tensors(i)
        t["threshold"] = t.pop("activation_function.threshold")
        t["W_dec"] = torch.stack([t["W_dec"] + n for n in range(len(layers) - s)], dim=1)
        decoder = {f"W_dec_{i}": t.pop("W_dec")}
        save_file({f"{name}_{i}": v for name, v in t.items()}, folder / f"W_enc_{i}.safetensors")
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
    return folder


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a safetensors file after ``edit`` has changed its tensors in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    return write_sae(tmp_path / "sae")


@pytest.fixture
def wcc(tmp_path: Path) -> Path:
    return write_wcc(tmp_path / "wcc")


def refusal(ref: str | Path) -> str:
    """The message with which ``ref`` is refused: one sentence on one line."""
    with pytest.raises(UserError) as caught:
        load_dictionaries(ref)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is read


@pytest.mark.parametrize(("hook", "shift"), [("hook_resid_post", 1), ("hook_resid_pre", 0)])
def test_sae_set(tmp_path: Path, hook: str, shift: int):
    folder = write_sae(tmp_path / "set", feature_input_hook=hook, feature_output_hook=hook)
    loaded = load_dictionaries(folder)
    assert (loaded.kind, loaded.hook) == ("residual_sae_set", hook)
    assert (loaded.scan, loaded.model_name, loaded.d_model) == ("tiny-scan", "tiny", D_MODEL)
    assert loaded.checkpoints == tuple(i + shift for i in range(3))
    for i in range(3):
        d, t = loaded.by_checkpoint[i + shift], sae_tensors(i)
        assert d.checkpoint == i + shift
        assert list(d.decoders) == [d.checkpoint]
        assert torch.equal(d.W_enc, t["W_enc"]) and torch.equal(d.b_enc, t["b_enc"])
        assert torch.equal(d.decoders[d.checkpoint], t["W_dec"])
        assert torch.equal(d.b_dec, t["b_dec"])
        assert d.threshold is not None
        assert torch.equal(d.threshold, t["activation_function.threshold"])
        assert d.k is None


def test_wcc(wcc: Path):
    loaded = load_dictionaries(wcc)
    assert loaded.kind == "weakly_causal_crosscoder"
    assert loaded.checkpoints == (1, 2, 3)
    assert [list(d.decoders) for d in loaded.by_checkpoint.values()] == [[1, 2, 3], [2, 3], [3]]
    for c, d in loaded.by_checkpoint.items():
        for k, decoder in d.decoders.items():
            assert torch.equal(decoder, sae_tensors(c - 1)["W_dec"] + (k - c))


def test_activations_by_definition():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, D_MODEL, generator=g, dtype=torch.float64)
    t = sae_tensors(0)

    def encode(threshold: Tensor | None, k: int | None) -> Tensor:
        d = Dictionary(1, t["W_enc"], t["b_enc"], t["b_dec"], {1: t["W_dec"]}, threshold, k)
        return d.encode(x)

    threshold = torch.tensor([0.5, 0.0, 1.0, -1.0, 0.2, 0.1])
    jump, topk, relu = encode(threshold, None), encode(None, 3), encode(None, None)
    assert jump.dtype == topk.dtype == relu.dtype == torch.float64
    for p in range(5):
        pre = [float(t["W_enc"][f].double() @ x[p] + t["b_enc"][f].double()) for f in range(D_DICT)]
        third = sorted(pre)[-3]
        assert relu[p].tolist() == pytest.approx([max(v, 0) for v in pre])
        assert jump[p].tolist() == pytest.approx(
            [v if v > threshold[f] else 0 for f, v in enumerate(pre)]
        )
        assert topk[p].tolist() == pytest.approx([max(v, 0) if v >= third else 0 for v in pre])


def test_jumprelu_is_off_at_its_threshold():
    t = sae_tensors(0)
    at = Dictionary(1, t["W_enc"], torch.ones(D_DICT), t["b_dec"], {}, torch.ones(D_DICT))
    assert at.encode(torch.zeros(1, D_MODEL)).tolist() == [[0.0] * D_DICT]


def test_relu_without_threshold(tmp_path: Path):
    loaded = load_dictionaries(write_sae(tmp_path / "set", threshold=False))
    assert all(d.threshold is None and d.k is None for d in loaded.by_checkpoint.values())


@pytest.mark.parametrize("key", ["activation", "activation_function"])
def test_topk(tmp_path: Path, key: str):
    folder = write_sae(tmp_path / "set", threshold=False, **{key: "topk", "k": 2})
    loaded = load_dictionaries(folder)
    assert all(d.k == 2 for d in loaded.by_checkpoint.values())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_threshold_is_broadcast(sae: Path, shape: tuple[int, ...]):
    one = {"activation_function.threshold": torch.full(shape, 0.25)}
    change(sae / "layer_0.safetensors", lambda t: t.update(one))
    threshold = load_dictionaries(sae).by_checkpoint[1].threshold
    assert threshold is not None and threshold.tolist() == [0.25] * D_DICT


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_cast(sae: Path, stored: torch.dtype):
    change(sae / "layer_1.safetensors", lambda t: t.update(W_dec=t["W_dec"].to(stored)))
    loaded = load_dictionaries(sae, dtype=torch.float64)
    decoder = loaded.by_checkpoint[2].decoders[2]
    assert decoder.dtype == torch.float64
    assert torch.equal(decoder, sae_tensors(1)["W_dec"].to(stored).double())


def test_to_casts_every_tensor(wcc: Path):
    loaded = load_dictionaries(wcc).to("cpu", torch.float64)
    for d in loaded.by_checkpoint.values():
        tensors = [d.W_enc, d.b_enc, d.b_dec, d.threshold, *d.decoders.values()]
        assert all(t is not None and t.dtype == torch.float64 for t in tensors)
    assert loaded.entries == {1: 0, 2: 1, 3: 2}


@pytest.mark.parametrize(
    ("entries", "named", "hook"),
    [
        ([0, 1, 2], None, "hook_resid_pre"),
        ([1, 2, 3], None, "hook_resid_post"),
        ([1, 2, 3], "hook_resid_pre", "hook_resid_pre"),
    ],
)
def test_checkpoints_in_place_of_layers(
    tmp_path: Path, entries: list[int], named: str | None, hook: str
):
    folder = write_sae(tmp_path / "set", entries)
    write_config(
        folder,
        layers=None,
        checkpoints=entries,
        feature_input_hook=named,
        feature_output_hook=named,
    )
    loaded = load_dictionaries(folder)
    assert (loaded.checkpoints, loaded.hook) == (tuple(entries), hook)
    assert torch.equal(loaded.by_checkpoint[2].W_enc, sae_tensors(2)["W_enc"])


def test_files_numbered_from_zero_are_taken_in_order(wcc: Path):
    write_config(wcc, model_kind="weakly_causal_crosscoder", layers=[1, 3, 4])
    loaded = load_dictionaries(wcc)
    assert loaded.checkpoints == (2, 4, 5)
    assert list(loaded.by_checkpoint[2].decoders) == [2, 4, 5]
    assert torch.equal(loaded.by_checkpoint[4].W_enc, sae_tensors(1)["W_enc"])


def test_checkpoints_ascend_whatever_the_order_of_the_list(tmp_path: Path):
    loaded = load_dictionaries(write_sae(tmp_path / "set", [2, 0, 1]))
    assert loaded.checkpoints == (1, 2, 3)
    assert torch.equal(loaded.by_checkpoint[1].W_enc, sae_tensors(0)["W_enc"])


def test_a_list_may_leave_layers_out(sae: Path):
    write_config(sae, layers=[1, 2])
    assert load_dictionaries(sae).checkpoints == (2, 3)


def test_scan_defaults_to_the_folder(sae: Path):
    write_config(sae, scan=None, model_name=None)
    loaded = load_dictionaries(str(sae))
    assert (loaded.scan, loaded.model_name, loaded.folder) == ("sae", None, sae)


def test_labels(sae: Path):
    labels = {"0": ["nought"], "2": ["", None, "two"]}
    (sae / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    loaded = load_dictionaries(sae)
    assert loaded.label(1, 0) == "nought"
    assert loaded.label(3, 2) == "two"
    assert [loaded.label(*at) for at in [(3, 0), (3, 1), (3, 3), (2, 0), (1, -1)]] == [""] * 5
    (sae / "labels.json").unlink()
    assert loaded.label(1, 0) == "nought"


def test_labels_go_by_the_number_in_the_file_names(sae: Path):
    write_config(sae, layers=[1, 3, 4])
    (sae / "labels.json").write_text('{"1": ["second"]}', encoding="utf-8")
    assert load_dictionaries(sae).label(4, 0) == "second"


def test_labels_of_a_set_made_in_memory_go_by_checkpoint_less_one(sae: Path):
    (sae / "labels.json").write_text('{"0": ["first"]}', encoding="utf-8")
    assert replace(load_dictionaries(sae), entries={}).label(1, 0) == "first"


def test_no_labels_or_examples(sae: Path):
    loaded = load_dictionaries(sae)
    assert loaded.label(1, 0) == "" and loaded.examples(1, 0) is None


@pytest.mark.parametrize("archive", [True, False])
def test_examples(sae: Path, archive: bool):
    name = "18.json"  # the Cantor index of layer 2, feature 3
    if archive:
        with zipfile.ZipFile(sae / "features.zip", "w") as file:
            file.writestr(name, b"{}")
    else:
        (sae / "features").mkdir()
        (sae / "features" / name).write_bytes(b"{}")
    loaded = load_dictionaries(sae)
    assert loaded.examples(3, 3) == b"{}"
    assert loaded.examples(3, 4) is None
    assert loaded.examples(0, 0) is None


# How bad input is refused


def test_refuses_missing_folder(tmp_path: Path):
    message = refusal(tmp_path / "nowhere")
    assert "nowhere does not exist" in message and "org/name[@revision]" in message


def test_refuses_file_in_place_of_folder(sae: Path):
    assert "config.yaml is not a folder" in refusal(str(sae / "config.yaml"))


def test_refuses_hub_id_that_cannot_be_had():
    message = refusal("no-such-organisation/no-such-set")
    assert "no-such-organisation/no-such-set" in message and "give the folder" in message


def test_refuses_hub_id_of_the_wrong_form():
    assert "org/na--me.. is no hub id" in refusal("org/na--me..")


def test_refuses_built_in_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(catalogue.MINIATURES, "miniature-sae", tmp_path / "absent")
    assert "miniature-sae" in refusal("miniature-sae")


def test_refuses_folder_without_config(sae: Path):
    (sae / "config.yaml").unlink()
    assert "has no config.yaml" in refusal(sae)


def test_refuses_invalid_yaml(sae: Path):
    (sae / "config.yaml").write_text("layers: [0, 1\nscan: {", encoding="utf-8")
    assert "config.yaml is not valid YAML" in refusal(sae)


def test_refuses_undecodable_config(sae: Path):
    (sae / "config.yaml").write_bytes(b"scan: \xff\xfe\xff")
    assert "config.yaml is not valid YAML" in refusal(sae)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "", "residual_sae_set"])
def test_refuses_config_that_is_no_mapping(sae: Path, text: str):
    (sae / "config.yaml").write_text(text, encoding="utf-8")
    assert "should be a mapping" in refusal(sae)


@pytest.mark.parametrize("kind", ["something_else", None, ["residual_sae_set"]])
def test_refuses_unknown_kind(sae: Path, kind: Any):
    write_config(sae, model_kind=kind)
    message = refusal(sae)
    for part in (repr(kind), "residual_sae_set", "weakly_causal_crosscoder"):
        assert part in message


@pytest.mark.parametrize("kind", ["transcoder_set", "cross_layer_transcoder"])
def test_refuses_transcoders(sae: Path, kind: str):
    write_config(sae, model_kind=kind)
    message = refusal(sae)
    assert kind in message and "-t/--transcoder_set" in message


@pytest.mark.parametrize("kind", ["crosscoder", "acausal_crosscoder"])
def test_refuses_acausal_kinds(wcc: Path, kind: str):
    write_config(wcc, model_kind=kind)
    assert "decode to sites before the one they read" in refusal(wcc)


def test_refuses_decoders_at_earlier_sites(wcc: Path):
    change(
        wcc / "W_dec_1.safetensors",
        lambda t: t.update(W_dec_1=torch.ones(D_DICT, 3, D_MODEL)),
    )
    message = refusal(wcc)
    assert "W_dec_1" in message and "before the one they read" in message


@pytest.mark.parametrize("hook", ["hook_mlp_out", None, 3])
def test_refuses_other_input_hooks(sae: Path, hook: Any):
    write_config(sae, feature_input_hook=hook, feature_output_hook=None)
    message = refusal(sae)
    assert "feature_input_hook" in message
    assert ("found nothing" if hook is None else repr(hook)) in message


def test_refuses_output_hook_that_differs(sae: Path):
    write_config(sae, feature_output_hook="hook_resid_pre")
    message = refusal(sae)
    assert "feature_output_hook 'hook_resid_pre'" in message and "'hook_resid_post'" in message


@pytest.mark.parametrize("layers", [[], None, 3, "all", [0, 1.5], [True], ["0"]])
def test_refuses_layers_that_are_no_list_of_integers(sae: Path, layers: Any):
    write_config(sae, layers=layers)
    assert "layers should be a list of integers" in refusal(sae)


def test_refuses_layers_beside_checkpoints(sae: Path):
    write_config(sae, checkpoints=[1, 2, 3])
    assert "both layers and checkpoints" in refusal(sae)


def test_refuses_duplicate_layers(sae: Path):
    write_config(sae, layers=[0, 1, 1])
    assert "layers holds 1 twice" in refusal(sae)


@pytest.mark.parametrize("key", ["layers", "checkpoints"])
def test_refuses_negative_entries(sae: Path, key: str):
    write_config(sae, **{"layers": None, key: [-1, 0, 1]})
    assert f"{key} should be a list of integers, counted from 0" in refusal(sae)


def test_refuses_wcc_list_that_does_not_ascend(wcc: Path):
    write_config(wcc, model_kind="weakly_causal_crosscoder", layers=[0, 2, 1])
    assert "layers should ascend, found [0, 2, 1]" in refusal(wcc)


def test_refuses_missing_layer_file(sae: Path):
    (sae / "layer_1.safetensors").unlink()
    message = refusal(sae)
    assert "layer_1.safetensors is missing" in message and "[0, 2]" in message


@pytest.mark.parametrize("name", ["W_enc_2.safetensors", "W_dec_1.safetensors"])
def test_refuses_missing_wcc_file(wcc: Path, name: str):
    (wcc / name).unlink()
    assert f"{name} is missing" in refusal(wcc)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_refuses_truncated_weights(sae: Path, length: int):
    path = sae / "layer_2.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "layer_2.safetensors is truncated" in refusal(sae)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_refuses_missing_tensor(sae: Path, name: str):
    change(sae / "layer_1.safetensors", lambda t: t.pop(name))
    assert f"layer_1.safetensors lacks the tensor {name};" in refusal(sae)


def test_refuses_missing_wcc_tensor(wcc: Path):
    change(wcc / "W_enc_1.safetensors", lambda t: t.pop("b_dec_1"))
    assert "W_enc_1.safetensors lacks the tensor b_dec_1;" in refusal(wcc)


def test_refuses_missing_threshold(sae: Path):
    write_config(sae, activation="jumprelu")
    change(sae / "layer_1.safetensors", lambda t: t.pop("activation_function.threshold"))
    assert "layer_1.safetensors lacks the tensor activation_function.threshold;" in refusal(sae)


def test_refuses_unknown_tensor(sae: Path):
    change(sae / "layer_0.safetensors", lambda t: t.update(W_skip=t["W_enc"].clone()))
    assert "layer_0.safetensors has the unknown tensor W_skip;" in refusal(sae)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("W_enc", (D_DICT, 3), [D_DICT, D_MODEL]),
        ("W_enc", (D_DICT, D_MODEL, 1), [D_DICT, D_MODEL]),
        ("W_dec", (5, D_MODEL), [D_DICT, D_MODEL]),
        ("b_enc", (5,), [D_DICT]),
        ("b_enc", (), [D_DICT]),
        ("b_dec", (3,), [D_MODEL]),
        ("activation_function.threshold", (5,), [D_DICT]),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_refuses_wrong_shape(
    sae: Path, name: str, shape: tuple[int, ...], expected: list[int], layer: int
):
    path = sae / f"layer_{layer}.safetensors"
    change(path, lambda t: t.update({name: torch.ones(shape)}))
    message = refusal(sae)
    assert f"tensor {name} of {path} should be {expected} and is {list(shape)}" in message
    assert "transposed" not in message


@pytest.mark.parametrize(
    "shape", [(D_DICT, 1, D_MODEL), (D_DICT, D_MODEL), (5, 2, D_MODEL), (D_DICT, 4, D_MODEL)]
)
def test_refuses_wrong_wcc_shape(wcc: Path, shape: tuple[int, ...]):
    path = wcc / "W_dec_1.safetensors"
    change(path, lambda t: t.update(W_dec_1=torch.ones(shape)))
    expected = f"W_dec_1 of {path} should be {[D_DICT, 2, D_MODEL]} and is {list(shape)}"
    assert refusal(wcc).endswith(expected)


@pytest.mark.parametrize("names", [["W_enc"], ["W_enc", "W_dec"]])
def test_refuses_transposed_encoder_with_a_hint(tmp_path: Path, names: list[str]):
    folder = write_sae(tmp_path / "set", threshold=False)
    path = folder / "layer_0.safetensors"
    change(path, lambda t: t.update({name: t[name].T for name in names}))
    message = refusal(folder)
    assert f"W_enc of {path} should be [6, 4] and is [4, 6]; it is stored transposed" in message


def test_refuses_width_that_differs_between_layers(sae: Path):
    narrow = {"W_enc": (6, 3), "W_dec": (6, 3), "b_dec": (3,)}
    change(
        sae / "layer_2.safetensors",
        lambda t: t.update({name: torch.ones(shape) for name, shape in narrow.items()}),
    )
    message = refusal(sae)
    assert "layer_2.safetensors should be [6, 4] and is [6, 3]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["W_dec", "b_enc", "activation_function.threshold"])
def test_refuses_values_that_are_not_finite(sae: Path, name: str, value: float):
    change(sae / "layer_1.safetensors", lambda t: t[name].view(-1)[3:4].fill_(value))
    message = refusal(sae)
    assert f"tensor {name} of {sae / 'layer_1.safetensors'} holds NaN or infinite" in message


def test_refuses_integers(sae: Path):
    change(sae / "layer_1.safetensors", lambda t: t.update(W_enc=t["W_enc"].to(torch.int8)))
    message = refusal(sae)
    assert "W_enc" in message and "torch.int8" in message


def test_refuses_unknown_activation(sae: Path):
    write_config(sae, activation="gelu")
    assert "activation should be relu, jumprelu or topk, found 'gelu'" in refusal(sae)


@pytest.mark.parametrize("k", [0, -1, None, 2.0, True, "3"])
def test_refuses_k_that_is_no_positive_integer(tmp_path: Path, k: Any):
    folder = write_sae(tmp_path / "set", threshold=False, activation="topk", k=k)
    assert repr(k) in refusal(folder)


def test_refuses_k_beyond_the_features(tmp_path: Path):
    folder = write_sae(tmp_path / "set", threshold=False, activation="topk", k=D_DICT + 1)
    assert "k should be at most 6" in refusal(folder)


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_refuses_threshold_beside_another_activation(sae: Path, activation: str):
    write_config(sae, activation=activation, k=2)
    message = refusal(sae)
    assert "activation_function.threshold" in message and activation in message


@pytest.mark.parametrize("name", ["scan", "model_name"])
def test_refuses_names_that_are_no_text(sae: Path, name: str):
    write_config(sae, **{name: ["a", "b"]})
    assert f"{name} should be a name" in refusal(sae)


@pytest.mark.parametrize("text", ["{", "[]", '{"0": "label"}'])
def test_refuses_malformed_labels(sae: Path, text: str):
    (sae / "labels.json").write_text(text, encoding="utf-8")
    loaded = load_dictionaries(sae)
    with pytest.raises(UserError, match="labels.json"):
        loaded.label(1, 0)


def test_refuses_malformed_examples(sae: Path):
    (sae / "features.zip").write_bytes(b"not a zip")
    loaded = load_dictionaries(sae)
    with pytest.raises(UserError, match=r"features\.zip is not a zip archive"):
        loaded.examples(1, 0)


def test_refuses_damaged_examples(sae: Path):
    with zipfile.ZipFile(sae / "features.zip", "w") as file:
        file.writestr("0.json", b"intact")
    data = (sae / "features.zip").read_bytes()
    (sae / "features.zip").write_bytes(data.replace(b"intact", b"broken"))
    loaded = load_dictionaries(sae)
    with pytest.raises(UserError, match=r"features\.zip is damaged"):
        loaded.examples(1, 0)


def test_fits_its_model(sae: Path):
    load_dictionaries(sae).check_fits(D_MODEL, 3)


def test_refuses_model_of_another_width(sae: Path):
    message = re.escape("checkpoint 1 does not fit the model: W_enc should be [6, 8] and is [6, 4]")
    with pytest.raises(UserError, match=message):
        load_dictionaries(sae).check_fits(8, 3)


def test_refuses_model_with_fewer_layers(sae: Path):
    with pytest.raises(UserError, match=r"checkpoint 3 .* n_layers = 2 .* found 3"):
        load_dictionaries(sae).check_fits(D_MODEL, 2)


# Real dictionaries


@pytest.mark.parametrize("name", ["sae", "wcc"])
def test_real_dictionaries_explain_their_model(shared: Path, name: str):
    """Features plus b_dec give back the stream as well as the training's own measurements say."""
    from transformers import AutoModelForCausalLM

    folder = shared / "stories260K"
    loaded = load_dictionaries(folder / name)
    loaded.check_fits(64, 5)
    assert loaded.checkpoints == (1, 2, 3, 4, 5)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokens = torch.tensor([[1]])
    generated = model.generate(
        tokens, do_sample=False, max_new_tokens=120, pad_token_id=0, eos_token_id=None
    )
    with torch.no_grad():
        states = model(generated, output_hidden_states=True).hidden_states
    # Hugging Face's last hidden state is after the final norm, so checkpoint 5 is left out
    active: dict[int, Tensor] = {}
    for c in range(1, 5):
        x = states[c][0, 1:]
        active[c] = loaded.by_checkpoint[c].encode(x)
        rebuilt = loaded.by_checkpoint[c].b_dec + sum(
            active[s] @ loaded.by_checkpoint[s].decoders[c]
            for s in active
            if c in loaded.by_checkpoint[s].decoders
        )
        unexplained = (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()
        assert unexplained < 0.2
        assert 2 < (active[c] > 0).sum(-1).float().mean() < 16


def test_the_miniature_is_found_beside_a_demos_folder_of_examples(tmp_path: Path, monkeypatch):
    (tmp_path / "miniature-sae").mkdir()
    (tmp_path / "miniature-sae" / "7.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert ctqk.load_model(device="cpu").scan == "miniature-sae"


def test_names_are_in_the_order_of_their_numbers():
    names = ["layer_10", "layer_2", "x\u00b2", "\u0663"]  # digits of other scripts are letters
    assert sorted(names, key=natural) == ["layer_2", "layer_10", "x\u00b2", "\u0663"]


def test_the_default_is_the_bundled_set_whatever_the_current_folder_holds(
    tmp_path: Path, monkeypatch, run
):
    write_dictionaries(ctqk.load_dictionaries("miniature-wcc"), tmp_path / "miniature-sae")
    monkeypatch.chdir(tmp_path)
    assert ctqk.load_model(device="cpu").scan == "miniature-sae"
    assert ctqk.load_dictionaries("miniature-sae").scan == "miniature-wcc"  # who names it gets it
    assert run("demo", "--no-serve").status == 0
    assert (tmp_path / "ctqk-demo" / "miniature-sae").is_dir()  # of examples, by the set's name
    table = run("qk", "--head", "L1H2:q14:k6")
    named = run("qk", "--head", "L1H2:q14:k6", "-d", "miniature-sae", "-p", DEMO_PROMPT)
    assert table.status == named.status == 0 and table.out != named.out


def test_a_converted_copy_of_the_miniatures_set_knows_its_model(tmp_path: Path):
    write_dictionaries(ctqk.load_dictionaries("miniature-wcc"), tmp_path / "copy")
    model = ctqk.load_model(dictionaries=tmp_path / "copy", device="cpu")
    assert model.cfg.n_layers == 4 and model.scan == "miniature-wcc"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "not valid JSON"),
        (b'{"0": ["\\ud800"]}', "label 0 of layer '0' is not valid Unicode"),
        (b'{"0": ["\xff"]}', "not UTF-8"),
        (b'{"0": [1]}', "should map layers"),
        (b"9" * 10_000, "not valid JSON|should map"),
    ],
    ids=["deep", "surrogate", "latin-1", "number", "long number"],
)
def test_refuses_labels_that_are_none(sae: Path, content: bytes, message: str):
    (sae / "labels.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_dictionaries(sae).label(1, 0)
    assert len(str(caught.value).splitlines()) == 1 and "labels.json" in str(caught.value)


def test_examples_whatever_bit_is_flipped(sae: Path):
    """Each byte of a small archive: the same bytes, none, or one sentence."""
    record = json.dumps({"examples": ["word"] * 20}).encode()
    path = sae / "features.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.json", record)
    data = path.read_bytes()
    for at in range(len(data)):
        for bit in (0, 3, 7):
            content = bytearray(data)
            content[at] ^= 1 << bit
            path.write_bytes(content)
            try:
                assert FeatureExamples(sae).read(1, 0) in (record, None)
            except UserError as error:
                message = str(error)
                assert len(message.splitlines()) == 1 and "features.zip" in message


def test_refuses_examples_that_expand_without_end(sae: Path):
    path = sae / "features.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.json", b"0" * (32 << 20))
    with pytest.raises(UserError, match=r"features\.zip: 0\.json is too large"):
        FeatureExamples(sae).read(1, 0)
    # the size that is declared is less than what comes
    size, told = (32 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, told))
    with pytest.raises(UserError, match=r"0\.json"):
        FeatureExamples(sae).read(1, 0)
