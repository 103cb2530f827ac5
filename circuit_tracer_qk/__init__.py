"""QK attributions and head loadings for circuit-tracer's attribution graphs.

Names are loaded on first use: importing this package imports no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import circuit_tracer_qk.attribution.shown as _shown
from circuit_tracer_qk.base.package import __version__ as __version__

if TYPE_CHECKING:  # what ``_HOMES`` says, for type checkers
    from circuit_tracer_qk.attribution.batches import Batch, Terms
    from circuit_tracer_qk.attribution.component import Component
    from circuit_tracer_qk.attribution.graph import ExplainedGraph
    from circuit_tracer_qk.attribution.links import Kept, Links
    from circuit_tracer_qk.attribution.qk import Place, QKRow, QKTable, Scores
    from circuit_tracer_qk.attribution.residual.attribution import explain
    from circuit_tracer_qk.attribution.residual.carriers import Carrier, carriers, select_heads
    from circuit_tracer_qk.attribution.residual.edges import EdgeParts, Parts
    from circuit_tracer_qk.attribution.residual.graph import (
        Edge,
        HeadLoadings,
        ResidualGraph,
        StrongestLoadings,
        load_graph,
    )
    from circuit_tracer_qk.attribution.residual.model import ResidualModel, load_model
    from circuit_tracer_qk.attribution.residual.qk import QK, TopTerms
    from circuit_tracer_qk.attribution.shown import ShownGraph
    from circuit_tracer_qk.attribution.transcoder.cuts import Listing, Pairs, Splits
    from circuit_tracer_qk.attribution.transcoder.graph import TranscoderGraph, explain_graph
    from circuit_tracer_qk.attribution.transcoder.qk import TranscoderQK
    from circuit_tracer_qk.base.errors import UserError
    from circuit_tracer_qk.base.json_text import Encoded
    from circuit_tracer_qk.base.precision import tf32
    from circuit_tracer_qk.dictionaries.dictionary import Dictionary, Scaled, Units
    from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
    from circuit_tracer_qk.dictionaries.load import load_dictionaries
    from circuit_tracer_qk.frontend.routes import Live
    from circuit_tracer_qk.frontend.server import Server, serve
    from circuit_tracer_qk.frontend.steer_requests import SteerRequest
    from circuit_tracer_qk.graph_files.create import create_graph_files
    from circuit_tracer_qk.model.run import FrozenRun
    from circuit_tracer_qk.plugin.attribute import attribute
    from circuit_tracer_qk.plugin.enable import disable, enable
    from circuit_tracer_qk.plugin.live import LiveGraphs
    from circuit_tracer_qk.steering.edits import (
        HeadEdit,
        QKEdit,
        ResolvedHeadEdit,
        ResolvedQKEdit,
        swap,
    )
    from circuit_tracer_qk.steering.head_curve import head_curve
    from circuit_tracer_qk.steering.options import SteeringOptions
    from circuit_tracer_qk.steering.resolve import Changed
    from circuit_tracer_qk.steering.results import (
        Continued,
        Effect,
        Generation,
        HeadCurve,
        Spread,
        SteeredRun,
        Swept,
    )
    from circuit_tracer_qk.steering.steer import generate, steer, sweep

_HOMES = {
    "attribution.batches": "Batch Terms",
    "attribution.component": "Component",
    "attribution.graph": "ExplainedGraph",
    "attribution.links": "Kept Links",
    "attribution.qk": "Place QKRow QKTable Scores",
    "attribution.residual.attribution": "explain",
    "attribution.residual.carriers": "Carrier carriers select_heads",
    "attribution.residual.edges": "EdgeParts Parts",
    "attribution.residual.graph": "Edge HeadLoadings ResidualGraph StrongestLoadings load_graph",
    "attribution.residual.model": "ResidualModel load_model",
    "attribution.residual.qk": "QK TopTerms",
    "attribution.shown": "ShownGraph",
    "attribution.transcoder.cuts": "Listing Pairs Splits",
    "attribution.transcoder.graph": "TranscoderGraph explain_graph",
    "attribution.transcoder.qk": "TranscoderQK",
    "base.errors": "UserError",
    "base.json_text": "Encoded",
    "base.precision": "tf32",
    "dictionaries.dictionary": "Dictionary Scaled Units",
    "dictionaries.dictionary_set": "DictionarySet",
    "dictionaries.load": "load_dictionaries",
    "frontend.routes": "Live",
    "frontend.server": "Server serve",
    "frontend.steer_requests": "SteerRequest",
    "graph_files.create": "create_graph_files",
    "model.run": "FrozenRun",
    "plugin.attribute": "attribute",
    "plugin.enable": "disable enable",
    "plugin.live": "LiveGraphs",
    "steering.edits": "HeadEdit QKEdit ResolvedHeadEdit ResolvedQKEdit swap",
    "steering.head_curve": "head_curve",
    "steering.options": "SteeringOptions",
    "steering.resolve": "Changed",
    "steering.results": "Continued Effect Generation HeadCurve Spread SteeredRun Swept",
    "steering.steer": "generate steer sweep",
}
"""Where the public names lie: module -> names."""

_MODULE = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Batch",
    "Carrier",
    "Changed",
    "Component",
    "Continued",
    "Dictionary",
    "DictionarySet",
    "Edge",
    "EdgeParts",
    "Effect",
    "Encoded",
    "ExplainedGraph",
    "FrozenRun",
    "Generation",
    "HeadCurve",
    "HeadEdit",
    "HeadLoadings",
    "Kept",
    "Links",
    "Listing",
    "Live",
    "LiveGraphs",
    "Pairs",
    "Parts",
    "Place",
    "QK",
    "QKEdit",
    "QKRow",
    "QKTable",
    "ResidualGraph",
    "ResidualModel",
    "ResolvedHeadEdit",
    "ResolvedQKEdit",
    "Scaled",
    "Scores",
    "Server",
    "ShownGraph",
    "Splits",
    "Spread",
    "SteerRequest",
    "SteeredRun",
    "SteeringOptions",
    "StrongestLoadings",
    "Swept",
    "Terms",
    "TopTerms",
    "TranscoderGraph",
    "TranscoderQK",
    "Units",
    "UserError",
    "attribute",
    "carriers",
    "create_graph_files",
    "disable",
    "enable",
    "explain",
    "explain_graph",
    "generate",
    "head_curve",
    "load_dictionaries",
    "load_graph",
    "load_model",
    "select_heads",
    "serve",
    "steer",
    "swap",
    "sweep",
    "tf32",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)


def _show(*args: Any, **options: Any) -> ShownGraph:
    return import_module(f"{__name__}.plugin.show").show(*args, **options)


_shown.opener = _show


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})
