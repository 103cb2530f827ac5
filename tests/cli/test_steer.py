"""``steer`` on the command line, edits as text, heads chosen from a graph, and how many are needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.cli import main as cli
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT
from circuit_tracer_qk.steering.parse import HeadChoice, parse_edit, read_edit, read_edits
from circuit_tracer_qk.steering.to_json import run_document

SALLY = DEMO_PROMPT
QUERY, KEY = 14, 6
TAGS = "side=key heads=L1H2,L1H7,L1H6 checkpoint=1 features=61,177 positions=6 factor=0"
EDIT = ctqk.QKEdit(["L1H2", "L1H7", "L1H6"], "key", 1, [61, 177], 6, factor=0)


@pytest.fixture(scope="module")
def model() -> ctqk.ResidualModel:
    return ctqk.load_model(device="cpu")


@pytest.fixture(scope="module")
def graph(model: ctqk.ResidualModel) -> ctqk.ResidualGraph:
    return ctqk.attribute(SALLY, model)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*argv: object) -> tuple[int, str, str]:
        status = cli.main(["steer", *(str(arg) for arg in argv)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_the_command_prints_what_steer_returns(run, model, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    status, out, err = run(
        *("--edit", TAGS, "--norms", "frozen", "--token", " Sally", "--sweep", "1,-1"),
        *("--generate", 3, "--controls", 4, "--json", path),
    )
    assert (status, err) == (0, "")
    assert all(len(line) <= 100 for line in out.splitlines())
    expected = ctqk.steer(model, SALLY, EDIT, norms="frozen", controls=4)
    effect = expected.effect(" Sally")
    row = next(line for line in out.splitlines() if line.startswith("  ' Sally'"))
    numbers = [float(x) for x in re.findall(r"[-+]?\d\.\d+", row)]
    wanted = (effect.before, effect.after, effect.after - effect.before)
    spreads = (effect.features.mean, effect.features.std, effect.heads.mean, effect.heads.std)
    assert numbers == pytest.approx([*wanted, *spreads], abs=1e-4)
    assert (
        "norms inside the edited QK circuits frozen" in out and "everything downstream live" in out
    )
    assert "L0/61 (checkpoint 1, feature 61)" in out and "  L0/61 many" in out
    document = json.loads(path.read_text())
    assert document["edits"][0]["names"] == ["L0/61", "L0/177"]
    stored = run_document(expected, [" Sally"])
    for name in ("edits", "changes", "tokens", "controls", "head_controls", "clean", "steered"):
        assert document[name] == json.loads(json.dumps(stored[name])), name
    assert [point["factor"] for point in document["sweep"]] == [1, -1]
    clean, _ = document["sweep"]
    assert clean["tokens"][0]["after"] == clean["tokens"][0]["before"]
    found = ctqk.generate(model, SALLY, EDIT, 3, norms="frozen", controls=3)
    assert document["continued"]["steered"] == found.steered.text
    # the run's own JSON is a file of edits
    again = run("--edits", path, "--norms", "frozen", "--controls", 4, "--json", "-")
    assert json.loads(again[1])["steered"] == document["steered"]


def test_heads_are_chosen_from_the_graph(run, model, graph) -> None:
    chosen = ctqk.select_heads(graph, query=QUERY, key=KEY, count=2)
    _, out, _ = run(
        *("--edit", TAGS.replace("L1H2,L1H7,L1H6", "2@q-1:k6"), "--controls", 0, "--json", "-")
    )
    heads = json.loads(out)["edits"][0]["heads"]
    assert heads == [f"L{layer}H{head}" for layer, head in chosen]


def test_text_and_json_say_the_same_edit() -> None:
    assert parse_edit(TAGS, lambda choice: []) == EDIT
    asked: list[HeadChoice] = []
    edit = parse_edit(
        "heads=80%@q14:k6,L0H1 factor=0.5 positions=-1,3",
        lambda choice: asked.append(choice) or [(2, 3)],
    )
    assert asked == [HeadChoice(None, 0.8, 14, 6)]
    assert edit == ctqk.HeadEdit([(2, 3), (0, 1)], 0.5, [-1, 3])
    mixed = parse_edit(
        "side=query heads=L0H0 checkpoint=0 features=embedding factor=0", lambda c: []
    )
    assert mixed == ctqk.QKEdit("L0H0", "query", 0, "embedding", factor=0)
    document = {"heads": ["L1H0"], "side": "key", "checkpoint": 1, "features": [3], "inject": 2.0}
    expected = ctqk.QKEdit("L1H0", "key", 1, 3, inject=2.0)
    assert read_edit(document) == expected
    assert read_edit(document | {"names": ["L0/3"]}) == expected
    named = {"heads": ["L1H0"], "side": "key", "inject": 2.0}
    assert read_edit(named | {"features": ["L0/3"]}) == expected
    assert read_edit(named | {"names": ["L0/3"]}) == expected
    with pytest.raises(ctqk.UserError, match="names that are not those of its features"):
        read_edit(document | {"names": ["L0/4"]})
    tags = TAGS.replace("checkpoint=1 features=61,177", "features=L0/61,L0/177")
    assert parse_edit(tags, lambda choice: []) == EDIT


MISTAKES = {
    "--edit is missing": [],
    "'size=3' in the edit": ["--edit", "size=3"],
    "names no heads": ["--edit", "side=key checkpoint=1 features=1 factor=0"],
    "names factor twice": ["--edit", TAGS + " factor=1"],
    "lacks checkpoint": ["--edit", "side=key heads=L1H0 features=1 factor=0"],
    "has features but no side": ["--edit", "heads=L1H0 features=1 factor=0"],
    "has neither": ["--edit", "side=key heads=L1H0 checkpoint=1 features=1"],
    "'L1' is no head": ["--edit", TAGS.replace("L1H2,", "L1,")],
    "no head L9H0": ["--edit", TAGS.replace("L1H2", "L9H0")],
    "L0/5 (feature 5 of checkpoint 1) is not active at position 6": [
        "--edit",
        TAGS.replace("61,177", "5"),
    ],
    "cannot be read": ["--edits", "nowhere.json"],
    "--sweep is '1,x'": ["--edit", TAGS, "--sweep", "1,x"],
    "--generate is 0": ["--edit", TAGS, "--generate", "0"],
    "--controls is -1": ["--edit", TAGS, "--controls", "-1"],
    "invalid choice: 'int8'": ["--edit", TAGS, "--dtype", "int8"],
    "'notatoken' is not one token": ["--edit", TAGS, "--token", "notatoken"],
    "context is": ["--edit", TAGS, "--generate", "100000"],
    "-p/--prompt is missing": ["--edit", TAGS, "-d", "miniature-sae"],
    "is a folder": ["--edit", TAGS, "--json", "/"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_sentence(run, message: str) -> None:
    status, out, err = run(*MISTAKES[message])
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_files_of_edits_that_hold_none_are_refused(tmp_path: Path) -> None:
    for text, message in (("{", "is no JSON"), ("[]", "holds no edits"), ("[1]", "no JSON object")):
        path = tmp_path / "edits.json"
        path.write_text(text)
        with pytest.raises(ctqk.UserError, match=message):
            read_edits(path)
    with pytest.raises(ctqk.UserError, match="unknown part size"):
        read_edit({"heads": "L0H0", "size": 1})


# Heads from a graph


def test_carriers_are_the_loadings_times_influence(graph) -> None:
    """Against edge by edge: influence of the edge times |head's part| / |edge|."""
    from circuit_tracer_qk.attribution.pruning import edge_influence

    influence = edge_influence(graph)
    position = graph.positions
    expected: dict[tuple[int, int], float] = {}
    for target, source in (influence > 0).nonzero().tolist():
        if int(position[target]) == QUERY and int(position[source]) == KEY:
            edge = graph.edge(source, target)
            if edge.layer is None:
                continue
            for head, part in enumerate(edge.heads.total.tolist()):
                share = float(influence[target, source]) * abs(part / edge.weight)
                key = (edge.layer, head)
                expected[key] = expected.get(key, 0.0) + share
    found = ctqk.carriers(graph, query=QUERY, key=KEY)
    assert {(c.layer, c.head): c.influence for c in found} == pytest.approx(expected, rel=1e-3)
    sizes = [c.influence for c in found]
    assert sizes == sorted(sizes, reverse=True)
    assert found[0].attention == pytest.approx(
        float(graph.run.pattern[found[0].layer, found[0].head, QUERY, KEY])
    )


def test_heads_by_count_by_share_and_into_a_node(graph) -> None:
    found = ctqk.carriers(graph, query=QUERY, key=KEY)
    ranked = [(c.layer, c.head) for c in found]
    assert ctqk.select_heads(graph, query=QUERY, key=KEY, count=3) == ranked[:3]
    assert ctqk.select_heads(graph, query=-1, key=KEY, count=3) == ranked[:3]
    half = ctqk.select_heads(graph, query=QUERY, key=KEY, share=0.5)
    total = sum(c.influence for c in found)
    assert half == ranked[: len(half)]
    assert sum(c.influence for c in found[: len(half)]) >= 0.5 * total
    assert sum(c.influence for c in found[: len(half) - 1]) < 0.5 * total
    logit = len(graph.adjacency_matrix) - len(graph.logit_targets)
    into = ctqk.carriers(graph, node=logit)
    assert into == [] or {c.layer for c in into} == {graph.run.n_layers - 1}
    feature = next(i for i in range(graph.n_features) if int(graph.positions[i]) == KEY)
    assert {c.layer for c in ctqk.carriers(graph, node=feature)} == {
        int(graph.active_features[graph.selected_features[feature], 0])
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(query=14), "either count="),
        (dict(query=14, count=1, share=0.5), "either count="),
        (dict(query=14, count=0), "count is 0"),
        (dict(query=14, share=1.5), "share is 1.5"),
        (dict(query=99, count=1), "query position 99"),
        (dict(query=14, count=2.0), "count is 2.0"),
        (dict(query=14, share="a"), "share is 'a'"),
        (dict(node=-1, count=1), "node -1"),
        (dict(count=1), "name a query or key"),
    ],
)
def test_choices_that_mean_nothing_are_refused(graph, options: dict, message: str) -> None:
    with pytest.raises(ctqk.UserError, match=message):
        ctqk.select_heads(graph, **options)


def test_the_curve_is_steering_one_head_more_at_a_time(model, graph) -> None:
    heads = ctqk.select_heads(graph, query=QUERY, key=KEY, count=3)
    edit = ctqk.QKEdit(heads, "key", 1, [61, 177], KEY, factor=0)
    curve = ctqk.head_curve(model, SALLY, edit, heads, " Sally", norms="frozen", controls=2)
    for freeze, points in (("none", curve.live), ("patterns", curve.frozen)):
        two = ctqk.QKEdit(heads[:2], "key", 1, [61, 177], KEY, factor=0)
        run = ctqk.steer(model, SALLY, two, freeze=freeze, norms="frozen", controls=0)  # type: ignore
        assert points[2] == run.probability(" Sally") and points[0] == run.clean.probability(
            " Sally"
        )
    assert len(curve.random) == 2 and all(len(points) == 4 for points in curve.random)
    assert {points[3] for points in curve.random} == {curve.live[3]}, "all heads, any order"
    assert curve.needed([0.99, 0.6, 0.2], 0.5) == 2
    with pytest.raises(ctqk.UserError, match="at least one head"):
        ctqk.head_curve(model, SALLY, edit, [], " Sally")
    with pytest.raises(ctqk.UserError, match="no edit names the head L0H0"):
        ctqk.head_curve(model, SALLY, edit, ["L0H0"], " Sally")
    twice = ctqk.head_curve(model, SALLY, edit, [*heads, *heads], " Sally", controls=0)
    assert twice.heads == heads


def test_weights_are_left_as_they_were(model) -> None:
    before = model.transformer(torch.tensor([[1, 5, 9]]))
    ctqk.steer(model, SALLY, [EDIT, ctqk.HeadEdit("L2H0", 0.0)], freeze="patterns", controls=1)
    assert torch.equal(model.transformer(torch.tensor([[1, 5, 9]])), before)
    assert all(not module.fwd_hooks for module in model.transformer.hook_points())


def test_threads_that_steer_one_model_do_not_meet(model) -> None:
    """Hooks belong to one run at a time: each gives what it gives alone."""
    from concurrent.futures import ThreadPoolExecutor

    factors = [0.0, 0.5, -1.0, 2.0] * 3
    edits = [ctqk.QKEdit(EDIT.heads, "key", 1, [61, 177], 6, factor=f) for f in factors]

    def steered(edit: ctqk.QKEdit) -> torch.Tensor:
        return ctqk.steer(model, SALLY, edit, controls=1).logits

    alone = [steered(edit) for edit in edits]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(steered, edits))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
