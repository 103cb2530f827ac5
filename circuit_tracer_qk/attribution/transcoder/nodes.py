"""What the nodes of a transcoder graph write and read, and the split of its edges.

An existing circuit-tracer graph is read as it is: its adjacency stays the host's, and is what the
parts must sum to (attribution/README.md, section 4). What flows through the model without being a node is here
too, so that the residual stream is a sum over all of it:

    residual[block] = sum over sources of their writes before the block, carried to it
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.transcoder.cuts import (
    Listing,
    Reads,
    Splits,
    Writes,
    split_edges,
)
from circuit_tracer_qk.attribution.transcoder.hookpoints import read_hook_points
from circuit_tracer_qk.attribution.transcoder.propagate import FrozenBlocks
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.heads import Heads, logit_directions
from circuit_tracer_qk.model.run import FrozenRun, freeze
from circuit_tracer_qk.model.supported import read_blocks


class StreamSource(NamedTuple):
    """What one source is.

    Attributes:
        kind: feature, error, embedding, position or bias.
        layer: the block of a feature, an error or a bias; -1 for what enters block 0.
        feature: its index; None for other kinds.
        position: where it is.
        activation: of a feature.
        label: what a source that is no node is called; empty for nodes.
    """

    kind: str
    layer: int
    feature: int | None
    position: int
    activation: float | None
    label: str = ""


@dataclass(frozen=True, eq=False)
class TranscoderRun:
    """One prompt on a replacement model, frozen, with what every node writes and reads.

    Attributes:
        run: the frozen run.
        blocks: the blocks without MLPs.
        writes: of every source: the graph's nodes by their index in adjacency order (logits write
            nothing), then the active features that the graph left out, then what is no node.
        reads: of every target: the graph's features, then its logits.
        sources: what each source is; None for logits.
        n_features: features in the graph.
        n_nodes: nodes in the graph.
    """

    run: FrozenRun
    blocks: FrozenBlocks
    writes: Writes
    reads: Reads
    sources: list[StreamSource | None]
    n_features: int
    n_nodes: int

    def split(
        self,
        source: Int[Tensor, " n"],
        target: Int[Tensor, " n"],
        listing: Listing | None = None,
        progress: bool = False,
    ) -> Splits:
        """Split edges between nodes in adjacency order."""
        n_logits = len(self.reads.layer) - self.n_features
        first_logit = self.n_nodes - n_logits
        row = torch.where(target < self.n_features, target, target - first_logit + self.n_features)
        return split_edges(self.blocks, self.writes, self.reads, source, row, listing, progress)


@torch.no_grad()
def read_transcoder_graph(
    model: Any, graph: host.Graph, columns: Float[Tensor, "n_logits d_model"]
) -> TranscoderRun:
    """Read a graph that circuit-tracer made, with the replacement model that it was made with.

    Args:
        model: the replacement model (TransformerLens backend), which :func:`check_model` accepts.
        graph: of ``circuit_tracer.attribute``.
        columns: demeaned unembedding columns of the graph's logits.

    Raises:
        UserError: the model is not done exactly, or did not make the graph.
    """
    tokens = graph.input_tokens.to(model.W_E.device)
    nodes = host.transcoder_nodes(model, tokens)
    if not torch.equal(nodes.active.cpu(), graph.active_features.cpu().to(nodes.active.dtype)):
        raise UserError(
            "the graph was made with another model or other transcoders: its active features are "
            f"not theirs; name the ones that it was made with{_or_again(model)}."
        )
    run = freeze(model, tokens)
    points = read_hook_points(
        model.blocks, run, *host.transcoder_hooks(model), host.skip_weights(model)
    )
    blocks = FrozenBlocks(Heads(read_blocks(model, run.n_pos), run), points)
    selected = graph.selected_features.to(run.residual.device)
    n_nodes = len(graph.adjacency_matrix)
    sources, writes = _nodes(nodes, blocks, selected, n_nodes)
    extra, more = _others(model, blocks, writes, len(sources))
    return TranscoderRun(
        run=run,
        blocks=blocks,
        writes=_joined([writes, more]),
        reads=_reads(model, nodes, blocks, selected, columns),
        sources=sources + extra,
        n_features=len(selected),
        n_nodes=n_nodes,
    )


def _nodes(
    nodes: host.TranscoderNodes, blocks: FrozenBlocks, selected: Tensor, n_nodes: int
) -> tuple[list[StreamSource | None], Writes]:
    """Features, errors and tokens: in the graph, then features that it left out."""
    run = blocks.heads.run
    dtype, device = run.residual.dtype, run.residual.device
    n_layers, n_pos, n_features = run.n_layers, run.n_pos, len(selected)
    features = zip(nodes.active.tolist(), nodes.activations.tolist(), strict=True)
    active = [StreamSource("feature", at, i, p, activation) for (at, p, i), activation in features]
    dropped = torch.ones(len(active), dtype=torch.bool, device=device)
    dropped[selected] = False
    left_out = dropped.nonzero().flatten()
    node = torch.empty(len(active), dtype=torch.long, device=device)
    node[selected] = torch.arange(n_features, device=device)
    node[left_out] = torch.arange(len(left_out), device=device) + n_nodes
    n_logits = n_nodes - n_features - (n_layers + 1) * n_pos
    sources: list[StreamSource | None] = [active[i] for i in selected.tolist()]
    slots = product(range(n_layers), range(n_pos))
    sources += [StreamSource("error", at, None, p, None) for at, p in slots]
    sources += [StreamSource("embedding", -1, None, p, None) for p in range(n_pos)]
    sources += [None] * n_logits
    sources += [active[i] for i in left_out.tolist()]

    places = torch.arange(n_pos, device=device)
    layer, position = nodes.decoder_layer, nodes.decoder_position
    parts = [Writes(node[nodes.decoder_feature], layer, position, nodes.decoders.to(dtype))]
    for at in range(n_layers):
        error = n_features + at * n_pos + places
        parts.append(Writes(error, torch.full_like(places, at), places, nodes.errors[at].to(dtype)))
    written = _joined(parts)
    for at in range(n_layers):
        here = written.layer == at
        writing = blocks.hook_points[at].writing(written.position[here])
        written.vector[here] = writing(written.vector[here])
    tokens = n_features + n_layers * n_pos + places, torch.full_like(places, -1), places
    return sources, _joined([written, Writes(*tokens, nodes.tokens.to(dtype))])


def _others(
    model: Any, blocks: FrozenBlocks, writes: Writes, first: int
) -> tuple[list[StreamSource], Writes]:
    """What flows without being a node: positions, biases, and MLPs where features are dropped."""
    run = blocks.heads.run
    places = torch.arange(run.n_pos, device=run.residual.device)
    sources: list[StreamSource] = []
    parts: list[Writes] = []

    def add(kind: str, layer: int, vectors: Tensor, label: str, at: Tensor = places) -> None:
        source = first + len(sources) + torch.arange(len(at), device=at.device)
        sources.extend(StreamSource(kind, layer, None, p, None, label) for p in at.tolist())
        parts.append(Writes(source, torch.full_like(at, layer), at, vectors))

    if run.position_embedding is not None:
        add("position", -1, run.position_embedding, "position")
    biases = host.transcoder_biases(model).to(run.residual)
    dropped = places[model.zero_positions]
    for layer in range(run.n_layers):
        b_dec = blocks.hook_points[layer].writing(places)(biases[layer].expand(run.n_pos, -1))
        add("bias", layer, b_dec, "b_dec")
        attention, skipped = blocks.constant(layer)
        if bool(attention.any()):
            add("bias", layer, attention, "attention biases")
        if bool(skipped.any()):
            add("bias", layer, skipped, "biases through the skip")
        # the MLP's write at positions without features is what the rest does not explain there
        out = blocks.block(layer)(run.residual[layer][None])[0]
        for known in (writes, *parts):
            here = known.layer == layer
            out.index_add_(0, known.position[here], known.vector[here])
        missing = (run.residual[layer + 1] - out)[dropped]
        add("error", layer, missing, "MLP where features are dropped", dropped)
    return sources, _joined(parts)


def _joined(parts: list[Writes]) -> Writes:
    return Writes(*map(torch.cat, zip(*parts, strict=True)))


def _reads(
    model: Any, nodes: host.TranscoderNodes, blocks: FrozenBlocks, selected: Tensor, columns: Tensor
) -> Reads:
    run = blocks.heads.run
    layer, position = nodes.active[selected, 0], nodes.active[selected, 1]
    row = nodes.encoders[selected].to(run.residual.dtype)
    for at in range(run.n_layers):
        here = layer == at
        row[here] = blocks.hook_points[at].reading(position[here]).vjp(row[here])
    logits = logit_directions(model, run, columns.to(run.residual.device))
    of_logits = layer.new_full((len(logits),), run.n_layers)
    at_end = position.new_full((len(logits),), run.n_pos - 1)
    return Reads(*map(torch.cat, ((layer, of_logits), (position, at_end), (row, logits))))


def _or_again(model: Any) -> str:
    """What else may be wrong with a graph that the model did not make."""
    if getattr(model.cfg, "rotary_base_local", None) is None:
        return ""
    return (
        ", or make it again here: circuit-tracer by itself runs this model with one rotary table "
        "for its local and global layers"
    )


def refuse_shared_rotary(model: Any) -> None:
    """Refuse a host that runs local and global layers with one rotary table where they need two.

    Raises:
        UserError: it does.
    """
    cfg = model.cfg
    local = getattr(cfg, "rotary_base_local", None)
    kinds = {block.attn.attn_type: block.attn for block in model.blocks}
    if local in (None, cfg.rotary_base) or len(kinds) < 2:
        return
    first, second = (attn.rotary_cos for attn in kinds.values())
    if first is second or torch.equal(first, second):
        raise UserError(
            f"circuit-tracer loaded {cfg.model_name} with one rotary table for its local and global "
            "layers, so its graphs are not those of the model: load it again by its name or folder "
            "after circuit_tracer_qk.enable(), which gives each layer its own."
        )
