"""The files of features' examples that the page reads, one for every feature it may show."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.base import digests
from circuit_tracer_qk.base.files import (
    LONGEST_SLUG,
    check_folder,
    remove_temporaries,
    write_together,
)
from circuit_tracer_qk.base.json_text import encode
from circuit_tracer_qk.dictionaries.features import FeatureExamples, feature_index
from circuit_tracer_qk.host import graph as host

TOGETHER_BYTES = 64 << 20
"""How many bytes of examples are held before they are written."""


def folder_name(graph: ExplainedGraph, scan: str | None = None) -> str:
    """The name of the folder that a graph's features lie in.

    Args:
        scan: in place of the dictionaries' own name; a hub id's slash becomes two hyphens.
    """
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", (scan or host.graph_scan(graph)).replace("/", "--"))
    # its own folder also where the scan is called like one of the files beside it
    if len(safe) > LONGEST_SLUG:
        safe = f"{safe[:100]}-{digests.of_text(safe)[:16]}"
    return safe if safe.strip(".") and not safe.endswith(".json") else f"features-{safe}"


def write_features(
    graph: ExplainedGraph, folder: Path, features: Iterable[tuple[int, int]], scan: str
) -> list[Path]:
    """Write the examples of every (checkpoint, feature), or an empty form where there are none.

    Returns:
        The files.

    Raises:
        UserError: a file that cannot be written; every other is whole.
    """
    remove_temporaries(check_folder(folder))
    written = []
    examples = stored_examples(graph)
    existing = {entry.name for entry in os.scandir(folder)}
    changed: dict[Path, bytes] = {}
    size = 0
    for checkpoint, feature in tqdm(
        sorted(features), "Feature examples", leave=False, delay=2, disable=None
    ):
        path = folder / f"{feature_index(checkpoint, feature)}.json"
        data = None if examples is None else examples.read(checkpoint, feature)
        data = data or encode(without_examples(feature, scan))
        if path.name not in existing or not path.is_file() or path.read_bytes() != data:
            changed[path] = data
            size += len(data)
        written.append(path)
        if size > TOGETHER_BYTES:
            write_together(changed)
            changed, size = {}, 0
    if changed:
        write_together(changed)
    return written


def stored_examples(graph: ExplainedGraph) -> FeatureExamples | None:
    """The examples beside a graph's dictionaries, None where it does not know their folder."""
    stored = graph.dictionary_folder
    return None if stored is None else FeatureExamples(Path(stored))


def without_examples(feature: int, scan: str) -> dict[str, Any]:
    """A feature of which nothing is known, in the form of circuit-tracer's ``feature_models``."""
    return {
        "transcoder_id": scan,
        "index": feature,
        "examples_quantiles": [],
        "top_logits": [],
        "bottom_logits": [],
        "act_min": 0.0,
        "act_max": 1.0,
        "quantile_values": [],
        "histogram": [],
        "activation_frequency": 0.0,
    }
