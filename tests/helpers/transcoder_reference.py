"""A transcoder graph's edges, independently: Hugging Face weights, autograd through a frozen pass.

Shares no code with the package or with circuit-tracer. Patterns, the denominators of all norms and
what the MLPs write are constants; sources write into the stream, targets read it, in float64.
For transcoders without a skip that read ``mlp.hook_in`` and write ``hook_mlp_out``, in models whose
blocks are sequential.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.reference import Reference, Run

FIRST = -1  # what tokens write enters the first block


class Frozen(NamedTuple):
    """The stream as a function of what is written, everything else held fixed.

    Attributes:
        written: by block, ``FIRST`` for what enters the first: (n_pos, d_model), zero, with gradient.
        read: by block, what its transcoder reads: (n_pos, d_model).
        last: (n_pos, d_model) what leaves the last block.
    """

    written: dict[int, Tensor]
    read: list[Tensor]
    last: Tensor


def frozen_pass(reference: Reference, run: Run) -> Frozen:
    """Run the model with its attention patterns, norms and MLPs held fixed."""
    zero = torch.zeros_like(run.residual[0])
    written = {at: zero.clone().requires_grad_() for at in range(FIRST, reference.n_layers)}
    x, read = run.residual[0] + written[FIRST], []
    for at, block in enumerate(reference.blocks):
        n = block.ln1(x, run.ln1[at]).expand(reference.n_heads, -1, -1)
        mid = x + block.post1(block.heads_write(n, run.pattern[at]), run.post1[at])
        read.append(block.ln2(mid, run.ln2[at]))
        mlp = run.residual[at + 1] - run.resid_mid[at]
        x = mid + mlp.detach() + written[at]
    return Frozen(written, read, x)


def adjacency(
    reference: Reference, run: Run, graph: Any, transcoders: Any, ids: list[int], n_zero: int = 1
) -> Tensor:
    """(n_nodes, n_nodes), in circuit-tracer's order, of the features and logits that a graph has.

    Args:
        reference: the model.
        run: its run on ``ids``.
        graph: which features were kept, and which logits.
        transcoders: circuit-tracer's ``TranscoderSet``, per-layer.
        ids: the prompt.
        n_zero: how many first positions have no features.
    """
    with torch.enable_grad():
        frozen = frozen_pass(reference, run)
    layers = [transcoders[at] for at in range(reference.n_layers)]
    active = torch.stack(
        [one.encode(x.detach().float()) for one, x in zip(layers, frozen.read, strict=True)]
    )
    active = active.double()
    active[:, :n_zero] = 0
    kept = graph.active_features[graph.selected_features].tolist()
    n_pos = len(ids)
    writes: list[tuple[int, int, Tensor]] = [  # block, position, vector
        (at, p, active[at, p, i] * layers[at].W_dec[i].double()) for at, p, i in kept
    ]
    for at, one in enumerate(layers):
        explained = active[at] @ one.W_dec.double() + one.b_dec.double()
        missed = run.residual[at + 1] - run.resid_mid[at] - explained
        missed[:n_zero] = 0
        writes += [(at, p, missed[p]) for p in range(n_pos)]
    writes += [(FIRST, p, reference.W_E[token]) for p, token in enumerate(ids)]
    block, position = torch.tensor([w[:2] for w in writes]).T
    vectors = torch.stack([w[2] for w in writes]).detach()
    out = torch.zeros(len(writes) + len(graph.logit_targets), len(writes), dtype=torch.float64)
    reads = [(layers[at].W_enc[i].double(), frozen.read[at][p]) for at, p, i in kept]
    for target in graph.logit_targets:
        reads.append((reference.logit_direction(run, int(target[1])), frozen.last[-1]))
    rows = [*range(len(kept)), *range(len(writes), len(out))]
    for row, (direction, x) in zip(rows, reads, strict=True):
        value = direction.detach() @ x
        gradients = torch.autograd.grad(
            value, list(frozen.written.values()), retain_graph=True, allow_unused=True
        )
        zero = torch.zeros_like(vectors[:1]).expand(n_pos, -1)
        stacked = torch.stack([zero if g is None else g for g in gradients])
        out[row] = (stacked[block - FIRST, position] * vectors).sum(-1)
    return torch.cat([out, out.new_zeros(len(out), len(graph.logit_targets))], 1)
