"""How long a large graph's files take to write and to open, and how large they are.

A residual graph of a random model at a real model's shape, its dictionaries made for the prompt so
that features, not errors, carry the stream; heads copy strongly, so that a third of its some 20,000
links run between positions, as they do in trained models.

- Writing: the whole of ``create_graph_files``, fsync included, into a folder where the features'
  examples lie already (and once into an empty one), with its stages.
- Opening: from the navigation to the graph and the panel, with a node in the address also to that
  node's edges, heads and table, in the system's Chromium; what of it is the page's own.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' browser

import pytest
import shapes
import torch
from measuring import Row
from transformer_lens import HookedTransformer, HookedTransformerConfig

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.dictionaries.dictionary import Dictionary
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.frontend import server
from circuit_tracer_qk.graph_files import create as export
from circuit_tracer_qk.model.run import freeze

SLUG = "large"
VOCAB = 1000
TARGET_WRITE, TARGET_OPEN, TARGET_BYTES = 2.0, 3.0, 40_000_000


class Shape(NamedTuple):
    """What is measured.

    Attributes:
        model: of TransformerLens' configuration.
        tokens, active, width: of the prompt, of the features of a position, of a dictionary.
        kept: feature nodes, circuit-tracer's ``max_feature_nodes``.
        node_threshold, edge_threshold: of the pruning, so that some 20,000 links are left.
        growth: how much more strongly than the last each block's attention writes.
        tables: how many to write, if links require fewer; with more than fit, some go beside.
    """

    model: dict[str, Any]
    tokens: int
    active: int
    width: int
    kept: int
    node_threshold: float
    edge_threshold: float
    growth: float = 1.5
    tables: int = 512


GPT2 = {"n_layers": 12, **shapes.GPT2}
GEMMA = {"n_layers": 26, "d_model": 2304, "n_heads": 8, "n_key_value_heads": 4, "d_head": 256}
GEMMA |= {"d_mlp": 9216, "act_fn": "gelu_pytorch_tanh", "gated_mlp": True, "rotary_dim": 256}
GEMMA |= {"normalization_type": "RMS", "positional_embedding_type": "rotary"}
SHAPES = {
    "gpt2-small": Shape(GPT2, 64, 50, 2048, 3000, 0.8, 0.83),
    "gpt2-small, spread": Shape(GPT2, 128, 12, 2048, 3000, 0.9, 0.75),
    "gpt2-small, 5,000 tables": Shape(GPT2, 128, 12, 2048, 3000, 0.9, 0.75, tables=5000),
    "gemma-2-2b": Shape(GEMMA, 48, 30, 1024, 2500, 0.9, 0.92, 1.2),
}
USUAL = [name for name in SHAPES if not name.startswith("gemma")]  # it takes 10 GB and minutes


def _row(name: str, values: list[float], unit: str, note: str = "") -> Row:
    return Row(name, values, unit, note=note)


def random_model(shape: Shape) -> HookedTransformer:
    """A random model whose heads look at few positions and write strongly."""
    cfg = HookedTransformerConfig(
        n_ctx=shape.tokens, d_vocab=VOCAB, seed=0, device="cpu", **shape.model
    )
    model = HookedTransformer(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name or name.endswith(".b"):
                parameter.normal_(0, 0.02)
            elif name.endswith(".w"):
                parameter.normal_(1, 0.1)
            elif ".W_Q" in name or ".W_K" in name:
                parameter.mul_(4)
            elif ".W_O" in name:
                parameter.mul_(8 * shape.growth ** int(name.split(".")[1]))
    return model.requires_grad_(False)


def fitted_dictionaries(
    model: HookedTransformer, tokens: torch.Tensor, shape: Shape
) -> DictionarySet:
    """Random features of given number that reconstruct 95% of this prompt's stream."""
    run = freeze(model, tokens)
    d_model, generator = run.residual.shape[2], torch.Generator().manual_seed(1)
    found = {}
    for c in range(1, run.n_layers + 1):
        x = run.residual[c]
        chosen = [torch.randperm(shape.width, generator=generator) for _ in tokens]
        at = torch.stack(chosen)[:, : shape.active]
        acts = torch.zeros(shape.tokens, shape.width)
        acts.scatter_(1, at, 0.5 + 5 * torch.rand(at.shape, generator=generator))
        acts[0] = 0
        decoder = torch.randn(shape.width, d_model, generator=generator) / d_model**0.5
        decoder *= 0.1 * x.norm(dim=1).mean() / shape.active**0.5
        decoder += torch.linalg.pinv(acts[1:]) @ (0.95 * x[1:] - acts[1:] @ decoder)
        found[c] = Dictionary(
            checkpoint=c,
            W_enc=decoder,
            b_enc=torch.zeros(shape.width),
            b_dec=torch.randn(d_model, generator=generator) * 1e-3,
            decoders={c: decoder},
            encoder=lambda _, acts=acts: acts,
        )
    named = DictionarySet("residual_sae_set", "hook_resid_post", "random/saes", None, found)
    labels = [f"feature {i}: a label of some words" for i in range(shape.width)]
    vars(named)["labels"] = {str(c - 1): labels for c in found}
    return named


def made_graph(shape: Shape) -> ctqk.ResidualGraph:
    """The graph that is written."""
    torch.manual_seed(0)
    tokens = torch.randint(VOCAB, (shape.tokens,))
    model = random_model(shape)
    dictionaries = fitted_dictionaries(model, tokens, shape)
    loaded = ctqk.load_model(model, dictionaries=dictionaries)
    return ctqk.attribute(tokens, loaded, max_feature_nodes=shape.kept)


# Writing


STAGES = {
    "prune": (export, "circuit-tracer's pruning, nodes"),
    "links": (ctqk.ResidualGraph, "links with head loadings"),
    "select_tables": (export, "tables"),
    "encode_files": (export, "JSON"),
    "write_features": (export, "features' examples"),
    "replace_files": (export, "to the disk"),
}


@contextmanager
def stages() -> Iterator[dict[str, list[float]]]:
    """Seconds of each stage of ``create_graph_files``, one entry a call."""
    seconds: dict[str, list[float]] = {name: [] for name in STAGES}
    before = {name: getattr(home, name) for name, (home, _) in STAGES.items()}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return before[name](*args, **options)
            finally:
                seconds[name].append(time.perf_counter() - start)

        return call

    for name, (home, _) in STAGES.items():
        setattr(home, name, watched(name))
    try:
        yield seconds
    finally:
        for name, (home, _) in STAGES.items():
            setattr(home, name, before[name])


def measure_writing(
    name: str, graph: ctqk.ResidualGraph, shape: Shape, repeats: int, folder: Path
) -> list[Row]:
    """Rows of one shape; the files are left in the folder."""

    processor: list[float] = []

    def write() -> float:
        start, begun = time.perf_counter(), time.process_time()
        thresholds = shape.node_threshold, shape.edge_threshold
        ctqk.create_graph_files(
            graph, SLUG, folder, *thresholds, max_tables=shape.tables, max_bytes=1 << 30
        )
        processor.append(time.process_time() - begun)
        return time.perf_counter() - start

    first = write()
    for scan in folder.iterdir():  # the examples again, with everything else warm
        if scan.is_dir():
            shutil.rmtree(scan)
    cold = write()
    with stages() as seconds:
        whole = [write() for _ in range(repeats)]
    path = folder / f"{SLUG}.json"
    document = json.loads(path.read_bytes())
    qk = document["qk"]
    beside = [folder / side["file"] for side in qk.get("sidecars", {}).values()]
    n_beside = sum(len(side["tables"]) for side in qk.get("sidecars", {}).values())
    features = len(list((folder / "random--saes").iterdir()))
    counted = f"{len(document['links']):,} links, {len(document['nodes']):,} nodes"
    tables = f"{len(qk['attributions']):,} tables in the file, {n_beside:,} in {len(beside)} others"
    limit = f"target: under {TARGET_WRITE:g} s"
    rows = [_row(f"write, {name}", whole, "s", f"{counted}; {limit}")]
    rows += [Row(f"  {STAGES[stage][1]}", times, "s") for stage, times in seconds.items()]
    rows.append(_row("  the processor's time, of all threads", processor[-repeats:], "s"))
    rows += [
        _row(f"write, {name}: into an empty folder", [cold], "s", f"{features:,} features' files"),
        _row(f"write, {name}: the first of the process", [first], "s", "into an empty folder too"),
        _row(
            f"size, {name}",
            [float(path.stat().st_size)],
            "MB",
            f"{tables}; target: at most {TARGET_BYTES / 1e6:g} MB",
        ),
    ]
    if beside:
        rows.append(_row("  sidecars", [float(sum(p.stat().st_size for p in beside))], "MB"))
    return rows


# Opening


def measure_opening(name: str, folder: Path, repeats: int) -> list[Row]:
    """Rows of the page opened anew, each time in a context without a cache."""
    from helpers.browsing import launched

    document = json.loads((folder / f"{SLUG}.json").read_bytes())
    traced = [node for node in document["nodes"] if "qk_tracing_results" in node]
    clicked = traced[len(traced) // 2]["node_id"]
    running = server.serve(folder, port=server.next_free_port(18_600))
    address = f"{running.url}/index.html?slug={SLUG}"
    seconds: dict[str, list[float]] = {key: [] for key in ("graph", "node", "file", "page")}
    try:
        with launched() as browser:
            for turn in range(repeats + 1):
                for what, url in (("graph", address), ("node", f"{address}&clickedId={clicked}")):
                    context = browser.new_context(viewport={"width": 1920, "height": 1080})
                    page = context.new_page()
                    start = time.perf_counter()
                    page.goto(url)
                    page.locator(".link-graph .node").first.wait_for()
                    last = ".qk-edges .qk-state" if what == "graph" else '[data-qk="query-term"]'
                    page.locator(f".qk-panel {last}").first.wait_for()
                    page.evaluate("new Promise(d => requestAnimationFrame(() => setTimeout(d)))")
                    took = time.perf_counter() - start
                    sent = page.evaluate(
                        """name => { var d = performance.getEntriesByType('resource')
                        .find(d => d.name.endsWith(name)); return (d.responseEnd - d.startTime)/1000 }""",
                        f"{SLUG}.json",
                    )
                    context.close()
                    if turn:
                        seconds[what].append(took)
                        if what == "graph":
                            seconds["file"].append(sent)
                            seconds["page"].append(took - sent)
    finally:
        running.stop()
    limit = f"target: under {TARGET_OPEN:g} s"
    return [
        _row(f"open, {name}", seconds["graph"], "s", f"graph and panel; {limit}"),
        _row("  the file on its way, compressed", seconds["file"], "s"),
        _row("  all else", seconds["page"], "s", "page, parsing, circuit-tracer's drawing, panel"),
        _row(f"open, {name}: at a node", seconds["node"], "s", "to its edges, heads and table"),
    ]


def measure(names: list[str] | None = None, repeats: int = 5, opening: bool = True) -> list[Row]:
    """All rows of some shapes, the usual ones if none is named."""
    rows = []
    for name in names or USUAL:
        rows += measure_shape(name, repeats, opening)
    return rows


def measure_shape(name: str, repeats: int = 5, opening: bool = True) -> list[Row]:
    """All rows of one shape."""
    shape = SHAPES[name]
    graph = made_graph(shape)
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure_writing(name, graph, shape, repeats, Path(temporary))
        del graph
        if not opening:
            return rows
        try:
            return rows + measure_opening(name, Path(temporary), repeats)
        except pytest.skip.Exception as without:
            print(f"not opened: {without.msg}", file=sys.stderr)
            return rows
