"""The built-in list of dictionary sets: names of sets that cover every layer of a model.

``catalogue.yaml`` beside this file says for each where its files are, what they are of and under
which licence; ``circuit-tracer-qk dictionaries`` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.package import ROOT

MINIATURES = {f"miniature-{kind}": ROOT / "miniature" / kind for kind in ("sae", "wcc")}
_NAME = re.compile(r"(?P<name>[\w.-]+)(?:/(?P<variant>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class ListedSet:
    """One set of the list.

    Attributes:
        name, variant: as listed.
        title: the name with its variant where that is not the first.
        revision: the hub revision asked for.
        folder: of a set that ships with the package.
        repository, layout, model, hook, licence: where and what it is.
        layers: the layers it covers.
        width: features a layer.
        folders: the folder of each layer's dictionary in the repository.
        files: the files, where a layer is no folder.
        neuronpedia: Neuronpedia's id with ``{layer}`` in it.
        centred, norm_scaling_factor: what the files do not say.
    """

    name: str
    variant: str
    title: str
    revision: str | None = None
    folder: Path | None = None
    repository: str = ""
    layout: str = "native"
    model: str | None = None
    hook: str = ""
    licence: str = ""
    layers: tuple[int, ...] = ()
    width: int = 0
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    neuronpedia: str | None = None
    centred: bool | None = None
    norm_scaling_factor: dict[int, float] | None = None


def find(ref: str) -> ListedSet | None:
    """The set that ``NAME[/VARIANT][@REVISION]`` names; None where NAME is not in the list.

    Raises:
        UserError: the name is there and its variant is not.
    """
    asked = _NAME.fullmatch(ref)
    if asked is None:
        return None
    name, variant, revision = asked["name"], asked["variant"], asked["revision"]
    if name in MINIATURES and (variant or revision):
        raise UserError(f"{name} has no variants and no revisions: leave out {ref[len(name) :]}.")
    if name in MINIATURES:
        return ListedSet(name, "", name, folder=MINIATURES[name])
    entry = _listed().get(name)
    if entry is None:
        return None
    variants: dict[str, Any] = entry["variants"]
    if variant is not None and variant not in variants:
        raise UserError(f"{name} has no variant {variant}: it has {', '.join(variants)}.")
    return _chosen(name, entry, variant or next(iter(variants)), revision)


def all_sets() -> Iterator[ListedSet]:
    """Every set and variant of the hub, in the list's order."""
    for name, entry in _listed().items():
        for variant in entry["variants"]:
            yield _chosen(name, entry, variant, None)


def names_of(repository: str) -> str:
    """A hint for messages: the sets of the list that a repository holds; "" for none."""
    names = [f"{c.name}/{c.variant}" for c in all_sets() if c.repository == repository]
    end = ", ..." if len(names) > 6 else "."
    return f" The list has, of this repository, {', '.join(names[:6])}{end}" if names else ""


def table(words: Iterable[str] = ()) -> list[str]:
    """The list as lines of text, a header first: those that have all the words."""
    rows = [("NAME", "MODEL", "HOOK", "LAYERS", "WIDTH", "LICENCE", "LAYOUT", "REPOSITORY")]
    rows += [
        (name, "the miniature", "hook_resid_post", "4", "512", "MIT", "native", "in the package")
        for name in MINIATURES
    ]
    for c in all_sets():
        gapless = c.layers == tuple(range(len(c.layers)))
        depth = str(len(c.layers)) if gapless else "at " + ",".join(map(str, c.layers))
        where = (c.layout, c.repository)
        rows.append((c.title, c.model or "", c.hook, depth, str(c.width), c.licence, *where))
    wanted = [word.lower() for word in words]
    kept = rows[:1] + [
        row for row in rows[1:] if all(word in " ".join(row).lower() for word in wanted)
    ]
    widths = [max(len(row[i]) for row in kept) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in kept
    ]


def _chosen(name: str, entry: dict[str, Any], variant: str, revision: str | None) -> ListedSet:
    values = entry | entry["variants"][variant]
    plain = {f.name: values[f.name] for f in fields(ListedSet) if f.name in values}
    count = values["layers"]
    layers = tuple(range(count)) if isinstance(count, int) else tuple(count)
    numbers = values.get("l0") or [None] * len(layers)
    folders = values.get("paths") or [
        values.get("path", "").format(layer=layer, l0=l0)
        for layer, l0 in zip(layers, numbers, strict=True)
    ]
    first = next(iter(entry["variants"]))
    title = name if variant == first else f"{name}/{variant}"
    pattern = values.get("files")
    files = () if pattern is None else tuple(pattern.format(layer=layer) for layer in layers)
    plain |= {"layers": layers, "folders": tuple(dict.fromkeys(folders)), "files": files}
    title = title if revision is None else f"{title}@{revision}"
    return ListedSet(name=name, variant=variant, title=title, revision=revision, **plain)


@cache
def _listed() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text("utf-8"))
