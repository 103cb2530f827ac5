"""What the package says of the trained miniature that it ships."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from circuit_tracer.frontend.feature_models import Model as FeatureFile

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.residual.model import MINIATURE
from circuit_tracer_qk.dictionaries.features import feature_index

FOLDER = MINIATURE.parent
METRICS = json.loads((FOLDER / "metrics.json").read_text())
SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"


@pytest.fixture(scope="module", params=["sae", "wcc"])
def model(request: pytest.FixtureRequest) -> ctqk.ResidualModel:
    return ctqk.load_model(dictionaries=f"miniature-{request.param}", device="cpu")


def test_it_is_small_and_its_bos_is_not_0() -> None:
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 10 << 20
    assert json.loads((MINIATURE / "config.json").read_text())["bos_token_id"] == 1


def test_the_figures_are_those_aimed_at_or_stated() -> None:
    accuracy = METRICS["metrics"]["accuracy"]
    for task, measured in accuracy.items():
        limit = 0.96 if task == "induction, two-word name, second word" else 0.97  # .968: README
        assert min(measured["with_distractor"], measured["without_distractor"]) >= limit, task
    for kind in ("sae", "wcc"):
        for site in METRICS["dictionaries"][kind]["sites"]:
            assert site["fvu"] <= 0.10 and site["l0"] <= 16 and site["loss_recovered"] >= 0.95
        assert METRICS["dictionaries"][kind]["all_sites"]["loss_recovered"] >= 0.93


def test_every_demo_prompt_gets_its_answer(model: ctqk.ResidualModel) -> None:
    for demo in METRICS["metrics"]["demo_prompts"]:
        tokens = model.ensure_tokenized(demo["prompt"])
        probabilities = model.transformer(tokens[None])[0, -1].softmax(0)
        best = int(probabilities.argmax())
        assert model.tokenizer.decode([best]) == demo["answer"]
        assert float(probabilities[best]) == pytest.approx(demo["top"][0][1], abs=5e-3)


def test_dictionaries_reconstruct_as_stated(model: ctqk.ResidualModel) -> None:
    """FVU on the demo prompts, which are few: within twice the limit that held on 94,500 tokens."""
    error, spread = {}, {}
    for demo in METRICS["metrics"]["demo_prompts"]:
        parts = ctqk.explain(demo["prompt"], model).parts
        for c, e in parts.errors.items():
            x = parts.run.residual[c, 1:]
            error[c] = error.get(c, 0.0) + float(e[1:].pow(2).sum())
            spread[c] = spread.get(c, 0.0) + float((x - x.mean(0)).pow(2).sum())
    assert set(error) == {1, 2, 3, 4}
    assert all(error[c] / spread[c] < 0.2 for c in error)


def test_every_feature_has_its_examples(model: ctqk.ResidualModel) -> None:
    folder = model.dictionaries.folder
    assert folder is not None
    with zipfile.ZipFile(folder / "features.zip") as archive:
        names = set(archive.namelist())
        for c, dictionary in model.dictionaries.by_checkpoint.items():
            for feature in range(len(dictionary.W_enc)):
                name = f"{feature_index(c, feature)}.json"
                assert name in names
                if feature % 64 == 0:
                    FeatureFile.model_validate_json(archive.read(name))
    labelled = [bool(model.dictionaries.label(2, f)) for f in range(512)]
    assert sum(labelled) > 450


def test_sally_is_copied_by_induction(model: ctqk.ResidualModel) -> None:
    """A previous-token head tags " Sally"; heads of layer 1 look there and carry it."""
    graph = ctqk.attribute(SALLY, model)
    assert graph.logit_targets[0].token_str == " Sally"
    last, sally = graph.n_pos - 1, 6
    assert int(graph.qk_row(0, 0, sally).pattern.argmax()) == sally - 1
    for head in range(8):
        assert float(graph.qk_row(1, head, last).pattern[sally]) > 0.9
        table = graph.qk(1, head, last, sally)
        assert float(table.terms.sum()) == pytest.approx(table.score, rel=1e-5)
        # features, not biases or errors, are why
        assert table.blocks["feature", "feature"] > 0.5 * table.score
    targets, sources = graph.adjacency_matrix.nonzero(as_tuple=True)
    parts = graph.edges(sources, targets).parts
    weight = parts.residual + parts.mlp + parts.total.sum(1)
    scale = graph.adjacency_matrix.abs().max(1).values[targets]
    error = (weight - graph.adjacency_matrix[targets, sources]).abs() / scale
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_reason_to_refuse(dtype: torch.dtype) -> None:
    """Its scores reach 70, where bfloat16 alone moves a pattern by 5 %: checks are made before."""
    model = ctqk.load_model(dtype=dtype, device="cpu")
    graph = ctqk.attribute(SALLY, model)
    assert graph.logit_targets[0].token_str == " Sally"
    table = graph.qk(1, 2, graph.n_pos - 1, 6)
    assert float(table.terms.sum()) == pytest.approx(table.score, rel=1e-5)


def test_the_training_script_runs(tmp_path: Path) -> None:
    """Every stage, in miniature of the miniature."""
    script = Path(__file__).resolve().parents[2] / "demos" / "train_miniature.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--threads", "1", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = ctqk.load_model(tmp_path / "out/model", dictionaries=tmp_path / "out/sae", device="cpu")
    assert isinstance(ctqk.attribute(SALLY, made).adjacency_matrix, torch.Tensor)
