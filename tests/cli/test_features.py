"""Examples and labels built from a corpus: against brute force, interrupted, and on the page."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli.features import collection as feature_collection
from circuit_tracer_qk.cli.features import examples as feature_examples
from circuit_tracer_qk.cli.features.collection import AFTER, BEFORE, WINDOW, Corpus, collect
from circuit_tracer_qk.cli.features.command import read_texts
from circuit_tracer_qk.cli.features.examples import build_features
from circuit_tracer_qk.dictionaries.dictionary import SAE, Dictionary
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.features import feature_index

MINIATURE = Path(ctqk.__file__).parent / "miniature"
TEXTS = [
    "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt Sally baked a ring.",
    'The opposite of "small" is "big". The opposite of "hot" is "cold".',
    "Aunt Mary loved Uncle Bob. Uncle Bob was feeling happy, and Aunt Mary was feeling sad.",
    "The color of a banana is yellow? Yes. The color of a banana is red? No.",
    "I always loved visiting Uncle Tom. Whenever I was feeling glad, Uncle",
] * 3
CONTEXT = 12


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the miniature's SAEs without descriptions."""
    folder = tmp_path_factory.mktemp("features") / "saes"
    shutil.copytree(MINIATURE / "sae", folder)
    for name in ("features.zip", "labels.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def model(saes: Path) -> ctqk.ResidualModel:
    return ctqk.load_model(MINIATURE / "model", saes, device="cpu")


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    with zipfile.ZipFile(folder / "features.zip") as archive:
        return {name: json.loads(archive.read(name)) for name in archive.namelist()}


def brute_force(model: ctqk.ResidualModel, c: int) -> tuple[list[list[int]], torch.Tensor]:
    """Chunks of tokens, and (n_chunks, CONTEXT, d_dict) activations of each run by itself."""
    chunks, acts = [], []
    for text in TEXTS:
        ids = model.ensure_tokenized(text).tolist()
        for start in range(1, len(ids), CONTEXT - 1):
            chunk = [ids[0], *ids[start : start + CONTEXT - 1]]
            hook = f"blocks.{c - 1}.hook_resid_post"
            x = model.transformer.run_with_cache(torch.tensor([chunk]))[1][hook][0]
            a = model.dictionaries.by_checkpoint[c].encode(x)
            a[0] = 0
            chunks.append(chunk)
            acts.append(torch.nn.functional.pad(a, (0, 0, 0, CONTEXT - len(chunk))))
    return chunks, torch.stack(acts)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_examples_are_where_features_fire_most(
    tmp_path: Path, model: ctqk.ResidualModel, batch: int
) -> None:
    built = build_features(model, TEXTS, tmp_path, examples=3, context=CONTEXT, batch=batch)
    found = documents(tmp_path)
    labels = json.loads((tmp_path / "labels.json").read_text("utf-8"))
    assert built.n_features == 4 * 512 and 200 < built.n_alive < 2048
    checked = 0
    for c in (1, 4):
        chunks, acts = brute_force(model, c)
        assert built.n_positions == sum(len(chunk) - 1 for chunk in chunks)
        for feature in range(0, 512, 7):
            document = found[f"{feature_index(c, feature)}.json"]
            mine = acts[:, :, feature]
            count = int((mine > 0).sum())
            assert document["activation_frequency"] == pytest.approx(
                count / built.n_positions, rel=1e-2
            )
            assert labels[str(c - 1)][feature] == document["label"]
            assert bool(document["label"]) == bool(count)
            if not count:
                assert document["examples_quantiles"] == [] and document["act_max"] == 0
                continue
            assert document["act_max"] == pytest.approx(float(mine.max()), rel=1e-2)
            [group] = document["examples_quantiles"]
            peaks = mine.max(1).values.sort(descending=True).values
            for i, example in enumerate(group["examples"]):
                at, values = example["train_token_ind"], example["tokens_acts_list"]
                assert len(values) == len(example["tokens"]) <= BEFORE + 1 + AFTER
                assert values[at] == max(values) or values[at] > 0
                if i == 0:
                    assert values[at] == pytest.approx(float(peaks[0]), rel=1e-2)
                hits = [
                    (n, p)
                    for n, chunk in enumerate(chunks)
                    for p in range(1, len(chunk))
                    if float(mine[n, p]) == pytest.approx(values[at], rel=1e-2)
                ]
                windows = [
                    [
                        model.tokenizer.decode(t)
                        for t in chunks[n][max(p - BEFORE, 0) :][: len(values)]
                    ]
                    for n, p in hits
                ]
                assert example["tokens"] in windows
                checked += 1
    assert checked > 100


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_peaks_are_those_of_brute_force(
    tmp_path: Path, model: ctqk.ResidualModel, batch: int
) -> None:
    """Every feature: the k largest peaks, the windows around them, and the count."""
    k = 5
    corpus = Corpus.of(TEXTS, model, CONTEXT, batch)
    found = collect(model, corpus, [1, 4], k, tmp_path / "part")
    for c, peaks in found.items():
        chunks, acts = brute_force(model, c)
        assert [chunk.tolist() for chunk in corpus.chunks] == chunks
        torch.testing.assert_close(peaks.count, (acts > 0).sum((0, 1)))
        strongest = acts.amax(1).sort(0, descending=True).values[:k].T
        torch.testing.assert_close(peaks.value, strongest, rtol=1e-5, atol=1e-5)
        around = torch.nn.functional.pad(acts, (0, 0, BEFORE, AFTER))
        alive = 0
        for feature, j in (peaks.value > 0).nonzero().tolist():
            chunk, place = int(peaks.chunk[feature, j]), int(peaks.position[feature, j])
            window = around[chunk, place : place + WINDOW, feature]
            torch.testing.assert_close(peaks.acts[feature, j], window, rtol=1e-5, atol=1e-5)
            assert float(window[BEFORE]) == pytest.approx(float(peaks.value[feature, j]), rel=1e-5)
            alive += 1
        assert alive > 500
        pairs = torch.stack([peaks.chunk, peaks.position], -1)
        for feature in range(0, 512, 5):
            some = pairs[feature][peaks.value[feature] > 0].tolist()
            assert len({chunk for chunk, _ in some}) == len(some), "one window of a chunk"


@pytest.mark.parametrize("dropped", [slice(0, 0), slice(0, 1), slice(0, 4)])
def test_frequencies_are_of_the_positions_that_count(
    tmp_path: Path, model: ctqk.ResidualModel, dropped: slice
) -> None:
    d_model = model.cfg.d_model
    always = Dictionary(
        checkpoint=1,
        W_enc=torch.zeros(2, d_model),
        b_enc=torch.tensor([1.0, -1.0]),
        b_dec=torch.zeros(d_model),
        decoders={1: torch.ones(2, d_model)},
    )
    known = DictionarySet(SAE, "hook_resid_post", "x", None, {1: always})
    build_features(ctqk.ResidualModel(model.transformer, known, dropped), TEXTS[:3], tmp_path)
    found = [d["activation_frequency"] for d in documents(tmp_path).values()]
    assert found == [1, 0]


def test_logits_are_the_decoder_vectors_through_the_unembedding(
    tmp_path: Path, model: ctqk.ResidualModel
) -> None:
    build_features(model, TEXTS[:2], tmp_path, checkpoints=[4])
    found = documents(tmp_path)
    t: Any = model.transformer
    for feature in (3, 77, 500):
        v = model.dictionaries.by_checkpoint[4].decoders[4][feature]
        logits = (v * t.ln_final.w) @ t.unembed.W_U
        tops = [model.tokenizer.decode(i) for i in logits.topk(10).indices]
        document = found[f"{feature_index(4, feature)}.json"]
        assert document["top_logits"] == tops
        assert len(document["bottom_logits"]) == 10
    assert len(found) == 512, "only the checkpoint that was asked for"
    build_features(model, TEXTS[:2], tmp_path, checkpoints=[4], logits=False, force=True)
    assert documents(tmp_path)[f"{feature_index(4, 3)}.json"]["top_logits"] == []


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, model: ctqk.ResidualModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"context": CONTEXT, "batch": 2, "examples": 2}
    build_features(model, TEXTS, whole, **options)
    monkeypatch.setattr(feature_collection, "SAVED_EVERY", -1.0)  # after every batch
    streams, runs = feature_collection.Reader.read, []

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        if len(runs) in (4, 9):
            raise KeyboardInterrupt
        return streams(*arguments)

    monkeypatch.setattr(feature_collection.Reader, "read", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build_features(model, TEXTS, broken, **options)
        assert [p.name for p in broken.iterdir()] == [".features.part"]
    build_features(model, TEXTS, broken, **options)
    n_batches = len(feature_collection.Corpus.of(TEXTS, model, CONTEXT, 2).batches())
    assert len(runs) == n_batches + 2, "what was done is not done again"
    assert sorted(p.name for p in broken.iterdir()) == ["features.zip", "labels.json"]
    for name in ("features.zip", "labels.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()

    runs.clear()
    with pytest.raises(KeyboardInterrupt):
        build_features(model, TEXTS, broken, force=True, **options)
    part = broken / ".features.part"
    part.write_bytes(part.read_bytes()[:-100])  # torn: done again
    runs[:] = [1] * 20
    build_features(model, TEXTS, broken, force=True, **options)
    assert len(runs) == 20 + n_batches
    assert (broken / "features.zip").read_bytes() == (whole / "features.zip").read_bytes()


def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, saes: Path, model: ctqk.ResidualModel
) -> None:
    """SIGKILL in the middle of the work, and while the result is written."""
    script = """
import os, signal, sys
import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli.features import collection as feature_collection
from circuit_tracer_qk.cli.features import examples as f
from pathlib import Path
import json, torch
torch.set_num_threads(1)
where, folder, saes, model, texts = sys.argv[1:]
feature_collection.SAVED_EVERY = -1.0
module, name, at = {"reading": (feature_collection.Reader, "read", 5), "writing": (f, "label_of", 700)}[where]
plain, calls = getattr(module, name), []
def killed(*args):
    calls.append(1)
    if len(calls) == at:
        left = Path(folder, "..features.part.0123456789abcdef.tmp")
        left.mkdir()
        Path(left, "lock").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args)
setattr(module, name, killed)
m = ctqk.load_model(model, saes, device="cpu")
f.build_features(m, json.loads(texts), folder, context=12, batch=2, examples=2)
"""
    options: dict[str, Any] = {"context": 12, "batch": 2, "examples": 2}
    build_features(model, TEXTS, tmp_path / "whole", **options)
    places = [str(saes), str(MINIATURE / "model"), json.dumps(TEXTS)]
    for where in ("reading", "writing"):
        folder = tmp_path / where
        folder.mkdir()
        command = [sys.executable, "-c", script, where, str(folder), *places]
        assert subprocess.run(command, cwd=MINIATURE.parents[1]).returncode == -9
        assert (folder / ".features.part").exists()
        assert not (folder / "features.zip").exists() and not (folder / "labels.json").exists()
        build_features(model, TEXTS, folder, **options)
        assert sorted(p.name for p in folder.iterdir()) == ["features.zip", "labels.json"]
        for name in ("features.zip", "labels.json"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_weights_are_other_work(model: ctqk.ResidualModel) -> None:
    """Where only what maps differs: biases and the first embeddings are often the same."""
    corpus = Corpus.of(TEXTS[:2], model, CONTEXT, 2)

    def printed(seed: int) -> str:
        W = torch.randn(70, model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
        zeros = torch.zeros(70), torch.zeros(model.cfg.d_model)
        known = DictionarySet(SAE, "x", "x", None, {1: Dictionary(1, W, *zeros, {1: W})})
        other = ctqk.ResidualModel(model.transformer, known, model.zero_positions)
        return feature_collection.fingerprint_of(other, corpus, [1], 4)

    assert printed(0) == printed(0)
    before = printed(0), printed(1)
    weight = model.transformer.state_dict()["blocks.2.mlp.W_out"]
    weight.mul_(2)
    after = printed(0)
    weight.div_(2)
    assert len({*before, after}) == 3


def test_other_checkpoints_stay(tmp_path: Path, model: ctqk.ResidualModel) -> None:
    options: dict[str, Any] = {"context": CONTEXT, "logits": False}
    build_features(model, TEXTS, tmp_path / "all", **options)
    build_features(model, TEXTS, tmp_path / "parts", checkpoints=[3, 1], **options)
    assert len(documents(tmp_path / "parts")) == 2 * 512
    build_features(model, TEXTS, tmp_path / "parts", checkpoints=[2, 4], force=True, **options)
    assert documents(tmp_path / "parts") == documents(tmp_path / "all")
    labels = [(tmp_path / name / "labels.json").read_bytes() for name in ("parts", "all")]
    assert labels[0] == labels[1]


def test_a_disk_that_is_full(
    tmp_path: Path, model: ctqk.ResidualModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_features(model, TEXTS[:3], tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(UserError, match="features.zip cannot be written .No space left"):
        build_features(model, TEXTS, tmp_path, force=True)
    (tmp_path / ".features.part").unlink()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_other_work_is_not_taken_for_this(
    tmp_path: Path, model: ctqk.ResidualModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work file of other texts or options starts over."""
    monkeypatch.setattr(feature_collection, "SAVED_EVERY", -1.0)
    monkeypatch.setattr(feature_examples, "feature_records", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_features(model, TEXTS[:3], tmp_path)
    monkeypatch.undo()
    assert (tmp_path / ".features.part").exists()
    build_features(model, TEXTS[3:6], tmp_path)
    build_features(model, TEXTS[3:6], tmp_path / "fresh")
    fresh = (tmp_path / "fresh" / "features.zip").read_bytes()
    assert (tmp_path / "features.zip").read_bytes() == fresh


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_the_command_describes_a_set_that_graphs_then_show(
    tmp_path: Path, saes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "saes"
    shutil.copytree(saes, folder)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(TEXTS), "utf-8")
    arguments = ["features", "-m", str(MINIATURE / "model"), "-d", str(folder)]
    arguments += ["--texts", str(texts)]
    assert cli.main(arguments) == 0
    assert "features fired in" in capsys.readouterr().out
    described = ctqk.load_model(MINIATURE / "model", folder, device="cpu")
    shipped = json.loads(ctqk.load_dictionaries("miniature-sae").examples(1, 61) or b"")
    found = json.loads(described.dictionaries.examples(1, 61) or b"")
    assert found.keys() == shipped.keys()
    graph = ctqk.attribute(TEXTS[0], described)
    ctqk.create_graph_files(graph, "x", tmp_path / "graphs")
    written = json.loads((tmp_path / "graphs" / "x.json").read_text("utf-8"))
    names = {n["clerp"] for n in written["nodes"] if n["feature_type"] == "cross layer transcoder"}
    assert len(names) > 2 and "" not in names
    assert cli.main(arguments) == 2
    assert "features.zip is there already: give force (--force)" in capsys.readouterr().err
    assert cli.main([*arguments, "--force"]) == 0


def test_stories_are_described(tmp_path: Path, shared: Path) -> None:
    folder = shared / "stories260K"
    described = ctqk.load_model(folder / "model", folder / "sae", device="cpu")
    texts = json.loads((folder / "corpus.json").read_text("utf-8"))[:50]
    built = build_features(described, texts, tmp_path)
    assert built.n_features == 5 * 512 and built.n_alive > 2000
    found = documents(tmp_path)
    assert len(found) == 5 * 512
    frequency = sum(d["activation_frequency"] for d in found.values()) / 5
    assert 4 < frequency < 16, "its SAEs were trained to L0 8"


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.txt", "one\nstill\n\ntwo\n", ["one\nstill", "two"]),
        ("x.txt", "one\r\nstill\r\n \t\r\n\r\ntwo", ["one\nstill", "two"]),
        ("x.txt", "\ufeffone\ntwo\x0cstill\n", ["one", "two\x0cstill"]),
        ("x.TXT", "\none\ntwo\n\n", ["one", "two"]),
        ("x.json", '\ufeff["one\\n\\ntwo", "", {"text": "three"}]', ["one\n\ntwo", "three"]),
        ("x.JSONL", '"one\u2028still"\r\n{"text": "two"}\n', ["one\u2028still", "two"]),
    ],
)
def test_texts_are_read(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read_texts(path) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "has no text in it"),
        ("x.txt", b"\xff\xfe", "is not UTF-8"),
        ("x.json", b"{}", "should be a list of strings"),
        ("x.json", b"[1]", "item 1 should be a string"),
        ("x.json", b"[", "is not valid JSON"),
        ("x.jsonl", b'"a"\n{"t": 1}\n', "line 2 should be a string"),
        ("x.jsonl", b'"a"\nb\n', "line 2 is not valid JSON"),
        (None, b"", "cannot be read"),
    ],
)
def test_texts_that_cannot_be_read(
    tmp_path: Path,
    name: str | None,
    content: bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / (name or "nowhere.txt")
    if name is not None:
        path.write_bytes(content)
    assert cli.main(["features", "-d", "miniature-sae", "--texts", str(path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and str(path) in line


def test_what_cannot_be_described_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('"Aunt Sally"\n\n{"text": "Uncle Bob"}\n')
    arguments = ["features", "-d", "miniature-sae", "--texts", str(path)]
    (tmp_path / "old" / "features").mkdir(parents=True)
    for more, message in (
        ([], "name one (-o FOLDER)"),
        (["-o", str(path)], "is no folder"),
        (["-o", str(tmp_path / "old")], "features is there already: give force (--force)"),
        (["-o", str(tmp_path / "out"), "--checkpoints", "9"], "no dictionary at checkpoint 9"),
        (["-o", str(tmp_path / "out"), "--checkpoints", "a"], "--checkpoints is 'a'"),
        (["-o", str(tmp_path / "out"), "--context", "1"], "context at least 2"),
        (["-o", str(tmp_path / "out"), "--max-texts", "0"], "--max-texts is 0"),
    ):
        assert cli.main([*arguments, *more]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert cli.main([*arguments, "-o", str(tmp_path / "out")]) == 0
    assert "of 2 texts" in capsys.readouterr().out
