"""The residual stream at a checkpoint, exactly, as a sum of named components.

    x_c[p] = sum_i a_i[p] v_i + b_c + e_c[p]

(method, section 1; paper, "QK attributions"). Encoders only infer activations. What a dictionary
does not explain stays one ``error`` component per position; nothing is spread or hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.dictionaries import DictionarySet, like
from circuit_tracer_qk.frozen import FrozenRun

KINDS = ("feature", "bias", "error", "embedding", "position")
FEATURE, BIAS, ERROR, EMBEDDING, POSITION = range(5)


class Component(NamedTuple):
    """One named part of the residual stream at one position.

    ``checkpoint`` is the one that the feature reads; for the other kinds, the one decomposed.
    ``feature`` and ``activation`` are None for everything but features.
    """

    kind: str
    checkpoint: int
    feature: int | None
    position: int
    activation: float | None
    label: str


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """Every active feature of the prompt, ordered by checkpoint read, position and index.

    The order is that of ``circuit_tracer.Graph.active_features``. Decoder vectors are kept once
    per *distinct* active feature, so a set of any width costs only its active rows.

    Attributes:
        checkpoint: (n,) checkpoint that the feature reads.
        position: (n,) token position.
        feature: (n,) index in its dictionary.
        activation: (n,) activation, in the contraction dtype.
        row: (n,) row in ``decoders[checkpoint, k]``.
        decoders: (c, k) -> (n_distinct at c, d_model) decoder vectors at checkpoint k.
    """

    checkpoint: Tensor
    position: Tensor
    feature: Tensor
    activation: Tensor
    row: Tensor
    decoders: dict[tuple[int, int], Tensor]

    def __len__(self) -> int:
        return len(self.activation)

    def vectors(self, nodes: Tensor, checkpoint: int) -> Tensor:
        """(len(nodes), d_model): activation times decoder vector at ``checkpoint``.

        Every node must read one and the same checkpoint's dictionary or several that all have a
        decoder at ``checkpoint``.
        """
        width = next(iter(self.decoders.values())).shape[1]
        out = self.activation.new_empty(len(nodes), width)
        reads = self.checkpoint[nodes]
        for c in reads.unique().tolist():
            at = (reads == c).nonzero().squeeze(1)
            decoder = self.decoders[c, checkpoint][self.row[nodes[at]]].to(out.dtype)
            out[at] = decoder * self.activation[nodes[at], None]
        return out


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The components of one checkpoint, ordered by position.

    Within a position: features by (checkpoint read, index), then embedding, position, bias, error.

    Attributes:
        checkpoint: the checkpoint c.
        kind: (n,) index into :data:`KINDS`.
        node: (n,) index into :class:`ActiveFeatures`; -1 for the other kinds.
        position: (n,) token position.
        starts: list of n_pos + 1 offsets: position p's components are ``starts[p]:starts[p+1]``.
    """

    checkpoint: int
    kind: Tensor
    node: Tensor
    position: Tensor
    starts: list[int]
    _vectors: Callable[[slice], Tensor]

    def at(self, position: int) -> slice:
        """The components of one position."""
        return slice(self.starts[position], self.starts[position + 1])

    def vectors(self, part: slice | None = None) -> Tensor:
        """(n, d_model) component vectors; over a position they sum to the residual stream."""
        return self._vectors(part or slice(0, len(self.kind)))


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The residual stream of one run at every checkpoint, as components.

    Attributes:
        run: the frozen run.
        features: its active features.
        biases: checkpoint -> (n_pos, d_model), what its dictionary reconstructs without features:
            the decoder bias; only checkpoints that have a dictionary.
        errors: checkpoint -> (n_pos, d_model) reconstruction error, the same checkpoints.
    """

    run: FrozenRun
    features: ActiveFeatures
    biases: dict[int, Tensor]
    errors: dict[int, Tensor]

    @cached_property
    def _built(self) -> dict[int, Checkpoint]:
        return {}

    def at(self, checkpoint: int) -> Checkpoint:
        """The components of one checkpoint (built once)."""
        if checkpoint not in self._built:
            self._built[checkpoint] = self._build(checkpoint)
        return self._built[checkpoint]

    @cached_property
    def tokens(self) -> Checkpoint:
        """Checkpoint 0 as graphs see it: embeddings, also where a dictionary reads it."""
        return self.at(0) if 0 not in self.biases else self._build(0, as_tokens=True)

    def _build(self, c: int, as_tokens: bool = False) -> Checkpoint:
        run, f = self.run, self.features
        device = run.residual.device
        everywhere = torch.arange(run.n_pos, device=device)
        # (kind, vectors of all positions) of the components that are no features
        if c in self.biases and not as_tokens:
            others = [(BIAS, self.biases[c].expand(run.n_pos, -1)), (ERROR, self.errors[c])]
        elif c == 0:
            others = [(EMBEDDING, run.embedding)]
            if run.position_embedding is not None:
                others.append((POSITION, run.position_embedding))
        else:
            others = [(ERROR, run.residual[c])]

        reads = [k for k, at in f.decoders if at == c and not as_tokens]
        reading = torch.tensor(reads, dtype=torch.long, device=device)
        nodes = torch.isin(f.checkpoint, reading).nonzero().squeeze(1)
        n_other = len(others) * run.n_pos
        position = torch.cat([f.position[nodes], everywhere.repeat(len(others))])
        order = position.argsort(stable=True)
        kinds = torch.tensor([k for k, _ in others], device=device).repeat_interleave(run.n_pos)
        kind = torch.cat([torch.full_like(nodes, FEATURE), kinds])[order]
        node = torch.cat([nodes, nodes.new_full((n_other,), -1)])[order]
        position = position[order]
        counts = torch.bincount(position, minlength=run.n_pos)
        starts = [0, *counts.cumsum(0).tolist()]
        stacked = dict(others)

        def vectors(part: slice) -> Tensor:
            kinds, nodes, positions = kind[part], node[part], position[part]
            out = run.residual.new_empty(len(kinds), run.residual.shape[-1])
            is_feature = kinds == FEATURE
            if bool(is_feature.any()):
                out[is_feature] = f.vectors(nodes[is_feature], c)
            for code, values in stacked.items():
                at = kinds == code
                out[at] = values[positions[at]]
            return out

        return Checkpoint(c, kind, node, position, starts, vectors)


@torch.no_grad()
def decompose(run: FrozenRun, dictionaries: DictionarySet, zero_positions: slice) -> Decomposition:
    """Decompose every checkpoint of a run.

    Args:
        run: the frozen run.
        dictionaries: features, their decoders and biases.
        zero_positions: positions without features (their components are bias and error only):
            dictionaries are not trained on the BOS position.

    Identity: at every checkpoint and position the components sum to ``run.residual`` (the error is
    defined by it; the method's section 1).
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    decoders: dict[tuple[int, int], Tensor] = {}
    biases: dict[int, Tensor] = {}
    explained: dict[int, Tensor] = {}
    for c, dictionary in dictionaries.by_checkpoint.items():
        biases[c] = dictionary.bias(run.residual[c])
        explained[c] = biases[c].clone()
    for c, dictionary in dictionaries.by_checkpoint.items():
        acts = dictionary.encode(run.residual[c])
        acts[zero_positions] = 0
        position, feature = acts.nonzero(as_tuple=True)
        distinct, row = feature.unique(return_inverse=True)
        parts.append(
            (torch.full_like(position, c), position, feature, acts[position, feature], row)
        )
        for k in dictionary.decoders:
            decoders[c, k] = like(dictionary.vectors(k, distinct), run.residual)
            explained[k] += acts[:, distinct] @ decoders[c, k]
    checkpoint, position, feature, activation, row = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    features = ActiveFeatures(checkpoint, position, feature, activation, row, decoders)
    errors = {c: run.residual[c] - explained[c] for c in explained}
    return Decomposition(run, features, biases, errors)
