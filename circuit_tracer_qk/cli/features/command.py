"""The command ``features``: its arguments, the texts it reads, and the order of work."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import read_file
from circuit_tracer_qk.cli import arguments
from circuit_tracer_qk.cli.loading import load_model
from circuit_tracer_qk.cli.output import show, silence_stdout

TEXTS_BYTES = 2**32  # how long a file of texts may be
HELP = "describe features by where they fire in a text file: examples and labels"
DESCRIPTION = (
    "Describe the features of a set of dictionaries by where they fire in a corpus: features.zip "
    "and labels.json, which the page and the tables show where they lie in the dictionaries' folder. "
    "An interrupted run goes on where it was."
)
EPILOG = "example: circuit-tracer-qk features -m MODEL -d FOLDER --texts corpus.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``features``."""
    add = parser.add_argument
    arguments.add_model(parser)
    arguments.add_dictionaries(parser, required=True)
    add(
        "--texts",
        required=True,
        metavar="FILE",
        help=".txt (texts between blank lines, else one a line), .json (a list of strings) or "
        '.jsonl (strings or {"text": ...})',
    )
    add(
        "-o",
        "--output",
        metavar="FOLDER",
        help="default: the dictionaries' own folder, where they are read; copy them there from FOLDER",
    )
    add("--examples", type=int, default=5, help="windows for each feature (default: 5)")
    add("--context", type=int, default=64, help="tokens of a text at a time (default: 64)")
    add("--batch", type=int, default=16, help="how many of these are run together (default: 16)")
    add("--max-texts", type=int, metavar="N", help="read only the first N texts")
    add(
        "--checkpoints",
        metavar="C,C",
        help="describe only these dictionaries (hook_resid_post of layer l is l + 1); with --force "
        "the descriptions of others stay",
    )
    add(
        "--no-logits",
        dest="logits",
        action="store_false",
        help="leave out promoted and suppressed tokens",
    )
    add("--force", action="store_true", help="replace descriptions that are there")


def run(args: argparse.Namespace) -> None:
    """Do it.

    Raises:
        UserError: the texts cannot be read, or what :func:`build_features` refuses.
    """
    checkpoints = _numbers(args.checkpoints)
    texts = read_texts(Path(args.texts).expanduser())
    texts = texts[: args.max_texts]

    from circuit_tracer_qk.cli.features.examples import build_features, check_sizes, check_target

    check_sizes(args.examples, args.context, args.batch)
    if args.output is not None:
        args.output = check_target(args.output, args.force)
    model = load_model(args)
    names = ("examples", "context", "batch", "logits", "force")
    options = {name: getattr(args, name) for name in names}
    with silence_stdout():
        built = build_features(model, texts, args.output, checkpoints=checkpoints, **options)
    fired = (
        f"{built.n_alive} of {built.n_features} features fired in {built.n_positions} tokens of "
    )
    written = f"{len(texts)} texts; features.zip and labels.json written to {built.folder}"
    show([fired + written])


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\s*-?[0-9]{1,9}\s*(,\s*-?[0-9]{1,9}\s*)*", text):
        raise UserError(f"--checkpoints is {text!r}: give whole numbers with commas, as in 1,2,3.")
    return [int(part) for part in text.split(",")]


def read_texts(path: Path) -> list[str]:
    """The texts of a ``.txt``, ``.json`` or ``.jsonl`` file.

    Raises:
        UserError: naming the file, and the line that is wrong.
    """
    try:
        content = read_file(path, TEXTS_BYTES, pipes=True).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8.") from error
    kind = path.suffix.lower()
    if kind == ".json":
        items = _parsed(path, content)
        if not isinstance(items, list):
            raise UserError(f"{path} should be a list of strings.")
        texts = [_text(path, f"item {i}", item) for i, item in enumerate(items, 1)]
    elif kind == ".jsonl":
        texts = [
            _text(path, f"line {i}", _parsed(path, line, f"line {i}"))
            for i, line in enumerate(content.split("\n"), 1)  # U+2028 may stand in a string
            if line.strip()
        ]
    else:
        blocks = re.split(r"\n[^\S\n]*\n", content.strip())
        texts = blocks if len(blocks) > 1 else content.split("\n")
        texts = [text.strip("\n") for text in texts]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(f"{path} has no text in it.")
    return texts


def _parsed(path: Path, text: str, where: str = "it") -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {where} is not valid JSON ({error}).") from error


def _text(path: Path, where: str, item: object) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise UserError(f'{path}: {where} should be a string or {{"text": ...}}.')
    return text
