"""Examples and labels built from a corpus: against brute force, interrupted, and on the page."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import circuit_tracer_qk as ctqk
from circuit_tracer_qk import cli, feature_collection, feature_examples
from circuit_tracer_qk.dictionaries import feature_index
from circuit_tracer_qk.feature_collection import AFTER, BEFORE
from circuit_tracer_qk.feature_examples import build_features

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
    monkeypatch.setattr(feature_examples, "SAVED_EVERY", -1.0)  # after every batch
    streams, runs = feature_collection._streams, []

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        if len(runs) in (4, 9):
            raise KeyboardInterrupt
        return streams(*arguments)

    monkeypatch.setattr(feature_collection, "_streams", counted)
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


def test_other_work_is_not_taken_for_this(
    tmp_path: Path, model: ctqk.ResidualModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A work file of other texts or options starts over."""
    monkeypatch.setattr(feature_examples, "SAVED_EVERY", -1.0)
    monkeypatch.setattr(feature_examples, "_records", _interrupted)
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
    for more, message in (
        ([], "name one (-o FOLDER)"),
        (["-o", str(path)], "is no folder"),
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
