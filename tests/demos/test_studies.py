"""The studies' claims, with margins, on fewer prompts than the report has; and the report itself."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import circuit_tracer_qk as ctqk

FOLDER = Path(__file__).parents[2] / "demos" / "studies"
PROMPTS = 6


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def studies() -> dict:
    run, model = importlib.import_module("run"), ctqk.load_model(device="cpu")
    return {name: study(model, PROMPTS) for name, study in run.STUDIES.items()}


def test_every_study_has_its_controls(studies: dict) -> None:
    for study in studies.values():
        d = study.document()
        assert d["prompts"] == PROMPTS and d["controls"] >= PROMPTS
        assert d["shown"] in ("yes", "partly", "no") and len(d["verdict"]) > 40
        assert study.figures and all("<svg" in f.svg and f.caption for f in study.figures)


def test_induction_is_carried_by_the_tag(studies: dict) -> None:
    d = studies["induction"].document()
    assert d["shown"] == "yes"
    assert d["effect"] > 0.7 and d["effect"] > d["controls_effect"] + 0.4
    m = d["numbers"]
    assert m["any_name_after"] > 0.8, "the copy ends, the talk of names does not"
    assert next(iter(m["writers"])) == "L0H0" and m["writers_look_at_the_token_before"] > 0.9
    parts = m["score"]
    assert parts["title x name-after-title"] > max(abs(v) for v in list(parts.values())[1:])


def test_two_word_names_need_more_than_one_interaction(studies: dict) -> None:
    d = studies["two_words"].document()
    first, two = d["numbers"]["energy_of_rank_1_to_4"][:2]
    assert first < 0.9 and two > first + 0.08, "rank 2 at least"
    assert d["shown"] == "partly", "the intervention is no stronger than its controls"


def test_antonyms_hang_on_the_cue_in_block_0(studies: dict) -> None:
    d = studies["antonyms"].document()
    assert d["shown"] == "no" and abs(d["effect"]) < 0.05
    antonym, synonym, _ = d["numbers"]["antonym_synonym_word"]["the cue hidden from block 0"]
    assert antonym < 0.1 and synonym > 0.9
    hidden = d["numbers"]["cue_hidden"]
    assert hidden["effect"] > hidden["other_tokens_hidden"] + 0.5


def test_right_options_are_marked_and_a_is_the_fallback(studies: dict) -> None:
    d = studies["choice"].document()
    assert d["shown"] == "partly" and d["effect"] > d["controls_effect"] + 0.2
    correct, false, _ = d["numbers"]["scores"].values()
    assert correct > 15 and false < -10
    down, up = d["numbers"]["right_letter_after_down"], d["numbers"]["letter_after_up_on_it"]
    assert down["A"] > 0.9 and down["B"] < 0.3 and down["C"] < 0.3
    assert up["A"] > 0.9 and up["B"] < 0.3 and up["C"] < 0.3
    attention = d["numbers"]["attention_of_the_largest_head"]
    assert attention["on the other, injected"] > attention["on the other, before"] + 0.4


def test_comparing_heads_move_and_the_answer_does_not(studies: dict) -> None:
    d = studies["correctness"].document()
    gain = d["numbers"]["attention_on_object_right_minus_wrong"]
    assert gain[d["numbers"]["concordance_head"]["head"]] > 0.1
    assert d["effect"] < 0.3, "the swap flips the answer on few prompts at most"
    hidden = d["numbers"]["object_hidden_from_block_0"]
    assert hidden["yes"] > 0.6 and abs(hidden["no"]) < 0.2
    assert all(-1 <= x <= 1 for x in d["numbers"]["concordance_index"].values())


def test_there_is_no_hydra_here(studies: dict) -> None:
    d = studies["hydra"].document()
    assert d["shown"] == "no" and d["effect"] <= 0
    live = d["numbers"]["probability_by_heads_live"]
    assert live[0] > 0.9 and live[-1] < 0.3


def test_the_report_stands_alone(studies: dict, tmp_path: Path) -> None:
    run = importlib.import_module("run")
    common = importlib.import_module("common")
    page = run.report(list(studies.values()), 1.0)
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert all(link.startswith("#") for link in links), "nothing else is fetched"
    targets = re.findall(r'\bid="([^"]+)"', page)
    assert len(targets) == len(set(targets))
    assert {link[1:] for link in links} <= set(targets)
    for study in studies.values():
        common.write(study, tmp_path)
        stored = json.loads((tmp_path / f"{study.name}.json").read_text())
        assert stored["name"] == study.name and len(stored["cases"]) == PROMPTS
        assert (tmp_path / f"{study.name}-1.svg").read_text().startswith("<svg")


def test_verdicts_follow_the_numbers(studies: dict) -> None:
    """Given numbers that contradict the story, a verdict does not tell it."""
    verdicts = importlib.import_module("verdicts")
    for name, study in studies.items():
        d, m = study.document(), study.numbers
        assert getattr(verdicts, name)(d, m) == (study.shown, study.verdict)
    d, m = studies["induction"].document(), studies["induction"].numbers
    shown, words = verdicts.induction(d | {"controls_effect": d["effect"]}, m)
    assert shown == "no"
    shown, words = verdicts.induction(d, m | {"any_name_after": 0.1})
    assert shown == "partly" and "more than the copy ends" in words
    shown, words = verdicts.induction(d | {"head_controls_effect": 0.0}, m)
    assert "the choice of heads matters." in words
    shown, words = verdicts.induction(d, m | {"writers_look_at_the_token_before": 0.1})
    assert shown == "partly" and "no previous-token head" in words

    d, m = studies["two_words"].document(), studies["two_words"].numbers
    sizes = {k: 9.0 if k in m["own"] else 1.0 for k in m["size_of_terms"]}
    strong = d | {"effect": 0.9, "controls_effect": 0.1}
    shown, words = verdicts.two_words(strong, m | {"size_of_terms": sizes})
    assert shown == "yes" and "crossed ones are weaker" in words
    sizes = {k: 10 - v for k, v in sizes.items()}
    flat = {"size_of_terms": sizes, "energy_of_rank_1_to_4": [0.99, 1.0, 1.0, 1.0]}
    shown, words = verdicts.two_words(d | {"effect": 0.1}, m | flat)
    assert shown == "no" and "not weaker" in words and "nearly of rank 1" in words

    d, m = studies["antonyms"].document(), studies["antonyms"].numbers
    shown, words = verdicts.antonyms(d | {"effect": 0.9}, m)
    assert shown == "yes" and "Not by" not in words
    weak = m | {"cue_hidden": {"effect": 0.1, "other_tokens_hidden": 0.1, "other_tokens": 9}}
    assert "the choice is made" not in verdicts.antonyms(d, weak)[1]

    d, m = studies["choice"].document(), studies["choice"].numbers
    shown, words = verdicts.choice(d, m | {"letter_after_up_on_it": dict.fromkeys("ABC", 0.9)})
    assert shown == "yes" and "A and B and C can be steered to" in words
    assert (
        "falls back"
        not in verdicts.choice(d, m | {"right_letter_after_down": dict.fromkeys("ABC", 0.1)})[1]
    )

    d, m = studies["correctness"].document(), studies["correctness"].numbers
    heads = {
        "concordance_head": m["concordance_head"] | {"gain": 0.5, "index": 0.8},
        "discordance_head": m["discordance_head"] | {"gain": -0.5, "index": -0.8},
        "value_by_object": {"right": 5.0, "wrong": -5.0},
        "swap_moves_attention": -0.5,
    }
    flips = d | {"effect": 0.9, "controls_effect": 0.0}
    shown, words = verdicts.correctness(flips, m | heads)
    assert shown == "yes" and "and flips the answer" in words
    none = {key: m[key] | {"gain": 0.0, "index": 0.0} for key in list(heads)[:2]}
    none |= {"value_by_object": {"right": 1.0, "wrong": 1.0}, "swap_moves_attention": 0.0}
    shown, words = verdicts.correctness(d, m | none)
    assert shown == "no" and "no such heads" in words

    d, m = studies["hydra"].document(), studies["hydra"].numbers
    need = {"live": 6.0, "patterns frozen": 2.0, "live, random order": 6.0}
    assert verdicts.hydra(d | {"effect": 4.0}, m | {"heads_needed": need})[0] == "yes"
    need |= {"patterns frozen": 4.0}
    shown, words = verdicts.hydra(d | {"effect": 2.0}, m | {"heads_needed": need})
    assert shown == "partly" and "the hydra effect" not in words
