"""The command ``steer``: its arguments, and the order in which they are used."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import write_together
from circuit_tracer_qk.base.rules import read_number
from circuit_tracer_qk.cli import arguments
from circuit_tracer_qk.cli.loading import load_prompt_and_model
from circuit_tracer_qk.cli.output import show, silence_stdout
from circuit_tracer_qk.steering.options import OPTIONS

if TYPE_CHECKING:
    from circuit_tracer_qk.steering.parse import HeadChoice
    from circuit_tracer_qk.steering.results import Generation, SteeredRun, Swept

HELP = "change features inside some heads' QK circuits and see what the model says"
DESCRIPTION = (
    "Scale, remove or inject features inside the QK circuit of chosen heads (or scale the heads' "
    "outputs) and see what the model says then, beside controls. Without model and dictionaries: "
    "the bundled miniature."
)
EPILOG = (
    'example: circuit-tracer-qk steer --edit "side=key heads=3@q14:k6 features=L0/61,L0/177 '
    'positions=6 factor=0" --norms frozen --token " Sally"'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``steer``, but for ``--verbose``."""
    add = parser.add_argument
    arguments.add_model(parser)
    arguments.add_dictionaries(parser)
    arguments.add_prompt(parser)
    add(
        "--edit",
        action="append",
        default=[],
        metavar="EDIT",
        help="side=query|key heads=L1H2,L1H7 features=L0/61,L0/177 (or checkpoint=1 "
        "features=61,177) [positions=6] and factor=0 or inject=ACTIVATION; without a side and "
        "features, the heads' outputs are scaled. heads=3@q14:k6 takes the 3 heads (or 80%%) that "
        "carried most from 6 to 14. Repeatable",
    )
    add("--edits", metavar="FILE", help="edits from a JSON file: a list, or another run's --json")
    add("--token", action="append", default=[], help="a next token to report; repeatable")
    for option in OPTIONS:
        how: dict[str, Any] = {"choices": tuple(option.values)} if option.values else {"type": int}
        help = f"{option.help} (default: {option.default})"
        add(f"--{option.name}", default=option.default, help=help, **how)
    add(
        "--sweep",
        metavar="F,F,...",
        help="also at these factors, such as 1,0.5,0,-1, each in place of every edit's own; 1 is "
        "the clean run (what an edit injects is multiplied with 1 - factor)",
    )
    add("--generate", type=int, metavar="N", help="also continue the prompt by N tokens")
    add("--json", metavar="FILE", help="write the run as JSON; - for standard output")


def run(args: argparse.Namespace) -> None:
    """Do it."""
    factors = _check(args)
    prompt, model = load_prompt_and_model(args)
    with silence_stdout():
        lines = _steer(args, factors, prompt, model)
    show(lines)


def _check(args: argparse.Namespace) -> list[float]:
    """Refuse what needs no model to be refused; the factors of ``--sweep``."""
    from circuit_tracer_qk.steering.parse import EXAMPLE, parse_edit, read_edits

    if not args.edit and args.edits is None:
        raise UserError(f'--edit is missing: give one such as --edit "{EXAMPLE}".')
    for text in args.edit:
        parse_edit(text, lambda choice: [(0, 0)])
    if args.edits is not None:
        read_edits(args.edits)
    for option in OPTIONS:
        option.checked(getattr(args, option.name), f"--{option.name}")
    factors = [] if args.sweep is None else _factors(args.sweep)
    if args.json not in (None, "-"):
        arguments.check_file(Path(args.json), "--json")
    return factors


def _factors(text: str) -> list[float]:
    try:
        factors = [read_number(x.strip()) for x in text.split(",") if x.strip()]
    except ValueError:
        factors = []
    if not factors or not all(abs(x) < 1e6 for x in factors):
        raise UserError(f"--sweep is {text!r}: give factors such as 1,0.5,0,-1.")
    return factors


def _steer(args: argparse.Namespace, factors: list[float], prompt: str, model: Any) -> list[str]:
    """Run the edits on a loaded model; the lines to show."""
    from circuit_tracer_qk.host import graph as host
    from circuit_tracer_qk.steering.parse import parse_edit, read_edits
    from circuit_tracer_qk.steering.steer import Session

    session = Session(model, prompt)
    choose = _chooser(prompt, model)
    edits = [parse_edit(text, choose) for text in args.edit]
    edits += [] if args.edits is None else read_edits(args.edits)
    options: dict[str, Any] = {option.name: getattr(args, option.name) for option in OPTIONS}
    tokens = [host.token_id(_token(t), model.tokenizer, model.cfg.d_vocab) for t in args.token]
    run = session.steer(edits, verbose=args.verbose, **options)
    swept = session.sweep(edits, factors, **options) if factors else None
    continued = None
    if args.generate is not None:
        fewer = options | {"controls": min(args.controls, 3)}
        continued = session.generate(edits, args.generate, **fewer)
    if args.json is not None:
        document = _document(run, swept, continued, tokens) | {
            "model": str(model.cfg.model_name),
            "dictionaries": model.scan,
            "prompt": "".join(session.token_strings),
            "seed": args.seed,
        }
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
        if args.json == "-":
            return text.splitlines()
        write_together({Path(args.json): text.encode()})
    lines = _lines(run, swept, continued, tokens, model.dictionaries.label)
    return lines if args.json is None else [*lines, "", f"written to {args.json}"]


def _chooser(prompt: Any, model: Any) -> Callable[[HeadChoice], list[tuple[int, int]]]:
    """Finds heads in the prompt's graph, which is made when first asked for."""
    import circuit_tracer_qk as ctqk

    @cache
    def graph() -> Any:
        return ctqk.attribute(prompt, model)

    def choose(choice: HeadChoice) -> list[tuple[int, int]]:
        heads = ctqk.select_heads(graph(), **choice._asdict())
        if not heads:
            raise UserError("no head carried anything between these positions.")
        return heads

    return choose


def _document(
    run: SteeredRun, swept: Swept | None, continued: Generation | None, tokens: list[int]
) -> dict[str, Any]:
    from circuit_tracer_qk.steering.to_json import run_document

    runs = [run.clean, run, *(swept.runs if swept else ())]
    # the same tokens at every factor
    asked = tokens or list(dict.fromkeys(run.top(1)[0][1] for run in runs))
    document = run_document(run, asked)
    if swept:
        document["sweep"] = [
            {"factor": f, **{k: run_document(r, asked)[k] for k in ("tokens", "steered")}}
            for f, r in zip(swept.factors, swept.runs, strict=True)
        ]
    if continued is not None:
        document["continued"] = {
            "clean": continued.clean.text,
            "steered": continued.steered.text,
            "controls": [c.text for c in continued.controls],
            "head_controls": [c.text for c in continued.head_controls],
            "notes": list(continued.notes),
        }
    return document


def _lines(
    run: SteeredRun,
    swept: Swept | None,
    continued: Generation | None,
    tokens: list[int],
    label: Any,
) -> list[str]:
    from circuit_tracer_qk.cli import steering_text
    from circuit_tracer_qk.cli.text import paragraphs, prompt_lines

    leading = [i for r in (run.clean, run) for _, i, _ in r.top(3)]
    shown = list(dict.fromkeys([*tokens, *leading]))
    sections = [
        prompt_lines(run.token_strings),
        steering_text.change_lines(run, label),
        steering_text.effect_lines(run, shown),
        steering_text.attention_lines(run),
    ]
    if swept:
        sections.append(steering_text.sweep_lines(swept, shown[0]))
    if continued is not None:
        sections.append(steering_text.generation_lines(continued))
    return paragraphs(*sections)


def _token(text: str) -> str | int:
    """A token as it was typed: a number in angle brackets is an id."""
    match = re.fullmatch("<([0-9]{1,9})>", text)
    return int(match[1]) if match else text
