"""Verdicts in words, each sentence from a condition on the numbers that it names.

A function of a study's summary and numbers alone: given other numbers it says other things.
``stands_out`` asks that an effect is large and that its controls' is much smaller.
"""

from __future__ import annotations

from typing import Any

LARGE = 0.3
"""Of an effect: this much of a probability."""

Verdict = tuple[str, str]
"""("yes", "partly" or "no", words)."""


def stands_out(d: dict[str, Any]) -> bool:
    """Whether the intervention does much more than the same on other features."""
    return d["effect"] > LARGE and d["effect"] > 2 * max(d["controls_effect"], 0.0)


def induction(d: dict[str, Any], m: dict[str, Any]) -> Verdict:
    """The tag features carry the copy, in features more than in heads, and were written before."""
    curve, controls = m["probability_by_factor"], m["controls_by_factor"]
    zero = m["factors"].index(0.0)
    parts, others = m["score"], d["head_controls_effect"]
    first, share = next(iter(m["writers"].items()))
    main = parts["title x name-after-title"]
    largest = main > max(abs(v) for k, v in parts.items() if k != "title x name-after-title")
    ends, names = stands_out(d), m["any_name_after"] > 0.7
    back = m["writers_look_at_the_token_before"]
    says = [
        f"Removing the two features takes the name from {curve[0]:.3f} to {curve[zero]:.3f}; "
        f"removing two other features of that token leaves {controls[zero]:.3f}.",
        f"{m['any_name_after']:.2f} of the probability is on names then, so "
        + ("the copy ends and not the rest." if names else "more than the copy ends."),
        f"Of the largest head's score title x name-after-title makes {main:+.1f}"
        + (", more than any other part." if largest else ", and not the largest part."),
        f"The tags were written by {first} ({share:.0%} of what reached them from other tokens), "
        f"whose attention on the token before is {back:.2f}"
        + (": a previous-token head." if back > 0.7 else ", so it is no previous-token head."),
    ]
    if back > 0.7:
        always = m["and_so_at_every_position"]
        generic = (
            ": it looks back at anything."
            if always > 0.9
            else ": titles before names are what it looks for."
            if always < 0.4
            else ": at names after titles more than elsewhere, but not there alone."
        )
        says.append(f"Over all positions it pays {always:.2f} to the token before{generic}")
    if others is not None:
        says.append(
            f"The same edits in three other heads of the layer take {others:.2f}: "
            + (
                "the copy is spread over its heads, and the choice of heads matters less than "
                "that of features."
                if others > d["controls_effect"] + 0.1
                else "the choice of heads matters."
            )
        )
    shown = "yes" if ends and names and largest and back > 0.7 else "partly" if ends else "no"
    return shown, " ".join(says)


def two_words(d: dict[str, Any], m: dict[str, Any]) -> Verdict:
    """Rank 2, weak cross terms, and an intervention that stands out."""
    own = [v for k, v in m["size_of_terms"].items() if k in m["own"]]
    crossed = [v for k, v in m["size_of_terms"].items() if k not in m["own"]]
    one, two, _, four = m["energy_of_rank_1_to_4"]
    rank, weak, hangs = one < 0.9, min(own) > max(crossed), stands_out(d)
    lost = m["effect_alone_and_together"]
    terms = ", ".join(f"{k} {v:.1f}" for k, v in m["size_of_terms"].items())
    says = [
        f"One singular value holds {one:.0%} of the squared terms of feature pairs, two {two:.0%}, "
        f"four {four:.0%}: "
        + ("the table has rank 2 at least." if rank else "the table is nearly of rank 1."),
        f"Mean sizes of the terms: {terms}; "
        + ("the crossed ones are weaker." if weak else "the crossed ones are not weaker."),
        f"Without after-first features the second word loses {lost['after-first x 0']:.2f} of its "
        f"probability, without after-title features {lost['after-title x 0']:.2f}, without both "
        f"{lost['after-both x 0']:.2f} (scaled by -1: {lost['after-first x -1']:.2f}, "
        f"{lost['after-title x -1']:.2f}, {lost['after-both x -1']:.2f}); without as many others "
        f"of the same token {d['controls_effect']:.2f}: "
        + (
            "these two groups carry the copy."
            if hangs
            else "the copy does not hang on these two groups more than on other features."
        ),
    ]
    held = sum((rank, weak, hangs))
    return ("yes" if held == 3 else "partly" if held else "no"), " ".join(says)


def antonyms(d: dict[str, Any], m: dict[str, Any]) -> Verdict:
    """Query-side "opposite" features, key-side tags, and the cue in block 0."""
    said, cue = m["antonym_synonym_word"], m["cue_hidden"]
    keyed = said['key side, "its opposite is asked" features x -1'][0]
    antonym, synonym, _ = said["the cue hidden from block 0"]
    route = stands_out(d)
    decides = cue["effect"] > LARGE and cue["effect"] > 2 * cue["other_tokens_hidden"]
    says = [
        "The paper's route." if route else "Not by the paper's route.",
        f'Query-side "opposite" features scaled by -1 take {d["effect"]:.3f} from the antonym '
        f"(controls {d['controls_effect']:.3f}), key-side ones leave it at {keyed:.3f}.",
        f"With the cue (opposite, antonym) hidden as a key in block 0 the antonym is at "
        f"{antonym:.3f} and the synonym at {synonym:.3f}; any other token hidden takes "
        f"{cue['other_tokens_hidden']:.3f} on average.",
    ]
    if decides and synonym > 0.5:
        says.append(
            "So the choice is made by what block 0 sees, and the model says the synonym unless it "
            "sees the cue."
        )
    return ("yes" if route else "no"), " ".join(says)


def choice(d: dict[str, Any], m: dict[str, Any]) -> Verdict:
    """Marks on right and wrong options, and which letters can be steered to."""
    correct, false, bias = m["scores"].values()
    down, up = m["right_letter_after_down"], m["letter_after_up_on_it"]
    look = m["attention_of_the_largest_head"]
    before, after = look["on the other, before"], look["on the other, injected"]
    marked, moved = correct > 0 > false, stands_out(d)
    reached = [x for x, p in up.items() if p > 0.5]
    fallback = [x for x, p in down.items() if p > 0.5]
    says = [
        f'"Correct" features add {correct:+.1f} to the score of the right option in the largest '
        f'head ({bias:+.1f} of it with the query bias), "false" ones {false:+.1f} to that of a '
        "wrong one" + (", as the paper saw." if marked else ", unlike what the paper saw."),
        f"Scaling the former by -1 takes {d['effect']:.2f} from the right letter (other features "
        f"{d['controls_effect']:.2f}); what is left of it is "
        + ", ".join(f"{x} {p:.2f}" for x, p in down.items())
        + "."
        + (f" The model falls back on {fallback[0]}." if len(fallback) == 1 else ""),
        "With the verdict moved to another option's key, the model says that letter with "
        + ", ".join(f"{x} {p:.2f}" for x, p in up.items())
        + f": {' and '.join(reached) or 'none'} can be steered to.",
        f"The largest head's attention on that option goes from {before:.2f} to {after:.2f}.",
    ]
    if after > before + 0.3 and len(reached) < len(up):
        says.append(
            "Values are not edited, so what the heads bring from there may still say that the "
            "option is wrong; that was not tested."
        )
    whole = marked and moved and len(reached) == len(up)
    return ("yes" if whole else "partly" if marked or moved else "no"), " ".join(says)


def correctness(d: dict[str, Any], m: dict[str, Any]) -> Verdict:
    """Heads that compare, their eigenvalues, the swap, and what block 0 sees."""
    agree, differ = m["concordance_head"], m["discordance_head"]
    compares = agree["gain"] > 0.1 and differ["gain"] < -0.1
    skewed = agree["index"] > 0.1 and differ["index"] < -0.1
    right, wrong = m["value_by_object"]["right"], m["value_by_object"]["wrong"]
    sign = right > 0 > wrong
    flips, moved = stands_out(d), m["swap_moves_attention"] < -0.2
    seen = m["object_hidden_from_block_0"]
    says = [
        f"Chosen on other prompts, {agree['head']} looks at the object {agree['gain']:+.2f} more "
        f"when the statement is right, {differ['head']} {differ['gain']:+.2f}: "
        + (
            "a concordance and a discordance head."
            if compares
            else "a concordance head, and no discordance head to speak of."
            if agree["gain"] > 0.1
            else "no such heads to speak of."
        ),
        f"Their eigenvalue indices are {agree['index']:+.2f} (number {agree['rank']} of "
        f"{m['heads']}) and {differ['index']:+.2f}"
        + (", skewed as the paper saw." if skewed else ", not skewed as the paper saw."),
        f"Value x object terms in {agree['head']} are {right:+.1f} for right values and "
        f"{wrong:+.1f} for wrong ones"
        + (", of opposite sign." if sign else ", not of opposite sign."),
        f"The paper's swap takes {d['effect']:.3f} from Yes (controls {d['controls_effect']:.3f})"
        + (" and flips the answer" if flips else " and does not flip the answer")
        + f"; {agree['head']}'s attention on the object changes by "
        f"{m['swap_moves_attention']:+.2f}.",
        f"With the object hidden as a key in block 0, Yes loses {seen['yes']:.2f} (other tokens "
        f"hidden: {seen['other_tokens']:.2f}) and No {seen['no']:.2f}.",
    ]
    if seen["yes"] > LARGE and seen["yes"] > 2 * seen["other_tokens"] and seen["no"] < 0.1:
        says.append(
            "So what block 0 sees decides, and No is what the model says unless value and object "
            "agree, as in the paper's picture of more things having to go right for Yes."
        )
    held = sum((compares, skewed, sign, flips, moved))
    return ("yes" if held == 5 else "partly" if held else "no"), " ".join(says)


def hydra(d: dict[str, Any], m: dict[str, Any]) -> Verdict:
    """Heads needed, live against frozen."""
    need = m["heads_needed"]
    fewer, more = m["prompts_where_frozen_needs_fewer"], m["prompts_where_frozen_needs_more"]
    says = [
        f"Half of the effect needs {need['live']:.1f} heads live and "
        f"{need['patterns frozen']:.1f} with the other heads' patterns frozen "
        f"({need['live, random order']:.1f} live in random order); frozen needs fewer on "
        f"{fewer:.0%} of the prompts and more on {more:.0%}."
    ]
    if need["patterns frozen"] < 0.5 * need["live"]:
        return "yes", " ".join([*says, "That is the hydra effect."])
    if d["effect"] > 0.5:
        return "partly", " ".join([*says, "Others take over, less than the paper saw."])
    says.append("That is no hydra effect: nothing takes over in the miniature.")
    if more > fewer:
        says.append(
            "Live heads seem to follow the steered ones down, and frozen ones go on attending to "
            "the name (why was not tested)."
        )
    return "no", " ".join(says)
