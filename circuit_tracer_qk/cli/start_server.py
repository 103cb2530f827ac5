"""The command ``start-server``: a folder of graph files on the page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import LISTING
from circuit_tracer_qk.cli import arguments
from circuit_tracer_qk.cli.serving import serve
from circuit_tracer_qk.host.cli import command_parser

HELP = "serve a folder of graph files"
DESCRIPTION = "Serve a folder of graph files until interrupted."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """circuit-tracer's own flags, and those of every server here."""
    parser._add_container_actions(command_parser("start-server"))
    arguments.add_serving(parser)


def run(args: argparse.Namespace) -> None:
    """Do it."""
    if not os.path.isfile(Path(args.graph_file_dir) / LISTING):
        raise UserError(
            f"{args.graph_file_dir} holds no graph files (no {LISTING}): write some with "
            "`attribute --slug NAME --graph_file_dir DIR`."
        )
    serve(args, args.graph_file_dir, args.port)
