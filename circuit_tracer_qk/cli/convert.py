"""The command ``convert``: dictionaries of any layout, written in the native format."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import circuit_tracer_qk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import remove_temporaries
from circuit_tracer_qk.cli.arguments import SET_FORMS
from circuit_tracer_qk.cli.output import show, silence_stdout

HELP = "write dictionaries in the native format"
DESCRIPTION = (
    "Read residual dictionaries of any layout and write them in the native format, with their "
    "labels and examples."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two places of ``convert``."""
    parser.add_argument("source", help=f"the dictionaries: {SET_FORMS}")
    parser.add_argument("destination", help="the folder to write, which must not exist")


def run(args: argparse.Namespace) -> None:
    """Do it."""
    remove_temporaries(Path(args.destination).expanduser().parent)
    if os.path.exists(args.destination):
        raise UserError(f"{args.destination} exists already: name a new folder.")

    from circuit_tracer_qk.dictionaries.native_writer import write_dictionaries

    with silence_stdout():
        dictionaries = circuit_tracer_qk.load_dictionaries(args.source)
        folder = write_dictionaries(dictionaries, args.destination)
    at = ", ".join(map(str, dictionaries.checkpoints))
    show([f"{dictionaries.kind} {dictionaries.scan} at checkpoints {at} written to {folder}"])
