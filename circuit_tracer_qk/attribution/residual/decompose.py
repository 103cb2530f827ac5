"""The residual stream at a checkpoint, exactly, as a sum of named components.

    x_c[p] = sum_i a_i[p] v_i + b_c + e_c[p]

(attribution/README.md, section 1; paper, "QK attributions"). Encoders only infer activations. What a dictionary
does not explain stays one ``error`` component per position; nothing is spread or hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuit_tracer_qk.attribution.component import BIAS, EMBEDDING, ERROR, FEATURE, POSITION
from circuit_tracer_qk.dictionaries.dictionary import like
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.model.run import FrozenRun


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """Every active feature of the prompt, ordered by checkpoint read, position and index.

    The order is that of ``circuit_tracer.Graph.active_features``. Decoder vectors are kept once
    per *distinct* active feature, so a set of any width costs only its active rows.

    Attributes:
        checkpoint: checkpoint that the feature reads.
        position: token position.
        feature: index in its dictionary.
        activation: activation, in the contraction dtype.
        row: row in ``decoders[checkpoint, k]``.
        decoders: -> (n_distinct at c, d_model) decoder vectors at checkpoint k.
    """

    checkpoint: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]
    row: Int[Tensor, " n"]
    decoders: dict[tuple[int, int], Tensor]

    def __len__(self) -> int:
        return len(self.activation)

    def vectors(self, nodes: Int[Tensor, " n"], checkpoint: int) -> Float[Tensor, "n d_model"]:
        """Activation times decoder vector at ``checkpoint``.

        Every node must read one and the same checkpoint's dictionary or several that all have a
        decoder at ``checkpoint``.
        """
        able = [c for c, k in self.decoders if k == checkpoint]
        if len(able) == 1:
            return self.decoder_rows(nodes, able[0], checkpoint)
        width = next(iter(self.decoders.values())).shape[1]
        out = self.activation.new_empty(len(nodes), width)
        reads = self.checkpoint[nodes]
        for c in reads.unique().tolist():
            at = (reads == c).nonzero().squeeze(1)
            out[at] = self.decoder_rows(nodes[at], c, checkpoint)
        return out

    def decoder_rows(
        self, nodes: Int[Tensor, " n"] | slice, read: int, checkpoint: int
    ) -> Float[Tensor, "n d_model"]:
        """The same for nodes that all read ``read``, which nothing has to be looked up for."""
        rows = self.decoders[read, checkpoint].index_select(0, self.row[nodes])
        return rows.to(self.activation.dtype).mul_(self.activation[nodes, None])


class Group(NamedTuple):
    """Components of one checkpoint that are made alike.

    Attributes:
        kind: index into :data:`KINDS`.
        read: the checkpoint that features read; -1 for the other kinds.
        starts: n_pos + 1 offsets: those of position p are the group's ``starts[p]:starts[p+1]``.
        first: row in :class:`ActiveFeatures` of the group's first; 0 for the other kinds.
        at: (n,) their rows among the checkpoint's components, ascending.
    """

    kind: int
    read: int
    starts: list[int]
    first: int
    at: Int[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The components of one checkpoint, ordered by position.

    Within a position: features by (checkpoint read, index), then embedding, position, bias, error.

    Attributes:
        checkpoint: the checkpoint c.
        kind: index into :data:`KINDS`.
        node: index into :class:`ActiveFeatures`; -1 for the other kinds.
        position: token position.
        starts: list of n_pos + 1 offsets: position p's components are ``starts[p]:starts[p+1]``.
        groups: the same components by how they are made.
    """

    checkpoint: int
    kind: Int[Tensor, " n"]
    node: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    starts: list[int]
    groups: list[Group]
    _features: ActiveFeatures
    _others: dict[int, Tensor]

    def at(self, position: int) -> slice:
        """The components of one position."""
        return slice(self.starts[position], self.starts[position + 1])

    def vectors(self, positions: range | None = None) -> Float[Tensor, "n d_model"]:
        """Component vectors; over a position they sum to the residual stream.

        Args:
            positions: neighbouring positions; None for all.
        """
        positions = range(len(self.starts) - 1) if positions is None else positions
        start, stop = self.starts[positions.start], self.starts[positions.stop]
        others = next(iter(self._others.values()))
        out = others.new_empty(stop - start, others.shape[1])
        for group in self.groups:
            part = slice(group.starts[positions.start], group.starts[positions.stop])
            out.index_copy_(0, group.at[part] - start, self.of(group, part))
        return out

    def of(self, group: Group, part: slice) -> Float[Tensor, "n d_model"]:
        """Vectors of a part of one group."""
        if group.kind != FEATURE:
            return self._others[group.kind][part]
        rows = slice(group.first + part.start, group.first + part.stop)
        return self._features.decoder_rows(rows, group.read, self.checkpoint)


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

    @cached_property
    def offsets(self) -> dict[int, list[int]]:
        """Checkpoint -> n_pos + 1 rows in ``features``: where each position's features start.

        Counted in one go: nothing that follows has to wait for a device to answer.
        """
        run, f = self.run, self.features
        n = run.n_layers + 1
        counts = f.position.new_zeros(n * run.n_pos)
        places = f.checkpoint * run.n_pos + f.position
        counts.index_add_(0, places, torch.ones_like(places))
        ends = counts.cumsum(0).tolist()
        return {
            c: [ends[at - 1] if at else 0 for at in range(c * run.n_pos, (c + 1) * run.n_pos + 1)]
            for c in range(n)
        }

    def at(self, checkpoint: int) -> Checkpoint:
        """The components of one checkpoint (built once)."""
        if checkpoint not in self._built:
            self._built[checkpoint] = self._build(checkpoint)
        return self._built[checkpoint]

    def sources(self, layer: int) -> Checkpoint:
        """The components that edges across a block come from: those at its input."""
        return self.tokens if layer == 0 else self.at(layer)

    @cached_property
    def tokens(self) -> Checkpoint:
        """Checkpoint 0 as graphs see it: embeddings, also where a dictionary reads it."""
        return self.at(0) if 0 not in self.biases else self._build(0, as_tokens=True)

    def _build(self, c: int, as_tokens: bool = False) -> Checkpoint:
        run, f = self.run, self.features
        device, n_pos = run.residual.device, run.n_pos
        everywhere = torch.arange(n_pos, device=device)
        # vectors of all positions of the components that are no features
        if c in self.biases and not as_tokens:
            others = {BIAS: self.biases[c].expand(n_pos, -1), ERROR: self.errors[c]}
        elif c == 0:
            others = {EMBEDDING: run.embedding}
            if run.position_embedding is not None:
                others[POSITION] = run.position_embedding
        else:
            others = {ERROR: run.residual[c]}

        reads = sorted(k for k, at in f.decoders if at == c and not as_tokens)
        rows = [slice(self.offsets[k][0], self.offsets[k][-1]) for k in reads]
        nodes = [torch.arange(part.start, part.stop, device=device) for part in rows]
        node = torch.cat([*nodes, everywhere.new_full((len(others) * n_pos,), -1)])
        position = torch.cat([*(f.position[part] for part in rows), everywhere.repeat(len(others))])
        counts = [*(len(n) for n in nodes), *(n_pos for _ in others)]
        codes = [*(FEATURE for _ in reads), *others]
        kind = torch.cat([everywhere.new_full((n,), i) for n, i in zip(counts, codes, strict=True)])
        order = position.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        at = place.split(counts)
        groups = [
            Group(FEATURE, k, [o - self.offsets[k][0] for o in self.offsets[k]], part.start, places)
            for k, part, places in zip(reads, rows, at[: len(reads)], strict=True)
        ]
        whole = list(range(n_pos + 1))
        groups += [
            Group(code, -1, whole, 0, places)
            for code, places in zip(others, at[len(reads) :], strict=True)
        ]
        starts = [sum(ends) for ends in zip(*(g.starts for g in groups), strict=True)]
        return Checkpoint(c, kind[order], node[order], position[order], starts, groups, f, others)


@torch.no_grad()
def decompose(run: FrozenRun, dictionaries: DictionarySet, zero_positions: slice) -> Decomposition:
    """Decompose every checkpoint of a run.

    Args:
        run: the frozen run.
        dictionaries: features, their decoders and biases.
        zero_positions: positions without features (their components are bias and error only):
            dictionaries are not trained on the BOS position.

    Identity: at every checkpoint and position the components sum to ``run.residual`` (the error is
    defined by it; attribution/README.md, section 1).
    """
    parts: list[tuple[Tensor, ...]] = []
    decoders: dict[tuple[int, int], Tensor] = {}
    biases = {c: d.bias(run.residual[c]) for c, d in dictionaries.by_checkpoint.items()}
    explained = {c: bias.clone() for c, bias in biases.items()}
    for c, dictionary in dictionaries.by_checkpoint.items():
        acts = dictionary.encode(run.residual[c])
        acts[zero_positions] = 0
        position, feature = acts.nonzero(as_tuple=True)
        distinct, row = feature.unique(return_inverse=True)
        read = torch.full_like(position, c)
        parts.append((read, position, feature, acts[position, feature], row))
        for k in dictionary.decoders:
            decoders[c, k] = like(dictionary.vectors(k, distinct), run.residual)
            explained[k] += acts[:, distinct] @ decoders[c, k]
    features = ActiveFeatures(*map(torch.cat, zip(*parts, strict=True)), decoders=decoders)
    errors = {c: run.residual[c] - explained[c] for c in explained}
    return Decomposition(run, features, biases, errors)
