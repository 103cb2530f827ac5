"""What heads cost on a transcoder graph: everything that ``--qk`` adds, against ``attribute``.

    python tests/benchmarks/transcoders.py [--threads N] [--json FILE]

A random model of 6 layers and d_model 512, 64 tokens, about 10,000 active features of which 2,000
are kept. One process attributes alone, with circuit-tracer's own graph files; another does the
same and explains: head loadings of every kept edge at every block, QK attributions, and the graph
file with them. Their times and peak memory are compared, and what an edge costs with what one
frozen forward and backward pass for it would.

Nothing here is a test; ratios vary with the machine and with what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # what tests share
sys.path.insert(0, str(Path(__file__).parents[2]))  # the package of this checkout

import circuit_tracer
import torch
from helpers.random_transcoders import Tokenizer, random_transcoders
from transformer_lens import HookedTransformer, HookedTransformerConfig

import circuit_tracer_qk as ctqk
from circuit_tracer_qk.attribution.transcoder.cuts import Listing
from circuit_tracer_qk.graph_files.nodes import prune

N_LAYERS, D_MODEL, N_POS, VOCAB, D_DICT = 6, 512, 64, 1000, 512
KEPT = 2000
QUIET = 2.5  # taken off every encoder bias: about 26 features are active at each place
PASSES = 40  # single passes timed


def build() -> Any:
    """The random replacement model."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (
        TransformerLensReplacementModel,
    )

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_ctx=N_POS,
        d_head=64,
        n_heads=8,
        d_vocab=VOCAB,
        act_fn="gelu",
        d_mlp=4 * D_MODEL,
        normalization_type="LN",
        device="cpu",
        seed=0,
        model_name="random",
        original_architecture="GPT2LMHeadModel",
    )
    model: Any = HookedTransformer(cfg)
    transcoders: Any = random_transcoders(
        N_LAYERS, D_MODEL, "relu", "hook_resid_mid", "hook_mlp_out", D_DICT
    )
    with torch.no_grad():
        for block, transcoder in zip(model.blocks, transcoders, strict=True):
            block.attn.W_Q *= 3
            block.attn.W_K *= 3
            transcoder.b_enc -= QUIET
    model.__class__ = TransformerLensReplacementModel
    model._configure_replacement_model(transcoders)
    model.tokenizer = Tokenizer(VOCAB)
    model.requires_grad_(False)
    return model


def measure(explain: bool) -> dict[str, float]:
    """One process's work: seconds of each step, and its peak memory."""
    model = build()
    ids = torch.randint(VOCAB, (N_POS,), generator=torch.Generator().manual_seed(1))
    clock = time.perf_counter
    start = clock()
    graph = circuit_tracer.attribute(
        ids, model, max_n_logits=5, max_feature_nodes=KEPT, batch_size=256
    )
    out: dict[str, float] = {"attribute": clock() - start, "active": len(graph.active_features)}
    if explain:
        start = clock()
        explained = ctqk.explain_graph(graph, model)
        out["explain"] = clock() - start
        with tempfile.TemporaryDirectory() as folder:
            start = clock()
            path = ctqk.create_graph_files(explained, "bench", folder)
            out["files"] = clock() - start
            out["megabytes"] = path.stat().st_size / 1e6
            out["tables"] = len(json.loads(path.read_bytes())["qk"]["attributions"])
        kept = prune(explained, 0.8, 0.98)
        out["edges"] = len(kept.sources)
        for name, listing in (("split", None), ("split and pairs", Listing())):
            start = clock()
            explained.split(kept.sources, kept.targets, listing)
            out[name] = clock() - start
        out["one pass"] = one_pass(model, ids)
    out["peak memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return out


def one_pass(model: Any, ids: torch.Tensor) -> float:
    """Seconds that circuit-tracer takes for one more backward pass of one row."""

    def seconds(rows: int) -> float:
        start = time.perf_counter()
        circuit_tracer.attribute(ids, model, max_n_logits=1, max_feature_nodes=rows, batch_size=1)
        return time.perf_counter() - start

    return (seconds(5 + PASSES) - seconds(5)) / PASSES


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=["attribute", "explain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part:
        print(json.dumps(measure(args.part == "explain")))
        return
    parts = {}
    for part in ("attribute", "explain"):
        command = [sys.executable, __file__, "--threads", str(args.threads), "--part", part]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        parts[part] = json.loads(done.stdout.splitlines()[-1])
    alone, both = parts["attribute"], parts["explain"]
    added = both["explain"] + both["files"]
    lines = [
        f"{platform.processor() or platform.machine()}, {args.threads} threads, "
        f"torch {torch.__version__}",
        f"attribute: {both['attribute']:.1f} s for {both['active']:.0f} active features, "
        f"{KEPT} kept",
        f"added: {added:.1f} s, {added / both['attribute']:.2f} of it: explain "
        f"{both['explain']:.1f} s, files {both['files']:.1f} s ({both['edges']:.0f} edges, "
        f"{both['tables']:.0f} tables, {both['megabytes']:.0f} MB)",
        f"an edge by head at every block: {1e3 * both['split'] / both['edges']:.3f} ms "
        f"({1e3 * both['split and pairs'] / both['edges']:.3f} ms with pairs of positions); one "
        f"backward pass: {1e3 * both['one pass']:.1f} ms, "
        f"{both['one pass'] * both['edges'] / both['split']:.0f} times as long",
        f"peak memory: {both['peak memory']:.2f} GB, {alone['peak memory']:.2f} GB without "
        f"({both['peak memory'] / alone['peak memory']:.2f} times)",
    ]
    print(*lines, sep="\n")
    if args.json:
        args.json.write_text(json.dumps(parts, indent=2))


if __name__ == "__main__":
    main()
