"""Every named set and every layout from a hand-made hub cache, offline, as a user would ask."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.architectures import prompt_ids, save_tiny, save_tokenizer
from helpers.hub_cache import COMMIT, HubCache
from helpers.layout_files import (
    D,
    K,
    write_crosscoder,
    write_dictionary_learning,
    write_gemma_scope,
    write_gemma_scope_2,
    write_llama_scope,
    write_qwen_scope,
    write_sae_lens,
    write_sparsify,
)
from helpers.random_dictionaries import write_sae

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.package import ROOT
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.dictionaries import catalogue

NAMED = {f"{chosen.name}/{chosen.variant}": chosen for chosen in catalogue.all_sets()}
README = (ROOT / "dictionaries" / "README.md").read_text("utf-8")
TABLE = re.findall(r"^\| .* \| `((?:attribute|qk) .*)` \|$", README, re.MULTILINE)
# architecture and number of layers of the real models, with the tests' width
MODELS = {
    "google/gemma-2-2b": ("gemma2", 26),
    "google/gemma-3-1b-pt": ("gemma3", 26),
    "meta-llama/Llama-3.1-8B": ("llama3-rope", 32),
    "gpt2": ("gpt2", 12),
    "EleutherAI/pythia-70m": ("neox", 6),
    "Qwen/Qwen3-1.7B-Base": ("qwen3", 28),
}


def standing(chosen: catalogue.ListedSet, place: str) -> tuple[int, str]:
    """Layer and hook of a folder of a named set of SAELens'."""
    if place == "e-res-sm":
        return 0, "hook_resid_pre"
    number = re.findall(r"\d+", place.removeprefix("v5_32k").removeprefix("v5_128k"))[0]
    return int(number), "hook_resid_pre" if "resid_pre" in place else "hook_resid_post"


def before_sae_lens_6(path: Path, layer: int, hook: str, **more: Any) -> None:
    """The configuration that older releases have."""
    cfg = json.loads((path / "cfg.json").read_text())
    del cfg["metadata"], cfg["architecture"]
    old = {"hook_point": f"blocks.{layer}.{hook}", "hook_point_layer": layer, "lp_norm": 1}
    (path / "cfg.json").write_text(json.dumps(cfg | old | {"model_name": "gpt2-small"} | more))


def write_layer(folder: Path, chosen: catalogue.ListedSet, layer: int, place: str) -> None:
    """One layer of a named set in its real layout, at the place that the list says."""
    scratch = folder / ".scratch"
    if chosen.layout == "sae-lens":
        layer, hook = standing(chosen, place)
        old = chosen.name.startswith("gpt2")
        made = write_sae_lens(scratch, layer, "standard" if old else "jumprelu", hook)
        if chosen.name == "gpt2-small-res-jb":
            before_sae_lens_6(made, layer, hook)
        elif old:
            top = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
            before_sae_lens_6(made, layer, hook, normalize_activations="layer_norm", **top)
    else:
        made = {
            "gemma-scope": write_gemma_scope,
            "gemma-scope-2": write_gemma_scope_2,
            "llama-scope": write_llama_scope,
            "sparsify": write_sparsify,
        }[chosen.layout](scratch, layer)
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(made, folder / place)
    shutil.rmtree(scratch)


def write_named(folder: Path, chosen: catalogue.ListedSet) -> Path:
    """A repository as the list says it is."""
    if chosen.layout == "gemma-scope-2-crosscoder":
        write_crosscoder(folder / chosen.folders[0], list(chosen.layers))
    elif chosen.layout == "qwen-scope":
        for layer in chosen.layers:
            write_qwen_scope(folder, layer)
    else:
        for i, place in enumerate(chosen.folders):
            write_layer(folder, chosen, min(i, chosen.layers[-1]), place)
    return folder


@pytest.mark.parametrize("name", NAMED)
def test_every_named_set_loads_from_its_repository(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = NAMED[name]
    cache = HubCache(tmp_path / "cache")
    cache.add(chosen.repository, write_named(tmp_path / "made", chosen))
    cache.use(monkeypatch)
    found = ctqk.load_dictionaries(name)
    assert found.model_name == chosen.model and found.scan == chosen.title
    shift = 0 if chosen.hook == "hook_resid_pre" else 1
    expected = {layer + shift for layer in chosen.layers}
    assert expected <= set(found.checkpoints) and found.d_model == D
    assert len(found.checkpoints) == max(len(chosen.folders), len(expected))
    if chosen.neuronpedia:
        assert set(found.neuronpedia) == set(found.checkpoints)
        assert len(set(found.neuronpedia.values())) == len(found.checkpoints)


def save_named_model(folder: Path, name: str) -> Path:
    """A tiny model of the architecture and depth of a real one, with a tokenizer."""
    architecture, n_layers = MODELS[name]
    key = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    width = {"hidden_size": D, "num_attention_heads": 2} if architecture == "neox" else {}
    save_tiny(architecture, folder, **{key: n_layers}, **width)
    save_tokenizer(folder)
    return folder


def provide(cache: HubCache, ref: str, folder: Path, n_layers: int) -> None:
    """What a row of the table names, in the cache or here."""
    name = ref.split("@")[0]
    chosen = NAMED.get(name) or next((c for c in NAMED.values() if c.name == name), None)
    if chosen is not None:
        cache.add(chosen.repository, write_named(folder, chosen))
    elif ref.startswith("./"):
        for layer in range(n_layers):
            write_sae_lens(Path(ref), layer)
    elif "gemma-scope" in ref:
        write_gemma_scope(folder, 12, l0=82)
        cache.add("google/gemma-scope-2b-pt-res", folder)
    elif "trainer_0" in ref:
        write_dictionary_learning(folder, 3)
        cache.add("someone/saes", folder)
    elif "EleutherAI" in ref:
        for layer in range(n_layers):
            write_sparsify(folder, layer)
        cache.add(ref, folder)
    else:
        write_sae(folder, D, list(range(n_layers)))
        cache.add("someone/native-saes", folder, revision="v1")


def test_the_readmes_table_is_found() -> None:
    assert len(TABLE) >= 14
    assert {c.name for c in NAMED.values()} >= {"gemma-scope-2b-pt-res", "llama_scope_lxr_8x"}


@pytest.mark.parametrize("row", TABLE)
def test_every_line_of_the_readmes_table(
    tmp_path: Path, row: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command, from the hub's names to a written graph or a printed table."""
    arguments = shlex.split(row)
    model, ref = (arguments[arguments.index(flag) + 1] for flag in ("-m", "-d"))
    monkeypatch.chdir(tmp_path)
    cache = HubCache(tmp_path / "cache")
    cache.add(model, save_named_model(tmp_path / "model", model))
    provide(cache, ref, tmp_path / "made", MODELS[model][1])
    cache.use(monkeypatch)
    arguments += ["-p", "w5 w9 w7 w5 w9"]
    if arguments[0] == "attribute":
        arguments += ["--slug", "x", "--graph_file_dir", "graphs"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    if arguments[0] == "qk":
        assert "score" in capsys.readouterr().out
        return
    written = json.loads((tmp_path / "graphs" / "x.json").read_text("utf-8"))
    assert written["links"] and written["qk"]["attributions"]
    known = ctqk.load_dictionaries(ref).neuronpedia
    assert written["qk"].get("neuronpedia", {}) == {str(c): name for c, name in known.items()}
    assert bool(known) == any(name in ref for name in ("gemma-scope-2b", "gpt2-small", "llama"))


# What goes wrong ----------------------------------------------------------------------------------


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    assert cli.main(arguments) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 1
    return out.err.removeprefix("circuit-tracer-qk: error: ")


@pytest.fixture
def scope(tmp_path: Path) -> HubCache:
    """A cache with two layers of Gemma Scope at main, at a tag and at an older commit."""
    folder = tmp_path / "made"
    for layer, l0 in ((0, 105), (1, 102), (1, 9)):
        write_gemma_scope(folder, layer, l0=l0)
    cache = HubCache(tmp_path / "cache")
    cache.add("google/gemma-scope-2b-pt-res", folder)
    return cache


REF = "google/gemma-scope-2b-pt-res"
ROW = f"{REF}/layer_*/width_16k/average_l0_10*"


def test_revisions_and_wildcards(scope: HubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    scope.use(monkeypatch)
    for revision in ("", "@main", f"@{COMMIT}"):
        found = ctqk.load_dictionaries(ROW + revision)
        assert found.checkpoints == (1, 2) and found.model_name == "google/gemma-2-2b"
    assert ctqk.load_dictionaries(f"{REF}/layer_1/width_16k/average_l0_9").checkpoints == (2,)


@pytest.mark.parametrize("silent", [False, True])
def test_what_cannot_be_had_is_one_sentence(
    scope: HubCache,
    silent: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Offline, and with a hub that answers nothing."""
    (scope.unreachable if silent else scope.use)(monkeypatch)
    reason = "it does not answer" if silent else "offline mode is on"

    def line(ref: str) -> str:
        return said(["convert", ref, "new"], capsys)

    assert f"({reason})" in line("nobody/nothing")
    assert "at main" in line(f"{REF}@v2") and "not at v2" in line(f"{REF}@v2")
    missing = line("gemma-scope-2b-pt-res")
    assert missing.startswith("layer_2/width_16k/average_l0_141/params.npz of google/gemma-scope")
    assert "is not in the local cache" in missing
    assert "nothing below layer_7: it has layer_0, layer_1" in line(f"{REF}/layer_7")
    several = line(REF)
    assert "several SAEs of layer 1" in several
    assert "The list has, of this repository, gemma-scope-2b-pt-res/16k" in several
    assert "has no variant 1k: it has 16k, 65k" in line("gemma-scope-2b-pt-res/1k")
    assert "is no hub id" in line("org/na--me..")
    if silent:
        assert ctqk.load_dictionaries(ROW).checkpoints == (1, 2), "what is cached needs no hub"


def test_a_truncated_download(
    scope: HubCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scope.use(monkeypatch)
    for blob in (scope.folder(REF) / "blobs").iterdir():
        blob.write_bytes(blob.read_bytes()[:-200])
    line = said(["convert", ROW, "new"], capsys)
    assert "params.npz is truncated or no NumPy archive" in line and "fetch it again" in line


def test_a_missing_layer_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set that lacks a layer in the middle explains heads where it can, and makes no graph."""
    for layer in (0, 2, 3):
        write_sparsify(tmp_path / "made", layer)
    cache = HubCache(tmp_path / "cache")
    cache.add("someone/saes", tmp_path / "made")
    cache.add("someone/model", tmp_path / "made" / "layers.0")
    model = tmp_path / "model"
    save_tiny("llama", model, num_hidden_layers=4)
    cache.use(monkeypatch)
    loaded = ctqk.load_model(model, "someone/saes", device="cpu")
    assert ctqk.explain(prompt_ids("llama", 6), loaded).table(1, 0, 5, 2).score
    with pytest.raises(ctqk.UserError, match="have none at checkpoint 2 of 1 to 3"):
        ctqk.attribute(prompt_ids("llama", 6), loaded)


def test_a_layer_whose_file_is_missing_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_sparsify(tmp_path / "made", layer) for layer in range(3)]
    (paths[2] / "sae.safetensors").unlink()
    cache = HubCache(tmp_path / "cache")
    cache.add("someone/saes", tmp_path / "made")
    cache.use(monkeypatch)
    for ref in ("someone/saes", tmp_path / "made"):
        with pytest.raises(ctqk.UserError, match=r"layers.2/sae.safetensors is missing"):
            ctqk.load_dictionaries(ref)


def test_other_kinds_are_refused_before_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = HubCache(tmp_path / "cache")
    config = b"model_kind: transcoder_set\nlayers: [0]\n"
    cache.add("someone/transcoders", {"config.yaml": config})
    cache.use(monkeypatch)
    with pytest.raises(ctqk.UserError, match="-t/--transcoder_set"):
        ctqk.load_dictionaries("someone/transcoders")


def test_the_list_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dictionaries"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(catalogue.MINIATURES) + len(NAMED)
    assert cli.main(["dictionaries", "gemma-2-2b", "16384"]) == 0
    [_, line] = capsys.readouterr().out.splitlines()
    for word in ("gemma-scope-2b-pt-res ", "google/gemma-2-2b", "26", "CC-BY-4.0", REF):
        assert word in line
    assert "no set of the list has nothing" in said(["dictionaries", "nothing"], capsys)


def test_one_heads_table_needs_one_layers_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that holds layer 12 alone explains a head of block 13, as the whole set does."""
    chosen = NAMED["gemma-scope-2b-pt-res/16k"]
    made = write_named(tmp_path / "made", chosen)
    model = save_named_model(tmp_path / "model", "google/gemma-2-2b")
    tables = []
    for name, wanted in (("whole", "*"), ("one", "layer_12")):
        cache = HubCache(tmp_path / name)
        files = {
            p.relative_to(made).as_posix(): p.read_bytes() for p in made.glob(f"{wanted}/*/*/*")
        }
        assert len(files) == (26 if name == "whole" else 1)
        cache.add(chosen.repository, files)
        cache.use(monkeypatch)
        arguments = ["-m", str(model), "-d", chosen.name, "-p", "w5 w9 w7 w5 w9"]
        assert cli.main(["qk", *arguments, "--head", "L13H0", "--key", "2"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    found = ctqk.load_dictionaries(chosen.name, checkpoints=[13])
    assert found.checkpoints == (13,) and found.neuronpedia == {
        13: "gemma-2-2b/12-gemmascope-res-16k"
    }
    line = said(["qk", *arguments, "--head", "L14H0"], capsys)
    assert line.startswith("layer_13/width_16k/average_l0_84/params.npz of google/gemma-scope")
