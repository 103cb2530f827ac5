"""What the nodes of a residual graph stand for, by their index in adjacency order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.component import EMBEDDING, ERROR, FEATURE
from circuit_tracer_qk.attribution.residual.decompose import Checkpoint
from circuit_tracer_qk.attribution.residual.edges import Targets

if TYPE_CHECKING:
    from circuit_tracer_qk.attribution.residual.graph import ResidualGraph


class Nodes:
    """Where the nodes of a residual graph stand, and their vectors.

    Args:
        graph: the graph.

    Attributes:
        rows: (n_features,) rows of the run's active features (those of checkpoint 0 are no nodes).
        checkpoint: (n_nodes,) the one that a feature reads, an error is of or a logit is at; 0 for
            tokens.
        position: (n_nodes,) token positions.
    """

    def __init__(self, graph: ResidualGraph) -> None:
        record, run = graph.record, graph.record.parts.run
        active = record.parts.features.checkpoint
        self.record = record
        self.features, self.tokens, self.logits, end = graph.first_indices()
        self.first_slot = 0 if record.resid_pre else 1  # the checkpoint of error slot 0
        selected = graph.selected_features.to(active.device)
        self.rows: Int[Tensor, " n_features"] = selected + int((active == 0).sum())
        self.position: Int[Tensor, " n_nodes"] = graph.positions.to(active.device)
        self.checkpoint: Int[Tensor, " n_nodes"] = active.new_zeros(end)
        slots = self.first_slot + torch.arange(run.n_layers, device=active.device)
        self.checkpoint[: self.features] = active[self.rows]
        self.checkpoint[self.features : self.tokens] = slots.repeat_interleave(run.n_pos)
        self.checkpoint[self.logits :] = run.n_layers

    def read_own(self, node: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which are logits that read their own checkpoint, so that no block is in between."""
        n_layers = self.record.heads.run.n_layers
        return (node >= self.logits) & (n_layers in self.record.parts.biases)

    def are_components(
        self, node: Int[Tensor, " n"], read: Int[Tensor, " n"]
    ) -> Bool[Tensor, " n"]:
        """Which source nodes are components of the checkpoints ``read``.

        A crosscoder's feature is one at every checkpoint where it has a decoder.
        """
        known = self.record.parts.features.decoders
        places = zip(node.tolist(), self.checkpoint[node].tolist(), read.tolist(), strict=True)
        has = [(at, r) in known if n < self.features else at == r for n, at, r in places]
        return torch.tensor(has, dtype=torch.bool, device=node.device)

    def vectors(self, node: Int[Tensor, " n"], checkpoint: int) -> Float[Tensor, "n d_model"]:
        """Vectors of source nodes at a checkpoint."""
        parts, position = self.record.parts, self.position[node]
        feature, token = node < self.features, node >= self.tokens
        error = ~feature & ~token
        out = parts.run.residual.new_zeros(len(node), parts.run.residual.shape[-1])
        out[feature] = parts.features.vectors(self.rows[node[feature]], checkpoint)
        out[token] = parts.run.embedding[position[token]]
        if checkpoint in parts.errors and checkpoint > 0:
            out[error] = parts.errors[checkpoint][position[error]]
        return out

    def targets(self, node: Int[Tensor, " n"]) -> Targets:
        """Rows of target nodes."""
        parts, checkpoint = self.record.parts, self.checkpoint[node]
        feature = node < self.features
        y = parts.run.residual.new_zeros(len(node), parts.run.residual.shape[-1])
        for c in checkpoint[feature].unique().tolist():
            at = feature & (checkpoint == c)
            y[at] = parts.features.vectors(self.rows[node[at]], c)
        y[~feature] = self.record.logit_rows[node[~feature] - self.logits]
        row = torch.where(feature, node, node - self.logits + self.features)
        return Targets(self.position[node], y, self.record.target_pulls[row])

    def of(self, sources: Checkpoint) -> Int[Tensor, " n_sources"]:
        """The node of every component of a checkpoint; -1 where it is none."""
        of_feature = sources.node.new_full((len(self.record.parts.features),), -1)
        of_feature[self.rows] = torch.arange(self.features, device=of_feature.device)
        n_pos = self.record.parts.run.n_pos
        first_error = self.features + (sources.checkpoint - self.first_slot) * n_pos
        nodes = torch.where(sources.kind == FEATURE, of_feature[sources.node], -1)
        nodes = torch.where(sources.kind == ERROR, first_error + sources.position, nodes)
        return torch.where(sources.kind == EMBEDDING, self.tokens + sources.position, nodes)
