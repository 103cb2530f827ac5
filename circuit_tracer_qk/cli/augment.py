"""The command ``augment``: the graph files of a graph that circuit-tracer made earlier."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import circuit_tracer_qk
from circuit_tracer_qk.base.files import beside, check_names, companion_of
from circuit_tracer_qk.cli import arguments
from circuit_tracer_qk.cli.loading import check_graph, explain_saved_graph, files_options
from circuit_tracer_qk.cli.output import show, silence_stdout
from circuit_tracer_qk.cli.serving import check_server, serve

HELP = "explain a graph that circuit-tracer made earlier: heads and QK attributions"
DESCRIPTION = (
    "Write the graph files of a saved graph (.pt), with head loadings and QK attributions. The "
    "model and the transcoders that it was made with are named again."
)
EPILOG = (
    f"example: {arguments.PROGRAM} augment graph.pt -t org/transcoders --slug NAME "
    "--graph_file_dir graphs"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``augment``."""
    add = parser.add_argument
    add("graph", help="the saved graph (.pt)")
    arguments.add_trust(parser)
    arguments.add_model(parser)
    arguments.add_transcoders(parser)
    add("--slug", required=True, help="slug of the graph files")
    add("--graph_file_dir", required=True, help="folder for the graph files")
    add("--node_threshold", type=float, default=0.8, help="node threshold (default: 0.8)")
    add("--edge_threshold", type=float, default=0.98, help="edge threshold (default: 0.98)")
    arguments.add_np_model(parser)
    add("--server", action="store_true", help="serve the graphs afterwards")
    arguments.add_serving(parser, port="the server's port")


def run(args: argparse.Namespace) -> None:
    """Do it."""
    path = Path(args.graph)
    check_graph(path)
    check_names(args.slug, args.np_model)
    arguments.check_writable(Path(args.graph_file_dir))
    if args.server:
        check_server(args)

    residual = os.path.isfile(
        companion_of(path, beside(path))
    )  # such a graph brings all that it needs
    if residual:
        graph = circuit_tracer_qk.load_graph(path, trust=args.trust)
    else:
        graph = explain_saved_graph(args, path)
    with silence_stdout():
        page = circuit_tracer_qk.create_graph_files(
            graph, args.slug, args.graph_file_dir, **files_options(args)
        )
    show([f"graph files written to {page}"])
    if args.server:
        serve(args, args.graph_file_dir, args.port, args.slug, graph)
