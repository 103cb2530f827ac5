"""Where a model's features fire in a corpus: the strongest window of every text, for each feature.

The corpus is read once, batch by batch, for all checkpoints together. Of every text a feature keeps
at most its peak, and of all texts the strongest few, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import write_atomically
from circuit_tracer_qk.model.run import alone, contraction_dtype

BEFORE, AFTER = 10, 4
WINDOW = BEFORE + 1 + AFTER
SAVED_EVERY = 30.0  # seconds between two writings of the work so far


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

    def add(self, acts: Tensor, first_chunk: int) -> None:
        """Merge a batch.

        Only features that beat the last of their peaks are touched, and only windows that stay
        are cut out: after the first batches these are few.

        Args:
            acts: (n_chunks, n_pos, d_dict), 0 where nothing counts.
            first_chunk: the number of its first chunk.
        """
        k, n_pos = self.value.shape[1], acts.shape[1]
        self.count += (acts > 0).sum((0, 1)).cpu()
        value, position = acts.max(1)  # (n_chunks, d_dict)
        rising = (value.amax(0).float().cpu() > self.value[:, -1]).nonzero()[:, 0]
        if not len(rising):
            return
        feature = rising.to(acts.device)
        value, chunk = value[:, feature].T.float().topk(min(k, len(value)))  # (n_rising, .)
        position = position[:, feature].T.gather(1, chunk)
        value, rank = torch.cat([self.value[rising].to(value.device), value], 1).topk(k)
        row, column = (rank >= k).nonzero(as_tuple=True)  # what is new
        new = rank[row, column] - k
        chunk, position = chunk[row, new], position[row, new]
        at = position[:, None] + torch.arange(-BEFORE, AFTER + 1, device=acts.device)
        inside = (at >= 0) & (at < n_pos)
        windows = acts[chunk[:, None], at.clamp(0, n_pos - 1), feature[row, None]] * inside

        self.value[rising] = value.cpu()
        rank, row, column = rank.cpu(), row.cpu(), column.cpu()
        rows = torch.arange(len(rising), device="cpu")[:, None]
        for known, new in (
            (self.chunk, chunk + first_chunk),
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

    def batches(self) -> list[range]:
        """Chunk numbers, batch by batch."""
        n = len(self.chunks)
        return [range(i, min(i + self.batch, n)) for i in range(0, n, self.batch)]

    def padded(self, numbers: range) -> tuple[Tensor, Tensor]:
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
    bar = tqdm(batches, "Reading the corpus", initial=done, leave=False, delay=2, disable=None)
    for i, numbers in enumerate(batches[done:], done):
        streams, counted = read_streams(model, corpus, numbers, checkpoints)
        for c in checkpoints:
            x = streams[c]
            acts = known[c].encode(x.flatten(0, 1)).view(*x.shape[:2], -1)
            peaks_of[c].add(acts * counted[..., None], numbers.start)
        bar.update(1)
        # at the end too: what follows takes its time
        if i + 1 == len(batches) or time.monotonic() - written > SAVED_EVERY:
            write_atomically(progress, _packed(peaks_of, fingerprint, i + 1))
            written = time.monotonic()
    bar.close()
    return peaks_of


def read_streams(
    model: ResidualModel, corpus: Corpus, numbers: range, checkpoints: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """checkpoint -> (n_chunks, n_pos, d_model), and (n_chunks, n_pos) which positions count."""
    transformer = model.transformer
    n_layers, device = transformer.cfg.n_layers, transformer.W_E.device
    ids, there = corpus.padded(numbers)
    hooks = {
        c: f"blocks.{c}.hook_resid_pre" if c < n_layers else f"blocks.{c - 1}.hook_resid_post"
        for c in checkpoints
    }
    wanted = set(hooks.values())
    with alone(transformer):
        _, cache = transformer.run_with_cache(
            ids.to(device), names_filter=lambda name: name in wanted, return_type=None
        )
    dtype = contraction_dtype(transformer.cfg.dtype)
    counted = there.to(device)
    counted[:, model.zero_positions] = False
    return {c: cache[hook].to(dtype) for c, hook in hooks.items()}, counted


# The work on the disk -----------------------------------------------------------------------------


def fingerprint_of(model: ResidualModel, corpus: Corpus, checkpoints: Sequence[int], k: int) -> str:
    """Differs where the result would: of weights, numbers spread over each of them are read."""
    digest = hashlib.sha256()
    weights = list(model.transformer.parameters())
    facts: list[Any] = [list(checkpoints), k, corpus.batch, BEFORE, AFTER]
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
