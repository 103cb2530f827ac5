"""How fast the closed form is: edges against autograd, QK tables against bare matrix products.

    python tests/benchmarks/run.py [--threads N] [--repeats R] [--tokens 32 128] [--json FILE]

Both sides of every ratio are measured in turns within one run, and must give the same numbers.

- Edges: every target x every source across one gpt2-small block (checkpoint 1 to 2), residual SAEs
  with 50 active features a position. The reference is autograd through that block alone with
  attention patterns and norm denominators frozen, no gradients for weights, a batched backward and
  the best of several batch sizes; its forward pass is not counted, and it is timed on a sample of
  targets spread over all positions.
- QK tables: the 50 largest terms of one head's query for each of its keys, against
  ``(q @ k.T / scale).flatten().abs().topk(50)`` in a loop over images projected beforehand.

Nothing here is a test; ratios vary with the machine and with what else runs on it.
Ask for no more threads than there are idle cores: with two threads on two busy cores both sides
were many times slower than with one, and the ratio at 32 tokens fell from 26x to 3x.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the package of this checkout

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from circuit_tracer_qk.components import Decomposition, decompose
from circuit_tracer_qk.dictionaries import Dictionary, DictionarySet
from circuit_tracer_qk.frozen import freeze
from circuit_tracer_qk.heads import Heads, read_blocks
from circuit_tracer_qk.influence import Rows, Sweep
from circuit_tracer_qk.qk import QK, TopTerms

LAYER = 1  # the block measured, of two
VOCAB = 100
BATCH_SIZES = (32, 64, 128, 256)  # of the reference's backward
OUR_BATCH = 512  # the default of circuit_tracer_qk.attribute
TOP = 50
QK_SHAPES = ((81, 32), (321, 128))  # components a side, d_head
QK_TOKENS = 64
AGREEMENT = 1e-4  # largest difference allowed, of the largest value
TARGET_RATIOS = {32: 25.0, 128: 60.0}
TARGET_QK = 1.5


@dataclass
class Row:
    """One line of the printed table: seconds (or ratios, without a unit) of all repeats."""

    name: str
    values: list[float]
    unit: str
    note: str = ""

    def __str__(self) -> str:
        scale = {"ms": 1e3, "s": 1.0, "x": 1.0}[self.unit]
        middle, low, high = (scale * f(self.values) for f in (median, min, max))
        return f"{self.name:58} {middle:9.3f} {self.unit:2} ({low:.3f} - {high:.3f})  {self.note}"


def timed(
    work: dict[str, Callable[[], object]], beside: Callable[[], object], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each piece of work and of what runs right before it, after an uncounted turn.

    What else runs on the machine then slows both sides of a ratio alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    neighbours: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, run in work.items():
            pair = _seconds(beside), _seconds(run)
            if turn:
                neighbours[name].append(pair[0])
                seconds[name].append(pair[1])
    return seconds, neighbours


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """Ratio of each pair."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def random_model(n_pos: int, **shape: Any) -> HookedTransformer:
    """A random two-block model, every gain and bias random."""
    cfg = HookedTransformerConfig(
        n_layers=2, n_ctx=n_pos, d_vocab=VOCAB, seed=0, device="cpu", **shape
    )
    model = HookedTransformer(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name or name.endswith(".b"):
                # RMSNorm models get no constants, so that a table has features, b_dec, error only
                parameter.normal_(0, 0.1 if cfg.normalization_type == "LN" else 0.0)
            elif name.endswith(".w"):
                parameter.normal_(1, 0.2)
    return model.requires_grad_(False)


def random_decomposition(
    model: HookedTransformer, n_pos: int, active: int, d_dict: int
) -> tuple[Decomposition, Heads]:
    """A random prompt with TopK SAEs at checkpoints 1 and 2; no features at the first position."""
    d_model = model.cfg.d_model
    by_checkpoint = {}
    for c in (1, 2):
        decoder = torch.randn(d_dict, d_model) / d_model**0.5
        by_checkpoint[c] = Dictionary(
            checkpoint=c,
            W_enc=torch.randn(d_dict, d_model) / d_model**0.5,
            b_enc=torch.zeros(d_dict),
            b_dec=torch.randn(d_model) * 0.1,
            decoders={c: decoder},
            k=active,
        )
    dictionaries = DictionarySet("residual_sae_set", "hook_resid_post", "rnd", None, by_checkpoint)
    run = freeze(model, torch.randint(VOCAB, (n_pos,)))
    return decompose(run, dictionaries, slice(0, 1)), Heads(read_blocks(model, n_pos), run)


# Edges


class AutogradBlock:
    """The reference: one block as plain torch, patterns and norm denominators frozen."""

    def __init__(self, model: HookedTransformer, parts: Decomposition, batch: int) -> None:
        block: Any = model.blocks[LAYER]
        run = parts.run
        pattern = run.pattern[LAYER]
        ln1, ln2 = run.scale("ln1", LAYER)[:, None], run.scale("ln2", LAYER)[:, None]
        heads, d_model, d_head = block.attn.W_V.shape
        # all heads in one matrix, as Hugging Face's GPT-2 has them
        W_V = block.attn.W_V.transpose(0, 1).reshape(d_model, heads * d_head)
        W_O = block.attn.W_O.reshape(heads * d_head, d_model)

        def norm(x: Tensor, scale: Tensor, module: Any) -> Tensor:
            return (x - x.mean(-1, keepdim=True)) / scale * module.w + module.b

        self.x = run.residual[LAYER].expand(batch, -1, -1).clone().requires_grad_()
        v = norm(self.x, ln1, block.ln1) @ W_V + block.attn.b_V.flatten()
        z = pattern @ v.unflatten(-1, (heads, d_head)).transpose(1, 2)
        mid = self.x + z.transpose(1, 2).flatten(2) @ W_O + block.attn.b_O
        pre = norm(mid, ln2, block.ln2) @ block.mlp.W_in + block.mlp.b_in
        self.out = mid + F.gelu(pre, approximate="tanh") @ block.mlp.W_out + block.mlp.b_out
        self.parts = parts
        self.sources = parts.at(LAYER)
        self.vectors = self.sources.vectors()

    def rows(self, features: Tensor) -> Iterator[Tensor]:
        """(batch, n_sources) edges of feature targets, by full batches."""
        batch = len(self.x)
        for chunk in features.split(batch):
            n = len(chunk)
            gradient = torch.zeros_like(self.out)
            position = self.parts.features.position[chunk]
            gradient[torch.arange(n), position] = self.parts.features.vectors(chunk, LAYER + 1)
            (pulled,) = torch.autograd.grad(self.out, self.x, gradient, retain_graph=True)
            edges = pulled.new_empty(n, len(self.vectors))
            for p in range(pulled.shape[1]):
                here = self.sources.at(p)
                edges[:, here] = pulled[:n, p] @ self.vectors[here].T
            yield edges


def measure_edges(n_pos: int, repeats: int, sample: int) -> list[Row]:
    """Our rows of all targets against the reference's."""
    torch.manual_seed(0)
    model = random_model(
        n_pos,
        d_model=768,
        n_heads=12,
        d_head=64,
        d_mlp=3072,
        act_fn="gelu_pytorch_tanh",
        normalization_type="LN",
        positional_embedding_type="standard",
    )
    parts, heads = random_decomposition(model, n_pos, active=50, d_dict=4096)
    sweep = Sweep(model, parts, heads, torch.empty(0, 768), False, OUR_BATCH, False)
    every = sweep.some()
    targets = (parts.features.checkpoint == LAYER + 1).nonzero().squeeze(1)
    sampled = targets[torch.linspace(0, len(targets) - 1, sample).long()]

    @torch.no_grad()
    def ours() -> list[Rows]:
        return list(sweep.feature_rows(LAYER + 1, every))

    our_edges = torch.cat([rows.weights for rows in ours()])[sampled - targets[0]]
    work: dict[str, Callable[[], object]] = {}
    worst = 0.0
    for batch in BATCH_SIZES:
        reference = AutogradBlock(model, parts, batch)
        edges = torch.cat(list(reference.rows(sampled)))
        worst = max(worst, float((edges - our_edges).abs().max() / edges.abs().max()))
        work[f"{batch}"] = lambda reference=reference: list(reference.rows(sampled))
    if worst > AGREEMENT:
        raise SystemExit(f"the edges differ by {worst:.1e} of their scale")

    seconds, mine = timed(work, ours, repeats)
    whole = len(targets) / len(sampled)
    theirs = {batch: [whole * s for s in times] for batch, times in seconds.items()}
    best = min(theirs, key=lambda batch: median(theirs[batch]))
    distinct = len(parts.features.decoders[LAYER + 1, LAYER + 1])
    shape = f"{len(targets)} targets ({distinct} distinct) x {len(parts.at(LAYER).kind)} sources"
    goal = f"target: at least {TARGET_RATIOS[n_pos]:g}x" if n_pos in TARGET_RATIOS else ""
    name = f"edges, {n_pos} tokens"
    return [
        Row(f"{name}: this package", sum(mine.values(), []), "s", shape),
        *(
            Row(f"{name}: autograd, batch {batch}", times, "s", f"from {len(sampled)} targets")
            for batch, times in theirs.items()
        ),
        Row(
            f"{name}: ratio to autograd at batch {best}",
            ratios(theirs[best], mine[best]),
            "x",
            f"{goal}; same edges to {worst:.0e}",
        ),
    ]


# QK tables


def measure_qk(n_components: int, d_head: int, repeats: int) -> list[Row]:
    """Tables of one query over all its keys, per table, against bare products."""
    torch.manual_seed(0)
    n_heads, head, query = 4, 2, QK_TOKENS - 1
    model = random_model(
        QK_TOKENS,
        d_model=n_heads * d_head,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=n_heads * d_head,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
    )
    active = n_components - 2  # and b_dec and error
    parts, heads = random_decomposition(model, QK_TOKENS, active, d_dict=4 * n_components)
    checkpoint = parts.at(LAYER)
    scale = heads.block(LAYER).attn_scale
    vectors = checkpoint.vectors()
    q = heads.queries(LAYER, vectors, checkpoint.position, head)[checkpoint.at(query)].contiguous()
    k = heads.keys(LAYER, vectors, checkpoint.position, head)
    ks = [k[checkpoint.at(p)].contiguous() for p in range(QK_TOKENS)]

    def new() -> QK:
        return QK(parts, heads, lambda c, f: "")

    def bare() -> list[Tensor]:
        found = []
        for image in ks:
            terms = (q @ image.T / scale).flatten()
            found.append(terms[terms.abs().topk(min(TOP, len(terms))).indices])
        return found

    qk = new()

    def top() -> TopTerms:
        return qk.top(LAYER, head, query, TOP)

    def cold() -> TopTerms:
        return new().top(LAYER, head, query, TOP)

    def single() -> None:
        for key in range(QK_TOKENS):
            qk.table(LAYER, head, query, key).top(TOP)

    for theirs, mine in zip(bare(), top().values, strict=True):
        difference = (theirs - mine[: len(theirs)]).abs().max() / theirs.abs().max()
        if float(difference) > AGREEMENT:
            raise SystemExit(f"the terms differ by {float(difference):.1e} of their scale")
    with torch.no_grad():
        seconds, bares = timed({"top": top, "cold": cold, "single": single}, bare, 4 * repeats)
    each = {name: [s / QK_TOKENS for s in times] for name, times in seconds.items()}
    each["bare"] = [s / QK_TOKENS for s in bares["top"]]
    name = f"QK {n_components}x{n_components}, d_head {d_head}"
    note = f"a table, of {QK_TOKENS} keys"
    return [
        Row(f"{name}: bare products with topk", each["bare"], "ms", note),
        Row(f"{name}: QK.top", each["top"], "ms", note),
        Row(
            f"{name}: ratio of QK.top to bare",
            ratios(each["top"], each["bare"]),
            "x",
            f"target: at most {TARGET_QK:g}x",
        ),
        Row(f"{name}: QK.top with projections", each["cold"], "ms", note),
        Row(f"{name}: QK.table(...).top one by one", each["single"], "ms", note),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--sample", type=int, default=256, help="targets the reference is timed on")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "repeats": arguments.repeats,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("median (least - most) of the repeats")
    rows: list[Row] = []
    repeats = arguments.repeats
    edges = (measure_edges(n_pos, repeats, arguments.sample) for n_pos in arguments.tokens)
    tables = (measure_qk(*shape, repeats) for shape in QK_SHAPES)
    for measured in chain(edges, tables):
        print(*measured, sep="\n", flush=True)
        rows += measured
    if arguments.json:
        results = [row.__dict__ | {"median": median(row.values)} for row in rows]
        arguments.json.write_text(json.dumps({**machine, "rows": results}, indent=1))


if __name__ == "__main__":
    main()
