"""One sweep from the logits down: which features matter, and all their edges.

Targets go by descending own checkpoint and sources are always lower, so a target's influence is
complete when its own row is taken up; each row is normalised over all its sources. It equals
circuit-tracer's iterated influence, for SAE and for WCC graphs (method, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.components import (
    BIAS,
    EMBEDDING,
    ERROR,
    FEATURE,
    POSITION,
    Checkpoint,
    Decomposition,
)
from circuit_tracer_qk.edges import BlockEdges, Targets, pull_mlp
from circuit_tracer_qk.heads import Heads, MLPBlock, read_mlp

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

KEEP_BYTES = 1 << 30  # edge rows kept from the influence sweep rather than computed again
SHARED_BYTES = 1 << 28  # decoder vectors read back through an MLP once for all positions


class Rows(NamedTuple):
    """Edges of some targets from every component of one checkpoint.

    Attributes:
        nodes: (n,) features in the order of all graph features; empty for the logits' rows.
        sources: the components that the columns stand for.
        weights: (n, n_sources).
        pulls: (n, d_model) ``M^T y`` of the targets.
    """

    nodes: Tensor
    sources: Checkpoint
    weights: Tensor
    pulls: Tensor


class Filled(NamedTuple):
    """A graph's numbers.

    Attributes:
        adjacency: (n_nodes, n_nodes) float32, rows are targets (circuit-tracer's order).
        target_pulls: (n_selected + n_logits, d_model).
        bias_edges: (n_selected + n_logits, n_pos) edges from decoder biases.
        position_edges: the same from learned positions; None without them.
    """

    adjacency: Tensor
    target_pulls: Tensor
    bias_edges: Tensor
    position_edges: Tensor | None


class Sweep:
    """The edges of one run's residual graph, computed block by block.

    Args:
        model: for its MLPs.
        parts: the components.
        heads: the heads of the run.
        directions: (n_logits, d_model) logit directions at checkpoint n_layers.
        resid_pre: error slot i stands for checkpoint i rather than i + 1.
        batch_size: target rows taken at once.
        verbose: show progress even off a terminal.
    """

    def __init__(
        self,
        model: HookedTransformer,
        parts: Decomposition,
        heads: Heads,
        directions: Tensor,
        resid_pre: bool,
        batch_size: int,
        verbose: bool,
    ) -> None:
        self.model, self.parts, self.heads, self.directions = model, parts, heads, directions
        self.batch_size, self.verbose = batch_size, verbose
        self.first_slot = 0 if resid_pre else 1  # the checkpoint of error slot 0
        run = parts.run
        self.n_layers, self.n_pos = run.n_layers, run.n_pos
        reads = parts.features.checkpoint
        self.skipped = int((reads == 0).sum())  # features of checkpoint 0 are no nodes
        self.n_features = len(reads) - self.skipped
        self.width = self.n_features + (self.n_layers + 1) * self.n_pos
        self._kept: dict[int, list[Rows]] = {}

    def columns(self, sources: Checkpoint) -> Tensor:
        """(n_sources,) node of each component; -1 for decoder biases and positions."""
        at = sources.kind.new_full((len(sources.kind),), -1)
        feature, error = sources.kind == FEATURE, sources.kind == ERROR
        token = sources.kind == EMBEDDING
        at[feature] = sources.node[feature] - self.skipped
        slot = sources.checkpoint - self.first_slot
        at[error] = self.n_features + slot * self.n_pos + sources.position[error]
        at[token] = self.n_features + self.n_layers * self.n_pos + sources.position[token]
        return at

    def feature_rows(self, checkpoint: int, nodes: Tensor) -> Iterator[Rows]:
        """Rows of features that read ``checkpoint``, in chunks of ``batch_size``."""
        layer = checkpoint - 1
        block = BlockEdges(self.parts, self.heads, layer)
        mlp = read_mlp(self.model.blocks[layer], self.parts.run.residual.dtype)
        features = self.parts.features
        shared = None if mlp is None else self._read_back_once(mlp, checkpoint, len(nodes))
        for chunk in nodes.split(self.batch_size):
            if len(chunk) == 0:
                continue
            at = chunk + self.skipped
            positions, hidden = features.position[at], None
            y = features.vectors(at, checkpoint)
            if shared is not None:
                post_scale = self.parts.run.scale("ln2_post", layer)[positions]
                hidden = shared[features.row[at]] * (features.activation[at] / post_scale)[:, None]
            m = pull_mlp(self.heads, mlp, layer, y, positions, hidden)
            yield Rows(chunk, block.sources, block.rows(Targets(positions, y, m)), m)

    def _read_back_once(self, mlp: MLPBlock, checkpoint: int, n_targets: int) -> Tensor | None:
        """(n_distinct, d_mlp) decoder vectors at the MLP's hidden layer, shared by the positions
        at which a feature is active; None where few features recur, or they take too much room."""
        decoder = self.parts.features.decoders[checkpoint, checkpoint]
        size = len(decoder) * mlp.W_out.shape[0] * self.directions.element_size()
        if 4 * len(decoder) > 3 * n_targets or size > SHARED_BYTES:
            return None
        decoder = decoder.to(self.directions.dtype)
        return mlp.read_back(decoder, decoder.new_ones(len(decoder)))

    def logit_rows(self) -> Rows:
        """Rows of the logits: from their own checkpoint, or across the last block without one."""
        run, y = self.parts.run, self.directions
        nodes = torch.empty(0, dtype=torch.long, device=y.device)
        if self.n_layers in self.parts.biases:
            sources = self.parts.at(self.n_layers)
            weights = y.new_zeros(len(y), len(sources.kind))
            here = sources.at(self.n_pos - 1)
            weights[:, here] = y @ sources.vectors(here).T
            return Rows(nodes, sources, weights, torch.zeros_like(y))
        layer = self.n_layers - 1
        block = BlockEdges(self.parts, self.heads, layer)
        mlp = read_mlp(self.model.blocks[layer], run.residual.dtype)
        positions = torch.full((len(y),), self.n_pos - 1, device=y.device)
        m = pull_mlp(self.heads, mlp, layer, y, positions)
        return Rows(nodes, block.sources, block.rows(Targets(positions, y, m)), m)

    def influence(self, logit_weights: Tensor) -> Tensor:
        """(width,) influence of every node on the weighted logits, in one sweep.

        Args:
            logit_weights: (n_logits,) e.g. their probabilities.
        """
        out = logit_weights.new_zeros(self.width)

        def spread(rows: Rows, weights: Tensor) -> None:
            at = self.columns(rows.sources)
            size = rows.weights[:, at >= 0].abs()
            shares = weights / size.sum(1).clamp_min(1e-10)
            out.index_add_(0, at[at >= 0], shares @ size)

        spread(self.logit_rows(), logit_weights)
        self._kept.clear()
        room = KEEP_BYTES
        for checkpoint in self._progress("Influence"):
            chunks = []
            for rows in self.feature_rows(checkpoint, self._reading(checkpoint)):
                spread(rows, out[rows.nodes])
                room -= rows.weights.numel() * rows.weights.element_size()
                if room > 0:
                    chunks.append(rows)
            if room > 0:
                self._kept[checkpoint] = chunks
        return out

    def select(self, logit_weights: Tensor, most: int | None) -> Tensor:
        """(n,) graph features to keep, ascending: the ``most`` of the largest influence, or all."""
        if most is None or most >= self.n_features:
            return torch.arange(self.n_features, device=logit_weights.device)
        influence = self.influence(logit_weights)[: self.n_features]
        return influence.topk(most).indices.sort().values

    def fill(self, selected: Tensor) -> Filled:
        """The selected features' and the logits' edges, as a graph's adjacency."""
        run = self.parts.run
        n, n_logits = len(selected), len(self.directions)
        n_others = self.width - self.n_features
        # where each node of the full width went; -1 for features left out
        place = torch.full((self.width,), -1, device=selected.device)
        place[selected] = torch.arange(n, device=selected.device)
        place[self.n_features :] = torch.arange(n, n + n_others, device=selected.device)

        total = n + n_others + n_logits
        adjacency = torch.zeros(total, total, dtype=torch.float32, device=selected.device)
        pulls = run.residual.new_zeros(n + n_logits, run.residual.shape[-1])
        extra = {
            kind: run.residual.new_zeros(n + n_logits, self.n_pos) for kind in (BIAS, POSITION)
        }

        def put(rows: Rows, at: Tensor, at_target: Tensor) -> None:
            columns = self.columns(rows.sources)
            to = torch.where(columns >= 0, place[columns], -1)
            adjacency[at[:, None], to[None, to >= 0]] = rows.weights[:, to >= 0].float()
            pulls[at_target] = rows.pulls
            for kind, edges in extra.items():
                of_kind = rows.sources.kind == kind
                where = rows.sources.position[of_kind]
                edges[at_target[:, None], where[None]] = rows.weights[:, of_kind]

        order = torch.arange(n_logits, device=selected.device)
        put(self.logit_rows(), total - n_logits + order, n + order)
        for checkpoint in self._progress("Edges"):
            nodes = self._reading(checkpoint)
            kept = self._kept.pop(checkpoint, None)
            if kept is None:
                kept = self.feature_rows(checkpoint, nodes[place[nodes] >= 0])
            for rows in kept:
                mine = place[rows.nodes] >= 0
                at = place[rows.nodes[mine]]
                put(rows._replace(weights=rows.weights[mine], pulls=rows.pulls[mine]), at, at)
        has_positions = run.position_embedding is not None
        return Filled(adjacency, pulls, extra[BIAS], extra[POSITION] if has_positions else None)

    def _reading(self, checkpoint: int) -> Tensor:
        """Graph features that read ``checkpoint``, by position."""
        reads = self.parts.features.checkpoint
        return (reads == checkpoint).nonzero().squeeze(1) - self.skipped

    def _progress(self, name: str) -> tqdm:
        checkpoints = [c for c in sorted(self.parts.biases, reverse=True) if c > 0]
        return tqdm(checkpoints, name, delay=2, disable=False if self.verbose else None)
