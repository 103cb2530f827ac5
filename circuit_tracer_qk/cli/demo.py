"""The command ``demo``: a prompt on the bundled miniature, from attribution to the page."""

from __future__ import annotations

import argparse
from pathlib import Path

import circuit_tracer_qk
from circuit_tracer_qk.cli import arguments
from circuit_tracer_qk.cli.arguments import DEMO_PROMPT, PROGRAM
from circuit_tracer_qk.cli.loading import load_model
from circuit_tracer_qk.cli.output import show, silence_stdout
from circuit_tracer_qk.cli.serving import check_page, serve

HELP = "attribute a prompt on the bundled miniature, explain its heads, show the graph"
DESCRIPTION = (
    "Attribute a prompt on the bundled miniature, print its strongest edges with their heads and "
    "the QK terms behind them, write the graph files and serve them."
)
SETS = {"sae": "miniature-sae", "wcc": "miniature-wcc"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``demo``."""
    add = parser.add_argument
    add("-p", "--prompt", default=DEMO_PROMPT, help=f"the prompt (default: {DEMO_PROMPT!r})")
    add(
        "-d",
        "--dictionaries",
        choices=(*SETS, *SETS.values()),
        default="sae",
        help="residual SAEs or the weakly causal crosscoder (default: sae)",
    )
    add("-o", "--output", default="./ctqk-demo", help="graph folder (default: ./ctqk-demo)")
    add("--no-serve", action="store_true", help="end after writing the graph files")
    arguments.add_select(parser)
    arguments.add_dtype(parser)
    arguments.add_serving(parser, port="port, or the next free one")
    parser.set_defaults(model=None)  # the bundled one


def run(args: argparse.Namespace) -> None:
    """Do it."""
    arguments.check_prompt(args.prompt)
    arguments.check_writable(Path(args.output))
    if not args.no_serve:
        from circuit_tracer_qk.frontend.server import next_free_port

        next_free_port(args.port, args.host)
        check_page()
    from circuit_tracer_qk.dictionaries.catalogue import MINIATURES

    dictionaries = SETS.get(args.dictionaries) or args.dictionaries
    model = load_model(args, MINIATURES[dictionaries])  # itself, whatever the current folder holds
    with silence_stdout():
        graph = circuit_tracer_qk.attribute(
            args.prompt, model, verbose=args.verbose, select=args.select
        )

    from circuit_tracer_qk.cli import text
    from circuit_tracer_qk.host.graph import token_texts

    show([f"the bundled miniature with its dictionaries {dictionaries}", ""])
    show(text.story_lines(graph, token_texts(model.tokenizer, model.cfg.d_vocab)))
    slug = dictionaries.replace("miniature", "demo")
    with silence_stdout():
        page = circuit_tracer_qk.create_graph_files(graph, slug, args.output)
    show(["", f"any head at any two positions: {PROGRAM} qk --help"])
    show([f"graph files written to {page}"])
    if not args.no_serve:
        serve(args, args.output, next_free_port(args.port, args.host), slug, graph, model)
