"""Top examples, logits and a readable label for every feature of a dictionary.

The files are circuit-tracer's local feature files, one per feature, in one deflated archive
(``features.zip``), with a key ``label`` added; ``labels.json`` has the labels alone.
"""

import json
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM

from .corpus import (
    DAYS,
    FACT_LIST,
    FEELINGS,
    NAMES,
    PLACES,
    RELATIONS,
    THINGS,
    TITLES,
    vocabulary,
)
from .dictionaries import Dictionary

BEFORE, AFTER = 10, 2
REACH = 14
CLASSES = {
    "a name": {f" {word}" for word in NAMES},
    "a title": {prefix + word for word in TITLES for prefix in ("", " ")},
    "a place": {f" {word}" for word in PLACES},
    "a thing": {f" {word}" for word in THINGS},
    "a feeling": {f" {word}" for word in FEELINGS},
    "a day": {f" {word}" for word in DAYS},
    "a value": {f" {value}" for _, _, value in FACT_LIST},
    "an object": {f" {thing}" for _, thing, _ in FACT_LIST},
    "a quoted word": {w for word, answers in RELATIONS.items() for w in (word, *answers)},
    "an option letter": {"A", "B", "C"},
}


def cantor(x: int, y: int) -> int:
    """Cantor's pairing, the name of a feature's file."""
    return (x + y) * (x + y + 1) // 2 + y


def rounded(value: float) -> float:
    """A number with three significant digits."""
    return float(f"{value:.3g}")


class Contexts:
    """The documents that features are described by, and what stands in front of each position.

    Args:
        ids: Token ids (documents, context), BOS first.
    """

    def __init__(self, ids: Tensor):
        self.ids = ids
        self.tokens = vocabulary()
        size = len(self.tokens)
        self.current = ids[:, 1:].flatten()
        self.previous = ids[:, :-1].flatten()
        documents, context = ids.shape
        seen = torch.zeros(documents, context, size, dtype=torch.bool)
        for offset in range(1, REACH + 1):
            seen[:, offset:].scatter_(2, ids[:, :-offset, None], True)
        self.before = seen[:, 1:].flatten(0, 1)
        """(positions, vocabulary): whether a token is among the last few before a position."""
        totals = torch.zeros(size, size).index_add_(0, self.current, self.before.float())
        counts = torch.bincount(self.current, minlength=size).clamp_min(1)
        self.usual = totals / counts[:, None]
        """(vocabulary, vocabulary): how often the second is among those before the first."""
        pairs = torch.bincount(self.current * size + self.previous, minlength=size * size)
        self.usual_previous = pairs.view(size, size) / counts[:, None]
        """(vocabulary, vocabulary): how often the second is directly before the first."""


def quoted(token: str) -> str:
    """A token in quotation marks, its leading space kept."""
    return f'"{token}"'


def percent(share: Tensor | float) -> str:
    """A share as percent."""
    return f"{100 * float(share):.0f}%"


def describe(contexts: Contexts, rows: Tensor, weights: Tensor) -> str:
    """A label: the tokens a feature fires on, and what comes before them.

    A token or a class of tokens has to hold most of the feature's activation to be named alone;
    otherwise the three tokens with the largest shares are named. What is before is said when it
    holds for most of the activation: the previous token, or else a token among the last few that
    is much more frequent there than it usually is before the same tokens.

    Args:
        contexts: The documents.
        rows: Positions at which the feature fires.
        weights: Its activations there.
    """
    tokens = contexts.tokens
    size = len(tokens)
    weights = weights / weights.sum()
    share = torch.zeros(size).index_add_(0, contexts.current[rows], weights)
    top = share.topk(3)
    first, second, third = (tokens[i] for i in top.indices.tolist())
    in_class = {
        name: sum(share[i].item() for i, token in enumerate(tokens) if token in members)
        for name, members in CLASSES.items()
    }
    best_class = max(in_class, key=lambda name: in_class[name])
    if top.values[0] >= 0.7:
        what = quoted(first)
    elif in_class[best_class] >= 0.85:
        what = best_class
        if top.values[0] >= 0.15:
            what += f" ({quoted(first)} {percent(top.values[0])})"
    elif top.values[0] >= 0.25:
        pairs = zip((first, second, third), top.values.tolist(), strict=True)
        what = ", ".join(f"{quoted(t)} {percent(v)}" for t, v in pairs if v >= 0.1)
    else:
        what = f"many: {quoted(first)}, {quoted(second)}, {quoted(third)}"

    before = torch.zeros(size).index_add_(0, contexts.previous[rows], weights)
    value, index = before.max(0)
    if value >= 0.6 and value - share @ contexts.usual_previous[:, index] >= 0.25:
        return f"{what} after {quoted(tokens[int(index)])}"
    expected = share @ contexts.usual
    held = (contexts.before[rows].float() * weights[:, None]).sum(0)
    gain, index = (held - expected).max(0)
    if held[index] >= 0.7 and gain >= 0.3:
        return f"{what} | before: {quoted(tokens[int(index)])}"
    return what


def examples(contexts: Contexts, acts: Tensor, ranked: Tensor, count: int) -> list[dict]:
    """Windows around the first positions of a ranking, no two with the same text.

    Args:
        contexts: The documents.
        acts: The feature's activation at every position, BOS left out.
        ranked: Positions, the wanted ones first.
        count: How many windows.
    """
    context = contexts.ids.shape[1]
    found: list[dict] = []
    texts: set[str] = set()
    for row in ranked.tolist():
        document, place = divmod(row, context - 1)
        place += 1
        start, stop = max(place - BEFORE, 0), min(place + AFTER + 1, context)
        tokens = [contexts.tokens[i] for i in contexts.ids[document, start:stop].tolist()]
        text = "".join(tokens[max(0, place - start - 6) : place - start + 1])
        if text in texts:
            continue
        texts.add(text)
        offset = document * (context - 1) - 1
        values = [
            rounded(acts[offset + position].item()) if position else 0.0
            for position in range(start, stop)
        ]
        found.append(
            {
                "tokens_acts_list": [v or 0 for v in values],
                "train_token_ind": place - start,
                "is_repeated_datapoint": False,
                "tokens": tokens,
            }
        )
        if len(found) == count:
            break
    return found


def feature_record(
    contexts: Contexts, acts: Tensor, logits: Tensor, index: int, scan: str
) -> dict[str, object]:
    """Everything about one feature, in circuit-tracer's form, with a label."""
    firing = acts.nonzero()[:, 0]
    record: dict[str, object] = {
        "transcoder_id": scan,
        "index": index,
        "label": "",
        "examples_quantiles": [],
        "top_logits": [],
        "bottom_logits": [],
        "act_min": 0,
        "act_max": 0,
        "quantile_values": [],
        "histogram": [],
        "activation_frequency": rounded(len(firing) / len(acts)),
    }
    if not len(firing):
        return record
    values = acts[firing]
    order = firing[values.argsort(descending=True)]
    middle = order[len(order) * 2 // 5 : len(order) * 3 // 5 + 1]
    quantiles = [("Top activations", order[:200], 5), ("Middle of the range", middle[:100], 2)]
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    record.update(
        label=describe(contexts, firing, values),
        examples_quantiles=[
            {"quantile_name": name, "examples": examples(contexts, acts, rows, count)}
            for name, rows, count in quantiles
        ],
        top_logits=[contexts.tokens[i] for i in logits.topk(6).indices.tolist()],
        bottom_logits=[contexts.tokens[i] for i in (-logits).topk(4).indices.tolist()],
        act_max=rounded(values.max().item()),
        quantile_values=[rounded(v) for v in values.quantile(levels).tolist()],
        histogram=torch.histc(values, 20, 0, values.max().item()).int().tolist(),
    )
    return record


@torch.no_grad()
def write_features(
    model: LlamaForCausalLM, folder: Path, scan: str, ids: Tensor, activations: Tensor
) -> dict[str, int]:
    """Write features.zip and labels.json next to a dictionary.

    Args:
        model: The transformer, for the features' logits.
        folder: The dictionary's folder.
        scan: The dictionary's name.
        ids: Token ids (documents, context).
        activations: Residual streams (sites, documents, context, width).
    """
    dictionary = Dictionary.load(folder)
    contexts = Contexts(ids)
    unembed = model.get_parameter("lm_head.weight") * model.get_parameter("model.norm.weight")
    labels: dict[str, list[str]] = {}
    with zipfile.ZipFile(folder / "features.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for site in tqdm(range(dictionary.sites), desc=scan):
            x = activations[site, :, 1:].flatten(0, 1)
            acts = dictionary.encode(site, x).T.contiguous()
            logits = dictionary.W_dec[site][:, -1] @ unembed.T
            labels[str(site)] = []
            for index in range(acts.shape[0]):
                record = feature_record(contexts, acts[index], logits[index], index, scan)
                labels[str(site)].append(str(record["label"]))
                text = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
                # a fixed date, so that the same features give the same archive
                name = zipfile.ZipInfo(f"{cantor(site, index)}.json", (2025, 1, 1, 0, 0, 0))
                name.compress_type = zipfile.ZIP_DEFLATED
                z.writestr(name, text)
    text = json.dumps(labels, ensure_ascii=False, indent=0)
    (folder / "labels.json").write_text(text + "\n", encoding="utf-8")
    return {
        "features": sum(map(len, labels.values())),
        "labelled": sum(bool(label) for row in labels.values() for label in row),
        "tokens": contexts.current.numel(),
        "zip_bytes": (folder / "features.zip").stat().st_size,
    }
