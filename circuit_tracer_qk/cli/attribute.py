"""The command ``attribute``: a prompt's graph, with the heads that carried every edge."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import circuit_tracer_qk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import LISTING, beside, check_folder, check_names
from circuit_tracer_qk.base.selection import CIRCUIT_TRACER
from circuit_tracer_qk.cli import arguments
from circuit_tracer_qk.cli.arguments import PROGRAM
from circuit_tracer_qk.cli.loading import attribute_prompt, files_options, load_model
from circuit_tracer_qk.cli.output import silence_stdout
from circuit_tracer_qk.cli.prompts import command as prompts
from circuit_tracer_qk.cli.serving import check_server, serve
from circuit_tracer_qk.host.cli import command_parser

log = logging.getLogger(__name__)

HELP = "attribute a prompt: takes every flag of circuit-tracer attribute"
DESCRIPTION = (
    "Attribute a prompt's next token, with the heads that carried every edge. With -t, transcoders: "
    "the installed `circuit-tracer attribute` runs with its own flags, and its graph is explained. "
    "With -d, residual dictionaries: the same flags, of which those that only a transcoder's "
    "backward passes need (--offload, --lazy-encoder, --lazy-decoder, --backend) change nothing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """circuit-tracer's own flags, and ours; one of ours takes the place of its namesake."""
    parser._add_container_actions(command_parser("attribute"))
    for action in parser._actions:
        if action.dest in ("transcoder_set", "prompt"):
            action.required = False  # -d or --prompts may stand in their place
        if action.dest == "transcoder_set":
            action.help = "Transcoders or a CLT: a hub id org/name[@revision] or a local folder."
        if action.dest == "dtype" and action.choices is not None:
            parser.set_defaults(host_dtypes=tuple(action.choices))
            more = [name for name in arguments.DTYPE_NAMES if name not in action.choices]
            action.type, action.choices = arguments.dtype_name, [*action.choices, *more]
    arguments.add_dictionaries(parser)
    parser.add_argument(
        "--qk",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Write QK attributions and head loadings into the graph files (default: True).",
    )
    arguments.add_select(parser)
    arguments.add_np_model(parser)
    prompts.add_arguments(parser)
    arguments.add_serving(parser)


def run(args: argparse.Namespace) -> None:
    """Do it."""
    if prompts.wanted(args):
        return _run_prompts(args)
    files = _check_outputs(args)
    if args.transcoder_set is not None:
        return _run_transcoders(args, files)
    log.info("attributing %r with %s in %s", args.prompt, args.dictionaries, args.dtype)
    model = load_model(args)
    graph = attribute_prompt(args, model)
    if args.graph_output_path is not None:
        path = Path(args.graph_output_path)
        check_folder(path.parent)
        graph.to_pt(str(path))
        print(f"graph written to {path}")
    if files is None:
        return
    slug, folder = files
    with silence_stdout():
        page = circuit_tracer_qk.create_graph_files(graph, slug, folder, **files_options(args))
    print(f"graph files written to {page}")
    if args.server:
        serve(args, folder, args.port, slug, graph, model)


def _run_prompts(args: argparse.Namespace) -> None:
    """A file of prompts; what failed is said at the end, after all that could be done is."""
    _check_sets(args)
    prompts.check(args)
    for folder in (args.graph_file_dir, args.graph_output_path):
        if folder is not None:
            arguments.check_writable(Path(folder))
    if args.server:
        check_server(args)
    failure = prompts.run(args, PROGRAM)
    if args.server and os.path.isfile(Path(args.graph_file_dir) / LISTING):
        serve(args, args.graph_file_dir, args.port)
    if failure is not None:
        raise failure


def _run_transcoders(args: argparse.Namespace, files: tuple[str, str] | None) -> None:
    """circuit-tracer's own command, and its graph explained."""
    from circuit_tracer_qk.host.cli import flags_of
    from circuit_tracer_qk.host.patching import run_command
    from circuit_tracer_qk.plugin.host_command import explaining

    flags = flags_of("attribute", args, leave_out=("server", "port"))
    with explaining(args.qk and files is not None, args.np_model) as explained, silence_stdout():
        run_command(["attribute", *flags])
    if args.graph_output_path is not None:
        print(f"graph written to {args.graph_output_path}")
        if args.qk and files is None:
            print(
                "its heads go into graph files: give --slug and --graph_file_dir too, or later "
                f"`{PROGRAM} augment {args.graph_output_path} -t {args.transcoder_set} ...`"
            )
    if files is None:
        return
    slug, folder = files
    print(f"graph files written to {Path(folder) / slug}.json", flush=True)
    if explained.problem is not None:
        raise UserError(f"these files are circuit-tracer's own, without heads: {explained.problem}")
    if args.server:
        serve(args, folder, args.port, slug, explained.graph)


def _check_outputs(args: argparse.Namespace) -> tuple[str, str] | None:
    """Refuse what could not be finished; slug and folder of the graph files, if they are wanted.

    The rules for which outputs must be named are circuit-tracer's own.
    """
    _check_sets(args)
    slug, folder = args.slug, args.graph_file_dir
    files = None if slug is None or folder is None else (slug, folder)
    if args.server and files is None:
        raise UserError("--server needs both --slug and --graph_file_dir: give them too.")
    if files is None and args.graph_output_path is None:
        raise UserError(
            "no output is named: give both --slug and --graph_file_dir for graph files, or "
            "-o/--graph_output_path for a .pt file."
        )
    arguments.check_prompt(args.prompt)
    if files is not None:
        check_names(files[0], args.np_model)
        arguments.check_writable(Path(files[1]))
    elif slug is not None or folder is not None:
        print("warning: graph files need both --slug and --graph_file_dir", file=sys.stderr)
    if args.graph_output_path is not None:
        arguments.check_file(Path(args.graph_output_path), "-o/--graph_output_path")
        if args.transcoder_set is None:
            arguments.check_file(beside(args.graph_output_path), "-o/--graph_output_path")
    if args.server:
        check_server(args)
    return files


def _check_sets(args: argparse.Namespace) -> None:
    """Refuse what says not, or twice, which graph is meant, or asks of it what it cannot have."""
    if args.transcoder_set is None and args.dictionaries is None:
        raise UserError(
            "-d/--dictionaries is missing: name residual SAEs or a crosscoder, or transcoders with "
            "-t/--transcoder_set."
        )
    if args.transcoder_set is None:
        return
    if args.dictionaries is not None:
        raise UserError("-t and -d make different graphs: give one of them.")
    dtypes = getattr(args, "host_dtypes", None)
    if dtypes is not None and args.dtype not in dtypes:
        raise UserError(
            f"--dtype {args.dtype} is for -d: the installed circuit-tracer, which runs with -t, "
            f"takes {', '.join(dtypes)}."
        )
    if args.select not in (None, CIRCUIT_TRACER):
        raise UserError(
            f"--select {args.select} is for -d: circuit-tracer chooses the nodes of transcoder "
            "graphs; leave it out."
        )
    backend = getattr(args, "backend", "transformerlens")
    if args.qk and backend != "transformerlens":
        raise UserError(
            f"--backend {backend}: heads are explained with transformerlens; leave --backend "
            "out, or give --no-qk for circuit-tracer's own files."
        )
    if args.np_model is not None and not args.qk:
        raise UserError(
            "--np-model names files that --no-qk leaves to circuit-tracer: leave it out."
        )
