"""The schema of graph files, and JSON read strictly."""

from __future__ import annotations

import json
from typing import Any

from circuit_tracer_qk.base.package import ROOT

SCHEMA = json.loads((ROOT / "graph.schema.json").read_bytes())


def strict(data: bytes) -> Any:
    """JSON without NaN or Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in JSON")

    return json.loads(data.decode("utf-8"), parse_constant=refuse)
