"""circuit-tracer's command line and page: the part of the host that loads without torch.

:mod:`circuit_tracer_qk.host.graph` has the rest. Here too features are detected, never versions.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from circuit_tracer_qk.base.errors import UserError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Its short names."""


class _Captured(BaseException):
    """Carries circuit-tracer's parser out of its ``main``, which builds it and never returns it."""


def command_parser(command: str) -> argparse.ArgumentParser:
    """The arguments of one command of the installed circuit-tracer, ``-h`` left out.

    Read from its own parser, so that a flag that a newer circuit-tracer adds is known at once;
    where that fails, the flags of 0.5.0.

    Args:
        command: "attribute" or "start-server".
    """
    try:
        parser = _installed_parser(command)
    except Exception:  # whatever a future main does instead of parsing arguments
        parser = known_parser(command)
    out = argparse.ArgumentParser(add_help=False)
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            out._add_action(action)
    return out


def _installed_parser(command: str) -> argparse.ArgumentParser:
    from circuit_tracer import __main__ as stock

    def give_up(self: argparse.ArgumentParser, *_: Any, **__: Any) -> NoReturn:
        raise _Captured(self)

    kept = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = give_up  # type: ignore[method-assign]
    try:
        with logging_kept():
            stock.main()
    except _Captured as captured:
        for action in captured.args[0]._actions:
            if isinstance(action, argparse._SubParsersAction) and command in action.choices:
                return action.choices[command]
    finally:
        argparse.ArgumentParser.parse_known_args = kept  # type: ignore[method-assign]
    raise LookupError(command)


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """Undo the ``logging.basicConfig`` that circuit-tracer's ``main`` begins with."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def known_parser(command: str) -> argparse.ArgumentParser:
    """The arguments of circuit-tracer 0.5.0, for hosts whose own parser cannot be read."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    if command == "attribute":
        add("-m", "--model", help="Model; can be inferred from the dictionaries' config.")
        add("-t", "--transcoder_set", required=True, help="Transcoders.")
        add("-p", "--prompt", required=True, help="Input prompt text to analyze.")
        add("-o", "--graph_output_path", help="Where to save the attribution graph (.pt file).")
        dtypes = ["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
        add("--dtype", choices=dtypes, default="float32", help="Data type for model weights.")
        add("--max_n_logits", type=int, default=10, help="Maximum number of logit nodes.")
        add(
            "--desired_logit_prob",
            type=float,
            default=0.95,
            help="Cumulative probability threshold for top logits.",
        )
        add("--batch_size", type=int, default=256, help="Batch size.")
        add("--offload", choices=["cpu", "disk", None], help="Offload model parameters.")
        add("--max_feature_nodes", type=int, default=7500, help="Maximum number of feature nodes.")
        add("--verbose", action="store_true", help="Display progress information.")
        add("--lazy-encoder", action="store_true", help="Lazy loading for encoder weights.")
        add(
            "--lazy-decoder",
            action="store_true",
            default=True,
            help="Lazy loading for decoder weights.",
        )
        backends = ["transformerlens", "nnsight"]
        add("--backend", choices=backends, default="transformerlens", help="Backend to use.")
        add("--slug", help="Slug of the graph files.")
        add("--graph_file_dir", help="Folder for the graph files; the server's data folder.")
        add("--node_threshold", type=float, default=0.8, help="Node threshold for pruning.")
        add("--edge_threshold", type=float, default=0.98, help="Edge threshold for pruning.")
        add("--server", action="store_true", help="Serve the graphs after processing.")
    else:
        add("--graph_file_dir", required=True, help="Folder that holds the graph files.")
    add("--port", type=int, default=8041, help="Port for the local server.")
    return parser


def flags_of(command: str, args: argparse.Namespace, leave_out: Sequence[str] = ()) -> list[str]:
    """The arguments of circuit-tracer's own command that parse to these.

    Args:
        command: the command.
        args: parsed by :func:`command_parser`'s arguments, perhaps among others.
        leave_out: names of arguments to leave out.
    """
    flags = []
    for action in command_parser(command)._actions:
        value = getattr(args, action.dest, action.default)
        if action.dest in leave_out or value == action.default or not action.option_strings:
            continue
        name = max(action.option_strings, key=len)
        if action.nargs == 0:  # a switch
            no = [n for n in action.option_strings if n.startswith("--no-")]
            flags.append(no[0] if no and value is False else name)
        elif isinstance(value, list | tuple):
            flags += [name, *map(str, value)]
        else:
            flags.append(f"{name}={value}")
    return flags


def assets() -> Path:
    """The folder of the installed circuit-tracer's page.

    Raises:
        UserError: there is none.
    """
    spec = find_spec("circuit_tracer")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (folder_of_page := Path(folder, "frontend", "assets")).is_dir():
            return folder_of_page
    raise UserError(
        "circuit-tracer is installed without its page (frontend/assets): install it again."
    )
