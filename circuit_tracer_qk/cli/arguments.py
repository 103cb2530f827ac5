"""The arguments that several commands share, and the checks of them that need no model."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import write_target
from circuit_tracer_qk.base.selection import SELECTIONS
from circuit_tracer_qk.host.cli import DTYPES

PROGRAM = "circuit-tracer-qk"
DEMO_PROMPT = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
DEMO_PORT = 8041
DTYPE_NAMES = ("float32", "float64", "bfloat16", "float16", *DTYPES)
SET_FORMS = (
    "a folder, a hub id org/name[/folder][@revision], or a name of `circuit-tracer-qk dictionaries`"
)

# Arguments ----------------------------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser) -> None:
    """``-m``, and ``--dtype``."""
    parser.add_argument(
        "-m",
        "--model",
        help="model folder, hub id or TransformerLens name (default: the one that the dictionaries "
        "or transcoders name)",
    )
    add_dtype(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, which every command that loads a model takes."""
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPE_NAMES,
        default="float32",
        metavar="DTYPE",
        help=f"of the weights: {', '.join(DTYPE_NAMES)} (default: float32)",
    )


def dtype_name(name: str) -> str:
    """torch's name of a dtype, whose short names circuit-tracer takes too."""
    return DTYPES.get(name, name)


def add_dictionaries(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``-d``."""
    parser.add_argument(
        "-d",
        "--dictionaries",
        metavar="REF",
        required=required,
        help=f"residual SAEs or a weakly causal crosscoder: {SET_FORMS}",
    )


def add_transcoders(parser: argparse.ArgumentParser) -> None:
    """``-t``."""
    parser.add_argument(
        "-t",
        "--transcoder_set",
        help="transcoders or a CLT: a hub id org/name[@revision] or a local folder",
    )


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """``-p``."""
    parser.add_argument(
        "-p", "--prompt", help=f"the prompt (default on the miniature: {DEMO_PROMPT!r})"
    )


def add_select(parser: argparse.ArgumentParser) -> None:
    """``--select``."""
    parser.add_argument(
        "--select",
        choices=SELECTIONS,
        help="with -d, how nodes are chosen: by the influence that features and tokens share among "
        "themselves (explained, the default), or by circuit-tracer's, of which errors take a share",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--trust``, which every command that reads a ``.pt`` takes."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load a .pt that holds objects of other classes than a graph's; it can then run code",
    )


def add_np_model(parser: argparse.ArgumentParser) -> None:
    """``--np-model``."""
    parser.add_argument(
        "--np-model", metavar="ID", help="Neuronpedia's model id, for files to be uploaded there"
    )


def add_serving(parser: argparse.ArgumentParser, port: str | None = None) -> None:
    """``--host`` and ``--online``, and ``--port`` unless circuit-tracer's own is there.

    Args:
        parser: the command's.
        port: what the command does with ``--port``; None to add none.
    """
    add = parser.add_argument
    if port is not None:
        add("--port", type=int, default=DEMO_PORT, help=f"{port} (default: {DEMO_PORT})")
    add(
        "--host",
        metavar="ADDR",
        default="127.0.0.1",
        help="address to serve on; everyone who reaches it can read and save the graphs "
        "(default: 127.0.0.1, this machine alone)",
    )
    add(
        "--online",
        action="store_true",
        help="let the page ask circuit-tracer's own hosts for feature examples that no folder holds",
    )


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """``-v``, which every command takes."""
    parser.add_argument("-v", "--verbose", action="store_true", help="show logs and progress")


# Checks -------------------------------------------------------------------------------------------


def check_prompt(prompt: str) -> None:
    """Refuse an empty prompt."""
    if not prompt:
        raise UserError("the prompt is empty: give at least one token of text with -p.")


def check_writable(folder: Path) -> None:
    """Refuse a folder that files cannot be written to; leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{folder} cannot be written to ({reason}): choose another folder."
        ) from error
    finally:
        for path in reversed(made):
            path.rmdir()


def check_file(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written; ``flag`` is the one that names it."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give {flag} the name of a file.")
    try:
        target = write_target(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be written to ({reason}): give {flag} the name of a file."
        ) from error
    check_writable(target.parent)
