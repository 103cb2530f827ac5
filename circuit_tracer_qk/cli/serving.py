"""Serving graph files until Ctrl+C, and the checks that come before anything is loaded."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import circuit_tracer_qk
from circuit_tracer_qk.cli.output import show

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.graph import ExplainedGraph
    from circuit_tracer_qk.attribution.residual.model import ResidualModel


def check_server(args: argparse.Namespace) -> None:
    """Refuse an address that cannot be had, or a page that our panel does not fit into."""
    from circuit_tracer_qk.frontend.server import check_port

    check_port(args.port, args.host)
    check_page()


def check_page() -> None:
    """Refuse a page that our panel does not fit into."""
    from circuit_tracer_qk.frontend import page
    from circuit_tracer_qk.host import cli as host_cli

    page.read_page(host_cli.assets())
    page.panel_folder()


def serve(
    args: argparse.Namespace,
    folder: str,
    port: int,
    slug: str | None = None,
    graph: ExplainedGraph | None = None,
    model: ResidualModel | None = None,
) -> None:
    """Serve a folder of graph files until interrupted, which is how serving ends.

    Args:
        args: ``--host`` and ``--online``.
        folder, port: what is served, and where.
        slug, graph: the graph to open, which answers for any head and any pair of positions.
        model: what made it; with it the page can steer.
    """
    from circuit_tracer_qk.frontend.server import is_public

    live, page = None, ""
    if slug is not None and graph is not None:
        from circuit_tracer_qk.attribution.pruning import edge_influence
        from circuit_tracer_qk.attribution.residual.graph import ResidualGraph
        from circuit_tracer_qk.cli import highlights
        from circuit_tracer_qk.plugin.live import LiveGraphs

        if isinstance(graph, ResidualGraph):
            look = highlights.first_look(graph, edge_influence(graph))
        else:
            document = json.loads(Path(folder, f"{slug}.json").read_bytes())
            look = highlights.first_transcoder_look(document)
        page = "&".join([f"/index.html?slug={slug}", *(f"{k}={v}" for k, v in look.items())])
        live = LiveGraphs({slug: graph}, {} if model is None else {slug: model})
    features = getattr(args, "features_dir", None)  # a flag of circuit-tracer's newer tree
    server = circuit_tracer_qk.serve(
        folder, port, host=args.host, online=args.online, live=live, features_dir=features
    )
    try:
        if is_public(args.host):
            at = server.url.rpartition(":")[2]  # of --port 0
            warning = f"everyone who reaches port {at} of this machine can read and save the graphs"
            print(f"warning: {warning}", file=sys.stderr)
        show([f"open {server.url}{page}   (Ctrl+C ends)"])
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()
