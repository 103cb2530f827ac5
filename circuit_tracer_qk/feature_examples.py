"""Examples and labels of features, built from a corpus, in the form that the page shows.

``features.zip`` holds one JSON for each feature in circuit-tracer's form, with a key ``label``;
``labels.json`` the labels alone. Labels are made by counting tokens, no reader has seen them.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_tracer_qk import host, hub
from circuit_tracer_qk.catalogue import MINIATURES
from circuit_tracer_qk.dictionaries import feature_index, like
from circuit_tracer_qk.errors import UserError
from circuit_tracer_qk.feature_collection import BEFORE, WINDOW, Corpus, Peaks, collect
from circuit_tracer_qk.files import check_folder, write_atomically
from circuit_tracer_qk.frozen import contraction_dtype
from circuit_tracer_qk.residual_model import ResidualModel

SAVED_EVERY = 30.0  # seconds between two writings of the work so far
LOGITS = 10
_AT_A_TIME = 512  # features whose logits are held together
_EPOCH = (2025, 1, 1, 0, 0, 0)  # the same features give the same archive


class Built(NamedTuple):
    """What :func:`build_features` wrote.

    Attributes:
        folder: where ``features.zip`` and ``labels.json`` are.
        n_features: features described.
        n_alive: those that fired.
        n_positions: positions of the corpus.
    """

    folder: Path
    n_features: int
    n_alive: int
    n_positions: int


def build_features(
    model: ResidualModel,
    texts: Sequence[str],
    folder: str | Path | None = None,
    *,
    examples: int = 5,
    context: int = 64,
    batch: int = 16,
    checkpoints: Sequence[int] | None = None,
    logits: bool = True,
    force: bool = False,
) -> Built:
    """Describe every feature of a model's dictionaries by where it fires in a corpus.

    Interrupted work goes on where it was (a file ``.features.part`` in the folder), with the same
    bytes as the result. One pass over the corpus serves all checkpoints; a feature takes
    ``2 * examples * (WINDOW + 3) * 4`` bytes of memory.

    Args:
        model: of :func:`circuit_tracer_qk.load_model`.
        texts: the corpus; each text starts with a BOS and is cut to ``context`` tokens.
        folder: where to write; the dictionaries' own folder if left out.
        examples: windows shown for each feature.
        context: tokens of a chunk, BOS included.
        batch: chunks run at a time.
        checkpoints: the dictionaries to describe; all if left out.
        logits: also list the tokens that each decoder vector promotes and suppresses.
        force: replace examples that are there.

    Raises:
        UserError: no folder to write to, examples that are there already, or nothing to read.
    """
    known = model.dictionaries.by_checkpoint
    every = tuple(known) if checkpoints is None else tuple(sorted(set(checkpoints)))
    unknown = [c for c in every if c not in known]
    if unknown:
        raise UserError(
            f"{model.dictionaries.scan} has no dictionary at checkpoint {unknown[0]}: it has them "
            f"at {', '.join(map(str, known))}."
        )
    if examples < 1 or context < 2 or batch < 1:
        raise UserError("examples and batch must be at least 1, context at least 2 tokens.")
    target = _target(model, folder)
    archive, labels = target / "features.zip", target / "labels.json"
    for path in (archive, labels):
        if path.exists() and not force:
            raise UserError(f"{path} is there already: give force (--force) to replace it.")
    context = min(context, model.cfg.n_ctx)
    corpus = Corpus.of(texts, model, context, batch)
    progress, last = target / ".features.part", time.monotonic()

    def save_when(done: int) -> bool:
        nonlocal last
        late = time.monotonic() - last > SAVED_EVERY
        last = time.monotonic() if late else last
        return late

    found = collect(model, corpus, every, 2 * examples, progress, save_when)
    decode = host.decoder(model.tokenizer, model.cfg.d_vocab).decode
    named: dict[str, list[str]] = {}
    part = target / ".features.zip.part"
    total = sum(len(peaks.count) for peaks in found.values())
    bar = tqdm(total=total, desc="Describing features", leave=False, delay=2, disable=None)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as out:
        for c, peaks in found.items():
            number = str(model.dictionaries.entries.get(c, c - 1))
            named[number] = []
            for record in _records(model, corpus, c, peaks, examples, decode, logits):
                named[number].append(record["label"])
                index = feature_index(c, record["index"])
                if index is not None:
                    entry = zipfile.ZipInfo(f"{index}.json", _EPOCH)
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
                    out.writestr(entry, text)
                bar.update(1)
    bar.close()
    write_atomically(labels, (json.dumps(named, ensure_ascii=False, indent=0) + "\n").encode())
    os.replace(part, archive)
    progress.unlink(missing_ok=True)
    alive = sum(int((peaks.count > 0).sum()) for peaks in found.values())
    return Built(target, total, alive, corpus.n_positions)


def _target(model: ResidualModel, folder: str | Path | None) -> Path:
    """The folder to write to."""
    own = model.dictionaries.folder
    others = own is not None and (own in MINIATURES.values() or hub.is_cached(own))
    if folder is None and (own is None or others):
        raise UserError(
            f"{model.dictionaries.scan} has no folder of its own here to describe its features in: "
            "name one (-o FOLDER), or `convert` the set first and describe the copy."
        )
    return check_folder(folder if folder is not None else own)  # type: ignore[arg-type]


def _records(
    model: ResidualModel,
    corpus: Corpus,
    checkpoint: int,
    peaks: Peaks,
    examples: int,
    decode: Any,
    logits: bool,
) -> Iterator[dict[str, Any]]:
    """Every feature of one dictionary, in order."""
    for start in range(0, len(peaks.count), _AT_A_TIME):
        some = range(start, min(start + _AT_A_TIME, len(peaks.count)))
        tops, bottoms = _promoted(model, checkpoint, some) if logits else ((), ())
        for i, feature in enumerate(some):
            shown = _windows(corpus, peaks, feature, examples, decode)
            yield {
                "transcoder_id": model.dictionaries.scan,
                "index": feature,
                "label": _label(corpus, peaks, feature, decode),
                "examples_quantiles": [{"quantile_name": "Top activations", "examples": shown}]
                if shown
                else [],
                "top_logits": [decode(t) for t in tops[i]] if logits else [],
                "bottom_logits": [decode(t) for t in bottoms[i]] if logits else [],
                "act_min": 0,
                "act_max": _rounded(float(peaks.value[0, feature])),
                "quantile_values": [],
                "histogram": [],
                "activation_frequency": _rounded(int(peaks.count[feature]) / corpus.n_positions),
            }


def _promoted(model: ResidualModel, checkpoint: int, some: range) -> tuple[Tensor, Tensor]:
    """(n, LOGITS) tokens that features' decoder vectors promote, and those they suppress.

    The vector goes through the final norm's gain and the unembedding, without the norm's scale.
    """
    transformer = model.transformer
    dictionary = model.dictionaries.by_checkpoint[checkpoint]
    site = max(dictionary.decoders)  # a crosscoder's last: nearest to the logits
    W_U = transformer.unembed.W_U.detach()
    x = torch.empty(0, dtype=contraction_dtype(W_U.dtype), device=W_U.device)
    vectors = like(dictionary.vectors(site, torch.arange(some.start, some.stop)), x)
    if str(transformer.cfg.normalization_type).startswith("LN"):
        vectors = vectors - vectors.mean(-1, keepdim=True)
    gain = getattr(transformer.ln_final, "w", None)
    if isinstance(gain, Tensor):
        vectors = vectors * like(gain.detach(), x)
    out = vectors @ like(W_U, x)
    n = min(LOGITS, out.shape[1])
    return out.topk(n).indices.cpu(), (-out).topk(n).indices.cpu()


def _windows(
    corpus: Corpus, peaks: Peaks, feature: int, count: int, decode: Any
) -> list[dict[str, Any]]:
    """The strongest windows, no two of the same tokens."""
    shown: list[dict[str, Any]] = []
    seen: set[tuple[int, ...]] = set()
    for j in range(len(peaks.value)):
        if not float(peaks.value[j, feature]) or len(shown) == count:
            break
        ids = corpus.chunks[int(peaks.chunk[j, feature])]
        place = int(peaks.position[j, feature])
        first = max(place - BEFORE, 0)
        window = ids[first : place - BEFORE + WINDOW]
        key = tuple(window[: place - first + 1].tolist())
        if key in seen:
            continue
        seen.add(key)
        acts = peaks.acts[j, first - place + BEFORE :, feature][: len(window)]
        shown.append(
            {
                "tokens_acts_list": [_rounded(a) for a in acts.tolist()],
                "train_token_ind": place - first,
                "is_repeated_datapoint": False,
                "tokens": [decode(t) for t in window],
            }
        )
    return shown


def _label(corpus: Corpus, peaks: Peaks, feature: int, decode: Any) -> str:
    """The token that holds most of the strongest activations, else the first three; "" if dead."""
    share: dict[int, float] = {}
    for j in range(len(peaks.value)):
        value = float(peaks.value[j, feature])
        if value:
            ids = corpus.chunks[int(peaks.chunk[j, feature])]
            token = int(ids[int(peaks.position[j, feature])])
            share[token] = share.get(token, 0.0) + value
    if not share:
        return ""
    ranked = sorted(share.items(), key=lambda item: (-item[1], item[0]))
    names = [f'"{decode(torch.tensor(token))}"' for token, _ in ranked[:3]]
    if ranked[0][1] >= 0.7 * sum(share.values()):
        return names[0]
    return f"many: {', '.join(names)}"


def _rounded(value: float) -> float:
    """Three significant digits; whole numbers as such."""
    number = float(f"{value:.3g}")
    return int(number) if number == int(number) else number
