"""QK attributions and head loadings for circuit-tracer's attribution graphs.

Names are loaded on first use: importing this package imports no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from circuit_tracer_qk.base.package import __version__ as __version__

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.component import Component
    from circuit_tracer_qk.attribution.qk import QKRow, QKTable
    from circuit_tracer_qk.attribution.residual.attribution import explain
    from circuit_tracer_qk.attribution.residual.carriers import carriers, select_heads
    from circuit_tracer_qk.attribution.residual.graph import Edge, ResidualGraph, load_graph
    from circuit_tracer_qk.attribution.residual.model import ResidualModel, load_model
    from circuit_tracer_qk.attribution.transcoder.graph import TranscoderGraph, explain_graph
    from circuit_tracer_qk.base.errors import UserError
    from circuit_tracer_qk.base.precision import tf32
    from circuit_tracer_qk.dictionaries.dictionary import Dictionary
    from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
    from circuit_tracer_qk.dictionaries.load import load_dictionaries
    from circuit_tracer_qk.frontend.server import serve
    from circuit_tracer_qk.graph_files.create import create_graph_files
    from circuit_tracer_qk.plugin.attribute import attribute
    from circuit_tracer_qk.plugin.enable import disable, enable
    from circuit_tracer_qk.plugin.live import LiveGraphs
    from circuit_tracer_qk.steering.edits import HeadEdit, QKEdit, swap
    from circuit_tracer_qk.steering.head_curve import head_curve
    from circuit_tracer_qk.steering.results import SteeredRun
    from circuit_tracer_qk.steering.steer import generate, steer, sweep

_HOMES = {
    "attribute": "plugin.attribute",
    "explain": "attribution.residual.attribution",
    "explain_graph": "attribution.transcoder.graph",
    "TranscoderGraph": "attribution.transcoder.graph",
    "Component": "attribution.component",
    "Dictionary": "dictionaries.dictionary",
    "DictionarySet": "dictionaries.dictionary_set",
    "load_dictionaries": "dictionaries.load",
    "enable": "plugin.enable",
    "disable": "plugin.enable",
    "carriers": "attribution.residual.carriers",
    "select_heads": "attribution.residual.carriers",
    "head_curve": "steering.head_curve",
    "HeadEdit": "steering.edits",
    "QKEdit": "steering.edits",
    "swap": "steering.edits",
    "UserError": "base.errors",
    "create_graph_files": "graph_files.create",
    "Edge": "attribution.residual.graph",
    "ResidualGraph": "attribution.residual.graph",
    "LiveGraphs": "plugin.live",
    "QKRow": "attribution.qk",
    "QKTable": "attribution.qk",
    "ResidualModel": "attribution.residual.model",
    "load_model": "attribution.residual.model",
    "load_graph": "attribution.residual.graph",
    "serve": "frontend.server",
    "SteeredRun": "steering.results",
    "generate": "steering.steer",
    "steer": "steering.steer",
    "sweep": "steering.steer",
    "tf32": "base.precision",
}

__all__ = [
    "Component",
    "Dictionary",
    "DictionarySet",
    "Edge",
    "HeadEdit",
    "LiveGraphs",
    "QKEdit",
    "QKRow",
    "QKTable",
    "ResidualGraph",
    "ResidualModel",
    "SteeredRun",
    "TranscoderGraph",
    "UserError",
    "attribute",
    "carriers",
    "disable",
    "enable",
    "explain",
    "explain_graph",
    "create_graph_files",
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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
