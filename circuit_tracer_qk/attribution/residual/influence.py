"""One sweep from the logits down: which features matter, and all their edges.

Targets go by descending own checkpoint and sources are always lower, so a target's influence is
complete when its own row is taken up; each row is normalised over all its sources. It equals
circuit-tracer's iterated influence, for SAE and for WCC graphs (attribution/README.md, section 3);
explained influence leaves the errors out of the normalisation ("Which nodes", there).
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.attribution.component import BIAS, EMBEDDING, ERROR, FEATURE, POSITION
from circuit_tracer_qk.attribution.residual.decompose import Checkpoint, Decomposition, Group
from circuit_tracer_qk.attribution.residual.edges import (
    BlockEdges,
    BlockMLP,
    PositionRun,
    Targets,
    runs_of,
)
from circuit_tracer_qk.base.selection import CIRCUIT_TRACER, EXPLAINED
from circuit_tracer_qk.base.threads import Crew
from circuit_tracer_qk.model.heads import Heads
from circuit_tracer_qk.model.mlp import read_mlp

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

KEEP_BYTES = 1 << 30  # edge rows kept from the influence sweep rather than computed again
LEAST_ROWS = 32  # taken at once by one of several threads: fewer would only read weights

R = TypeVar("R")


class Subset(NamedTuple):
    """Subset graph features, ascending: on the run's device, and at hand.

    Nothing in the loops over blocks waits for a device: what they need to know is known before.
    """

    nodes: Tensor
    at_hand: list[int]

    def within(self, start: int, stop: int) -> slice:
        """The part of them that lies among graph features ``start`` to ``stop - 1``."""
        return slice(bisect_left(self.at_hand, start), bisect_left(self.at_hand, stop))


class Rows(NamedTuple):
    """Edges of some targets from every component of one checkpoint.

    Attributes:
        part: which of the features asked for; empty for the logits' rows.
        sources: the components that the columns stand for.
        weights: (n, n_sources).
        m: ``M^T y`` of the targets.
    """

    part: slice
    sources: Checkpoint
    weights: Float[Tensor, "n n_sources"]
    m: Float[Tensor, "n d_model"]


class Filled(NamedTuple):
    """A graph's numbers.

    Attributes:
        adjacency: float32, rows are targets (circuit-tracer's order).
        target_pulls: (n_selected + n_logits, d_model).
        bias_edges: edges from decoder biases.
        position_edges: the same from learned positions; None without them.
    """

    adjacency: Float[Tensor, "n_nodes n_nodes"]
    target_pulls: Float[Tensor, "n_targets d_model"]
    bias_edges: Float[Tensor, "n_targets n_pos"]
    position_edges: Float[Tensor, "n_targets n_pos"] | None


class Sweep:
    """The edges of one run's residual graph, computed block by block.

    Args:
        model: for its MLPs.
        parts: the components.
        heads: the heads of the run.
        directions: logit directions at checkpoint n_layers.
        resid_pre: error slot i stands for checkpoint i rather than i + 1.
        batch_size: target rows taken at once, by all threads together.
        verbose: show progress even off a terminal.
        select: whether influence is shared out over all sources or over what is explained.
    """

    def __init__(
        self,
        model: HookedTransformer,
        parts: Decomposition,
        heads: Heads,
        directions: Float[Tensor, "n_logits d_model"],
        resid_pre: bool,
        batch_size: int,
        verbose: bool,
        select: str = CIRCUIT_TRACER,
    ) -> None:
        self.model, self.parts, self.heads, self.directions = model, parts, heads, directions
        self.batch_size = batch_size
        self._without_errors = select == EXPLAINED
        self._shown: Any = {"delay": 2, "disable": False if verbose else None}
        self.first_slot = 0 if resid_pre else 1  # the checkpoint of error slot 0
        run = parts.run
        self.n_layers, self.n_pos = run.n_layers, run.n_pos
        self.skipped = parts.offsets[0][-1]  # features of checkpoint 0 are no nodes
        self.n_features = len(parts.features) - self.skipped
        self.width = self.n_features + (self.n_layers + 1) * self.n_pos
        self._positions = parts.features.position[self.skipped :].cpu()
        self._kept: dict[int, list[Rows]] = {}
        self.crew = Crew(directions.device, batch_size // LEAST_ROWS)

    def place(self, group: Group, checkpoint: int) -> slice | None:
        """The nodes of a group of components; None for decoder biases and positions."""
        if group.kind == FEATURE:
            start = group.first - self.skipped
        elif group.kind == ERROR:
            start = self.n_features + (checkpoint - self.first_slot) * self.n_pos
        elif group.kind == EMBEDDING:
            start = self.n_features + self.n_layers * self.n_pos
        else:
            return None
        return slice(start, start + len(group.at))

    def subset(self, nodes: Tensor | None = None) -> Subset:
        """Graph features by their order; all without ``nodes``."""
        if nodes is None:
            nodes = torch.arange(self.n_features, device=self.directions.device)
        return Subset(nodes, nodes.tolist())

    def reading(self, checkpoint: int) -> tuple[int, int]:
        """The first graph feature that reads ``checkpoint``, and the first after these."""
        offsets = self.parts.offsets[checkpoint]
        return offsets[0] - self.skipped, offsets[-1] - self.skipped

    def feature_rows(
        self, checkpoints: Sequence[int], subset: Subset, use: Callable[[Rows], R]
    ) -> Iterator[R]:
        """What is made of the rows of those of some features that read one of ``checkpoints``.

        Args:
            checkpoints: whose features are the targets.
            subset: the features.
            use: called with some rows, which it need not keep; on a processor by several threads
                at once, together with ``batch_size`` rows or fewer.

        Yields:
            What ``use`` made of each, checkpoint by checkpoint in the features' order.
        """

        def begin(checkpoint: int) -> tuple[Callable[[slice], R], list[slice]]:
            whole = wholes[checkpoint]
            rows_of = self._rows_of(checkpoint, subset, whole.stop - whole.start)
            return lambda part: use(rows_of(part)), self.pieces(subset, whole)

        wholes = {c: subset.within(*self.reading(c)) for c in checkpoints}
        return self.crew.flow(begin, [c for c in checkpoints if wholes[c].start < wholes[c].stop])

    def _rows_of(self, checkpoint: int, subset: Subset, n: int) -> Callable[[slice], Rows]:
        """What makes the rows of any part of some features, ``n`` of which read a checkpoint."""
        layer, features = checkpoint - 1, self.parts.features
        block, local = BlockEdges(self.parts, self.heads, layer), self._mlp(layer)
        decoder = features.decoders[checkpoint, checkpoint]
        shared = local.shared(decoder, n)

        def rows(part: slice) -> Rows:
            at = subset.nodes[part] + self.skipped
            runs = runs_of(self._positions[subset.at_hand[part]])
            positions, y = features.position[at], features.decoder_rows(at, checkpoint, checkpoint)
            if shared is None:
                m = local.vjp(y, positions, runs)
            else:
                weight = features.activation[at]
                m = local.vjp_shared(shared, features.row[at], weight, positions, runs)
            return Rows(part, block.sources, block.rows(Targets(positions, y, m), runs), m)

        return rows

    def _mlp(self, layer: int) -> BlockMLP:
        mlp = read_mlp(self.model.blocks[layer], self.parts.run.residual.dtype)
        return BlockMLP(self.heads, mlp, layer)

    def pieces(self, subset: Subset, whole: slice) -> list[slice]:
        """Parts of as many features as a thread takes, cut between positions where that can be."""
        most, cuts = self.batch_size // self.crew.size, [0]
        for _, start, stop in runs_of(self._positions[subset.at_hand[whole]]):
            while stop - cuts[-1] > most:
                cuts.append(start if start > cuts[-1] else cuts[-1] + most)
        cuts.append(whole.stop - whole.start)
        return [slice(whole.start + a, whole.start + b) for a, b in pairwise(cuts)]

    def logit_rows(self) -> Rows:
        """Rows of the logits: from their own checkpoint, or across the last block without one."""
        y = self.directions
        if self.n_layers in self.parts.biases:
            sources = self.parts.at(self.n_layers)
            weights = y.new_zeros(len(y), len(sources.kind))
            last = range(self.n_pos - 1, self.n_pos)
            weights[:, sources.at(last.start)] = y @ sources.vectors(last).T
            return Rows(slice(0, 0), sources, weights, torch.zeros_like(y))
        layer = self.n_layers - 1
        block = BlockEdges(self.parts, self.heads, layer)
        positions = torch.full((len(y),), self.n_pos - 1, device=y.device)
        runs = [PositionRun(self.n_pos - 1, 0, len(y))]
        m = self._mlp(layer).vjp(y, positions, runs)
        weights = block.rows(Targets(positions, y, m), runs)
        return Rows(slice(0, 0), block.sources, weights, m)

    def influence(self, logit_weights: Float[Tensor, " n_logits"]) -> Float[Tensor, " width"]:
        """Influence of every node on the weighted logits, in one sweep.

        Args:
            logit_weights: e.g. their probabilities.
        """
        out = logit_weights.new_zeros(self.width)

        rows = self.logit_rows()
        self._add(out, rows.sources, self._given(rows, logit_weights))
        self._kept.clear()
        room = KEEP_BYTES
        every = self.subset()
        for checkpoint in tqdm(self._checkpoints(), "Influence", **self._shown):
            if checkpoint == self.n_layers:  # the logits read the last position, and nothing else
                start, stop = (at - self.skipped for at in self.parts.offsets[checkpoint][-2:])
                subset = self.subset(torch.arange(start, stop, device=out.device))
                self._spread(checkpoint, subset, out, keep=False)
                continue
            start, stop = self.reading(checkpoint)
            n_sources = len(self.parts.sources(checkpoint - 1).kind)
            size = (stop - start) * n_sources * self.directions.element_size()
            keep = size <= room
            kept = self._spread(checkpoint, every, out, keep)
            if keep:
                self._kept[checkpoint] = kept
                room -= size
        return out

    def _spread(self, checkpoint: int, subset: Subset, out: Tensor, keep: bool) -> list[Rows]:
        """Pass on the influence, which is complete, of some features that read a checkpoint.

        Returns:
            The rows, if they are to be kept.
        """

        def use(rows: Rows) -> tuple[Tensor, list[Rows]]:
            return self._given(rows, out[subset.nodes[rows.part]]), [rows] if keep else []

        sources, kept = self.parts.sources(checkpoint - 1), []
        for given, rows in self.feature_rows([checkpoint], subset, use):
            self._add(out, sources, given)  # in order: every run adds up to the same bits
            kept += rows
        return kept

    def _given(self, rows: Rows, influence: Float[Tensor, " n"]) -> Float[Tensor, " n_sources"]:
        """What targets of some influence give to their sources."""
        size = rows.weights.abs()
        for group in rows.sources.groups:
            no_node = self.place(group, rows.sources.checkpoint) is None
            if no_node or (group.kind == ERROR and self._without_errors):
                size.index_fill_(1, group.at, 0)
        return (influence / size.sum(1).clamp_min(1e-10)) @ size

    def _add(
        self, out: Float[Tensor, " width"], sources: Checkpoint, given: Float[Tensor, " n_sources"]
    ) -> None:
        for group in sources.groups:
            nodes = self.place(group, sources.checkpoint)
            if nodes is not None:
                out[nodes] += given[group.at]

    def select(
        self, logit_weights: Float[Tensor, " n_logits"], most: int | None
    ) -> Int[Tensor, " n"]:
        """Graph features to keep, ascending: the ``most`` of the largest influence, or all."""
        if most is None or most >= self.n_features:
            return torch.arange(self.n_features, device=logit_weights.device)
        influence = self.influence(logit_weights)[: self.n_features]
        return influence.topk(most).indices.sort().values

    def fill(self, selected: Int[Tensor, " n"]) -> Filled:
        """The selected features' and the logits' edges, as a graph's adjacency."""
        run, subset = self.parts.run, self.subset(selected)
        n, n_logits = len(selected), len(self.directions)
        left_out = self.n_features - n
        total = self.width - left_out + n_logits
        adjacency = unwritten_zeros(total, selected.device)
        through_mlp = run.residual.new_zeros(n + n_logits, run.residual.shape[-1])
        extra = {
            kind: run.residual.new_zeros(n + n_logits, self.n_pos) for kind in (BIAS, POSITION)
        }

        def put(rows: Rows, at: slice, at_target: slice) -> None:
            """Every group of sources is a block of columns: both are in the nodes' order."""
            through_mlp[at_target] = rows.m
            for group in rows.sources.groups:
                nodes, columns = self.place(group, rows.sources.checkpoint), group.at
                if nodes is None:
                    extra[group.kind][at_target] = rows.weights.index_select(1, columns)
                    continue
                to = slice(nodes.start - left_out, nodes.stop - left_out)
                if group.kind == FEATURE:
                    to = subset.within(nodes.start, nodes.stop)
                    columns = columns[subset.nodes[to] - nodes.start]
                adjacency[at, to] = rows.weights.index_select(1, columns).float()

        def put_features(rows: Rows) -> int:
            put(rows, rows.part, rows.part)
            return len(rows.m)

        put(self.logit_rows(), slice(total - n_logits, total), slice(n, n + n_logits))
        again = [c for c in self._checkpoints() if c not in self._kept]
        with tqdm(total=n, desc="Edges", **self._shown) as bar:
            while self._kept:
                for part, sources, weights, m in self._kept.popitem()[1]:
                    kept = subset.within(part.start, part.stop)
                    kept_rows = subset.nodes[kept] - part.start
                    bar.update(put_features(Rows(kept, sources, weights[kept_rows], m[kept_rows])))
            for done in self.feature_rows(again, subset, put_features):
                bar.update(done)
        positions = extra[POSITION] if run.position_embedding is not None else None
        return Filled(adjacency, through_mlp, extra[BIAS], positions)

    def _checkpoints(self) -> list[int]:
        """Those with dictionaries, the last first; the features of checkpoint 0 are no targets."""
        return [c for c in sorted(self.parts.biases, reverse=True) if c > 0]


def unwritten_zeros(n: int, device: torch.device) -> Tensor:
    """(n, n) float32 zeros. Most of an adjacency stays so, and takes no memory until it is written:
    a target has edges from one checkpoint only, a few pages of its row."""
    if device.type != "cpu":
        return torch.zeros(n, n, dtype=torch.float32, device=device)
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # no huge pages to be had
        return torch.from_numpy(np.zeros((n, n), dtype=np.float32))
    memory = mmap.mmap(-1, 4 * n * n, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # one of them holds parts of many rows
    return torch.frombuffer(memory, dtype=torch.float32).view(n, n)
