"""Models by hub name, offline from a hand-made cache: what a local folder gives, and what goes wrong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.architectures import ARCHITECTURES, prompt_ids, save_tiny, save_tokenizer
from helpers.hub_cache import COMMIT, HubCache, answering
from helpers.random_dictionaries import write_sae
from transformer_lens import HookedTransformerConfig
from transformers import AutoConfig, AutoModelForCausalLM

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT

MODEL = "someone/tiny"
MINIATURE = Path(ctqk.__file__).parent / "miniature"
# part of the largest edge; measured over all architectures and three prompts: 0.024 and 0.0053
EDGES_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}


def saes(folder: Path, model: Path) -> Path:
    """Random SAEs at every layer of a model folder."""
    config = AutoConfig.from_pretrained(model)
    return write_sae(folder, config.hidden_size, list(range(config.num_hidden_layers)))


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder and random SAEs for it."""
    folder = tmp_path / "model"
    save_tiny("llama", folder)
    save_tokenizer(folder)
    return folder, saes(tmp_path / "saes", folder)


def feature_edges(graph: ctqk.ResidualGraph) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """The features of a graph and the edges among them."""
    kept = graph.active_features[graph.selected_features].tolist()
    return [tuple(f) for f in kept], graph.adjacency_matrix[: len(kept), : len(kept)]


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
    # what is left is the rounding of the forward pass: the same weights, run in float32
    exact = copy.deepcopy(model.transformer).float()
    exact.cfg.dtype = torch.float32
    single = ctqk.load_model(exact, dictionaries)
    features, edges = feature_edges(graph)
    wanted, expected = feature_edges(ctqk.attribute(prompt_ids(name, 8), single, max_n_logits=2))
    both = [f for f in features if f in set(wanted)]
    assert len(both) >= 0.95 * max(len(features), len(wanted))
    here, there = ([of.index(f) for f in both] for of in (features, wanted))
    expected = expected[there][:, there]
    difference = (edges[here][:, here] - expected).abs().max() / expected.abs().max()
    assert float(difference) < EDGES_TOLERANCE[dtype]


def refusal(capsys: pytest.CaptureFixture[str], ref: str, dictionaries: Path) -> str:
    """The one sentence with which Python and the command line refuse a model."""
    with pytest.raises(ctqk.UserError) as caught:
        ctqk.load_model(ref, dictionaries, device="cpu")
    capsys.readouterr()  # bars of what was fetched
    arguments = ["qk", "-m", ref, "-d", str(dictionaries), "-p", "w1", "--head", "L1H0"]
    assert cli.main(arguments) == cli.MISTAKE
    out = capsys.readouterr()
    *_, line = out.err.splitlines()
    assert out.out == "" and "Traceback" not in out.err
    assert line == f"circuit-tracer-qk: error: {caught.value}"
    return str(caught.value)


def halve(name: str) -> Callable[[Path], object]:
    """Cut a cached file in two, as a download that broke off leaves it."""

    def cut(snapshot: Path) -> None:
        file = (snapshot / name).resolve()
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return cut


def in_pytorchs_format(snapshot: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    (snapshot / "model.safetensors").unlink()
    model.save_pretrained(snapshot, safe_serialization=False)


def in_shards(snapshot: Path) -> list[str]:
    """The weights in ten files."""
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    (snapshot / "model.safetensors").unlink()
    model.save_pretrained(snapshot, max_shard_size="10KB")
    return sorted(path.name for path in snapshot.glob("*.safetensors"))


def forget(*names: str) -> Callable[[Path], object]:
    return lambda snapshot: [(snapshot / name).unlink() for name in names]


LACKS = "The local cache lacks files for the {} of someone/tiny and the Hugging Face hub does not"
# what is asked for, what is wrong with the cache, what is said
NOT_TO_BE_HAD: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "nowhere": (
        "nobody/nothing",
        bool,
        ("nobody/nothing is not in the local cache", "cannot be reached", "or give a local folder"),
    ),
    "branch": (f"{MODEL}@v3", bool, (f"holds {MODEL} at main", "not at v3", "check the revision")),
    "commit": (f"{MODEL}@{'f' * 40}", bool, (f"holds {MODEL} at main", f"not at {'f' * 40}")),
    "two dashes": ("some--one/tiny", bool, ("is not a folder; give", "org/name")),
    "dot": ("someone/tiny.", bool, ("is not a folder; give", "org/name")),
    "long": (f"someone/{'y' * 100}", bool, ("is not a folder; give", "org/name")),
    "half the weights": (
        MODEL,
        halve("model.safetensors"),
        ("model.safetensors is truncated or not a safetensors file; delete", "download it again"),
    ),
    "half of PyTorch's weights": (
        MODEL,
        lambda snapshot: [in_pytorchs_format(snapshot), halve("pytorch_model.bin")(snapshot)],
        ("pytorch_model.bin is truncated; delete", "download it again"),
    ),
    "half a shard": (
        MODEL,
        lambda snapshot: halve(in_shards(snapshot)[1])(snapshot),
        ("model-00002-of-00010.safetensors is truncated", "download it again"),
    ),
    "half the configuration": (
        MODEL,
        halve("config.json"),
        ("config.json is truncated or not JSO",),
    ),
    "half the tokenizer": (
        MODEL,
        halve("tokenizer.json"),
        ("tokenizer.json is truncated or not J",),
    ),
    "no configuration": (MODEL, forget("config.json"), ("The config.json of", "the local cache")),
    "no weights": (MODEL, forget("model.safetensors"), (LACKS.format("weights"), "local folder")),
    "no blob": (
        MODEL,
        lambda snapshot: (snapshot / "model.safetensors").resolve().unlink(),
        (LACKS.format("weights"),),
    ),
    "a shard missing": (
        MODEL,
        lambda snapshot: (snapshot / in_shards(snapshot)[1]).unlink(),
        (LACKS.format("weights"),),
    ),
    "no tokenizer": (MODEL, forget("tokenizer.json"), (LACKS.format("tokenizer"),)),
}


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("what", NOT_TO_BE_HAD)
def test_models_that_cannot_be_had(
    tiny: tuple[Path, Path],
    cache: HubCache,
    what: str,
    silent: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Offline, and with a hub that answers nothing."""
    folder, dictionaries = tiny
    ref, spoil, expected = NOT_TO_BE_HAD[what]
    snapshot = cache.add(MODEL, folder)
    spoil(snapshot)
    (cache.unreachable if silent else cache.use)(monkeypatch)
    said = refusal(capsys, ref, dictionaries)
    assert all(part in said for part in expected), said
    assert "NoneType" not in said and "\n" not in said


def test_a_configuration_of_no_known_model_is_not_a_broken_cache(
    tiny: tuple[Path, Path],
    cache: HubCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, dictionaries = tiny
    cache.add(MODEL, {"config.json": json.dumps({"model_type": "unheard-of"}).encode()})
    cache.use(monkeypatch)
    said = refusal(capsys, MODEL, dictionaries)
    assert "unheard-of" in said and "lacks" not in said


# A hub that answers -------------------------------------------------------------------------------


INTERRUPTED: dict[str, Callable[[Path], object] | None] = {
    "nothing cached": None,
    "the configuration": lambda s: [p.unlink() for p in s.iterdir() if p.name != "config.json"],
    "no weights": forget("model.safetensors"),
    "no blob": lambda s: (s / "model.safetensors").resolve().unlink(),
    "no tokenizer": forget("tokenizer.json"),
    "everything": bool,
}


@pytest.mark.parametrize("left", INTERRUPTED)
def test_what_is_not_cached_is_downloaded(
    tiny: tuple[Path, Path], cache: HubCache, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first use, and one after a download that broke off; what is cached is not asked for."""
    folder, dictionaries = tiny
    spoil = INTERRUPTED[left]
    if spoil is not None:
        spoil(cache.add(MODEL, folder))
    with answering() as hub:
        hub.add(MODEL, folder)
        cache.online(monkeypatch, hub.endpoint)
        found, local = (ctqk.load_model(m, dictionaries, device="cpu") for m in (MODEL, folder))
        ids = found.ensure_tokenized("w1 w2 w3")
        assert torch.equal(ids, local.ensure_tokenized("w1 w2 w3"))
        assert torch.equal(found.transformer(ids), local.transformer(ids))
        assert bool(hub.asked) == (left != "everything")


def test_what_the_hub_refuses(
    tiny: tuple[Path, Path],
    cache: HubCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, dictionaries = tiny
    with answering() as hub:
        for repo in (MODEL, "someone/shy", "someone/empty"):
            hub.add(repo, folder)
        hub.gated.add("someone/shy")
        del hub.repositories["someone/empty"]["model.safetensors"]
        cache.online(monkeypatch, hub.endpoint)
        expected = {
            "nobody/nothing": "nobody/nothing is not on the hub (or is private); check the name",
            f"{MODEL}@v3": f"{MODEL} has no revision v3 on the hub",
            "someone/shy": "someone/shy is gated on the hub; accept its terms",
            "someone/empty": "lacks files for the weights of someone/empty and the Hugging Face hub",
        }
        for ref, sentence in expected.items():
            assert sentence in refusal(capsys, ref, dictionaries)
            assert hub.asked


def test_the_way_out_of_a_truncated_download_is_one(
    tiny: tuple[Path, Path],
    cache: HubCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The hub's client would link the same content again: it is the content that has to go."""
    folder, dictionaries = tiny
    halve("model.safetensors")(cache.add(MODEL, folder))
    with answering() as hub:
        hub.add(MODEL, folder)
        cache.online(monkeypatch, hub.endpoint)
        said = refusal(capsys, MODEL, dictionaries)
        Path(said.partition("; delete ")[2].partition(" and download")[0]).unlink()
        assert ctqk.load_model(MODEL, dictionaries, device="cpu").cfg.n_layers == 3


def test_the_command_line_attributes_a_cached_model(tmp_path: Path, cache: HubCache) -> None:
    """Another process, which knows of the cache by its environment alone."""
    cache.add("someone/miniature", MINIATURE / "model")
    arguments = ["-d", str(MINIATURE / "sae"), "-p", DEMO_PROMPT, "--slug", "s"]
    written = []
    for name, model in (("hub", "someone/miniature"), ("folder", str(MINIATURE / "model"))):
        graphs = tmp_path / name
        command = [sys.executable, "-m", "circuit_tracer_qk", "attribute", "-m", model, *arguments]
        command += ["-o", str(tmp_path / f"{name}.pt"), "--graph_file_dir", str(graphs)]
        environment = os.environ | cache.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        written.append(json.loads((graphs / "s.json").read_bytes())["links"])
    assert written[0] == written[1] and written[0]
    one, other = (ctqk.load_graph(tmp_path / f"{n}.pt").adjacency_matrix for n in ("hub", "folder"))
    assert torch.equal(one, other)


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
