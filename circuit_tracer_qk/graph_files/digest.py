"""Which graph a file is of: a digest of the graph's content, the same in every process."""

from __future__ import annotations

import json
from hashlib import sha256

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.graph import ExplainedGraph
from circuit_tracer_qk.host import graph as host


def graph_digest(graph: ExplainedGraph) -> str:
    """32 hexadecimal digits, of the bytes that the graph's ``.pt`` holds.

    These are its nodes, activations, tokens, logits and edges, the kind of graph and its
    dictionaries. A graph that was saved has the same digest when it is loaded. Graph files written
    under other thresholds have the same one, too: they show the same graph.
    """
    arguments = host.arguments_of(graph)
    tensors = {name: t for name, t in sorted(arguments.items()) if isinstance(t, Tensor)}
    shapes = {name: [str(t.dtype), *t.shape] for name, t in tensors.items()}
    logits = [int(target[1]) for target in graph.logit_targets]
    about = [graph.kind, host.graph_scan(graph), logits, shapes]
    digest = sha256(json.dumps(about).encode())
    for tensor in tensors.values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
