"""Examples and labels of features, built from a corpus, in the form that the page shows.

``features.zip`` holds one JSON for each feature in circuit-tracer's form, with a key ``label``;
``labels.json`` the labels alone. Labels are made by counting tokens, no reader has seen them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuit_tracer_qk.attribution.residual.model import ResidualModel
from circuit_tracer_qk.base import hub
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import check_folder, write_pair
from circuit_tracer_qk.cli.features.collection import AFTER, BEFORE, Corpus, Peaks, collect
from circuit_tracer_qk.cli.features.progress import progress_of
from circuit_tracer_qk.dictionaries.catalogue import MINIATURES
from circuit_tracer_qk.dictionaries.dictionary import like
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.features import (
    feature_index,
    indexed_feature,
    open_archive,
    read_labels,
    read_member,
)
from circuit_tracer_qk.host import graph as host
from circuit_tracer_qk.model.run import contraction_dtype

LOGITS = 10
_AT_A_TIME = 512  # features whose windows are held as Python's numbers
_PIECE = 2**26  # logits held together
_EPOCH = (2025, 1, 1, 0, 0, 0)  # the same features give the same archive


class Window(NamedTuple):
    """The surroundings of one of a feature's peaks.

    Attributes:
        value: activation at the peak.
        ids: the tokens.
        acts: activations at them.
        place: the peak's index in them.
    """

    value: float
    ids: list[int]
    acts: list[float]
    place: int


class Built(NamedTuple):
    """What :func:`build_features` wrote.

    Attributes:
        folder: where ``features.zip`` and ``labels.json`` are.
        n_features: features described.
        n_alive: those that fired.
        n_positions: positions of the corpus; the BOS is none.
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
    ``2 * examples * (WINDOW + 3) * 4`` bytes of memory and of that file, a batch
    ``batch * context`` activations of every feature of one dictionary. The dictionaries' own folder
    is where they are read; from another folder copy both files there (dictionaries that are not in
    a folder of yours: ``convert`` them first).

    Args:
        model: of :func:`circuit_tracer_qk.load_model`.
        texts: the corpus; each text starts with a BOS and is cut to ``context`` tokens.
        folder: where to write; the dictionaries' own folder if left out.
        examples: windows shown for each feature.
        context: tokens of a chunk, BOS included.
        batch: chunks run at a time.
        checkpoints: the dictionaries to describe; all if left out. What the folder has of others
            stays.
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
    check_sizes(examples, context, batch)
    target = check_target(_target(model.dictionaries, folder), force)
    context = min(context, model.cfg.n_ctx)
    corpus = Corpus.of(texts, model, context, batch)
    progress = target / ".features.part"
    peaks_of = collect(model, corpus, every, 2 * examples, progress)
    decode = cache(host.token_texts(model.tokenizer, model.cfg.d_vocab))
    total = sum(len(peaks.count) for peaks in peaks_of.values())
    described = (
        (c, record)
        for c, peaks in peaks_of.items()
        for record in feature_records(model, corpus, c, peaks, examples, decode, logits)
    )
    with progress_of("Describing features", total) as step:

        def told() -> Iterator[tuple[int, dict[str, Any]]]:
            for record in described:
                yield record
                step()

        _write(target, model.dictionaries, told(), every)
    progress.unlink(missing_ok=True)
    alive = sum(int((peaks.count > 0).sum()) for peaks in peaks_of.values())
    return Built(target, total, alive, corpus.n_positions(model.zero_positions))


def check_sizes(examples: int, context: int, batch: int) -> None:
    """Refuse numbers that are out of range.

    Raises:
        UserError: one is.
    """
    if examples < 1 or context < 2 or batch < 1:
        raise UserError("examples and batch must be at least 1, context at least 2 tokens.")


def check_target(folder: str | Path, force: bool) -> Path:
    """The folder, if descriptions can be written to it.

    Raises:
        UserError: it cannot be written to, or has descriptions that are not to be replaced.
    """
    target = check_folder(folder)
    for name in ("features.zip", "features", "labels.json"):
        if (target / name).exists() and not force:
            raise UserError(
                f"{target / name} is there already: give force (--force) to replace it."
            )
    return target


def _target(dictionaries: DictionarySet, folder: str | Path | None) -> Path:
    """The folder to write to."""
    if folder is not None:
        return Path(folder)
    set_folder = dictionaries.folder
    if set_folder is None or set_folder in MINIATURES.values() or hub.is_cached(set_folder):
        raise UserError(
            f"{dictionaries.scan} has no folder of its own here to describe its features in: "
            "name one (-o FOLDER), or `convert` the set first and describe the copy."
        )
    return set_folder


def _write(
    target: Path,
    dictionaries: DictionarySet,
    described: Iterable[tuple[int, dict[str, Any]]],
    checkpoints: Sequence[int],
) -> None:
    """Put ``features.zip`` and ``labels.json`` in their places, whole.

    Args:
        described: (checkpoint, feature's JSON), by checkpoint and feature.
        checkpoints: those of ``described``; of others, what is there stays.

    Raises:
        UserError: they cannot be written, or what is there cannot be read.
    """
    archive = target / "features.zip"
    labels = _other_labels(target / "labels.json", dictionaries, checkpoints)

    def write(part: Path) -> bytes:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as out:
            if archive.exists():
                with open_archive(archive) as old:
                    for name in old.namelist():
                        stem = Path(name).stem
                        numbered = stem.isascii() and stem.isdecimal()
                        if numbered and indexed_feature(int(stem))[0] not in checkpoints:
                            out.writestr(_entry(name), read_member(old, name))
            for c, record in described:
                number = str(dictionaries.entries.get(c, c - 1))
                labels.setdefault(number, []).append(record["label"])
                index = feature_index(c, record["index"])
                if index is not None:
                    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
                    out.writestr(_entry(f"{index}.json"), text)
        ordered = dict(sorted(labels.items(), key=lambda item: (len(item[0]), item[0])))
        return (json.dumps(ordered, ensure_ascii=False, indent=0) + "\n").encode()

    write_pair(target / "labels.json", archive, write)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _other_labels(
    path: Path, dictionaries: DictionarySet, checkpoints: Sequence[int]
) -> dict[str, list[str | None]]:
    """The labels that are there of other checkpoints."""
    if not path.is_file():
        return {}
    labels = read_labels(path)
    described = {str(dictionaries.entries.get(c, c - 1)) for c in checkpoints}
    return {number: texts for number, texts in labels.items() if number not in described}


def feature_records(
    model: ResidualModel,
    corpus: Corpus,
    checkpoint: int,
    peaks: Peaks,
    examples: int,
    decode: Callable[[int], str],
    logits: bool,
) -> Iterator[dict[str, Any]]:
    """Every feature of one dictionary, in order."""
    n, n_positions = len(peaks.count), corpus.n_positions(model.zero_positions)
    tops, bottoms = _promoted(model, checkpoint) if logits else ([[]] * n, [[]] * n)
    for start in range(0, n, _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        for i, windows in enumerate(_windows(corpus, peaks, part), start):
            shown = _examples(windows, examples, decode)
            quantile = {"quantile_name": "Top activations", "examples": shown}
            yield {
                "transcoder_id": model.dictionaries.scan,
                "index": i,
                "label": label_of(windows, decode),
                "examples_quantiles": [quantile] if shown else [],
                "top_logits": [decode(t) for t in tops[i]],
                "bottom_logits": [decode(t) for t in bottoms[i]],
                "act_min": 0,
                "act_max": _rounded(windows[0].value) if windows else 0,
                "quantile_values": [],
                "histogram": [],
                "activation_frequency": _rounded(int(peaks.count[i]) / n_positions),
            }


@torch.no_grad()
def _promoted(model: ResidualModel, checkpoint: int) -> tuple[list[list[int]], list[list[int]]]:
    """(d_dict, LOGITS) tokens that features' decoder vectors promote, and those they suppress.

    The vector goes through the final norm's gain and the unembedding, without the norm's scale.
    """
    transformer = model.transformer
    dictionary = model.dictionaries.by_checkpoint[checkpoint]
    site = max(dictionary.decoders)  # a crosscoder's last: nearest to the logits
    W_U = transformer.unembed.W_U
    W_U = W_U.to(contraction_dtype(W_U.dtype))
    gain = getattr(transformer.ln_final, "w", None)
    n, d_dict = min(LOGITS, W_U.shape[1]), len(dictionary.b_enc)
    rows = max(1, _PIECE // W_U.shape[1])
    tops, bottoms = [], []
    for start in range(0, d_dict, rows):
        features = torch.arange(start, min(start + rows, d_dict), device="cpu")
        vectors = like(dictionary.vectors(site, features), W_U)
        if str(transformer.cfg.normalization_type).startswith("LN"):
            vectors = vectors - vectors.mean(-1, keepdim=True)
        if isinstance(gain, Tensor):
            vectors = vectors * like(gain, W_U)
        logits = vectors @ W_U
        tops += logits.topk(n).indices.tolist()
        bottoms += logits.topk(n, largest=False).indices.tolist()
    return tops, bottoms


def _windows(corpus: Corpus, peaks: Peaks, features: slice) -> Iterator[list[Window]]:
    """The windows of some features, strongest first."""
    fields = (peaks.value, peaks.chunk, peaks.position, peaks.acts)
    for values, chunks, positions, acts in zip(
        *(f[features].tolist() for f in fields), strict=True
    ):
        windows = []
        for value, chunk, position, around in zip(values, chunks, positions, acts, strict=True):
            if not value:
                break
            first = max(position - BEFORE, 0)
            ids = corpus.chunks[chunk][first : position + AFTER + 1].tolist()
            skipped = first - (position - BEFORE)  # what lies before the chunk
            around = around[skipped : skipped + len(ids)]
            windows.append(Window(value, ids, around, position - first))
        yield windows


def _examples(
    windows: Sequence[Window], count: int, decode: Callable[[int], str]
) -> list[dict[str, Any]]:
    """The strongest windows, no two of the same tokens up to the peak."""
    distinct: dict[tuple[int, ...], Window] = {}
    for w in windows:
        distinct.setdefault(tuple(w.ids[: w.place + 1]), w)
    return [
        {
            "tokens_acts_list": [_rounded(a) for a in w.acts],
            "train_token_ind": w.place,
            "is_repeated_datapoint": False,
            "tokens": [decode(t) for t in w.ids],
        }
        for w in list(distinct.values())[:count]
    ]


def label_of(windows: Sequence[Window], decode: Callable[[int], str]) -> str:
    """The token that holds most of the strongest activations, else the first three; "" if dead."""
    share: dict[int, float] = {}
    for w in windows:
        share[w.ids[w.place]] = share.get(w.ids[w.place], 0.0) + w.value
    if not share:
        return ""
    ranked = sorted(share.items(), key=lambda item: (-item[1], item[0]))
    names = [f'"{decode(token)}"' for token, _ in ranked[:3]]
    clear = ranked[0][1] >= 0.7 * sum(share.values())
    return names[0] if clear else f"many: {', '.join(names)}"


def _rounded(value: float) -> float:
    """Three significant digits; whole numbers as such."""
    number = float(f"{value:.3g}")
    return int(number) if number == int(number) else number
