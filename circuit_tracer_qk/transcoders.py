"""What the nodes of a transcoder graph write and read, and the split of its edges.

An existing circuit-tracer graph is read as it is: its adjacency stays the host's, and is what the
parts must sum to (method, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuit_tracer_qk import host
from circuit_tracer_qk.carry import Carrier
from circuit_tracer_qk.errors import UserError
from circuit_tracer_qk.frozen import FrozenRun, freeze
from circuit_tracer_qk.heads import Heads, logit_directions, read_blocks
from circuit_tracer_qk.ports import read_ports
from circuit_tracer_qk.splits import Reads, Splits, Writes, split_edges

AGREES = 1e-3  # how far an edge may differ from the host's, as a share of the largest


@dataclass(frozen=True, eq=False)
class TranscoderRun:
    """One prompt on a replacement model, frozen, with what every node writes and reads.

    Attributes:
        run: the frozen run.
        carrier: the blocks without MLPs.
        writes: of every source, by node index in adjacency order; active features that the graph
            left out have the indices from ``n_nodes`` on.
        reads: of every target: the graph's features, then its logits.
        n_features: features in the graph.
        n_nodes: nodes in the graph.
    """

    run: FrozenRun
    carrier: Carrier
    writes: Writes
    reads: Reads
    n_features: int
    n_nodes: int

    def split(self, source: Tensor, target: Tensor) -> Splits:
        """Split edges between nodes in adjacency order, as (n,) indices."""
        n_logits = len(self.reads.layer) - self.n_features
        first_logit = self.n_nodes - n_logits
        row = torch.where(target < self.n_features, target, target - first_logit + self.n_features)
        return split_edges(self.carrier, self.writes, self.reads, source, row)


@torch.no_grad()
def read_transcoder_graph(model: Any, graph: host.Graph, columns: Tensor) -> TranscoderRun:
    """Read a graph that circuit-tracer made, with the replacement model that it was made with.

    Args:
        model: the replacement model (TransformerLens backend).
        graph: of ``circuit_tracer.attribute``.
        columns: (n_logits, d_model) demeaned unembedding columns of the graph's logits.

    Raises:
        UserError: the model is of another backend, is not done exactly, or did not make the graph.
    """
    if not hasattr(model, "blocks"):
        raise UserError(
            "this replacement model is of the nnsight backend: load it with "
            'backend="transformerlens" to explain its heads.'
        )
    _refuse_shared_rotary(model)
    tokens = graph.input_tokens.to(model.W_E.device)
    nodes = host.transcoder_nodes(model, tokens)
    if not torch.equal(nodes.active.cpu(), graph.active_features.cpu().to(nodes.active.dtype)):
        raise UserError(
            "the graph was made with another model or other transcoders: its active features are "
            "not theirs; name the ones that it was made with."
        )
    run = freeze(model, tokens)
    ports = read_ports(model.blocks, run, *host.transcoder_hooks(model), host.skip_weights(model))
    carrier = Carrier(Heads(read_blocks(model, run.n_pos), run), ports)
    selected = graph.selected_features.to(run.residual.device)
    n_features, n_nodes = len(selected), len(graph.adjacency_matrix)
    return TranscoderRun(
        run=run,
        carrier=carrier,
        writes=_writes(nodes, carrier, selected, n_features, n_nodes),
        reads=_reads(model, nodes, carrier, selected, columns),
        n_features=n_features,
        n_nodes=n_nodes,
    )


def _writes(
    nodes: host.TranscoderNodes, carrier: Carrier, selected: Tensor, n_features: int, n_nodes: int
) -> Writes:
    run = carrier.heads.run
    dtype, device = run.residual.dtype, run.residual.device
    n_layers, n_pos = run.n_layers, run.n_pos
    node = torch.arange(len(nodes.active), device=device) + n_nodes
    node[selected] = torch.arange(n_features, device=device)
    places = torch.arange(n_pos, device=device)
    source = [node[nodes.decoder_feature]]
    layer, position = [nodes.decoder_layer], [nodes.decoder_position]
    vector = [nodes.decoders.to(dtype)]
    for at in range(n_layers):
        source.append(n_features + at * n_pos + places)
        layer.append(torch.full_like(places, at))
        position.append(places)
        vector.append(nodes.errors[at].to(dtype))
    written = Writes(*map(torch.cat, (source, layer, position, vector)))
    for at in range(n_layers):
        here = written.layer == at
        added = carrier.ports[at].written(written.vector[here], written.position[here])
        written.vector[here] = added
    tokens = Writes(
        n_features + n_layers * n_pos + places,
        torch.full_like(places, -1),
        places,
        nodes.tokens.to(dtype),
    )
    return Writes(*(torch.cat(pair) for pair in zip(written, tokens, strict=True)))


def _reads(
    model: Any, nodes: host.TranscoderNodes, carrier: Carrier, selected: Tensor, columns: Tensor
) -> Reads:
    run = carrier.heads.run
    layer, position = nodes.active[selected, 0], nodes.active[selected, 1]
    row = nodes.encoders[selected].to(run.residual.dtype)
    for at in range(run.n_layers):
        here = layer == at
        row[here] = carrier.ports[at].pull_read(row[here], position[here])
    logits = logit_directions(model, run, columns.to(run.residual.device))
    of_logits = layer.new_full((len(logits),), run.n_layers)
    at_end = position.new_full((len(logits),), run.n_pos - 1)
    return Reads(*map(torch.cat, ((layer, of_logits), (position, at_end), (row, logits))))


def _refuse_shared_rotary(model: Any) -> None:
    """Refuse a host that runs local and global layers with one table where they need two."""
    cfg = model.cfg
    local = getattr(cfg, "rotary_base_local", None)
    kinds = {block.attn.attn_type: block.attn for block in model.blocks}
    if local in (None, cfg.rotary_base) or len(kinds) < 2:
        return
    first, second = (attn.rotary_cos for attn in kinds.values())
    if first is second or torch.equal(first, second):
        raise UserError(
            f"circuit-tracer runs {cfg.model_name} with one rotary table for its local and global "
            "layers, so its graphs are not the model's: use its nnsight backend for this model."
        )


__all__ = ["AGREES", "TranscoderRun", "read_transcoder_graph"]
