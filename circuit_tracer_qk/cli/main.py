"""The command line: ``circuit-tracer-qk demo | attribute | augment | qk | steer | dictionaries |
convert | features | start-server``.

Arguments, order of work and exit status; the text is :mod:`circuit_tracer_qk.cli.text`'s. Whatever
can be refused without the model is refused before it is loaded, and parsing imports no torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import circuit_tracer_qk
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import LISTING, check_folder, check_names
from circuit_tracer_qk.cli import steer as steer_command
from circuit_tracer_qk.cli.features import command as features_command
from circuit_tracer_qk.cli.output import hushed, noise
from circuit_tracer_qk.cli.prompts import command as prompts_command
from circuit_tracer_qk.host.cli import DTYPES

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.qk import Scores
    from circuit_tracer_qk.attribution.residual.graph import ExplainedGraph
    from circuit_tracer_qk.attribution.residual.model import ResidualModel

log = logging.getLogger(__name__)

PROGRAM = "circuit-tracer-qk"
SALLY = "I always loved visiting Aunt Sally. Whenever I was feeling sad, Aunt"
DEMO_PORT = 8041
MINIATURES = {"sae": "miniature-sae", "wcc": "miniature-wcc"}
HEAD = re.compile(r"(?:L(\d+)H)?(\d+)(?::q(-?\d+))?(?::k(-?\d+))?", re.IGNORECASE)
DONE, MISTAKE, INTERRUPTED, PIPE_CLOSED = 0, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; the process's own if left out.

    Returns:
        The exit status: 0 done, 2 for a mistake of the user's (its last line on stderr says what
        and the way out), 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv[0] if argv else "").parse_args(argv)
        with noise(PROGRAM, args.verbose):
            args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return DONE


# Arguments ----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser; circuit-tracer's own flags are read only for the command that takes them."""
    parser = _Parser(
        prog=PROGRAM,
        description="Why attention heads looked where they looked: QK attributions and head "
        "loadings for circuit-tracer's attribution graphs.",
    )
    parser.add_argument(
        "--version", action="version", version=f"{PROGRAM} {circuit_tracer_qk.__version__}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_attribute(commands, _host_flags(command, "attribute"))
    _add_augment(commands)
    _add_qk(commands)
    _add_steer(commands)
    _add_dictionaries(commands)
    _add_convert(commands)
    _add_features(commands)
    _add_start_server(commands, _host_flags(command, "start-server"))
    return parser


def _host_flags(command: str, wanted: str) -> list[argparse.ArgumentParser]:
    if command != wanted:
        return []
    from circuit_tracer_qk.host.cli import command_parser

    return [command_parser(wanted)]


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="attribute a prompt on the bundled miniature, explain its heads, show the graph",
        description="Attribute a prompt on the bundled miniature, print its strongest edges with "
        "their heads and the QK terms behind them, write the graph files and serve them.",
    )
    add = parser.add_argument
    add("-p", "--prompt", default=SALLY, help=f"the prompt (default: {SALLY!r})")
    add(
        "-d",
        "--dictionaries",
        choices=sorted(MINIATURES),
        default="sae",
        help="residual SAEs or the weakly causal crosscoder (default: sae)",
    )
    add("-o", "--output", default="./ctqk-demo", help="graph folder (default: ./ctqk-demo)")
    add(
        "--port",
        type=int,
        default=DEMO_PORT,
        help=f"port, or the next free one (default: {DEMO_PORT})",
    )
    add("--no-serve", action="store_true", help="end after writing the graph files")
    _add_serving(parser)
    _add_verbose(parser)
    parser.set_defaults(run=_demo)


def _add_attribute(commands: Any, host: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "attribute",
        parents=host,
        conflict_handler="resolve",
        help="attribute a prompt: takes every flag of circuit-tracer attribute",
        description="Attribute a prompt's next token, with the heads that carried every edge. With "
        "-t, transcoders: the installed `circuit-tracer attribute` runs with its own flags, and its "
        "graph is explained. With -d, residual dictionaries: the same flags, of which those that "
        "only a transcoder's backward passes need (--offload, --lazy-encoder, --lazy-decoder, "
        "--backend) change nothing.",
    )
    for action in parser._actions:
        if "--transcoder_set" in action.option_strings:
            action.required = False
            action.help = "Transcoders or a CLT: a hub id org/name[@revision] or a local folder."
        if "--prompt" in action.option_strings:
            action.required = False  # --prompts may stand in its place
    add = parser.add_argument
    add(
        "-d",
        "--dictionaries",
        metavar="REF",
        help="Residual SAEs or a weakly causal crosscoder: a folder, a hub id "
        "org/name[/folder][@revision], or a name of `circuit-tracer-qk dictionaries`.",
    )
    add(
        "--qk",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Write QK attributions and head loadings into the graph files (default: True).",
    )
    add("--np-model", metavar="ID", help="Neuronpedia's model id, for files to be uploaded there.")
    prompts_command.add_arguments(parser)
    _add_serving(parser)
    _add_verbose(parser)
    parser.set_defaults(run=_attribute)


def _add_augment(commands: Any) -> None:
    parser = commands.add_parser(
        "augment",
        help="explain a graph that circuit-tracer made earlier: heads and QK attributions",
        description="Write the graph files of a saved graph (.pt), with head loadings and QK "
        "attributions. The model and the transcoders that it was made with are named again.",
        epilog=f"example: {PROGRAM} augment graph.pt -t org/transcoders --slug NAME "
        "--graph_file_dir graphs",
    )
    add = parser.add_argument
    add("graph", help="the saved graph (.pt)")
    add("-m", "--model", help="model; can be inferred from the transcoders' config")
    add("-t", "--transcoder_set", help="transcoders or a CLT: a hub id or a local folder")
    add("--slug", required=True, help="slug of the graph files")
    add("--graph_file_dir", required=True, help="folder for the graph files")
    add("--node_threshold", type=float, default=0.8, help="node threshold (default: 0.8)")
    add("--edge_threshold", type=float, default=0.98, help="edge threshold (default: 0.98)")
    add("--dtype", choices=[*DTYPES.values(), *DTYPES], default="float32", help="of the weights")
    add("--np-model", metavar="ID", help="Neuronpedia's model id, for files to be uploaded there.")
    add("--server", action="store_true", help="serve the graphs afterwards")
    add("--port", type=int, default=DEMO_PORT, help=f"its port (default: {DEMO_PORT})")
    _add_serving(parser)
    _add_verbose(parser)
    parser.set_defaults(run=_augment)


def _add_qk(commands: Any) -> None:
    parser = commands.add_parser(
        "qk",
        help="why one head looked from one position at another: one table",
        description="Take one head's attention score apart into named terms, from a prompt or "
        "from a saved graph. Without model and dictionaries: the bundled miniature.",
        epilog=f"example: {PROGRAM} qk graph.pt --head L3H5:q14:k6",
    )
    add = parser.add_argument
    add("graph", nargs="?", help="a saved graph (.pt), in place of -m, -d and -p")
    add("-t", "--transcoder_set", help="the transcoders of a saved graph of circuit-tracer's")
    add("-m", "--model", help="model folder, hub id or TransformerLens name")
    add("-d", "--dictionaries", metavar="REF", help="residual SAEs or a crosscoder, see attribute")
    add("-p", "--prompt", help="the prompt (default on the miniature: the demo's)")
    add("--layer", type=int, help="the block, from 0")
    add("--head", help="the head, from 0; L3H5 names the layer too, L3H5:q14:k6 everything")
    add("--query", type=int, help="query position (default: the last; -1 counts from the end)")
    add("--key", type=int, help="key position (default: the most attended one but the first)")
    add("--top", type=int, default=20, help="rows of each list (default: 20)")
    _add_verbose(parser)
    parser.set_defaults(run=_qk)


def _add_steer(commands: Any) -> None:
    parser = commands.add_parser(
        "steer",
        help="change features inside some heads' QK circuits and see what the model says",
        description=steer_command.DESCRIPTION,
        epilog=steer_command.EPILOG,
    )
    steer_command.add_arguments(parser)
    _add_verbose(parser)
    parser.set_defaults(run=_steer)


def _add_dictionaries(commands: Any) -> None:
    parser = commands.add_parser(
        "dictionaries",
        help="list the dictionary sets that are known by name",
        description="List the dictionary sets that -d knows by name: those that cover every layer "
        "of a model's residual stream, and crosscoders. Nothing is fetched.",
    )
    parser.add_argument("words", nargs="*", help="show only sets whose line has all these words")
    _add_verbose(parser)
    parser.set_defaults(run=_dictionaries)


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write dictionaries in the native format",
        description="Read residual dictionaries of any layout and write them in the native format,"
        " with their labels and examples.",
    )
    parser.add_argument("source", help="the dictionaries: a folder, a hub id or a built-in name")
    parser.add_argument("destination", help="the folder to write, which must not exist")
    _add_verbose(parser)
    parser.set_defaults(run=_convert)


def _add_features(commands: Any) -> None:
    parser = commands.add_parser(
        "features",
        help="describe features by where they fire in a text file: examples and labels",
        description=features_command.DESCRIPTION,
        epilog=features_command.EPILOG,
    )
    features_command.add_arguments(parser)
    _add_verbose(parser)
    parser.set_defaults(run=_features)


def _add_start_server(commands: Any, host: list[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "start-server",
        parents=host,
        conflict_handler="resolve",
        help="serve a folder of graph files",
        description="Serve a folder of graph files until interrupted.",
    )
    _add_serving(parser)
    _add_verbose(parser)
    parser.set_defaults(run=_start_server)


def _add_serving(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-v", "--verbose", action="store_true", help="show logs and progress")


# Commands -----------------------------------------------------------------------------------------


def _attribute(args: argparse.Namespace) -> None:
    if prompts_command.wanted(args):
        return _attribute_prompts(args)
    files = _checked_files(args)
    if args.transcoder_set is not None:
        return _attribute_transcoders(args, files)
    dtype = DTYPES.get(args.dtype) or args.dtype
    log.info("attributing %r with %s in %s", args.prompt, args.dictionaries, dtype)
    model = _load(args.model, args.dictionaries, dtype)
    with hushed():
        graph = circuit_tracer_qk.attribute(
            args.prompt,
            model,
            max_n_logits=args.max_n_logits,
            desired_logit_prob=args.desired_logit_prob,
            batch_size=args.batch_size,
            max_feature_nodes=args.max_feature_nodes,
            verbose=args.verbose,
        )
    if args.graph_output_path is not None:
        path = Path(args.graph_output_path)
        check_folder(path.parent)
        graph.to_pt(str(path))
        print(f"graph written to {path}")
    if files is None:
        return
    slug, folder = files
    written = _write_files(
        graph,
        slug,
        folder,
        node_threshold=args.node_threshold,
        edge_threshold=args.edge_threshold,
        qk=args.qk,
        np_model=args.np_model,
    )
    print(f"graph files written to {written}")
    if args.server:
        _serve(args, folder, args.port, slug, graph, model)


def _attribute_prompts(args: argparse.Namespace) -> None:
    """A file of prompts: what failed is told at the end, after all that could be done is."""
    _check_sets(args)
    _check_thresholds(args)
    prompts_command.check(args)
    for folder in (args.graph_file_dir, args.graph_output_path):
        if folder is not None:
            _probe_folder(Path(folder))
    if args.server:
        _check_server(args)
    failure = prompts_command.run(args, PROGRAM)
    if args.server and (Path(args.graph_file_dir) / LISTING).is_file():
        _serve(args, args.graph_file_dir, args.port)
    if failure is not None:
        raise failure


def _attribute_transcoders(args: argparse.Namespace, files: tuple[str, str] | None) -> None:
    """circuit-tracer's own command, and its graph explained."""
    from circuit_tracer_qk.host.cli import flags_of
    from circuit_tracer_qk.host.patching import run_command
    from circuit_tracer_qk.plugin.host_command import explaining

    explain = args.qk and files is not None
    flags = flags_of("attribute", args, leave_out=("server", "port"))
    with explaining(explain, args.np_model) as run, hushed():
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
    if run.problem is not None:
        raise UserError(f"these files are circuit-tracer's own, without heads: {run.problem}")
    if args.server:
        _serve(args, folder, args.port, slug, run.graph)


def _augment(args: argparse.Namespace) -> None:
    path = Path(args.graph)
    if not path.is_file():
        raise UserError(f"there is no graph file {path}: give the .pt that was saved.")
    _check_thresholds(args)
    check_names(args.slug, args.np_model)
    _probe_folder(Path(args.graph_file_dir))
    if args.server:
        _check_server(args)

    from circuit_tracer_qk.attribution.residual.store import beside

    graph: Any
    if beside(path).is_file():  # a residual graph brings all that it needs
        graph = circuit_tracer_qk.load_graph(path)
    else:
        graph = _explained(args, path)
    written = _write_files(
        graph,
        args.slug,
        args.graph_file_dir,
        node_threshold=args.node_threshold,
        edge_threshold=args.edge_threshold,
        np_model=args.np_model,
    )
    print(f"graph files written to {written}", flush=True)
    if args.server:
        _serve(args, args.graph_file_dir, args.port, args.slug, graph)


def _explained(args: argparse.Namespace, path: Path) -> Any:
    """A saved graph of circuit-tracer's, explained with the model and transcoders named."""
    import torch

    from circuit_tracer_qk.host import graph as host
    from circuit_tracer_qk.plugin import host_command as explaining

    if args.transcoder_set is None:
        raise UserError(
            "-t/--transcoder_set is missing: name the transcoders that the graph was made with."
        )
    if not path.is_file():
        raise UserError(f"there is no graph file {path}: give the .pt that was saved.")
    try:
        stock = host.load_graph(path)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is no graph that circuit-tracer can read ({error}).") from error
    named = getattr(args, "dtype", "float32")
    dtype = getattr(torch, DTYPES.get(named) or named)
    with hushed():
        model = explaining.load_replacement_model(args.model, args.transcoder_set, dtype)
        return circuit_tracer_qk.explain_graph(stock, model)


def _checked_files(args: argparse.Namespace) -> tuple[str, str] | None:
    """Refuse what `attribute` could not finish; slug and folder of the graph files, if wanted.

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
    _check_thresholds(args)
    _check_prompt(args.prompt)
    if files is not None:
        check_names(files[0], args.np_model)
        _probe_folder(Path(files[1]))
    elif slug is not None or folder is not None:
        print("warning: graph files need both --slug and --graph_file_dir", file=sys.stderr)
    if args.graph_output_path is not None:
        _check_file(Path(args.graph_output_path))
    if args.server:
        _check_server(args)
    return files


def _check_sets(args: argparse.Namespace) -> None:
    """Refuse what says not, or twice, which graph is meant."""
    if args.transcoder_set is None and args.dictionaries is None:
        raise UserError(
            "-d/--dictionaries is missing: name residual SAEs or a crosscoder, or transcoders with "
            "-t/--transcoder_set."
        )
    if args.transcoder_set is not None and args.dictionaries is not None:
        raise UserError("-t and -d make different graphs: give one of them.")
    if args.transcoder_set is not None and args.qk:
        backend = getattr(args, "backend", "transformerlens")
        if backend != "transformerlens":
            raise UserError(
                f"--backend {backend}: heads are explained with transformerlens; leave --backend "
                "out, or give --no-qk for circuit-tracer's own files."
            )
    if args.transcoder_set is not None and args.np_model is not None and not args.qk:
        raise UserError(
            "--np-model names files that --no-qk leaves to circuit-tracer: leave it out."
        )


def _qk(args: argparse.Namespace) -> None:
    layer, head, query, key = _selection(args)
    if args.top < 1:
        raise UserError(f"--top is {args.top}: it must be at least 1.")
    if args.transcoder_set is not None and args.graph is None:
        raise UserError("-t explains a saved graph: give its .pt, which `attribute -t -o` writes.")
    own_model = args.model and args.transcoder_set is None
    if args.graph is not None and (own_model or args.dictionaries or args.prompt is not None):
        raise UserError("a saved graph has its own model and prompt: leave out -m, -d and -p.")
    qk, tokens = _opened(args) if args.graph is not None else _run(args, layer)

    from circuit_tracer_qk.cli import text as report

    n = len(tokens)
    query = n - 1 if query is None else _position("query", query, n)
    row = qk.row(layer, head, query)
    note = ""
    if key is None:
        key = 1 + int(row.pattern[1:].argmax()) if query else 0
        note = "   (most attended key but the first)" if query else ""
    else:
        key = _position("key", key, n)
    table = qk.table(layer, head, query, key)
    lines = report.prompt_lines(tokens, {query: "query", key: "key"} if key != query else {})
    foot = report.FOOTNOTE if args.transcoder_set is None else report.TRANSCODER_FOOTNOTE
    _show([*lines, "", *report.qk_lines(table, row, tokens, args.top, note), "", *foot])


def _steer(args: argparse.Namespace) -> None:
    steer_command.check(args)
    if args.json not in (None, "-"):
        _check_file(Path(args.json), "--json")
    prompt, model = _prompt_and_model(args)
    with hushed():
        lines = steer_command.steer(args, prompt, model)
    _show(lines)


def _dictionaries(args: argparse.Namespace) -> None:
    from circuit_tracer_qk.dictionaries import catalogue

    lines = catalogue.table(args.words)
    if len(lines) < 2:
        raise UserError(
            f"no set of the list has {' and '.join(args.words)}: leave the words out to see all."
        )
    _show(lines)


def _convert(args: argparse.Namespace) -> None:
    if Path(args.destination).exists():
        raise UserError(f"{args.destination} exists already: name a new folder.")

    from circuit_tracer_qk.dictionaries.native_writer import write_dictionaries

    with hushed():
        found = circuit_tracer_qk.load_dictionaries(args.source)
        written = write_dictionaries(found, args.destination)
    layers = ", ".join(map(str, found.checkpoints))
    _show([f"{found.kind} {found.scan} at checkpoints {layers} written to {written}"])


def _features(args: argparse.Namespace) -> None:
    with hushed():
        lines = features_command.run(args, _load)
    _show(lines)


def _demo(args: argparse.Namespace) -> None:
    _check_prompt(args.prompt)
    folder = Path(args.output)
    _probe_folder(folder)
    dictionaries = MINIATURES[args.dictionaries]
    if not args.no_serve:
        from circuit_tracer_qk.frontend.server import next_free_port

        next_free_port(args.port, args.host)
        _check_page()
    model = _load(None, dictionaries)
    with hushed():
        graph = circuit_tracer_qk.attribute(args.prompt, model, verbose=args.verbose)

    from circuit_tracer_qk.cli import text as report

    _show([f"the bundled miniature with its dictionaries {dictionaries}", ""])
    _show(report.story_lines(graph, model.tokenizer.decode))
    slug = f"demo-{args.dictionaries}"
    written = _write_files(graph, slug, args.output)
    _show(["", f"any head at any two positions: {PROGRAM} qk --help"])
    _show([f"graph files written to {written}"])
    if not args.no_serve:
        _serve(args, args.output, next_free_port(args.port, args.host), slug, graph, model)


def _start_server(args: argparse.Namespace) -> None:
    if not (Path(args.graph_file_dir) / "graph-metadata.json").is_file():
        raise UserError(
            f"{args.graph_file_dir} holds no graph files (no graph-metadata.json): write some with "
            "`attribute --slug NAME --graph_file_dir DIR`."
        )
    _serve(args, args.graph_file_dir, args.port)


# Parts of commands --------------------------------------------------------------------------------


def _selection(args: argparse.Namespace) -> tuple[int, int, int | None, int | None]:
    """Layer, head, query and key, however they were written."""
    found = HEAD.fullmatch(args.head or "")
    if found is None:
        problem = "is missing" if args.head is None else f"{args.head!r} is not understood"
        raise UserError(f"--head {problem}: give --layer 3 --head 5, or --head L3H5.")
    values: dict[str, int | None] = {}
    for name, text in zip(("layer", "head", "query", "key"), found.groups(), strict=True):
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


def _opened(args: argparse.Namespace) -> tuple[Scores, list[str]]:
    """QK attributions of a saved graph, and its tokens."""
    if args.transcoder_set is None:
        graph = circuit_tracer_qk.load_graph(args.graph)
    else:
        graph = _explained(args, Path(args.graph))
    return graph.scores, graph.token_strings


def _prompt_and_model(
    args: argparse.Namespace, checkpoints: Sequence[int] | None = None
) -> tuple[str, ResidualModel]:
    """The prompt and the model to run it on; without both, the miniature and the demo's."""
    prompt = args.prompt
    if args.dictionaries is None:
        if args.model is not None:
            raise UserError("-m is given without -d/--dictionaries: name the dictionaries too.")
        prompt = SALLY if prompt is None else prompt
    if prompt is None:
        raise UserError("-p/--prompt is missing: give the prompt to explain.")
    _check_prompt(prompt)
    dtype = getattr(args, "dtype", "float32")
    ref = args.dictionaries or MINIATURES["sae"]
    return prompt, _load(args.model, ref, dtype, checkpoints)


def _run(args: argparse.Namespace, layer: int) -> tuple[Scores, list[str]]:
    """QK attributions of a prompt, without its graph, and its tokens."""
    prompt, model = _prompt_and_model(args, [layer])

    from circuit_tracer_qk.attribution.residual.attribution import explain
    from circuit_tracer_qk.host import graph as host

    with hushed():
        qk = explain(prompt, model)
    decode = host.decoder(model.tokenizer, model.cfg.d_vocab).decode
    return qk, [decode(t) for t in qk.heads.run.tokens]


def _load(
    model: str | None,
    dictionaries: str,
    dtype: str = "float32",
    checkpoints: Sequence[int] | None = None,
) -> ResidualModel:
    import torch

    with hushed():
        return circuit_tracer_qk.load_model(
            model, dictionaries, dtype=getattr(torch, dtype), checkpoints=checkpoints
        )


def _write_files(
    graph: ExplainedGraph, slug: str, folder: str, *, qk: bool = True, **options: Any
) -> Path:
    """Write graph files and return the graph's own."""
    with hushed():
        return circuit_tracer_qk.create_graph_files(graph, slug, folder, qk=qk, **options)


def _serve(
    args: argparse.Namespace,
    folder: str,
    port: int,
    slug: str | None = None,
    graph: ExplainedGraph | None = None,
    model: ResidualModel | None = None,
) -> None:
    """Serve until interrupted, which is how serving ends.

    Args:
        slug, graph: the graph to open, which answers for any head and any pair of positions.
        model: what made it; with it the page can steer.
    """
    from circuit_tracer_qk.frontend.server import is_public

    live, page = None, ""
    if slug is not None and graph is not None:
        from circuit_tracer_qk.attribution.residual.graph import ResidualGraph
        from circuit_tracer_qk.cli import highlights
        from circuit_tracer_qk.host import graph as host
        from circuit_tracer_qk.plugin.live import LiveGraphs

        if isinstance(graph, ResidualGraph):
            look = highlights.first_look(graph, host.edge_influence(graph))
        else:
            look = highlights.first_transcoder_look(
                json.loads(Path(folder, f"{slug}.json").read_bytes())
            )
        page = "&".join([f"/index.html?slug={slug}", *(f"{k}={v}" for k, v in look.items())])
        live = LiveGraphs({slug: graph}, {} if model is None else {slug: model})
    server = circuit_tracer_qk.serve(
        folder,
        port=port,
        host=args.host,
        online=args.online,
        live=live,
        features_dir=getattr(args, "features_dir", None),  # a flag of circuit-tracer's newer tree
    )
    try:
        if is_public(args.host):
            print(
                f"warning: everyone who reaches port {port} of this machine can read and save the "
                "graphs",
                file=sys.stderr,
            )
        _show([f"open {server.url}{page}   (Ctrl+C ends)"])
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()


def _show(lines: Sequence[str]) -> None:
    print(*lines, sep="\n", flush=True)


# Checks that need no model ------------------------------------------------------------------------


def _check_prompt(prompt: str) -> None:
    if not prompt:
        raise UserError("the prompt is empty: give at least one token of text with -p.")


def _check_thresholds(args: argparse.Namespace) -> None:
    for name in ("node_threshold", "edge_threshold"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} is {getattr(args, name)}: it must be 0 to 1.")


def _check_server(args: argparse.Namespace) -> None:
    from circuit_tracer_qk.frontend.server import check_port

    check_port(args.port, args.host)
    _check_page()


def _check_page() -> None:
    """Refuse a page that our panel does not fit into."""
    from circuit_tracer_qk.frontend import page
    from circuit_tracer_qk.host import cli as host_cli

    page.read_page(host_cli.assets())
    page.panel_folder()


def _probe_folder(folder: Path) -> None:
    """Refuse a folder that files cannot be written to; leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
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


def _check_file(path: Path, flag: str = "-o/--graph_output_path") -> None:
    """Refuse a file that cannot be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give {flag} the name of a file.")
    _probe_folder(path.parent)
