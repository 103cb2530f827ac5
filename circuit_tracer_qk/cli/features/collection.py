"""Where a model's features fire in a corpus: the strongest window of every text, for each feature.

The corpus is read once, batch by batch, for all checkpoints together. Of every text a feature keeps
at most its peak, and of all texts the strongest few, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, local
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import write_atomically
from circuit_tracer_qk.base.threads import Crew
from circuit_tracer_qk.cli.features.progress import progress_of
from circuit_tracer_qk.model.run import alone, contraction_dtype

BEFORE, AFTER = 10, 4
WINDOW = BEFORE + 1 + AFTER
SAVED_EVERY = 30.0  # seconds between two writings of the work so far
ROUND = 4  # batches that each of several threads reads between two looks at the clock


@dataclass
class Peaks:
    """The strongest windows of one checkpoint's features, on the CPU.

    Attributes:
        value: (d_dict, k) activation at the peak, descending; 0 where there is none.
        chunk: (d_dict, k) the chunk of the corpus.
        position: (d_dict, k) the peak's position in it.
        acts: (d_dict, k, WINDOW) activations around the peak; 0 outside the chunk.
        count: (d_dict,) positions at which the feature fires.
    """

    value: Tensor
    chunk: Tensor
    position: Tensor
    acts: Tensor
    count: Tensor

    @classmethod
    def none(cls, d_dict: int, k: int) -> Peaks:
        """Nothing read yet."""
        return cls(
            value=torch.zeros(d_dict, k, device="cpu"),
            chunk=torch.zeros(d_dict, k, dtype=torch.int32, device="cpu"),
            position=torch.zeros(d_dict, k, dtype=torch.int32, device="cpu"),
            acts=torch.zeros(d_dict, k, WINDOW, device="cpu"),
            count=torch.zeros(d_dict, dtype=torch.int64, device="cpu"),
        )

    def add(self, acts: Tensor, numbers: Sequence[int]) -> None:
        """Merge a batch.

        Only features that beat the last of their peaks are touched, and only windows that stay
        are cut out: after the first batches these are few.

        Args:
            acts: (n_chunks, n_pos, d_dict), 0 where nothing counts.
            numbers: those of its chunks.
        """
        k, n_pos = self.value.shape[1], acts.shape[1]
        # as a product, which is many times quicker than to count what is above 0
        fires = acts.sign().flatten(0, 1)
        self.count += (fires.new_ones(len(fires)) @ fires).round().long().cpu()
        value = acts.amax(1)  # (n_chunks, d_dict)
        rising = (value.amax(0).float().cpu() > self.value[:, -1]).nonzero()[:, 0]
        if not len(rising):
            return
        feature = rising.to(acts.device)
        value, chunk = value[:, feature].T.float().topk(min(k, len(value)))  # (n_rising, .)
        value, rank = torch.cat([self.value[rising].to(value.device), value], 1).topk(k)
        row, column = (rank >= k).nonzero(as_tuple=True)  # what is new
        chunk = chunk[row, rank[row, column] - k]
        position = acts[chunk, :, feature[row]].argmax(1)
        at = position[:, None] + torch.arange(-BEFORE, AFTER + 1, device=acts.device)
        inside = (at >= 0) & (at < n_pos)
        windows = acts[chunk[:, None], at.clamp(0, n_pos - 1), feature[row, None]] * inside

        self.value[rising] = value.cpu()
        rank, row, column = rank.cpu(), row.cpu(), column.cpu()
        rows = torch.arange(len(rising), device="cpu")[:, None]
        numbered = torch.tensor(numbers, device="cpu")[chunk.cpu()]
        for known, new in (
            (self.chunk, numbered),
            (self.position, position),
            (self.acts, windows),
        ):
            ranked = known[rising][rows, rank.clamp(max=k - 1)]
            ranked[row, column] = new.to("cpu", known.dtype)
            known[rising] = ranked


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts as chunks of tokens, each with the BOS in front.

    Attributes:
        chunks: (n_tokens,) ids each.
        batch: how many are read at a time.
    """

    chunks: Sequence[Tensor]
    batch: int

    @classmethod
    def of(cls, texts: Sequence[str], model: ResidualModel, context: int, batch: int) -> Corpus:
        """Texts cut to a context.

        Raises:
            UserError: nothing is left of them.
        """
        chunks: list[Tensor] = []
        for text in tqdm(texts, "Tokenising", leave=False, delay=2, disable=None):
            if not text.strip():
                continue
            ids = model.ensure_tokenized(text).cpu()
            for start in range(1, len(ids), context - 1):
                chunks.append(torch.cat([ids[:1], ids[start : start + context - 1]]))
        if not chunks:
            raise UserError("the texts have no tokens: give a file with text.")
        return cls(chunks, batch)

    def n_positions(self, dropped: slice) -> int:
        """How many positions count: all but those that are dropped of each chunk."""
        lengths = [len(chunk) for chunk in self.chunks]
        return sum(n - len(range(*dropped.indices(n))) for n in lengths)

    def batches(self) -> list[list[int]]:
        """Chunk numbers, batch by batch, the long ones first: those of a batch are alike."""
        n = len(self.chunks)
        order = sorted(range(n), key=lambda i: -len(self.chunks[i]))
        return [order[i : i + self.batch] for i in range(0, n, self.batch)]

    def padded(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(n_chunks, n_pos) ids, and where they are tokens; what is padded follows them."""
        chunks = [self.chunks[i] for i in numbers]
        ids = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True)
        length = torch.tensor([len(chunk) for chunk in chunks], device="cpu")
        return ids, torch.arange(ids.shape[1], device="cpu") < length[:, None]


@torch.no_grad()
def collect(
    model: ResidualModel,
    corpus: Corpus,
    checkpoints: Sequence[int],
    k: int,
    progress: Path,
) -> dict[int, Peaks]:
    """checkpoint -> the k strongest windows of each of its features.

    Args:
        model: of :func:`circuit_tracer_qk.load_model`.
        corpus: what is read.
        checkpoints: which dictionaries.
        k: windows a feature.
        progress: the file in which the work is kept; if it is there and of this work, it goes on.
    """
    known = model.dictionaries.by_checkpoint
    fingerprint = fingerprint_of(model, corpus, checkpoints, k)
    peaks_of, done = _resumed(progress, fingerprint)
    written = time.monotonic()
    for c in checkpoints:
        peaks_of.setdefault(c, Peaks.none(len(known[c].b_enc), k))
    batches = corpus.batches()
    crew = Crew(model.transformer.W_E.device)
    together = ROUND * crew.size if crew.size > 1 else 1  # between two looks at the clock
    turns = {c: Turns(done) for c in checkpoints}

    def describe(batch: int) -> None:
        """Read a batch and merge it, checkpoint by checkpoint; by several threads at once."""
        numbers = batches[batch]
        try:
            streams, counted = reader.read(numbers)
            for c in checkpoints:
                x = streams.pop(c)
                acts = known[c].encode(x.flatten(0, 1)).view(*x.shape[:2], -1)
                acts = acts * counted[..., None]
                with turns[c].turn(batch):
                    peaks_of[c].add(acts, numbers)
        except BaseException:
            for each in turns.values():
                each.end()
            raise

    said = progress_of("Reading the corpus, by batches", len(batches), done)
    with Reader(model, corpus, checkpoints) as reader, said as step:
        while done < len(batches):
            for _ in crew.do(describe, range(done, min(done + together, len(batches)))):
                done += 1
                step()
            # between rounds nothing is half merged; at the end too: what follows takes its time
            if done == len(batches) or time.monotonic() - written > SAVED_EVERY:
                write_atomically(progress, _packed(peaks_of, fingerprint, done))
                written = time.monotonic()
    return peaks_of


class Turns:
    """Lets batches merge one after the other, so that of equal peaks the same ones stay.

    Args:
        first: the batch whose turn it is.
    """

    def __init__(self, first: int) -> None:
        self._next: int | None = first
        self._changed = Condition()

    @contextmanager
    def turn(self, batch: int) -> Iterator[None]:
        """Within, it is a batch's turn.

        Raises:
            RuntimeError: a batch before it failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._next in (batch, None))
            if self._next is None:
                raise RuntimeError("another batch failed")
            yield
            self._next = batch + 1
            self._changed.notify_all()

    def end(self) -> None:
        """There are no more turns: a batch failed."""
        with self._changed:
            self._next = None
            self._changed.notify_all()


class Reader:
    """Runs a model over batches of chunks, in several threads at once.

    Args:
        model: of :func:`circuit_tracer_qk.load_model`; its hooks are this reader's while it is open.
        corpus: what is read.
        checkpoints: whose streams are wanted.
    """

    def __init__(self, model: ResidualModel, corpus: Corpus, checkpoints: Sequence[int]) -> None:
        self.model, self.corpus = model, corpus
        n_layers = model.transformer.cfg.n_layers
        self._hooks = {
            f"blocks.{c}.hook_resid_pre" if c < n_layers else f"blocks.{c - 1}.hook_resid_post": c
            for c in checkpoints
        }
        self._seen = local()  # each thread's own: hooks are the model's
        self._open = ExitStack()

    def __enter__(self) -> Reader:
        dtype = contraction_dtype(self.model.transformer.cfg.dtype)

        def keep(x: Tensor, hook: Any) -> None:
            self._seen.streams[self._hooks[hook.name]] = x.to(dtype)

        self._open.enter_context(alone(self.model.transformer))
        hooks: list[Any] = [(name, keep) for name in self._hooks]
        self._open.enter_context(self.model.transformer.hooks(fwd_hooks=hooks))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def read(self, numbers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
        """checkpoint -> (n_chunks, n_pos, d_model), and (n_chunks, n_pos) which positions count."""
        transformer = self.model.transformer
        ids, there = self.corpus.padded(numbers)
        self._seen.streams = {}
        transformer(ids.to(transformer.W_E.device), return_type=None)
        counted = there.to(transformer.W_E.device)
        counted[:, self.model.zero_positions] = False
        return self._seen.__dict__.pop("streams"), counted


# The work on the disk -----------------------------------------------------------------------------


def fingerprint_of(model: ResidualModel, corpus: Corpus, checkpoints: Sequence[int], k: int) -> str:
    """Differs where the result would: of weights, numbers spread over each of them are read."""
    digest = hashlib.sha256()
    weights = list(model.transformer.parameters())
    facts: list[Any] = ["by length", list(checkpoints), k, corpus.batch, BEFORE, AFTER]
    facts += [str(model.zero_positions), str(model.cfg), str(model.transformer.W_E.device)]
    for c in checkpoints:
        dictionary = model.dictionaries.by_checkpoint[c]
        weights += [value for value in vars(dictionary).values() if isinstance(value, Tensor)]
        facts += [dictionary.k, str(dictionary.units)]
    digest.update(json.dumps(facts).encode())
    for tensor in (*map(_spread, weights), *corpus.chunks):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _spread(tensor: Tensor) -> Tensor:
    """At most 64 entries along every dimension of a tensor; no others are read."""
    for dim, size in enumerate(tensor.shape):
        tensor = tensor[(slice(None),) * dim + (slice(None, None, max(1, -(-size // 64))),)]
    return tensor


def _packed(peaks_of: dict[int, Peaks], fingerprint: str, done: int) -> bytes:
    tensors = {
        f"{c}.{name}": tensor.contiguous()
        for c, peaks in peaks_of.items()
        for name, tensor in vars(peaks).items()
    }
    return save(tensors, {"fingerprint": fingerprint, "done": str(done)})


def _resumed(path: Path, fingerprint: str) -> tuple[dict[int, Peaks], int]:
    """What was done before; nothing where the file is torn or of other work."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("fingerprint") != fingerprint:
                return {}, 0
            parts: dict[int, dict[str, Any]] = defaultdict(dict)
            for name in file.keys():
                c, _, field = name.partition(".")
                parts[int(c)][field] = file.get_tensor(name).clone()
    except (SafetensorError, OSError):
        return {}, 0
    return {c: Peaks(**fields) for c, fields in parts.items()}, int(said["done"])
