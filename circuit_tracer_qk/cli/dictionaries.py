"""The command ``dictionaries``: the sets that are known by name."""

from __future__ import annotations

import argparse

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.cli.output import show

HELP = "list the dictionary sets that are known by name"
DESCRIPTION = (
    "List the dictionary sets that -d knows by name: those that cover every layer of a model's "
    "residual stream, and crosscoders. Nothing is fetched."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of ``dictionaries``."""
    parser.add_argument("words", nargs="*", help="show only sets whose line has all these words")


def run(args: argparse.Namespace) -> None:
    """Do it."""
    from circuit_tracer_qk.dictionaries import catalogue

    lines = catalogue.table(args.words)
    if len(lines) < 2:
        raise UserError(
            f"no set of the list has {' and '.join(args.words)}: leave the words out to see all."
        )
    show(lines)
