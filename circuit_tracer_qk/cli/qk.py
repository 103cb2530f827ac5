"""The command ``qk``: one head's table between two positions."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

import circuit_tracer_qk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.cli import arguments
from circuit_tracer_qk.cli.loading import check_graph, explain_saved_graph, load_prompt_and_model
from circuit_tracer_qk.cli.output import show, silence_stdout

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.qk import Scores

HELP = "why one head looked from one position at another: one table"
DESCRIPTION = (
    "Take one head's attention score apart into named terms, from a prompt or from a saved graph. "
    "Without model and dictionaries: the bundled miniature."
)
EPILOG = f"example: {arguments.PROGRAM} qk graph.pt --head L3H5:q14:k6"
HEAD = re.compile(
    r"(?:L([0-9]{1,9})H)?([0-9]{1,9})(?::q(-?[0-9]{1,9}))?(?::k(-?[0-9]{1,9}))?",
    re.ASCII | re.IGNORECASE,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``qk``."""
    add = parser.add_argument
    add("graph", nargs="?", help="a saved graph (.pt), in place of -m, -d and -p")
    arguments.add_trust(parser)
    arguments.add_transcoders(parser)
    arguments.add_model(parser)
    arguments.add_dictionaries(parser)
    arguments.add_prompt(parser)
    add("--layer", type=int, help="the block, from 0")
    add("--head", help="the head, from 0; L3H5 names the layer too, L3H5:q14:k6 everything")
    add("--query", type=int, help="query position (default: the last; -1 counts from the end)")
    add("--key", type=int, help="key position (default: the most attended one but the first)")
    add("--top", type=int, default=20, help="rows of each list (default: 20)")


def run(args: argparse.Namespace) -> None:
    """Do it."""
    layer, head, query, key = _selection(args)
    if args.transcoder_set is not None and args.graph is None:
        raise UserError("-t explains a saved graph: give its .pt, which `attribute -t -o` writes.")
    if args.graph is not None:
        model = args.transcoder_set is None and (args.model or args.dtype != "float32")
        if model or args.dictionaries or args.prompt is not None:
            raise UserError(
                "a saved graph has its own model and prompt: leave out -m, -d and -p, and --dtype."
            )
        check_graph(Path(args.graph))
    scores, tokens = _scores_of_prompt(args, layer) if args.graph is None else _saved_scores(args)

    from circuit_tracer_qk.cli import text

    n = len(tokens)
    query = n - 1 if query is None else _position("query", query, n)
    row = scores.row(layer, head, query)
    note = ""
    if key is None:
        key = 1 + int(row.pattern[1:].argmax()) if query else 0
        note = "   (most attended key but the first)" if query else ""
    else:
        key = _position("key", key, n)
    table = scores.table(layer, head, query, key)
    marked = text.prompt_lines(tokens, {query: "query", key: "key"} if key != query else {})
    foot = text.FOOTNOTE if args.transcoder_set is None else text.TRANSCODER_FOOTNOTE
    show(text.paragraphs(marked, text.qk_lines(table, row, tokens, args.top, note), foot))


def _selection(args: argparse.Namespace) -> tuple[int, int, int | None, int | None]:
    """Layer, head, query and key, however they were written."""
    match = HEAD.fullmatch(args.head or "")
    if match is None:
        problem = "is missing" if args.head is None else f"{args.head!r} is not understood"
        raise UserError(f"--head {problem}: give --layer 3 --head 5, or --head L3H5.")
    values: dict[str, int | None] = {}
    for name, text in zip(("layer", "head", "query", "key"), match.groups(), strict=True):
        named = None if text is None else int(text)
        given = None if name == "head" else getattr(args, name)
        if named is not None and given is not None and named != given:
            raise UserError(f"--head {args.head} and --{name} {given} disagree: give one of them.")
        values[name] = given if named is None else named
    layer, head = values["layer"], values["head"]
    if layer is None or head is None:
        raise UserError("--layer is missing: give --layer 3 --head 5, or --head L3H5.")
    return layer, head, values["query"], values["key"]


def _position(name: str, position: int, n: int) -> int:
    """A position counted from the start."""
    if not -n <= position < n:
        raise UserError(
            f"--{name} {position} is out of range: the prompt has {n} tokens, positions 0 to "
            f"{n - 1} (or -{n} to -1 from the end)."
        )
    return position % n


def _saved_scores(args: argparse.Namespace) -> tuple[Scores, list[str]]:
    """QK attributions of a saved graph, and its tokens."""
    if args.transcoder_set is None:
        graph = circuit_tracer_qk.load_graph(args.graph, trust=args.trust)
    else:
        graph = explain_saved_graph(args, Path(args.graph))
    return graph.scores, graph.token_strings


def _scores_of_prompt(args: argparse.Namespace, layer: int) -> tuple[Scores, list[str]]:
    """QK attributions of a prompt, without its graph, and its tokens."""
    prompt, model = load_prompt_and_model(args, [layer])

    from circuit_tracer_qk.host import graph as host

    with silence_stdout():
        scores = circuit_tracer_qk.explain(prompt, model)
    text_of = host.token_texts(model.tokenizer, model.cfg.d_vocab)
    return scores, list(map(text_of, scores.heads.run.tokens))
