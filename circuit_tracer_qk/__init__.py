"""QK attributions and head loadings for circuit-tracer's attribution graphs.

Names are loaded on first use: importing this package imports no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution import attribute
    from circuit_tracer_qk.components import Component
    from circuit_tracer_qk.dictionaries import load_dictionaries
    from circuit_tracer_qk.errors import UserError
    from circuit_tracer_qk.graph import Edge, ResidualGraph
    from circuit_tracer_qk.qk import QKRow, QKTable
    from circuit_tracer_qk.residual_model import ResidualModel, load_model

__version__ = "0.1.0"

_HOMES = {
    "attribute": "attribution",
    "Component": "components",
    "load_dictionaries": "dictionaries",
    "UserError": "errors",
    "Edge": "graph",
    "ResidualGraph": "graph",
    "QKRow": "qk",
    "QKTable": "qk",
    "ResidualModel": "residual_model",
    "load_model": "residual_model",
}

__all__ = [
    "Component",
    "Edge",
    "QKRow",
    "QKTable",
    "ResidualGraph",
    "ResidualModel",
    "UserError",
    "attribute",
    "load_dictionaries",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
