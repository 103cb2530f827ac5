"""A reference to dictionaries becomes a set of them: by a name, a local folder or a hub id.

Folders are recognised by their files; each layout's activations, decoder vectors and biases come
out in the model's own units, so that everything after this module sees one kind of dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from circuit_tracer_qk.base import hub, rules
from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.memory import fitting
from circuit_tracer_qk.base.validation import validate
from circuit_tracer_qk.base.yaml_files import read_yaml
from circuit_tracer_qk.dictionaries import catalogue
from circuit_tracer_qk.dictionaries.dictionary import SAE
from circuit_tracer_qk.dictionaries.dictionary_set import DictionarySet
from circuit_tracer_qk.dictionaries.files import WILD, Files, joined, natural
from circuit_tracer_qk.dictionaries.layouts import LAYOUTS, Hints, Layout, assemble, native

LARGE = 2**29  # weights above which a set stays mapped into memory: 2 GB in float32
_HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<folder>(?:/[^/@]+)*)/?(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
_FORMAT = re.compile(r"(?P<format>[a-z][a-z0-9-]+):(?P<ref>.+)")


def load_dictionaries(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    lazy: bool | None = None,
    checkpoints: Iterable[int] | None = None,
) -> DictionarySet:
    """Load residual SAEs or a weakly causal crosscoder.

    The layouts are those of :data:`circuit_tracer_qk.dictionaries.layouts.LAYOUTS`. Where the files allow two
    readings, the reference says which: ``FORMAT:REF``, or a ``config.yaml`` in the folder with
    ``format: FORMAT`` (and, where needed, ``model_name``, ``scan``, ``centred``,
    ``norm_scaling_factor``).

    Args:
        ref: a built-in name (``circuit-tracer-qk dictionaries`` lists them), a local folder, or a
            hub id ``org/name[/folder][@revision]``. Folders may have wildcards:
            ``org/name/layer_*/width_16k/average_l0_71``.
        device: where the weights go.
        dtype: what they are cast to.
        lazy: leave them mapped into memory, as stored: encoders are read through in pieces and of
            decoders only the rows of active features. Default: sets of over 2 GB in float32.
        checkpoints: fetch and read only the SAEs of these (the first, if there are none); QK
            attributions of block ``l`` need checkpoint ``l``. Crosscoders are read whole.

    Returns:
        The set; activations and decoder vectors come out in the model's own units.

    Raises:
        UserError: the dictionaries cannot be had, or cannot be read exactly.

    >>> from circuit_tracer_qk import load_dictionaries
    >>> load_dictionaries("miniature-sae").checkpoints
    (1, 2, 3, 4)
    """
    rules.check(ref=ref)
    full = fitting(f"the set {ref}", "give lazy=True, fewer checkpoints, or a smaller set")
    try:
        with full:
            dictionaries = _find(ref, None if checkpoints is None else frozenset(checkpoints))
            if dictionaries.n_weights > LARGE if lazy is None else lazy:
                return dictionaries
            return dictionaries.to(device, dtype)
    except (OSError, RuntimeError) as error:  # permissions, ~nobody, names beyond all length
        raise UserError(
            f"{ref} cannot be read ({getattr(error, 'strerror', 0) or error})."
        ) from error


def _find(ref: str | Path, checkpoints: frozenset[int] | None) -> DictionarySet:
    """The set, its tensors as stored."""
    text, layout = str(ref), None
    form = _FORMAT.fullmatch(text)
    if form is not None and form["format"] in LAYOUTS:
        layout, text = LAYOUTS[form["format"]], form["ref"]
    folder = Path(text).expanduser()
    # a demo's folder of graphs has a folder of examples with the bundled set's name
    bundled = text in catalogue.MINIATURES and not (folder / "config.yaml").is_file()
    if layout is None and isinstance(ref, str) and (bundled or not folder.exists()):
        entry = catalogue.find(text)
        if entry is not None:
            return _listed(entry, checkpoints)
    if folder.is_dir():
        return _read(Files.local(folder), layout, checkpoints)
    if folder.exists():
        raise _no_dictionaries(ref, "is not a folder")
    if WILD.search(text):
        parts = folder.parts
        at = next(i for i, part in enumerate(parts) if WILD.search(part))
        root = Path(*parts[:at]) if at else Path()
        if root.is_dir() and (at or any(Path().glob(parts[0]))):
            return _read(Files.local(root, "/".join(parts[at:])), layout, checkpoints)
    hub = _HUB_ID.fullmatch(text) if isinstance(ref, str) else None
    if hub is None:
        raise _no_dictionaries(ref, "does not exist")
    pattern = hub["folder"].strip("/") or None
    parent = next(path for path in folder.parents if path.is_dir())  # the nearest that is there
    if len(parent.parts) > 1:  # the hub knows nothing of what lacks in a local set
        raise _no_dictionaries(ref, f"does not exist ({_holds(parent)})")
    try:
        files = Files.on_hub(hub["repo"], hub["revision"], pattern)
    except UserError as error:
        if not parent.parts:
            raise
        raise UserError(f"{str(error).rstrip('.')}; the local folder {_holds(parent)}.") from error
    return _read(files, layout, checkpoints)


def _read(files: Files, layout: Layout | None, checkpoints: frozenset[int] | None) -> DictionarySet:
    """What a folder or repository holds."""
    hints = Hints(named=layout is not None, checkpoints=checkpoints)
    if layout is None and native.CONFIG in files.names:
        config, content = _config_in(files, "")
        if "format" not in content:
            return _in_layout(files, native.LAYOUT, [""], hints)
        layout, hints = _with_format(config, content, hints)
    layouts = LAYOUTS.values() if layout is None else [layout]
    by_layout = {o.name: folders for o in layouts if (folders := files.folders_with(o.files))}
    if native.LAYOUT.name in by_layout and len(by_layout) > 1:
        folders = by_layout.pop(native.LAYOUT.name)
        # a config.yaml with `format` describes another layout's files, beside which it lies
        if kept := [p for p in folders if "format" not in _config_in(files, p)[1]]:
            by_layout[native.LAYOUT.name] = kept
    if not by_layout:
        if layout is not None:
            wanted = " and ".join(layout.files)
            raise UserError(f"{files.title} holds no dictionaries of {layout.name}: no {wanted}.")
        _refuse_halves(files)
        raise UserError(
            f"{files.title} has no config.yaml, nor files of a layout that is known "
            f"({', '.join(list(LAYOUTS)[1:])}): dictionary folders are recognised by them."
        )
    if len(by_layout) > 1:
        names = " and ".join(by_layout)
        raise UserError(
            f"{files.title} holds dictionaries in several layouts, {names}: name one, as in "
            f"{next(iter(by_layout))}:{files.title}, or a subfolder.{catalogue.names_of(files.repo)}"
        )
    [(name, folders)] = by_layout.items()
    return _in_layout(files, LAYOUTS[name], folders, hints)


def _config_in(
    files: Files, folder: str, example: str = f"model_kind: {SAE}"
) -> tuple[Path, dict[str, Any]]:
    """A folder's ``config.yaml`` and what it says."""
    path = files.get(joined(folder, native.CONFIG))
    return path, read_yaml(path, example)


def _refuse_halves(files: Files) -> None:
    """Refuse a folder that has one file of a layout without the others."""
    for layout in LAYOUTS.values():
        for name in layout.files if len(layout.files) > 1 else ():
            for folder in files.folders_with([name]):
                lacks = [
                    f"{file} ({other.name})"
                    for other in LAYOUTS.values()
                    for file in other.files
                    if name in other.files and folder not in files.folders_with([file])
                ]
                raise UserError(
                    f"{joined(files.title, folder).rstrip('/')} has {name}, and {' or '.join(lacks)} is missing "
                    "beside it: fetch it again."
                )


def _refuse_gaps(files: Files, layout: Layout, folders: list[str]) -> None:
    """Refuse a set one of whose folders lacks a file that the others have."""
    others = [other for other in LAYOUTS.values() if other != layout]
    whole = {folder for other in others for folder in files.folders_with(other.files)}
    alike = {_shape(folder) for folder in folders if folder}
    for name in layout.files:
        for folder in files.folders_with([name]):
            if _shape(folder) in alike and folder not in folders and folder not in whole:
                lacks = [f for f in layout.files if folder not in files.folders_with([f])]
                raise UserError(
                    f"{joined(joined(files.title, folder), lacks[0])} is missing: fetch it again."
                )


def _shape(folder: str) -> str:
    """A folder's name without its numbers: what the layers of a set have in common."""
    return re.sub(r"[0-9]+", "#", folder)


def _options_at(files: Files, layout: Layout, folder: str, hints: Hints) -> Hints:
    """The hints of one SAE's folder, which may have a ``config.yaml`` of its own."""
    if not folder or joined(folder, native.CONFIG) not in files.names:
        return hints
    path, content = _config_in(files, folder, f"format: {layout.name}")
    return _with_format(path, content, hints)[1] if content.get("format") == layout.name else hints


def _in_layout(files: Files, layout: Layout, folders: list[str], hints: Hints) -> DictionarySet:
    if layout.name != "sae-lens" and (
        hints.centred is not None or hints.norm_scaling_factor is not None
    ):
        raise UserError(
            f"{files.title}: `centred` and `norm_scaling_factor` are for sae-lens, and the format "
            f"is {layout.name}: leave them out."
        )
    if layout.read_set is not None:
        if len(folders) > 1:
            raise UserError(
                f"{files.title} holds several sets ({', '.join(folders[:4])}"
                f"{', ...' if len(folders) > 4 else ''}): name one of them as a subfolder."
                + catalogue.names_of(files.repo)
            )
        return layout.read_set(files, folders[0], hints)
    assert layout.read_layer is not None
    layers = [layout.read_layer(files, p, _options_at(files, layout, p, hints)) for p in folders]
    kept = [layer for layer in layers if layer is not None]
    wanted = hints.checkpoints
    if wanted is None or not any(layer.checkpoint in wanted for layer in kept):
        _refuse_gaps(files, layout, folders)
        if files.from_cache and wanted and max(wanted) > 0:
            raise UserError(
                f"the local cache has no dictionary of {files.title} at checkpoint "
                f"{', '.join(map(str, sorted(wanted)))}, and the hub cannot be asked for it: check "
                "the network."
            )
    if not kept:
        raise UserError(f"{files.title} holds no dictionaries of the residual stream.")
    return assemble(files, kept, hints)


def _listed(entry: catalogue.ListedSet, checkpoints: frozenset[int] | None) -> DictionarySet:
    """A set of the built-in list."""
    if entry.folder is not None:
        if not entry.folder.is_dir():
            raise UserError(
                f"this installation lacks the built-in dictionaries {entry.name}; reinstall"
            )
        return _read(Files.local(entry.folder), None, checkpoints)
    layout = LAYOUTS[entry.layout]
    files = Files(entry.title, None, entry.repository, entry.revision, names=_names(entry, layout))
    hints = Hints(
        named=True,
        model_name=entry.model,
        scan=entry.title,
        centred=entry.centred,
        norm_scaling_factor=entry.norm_scaling_factor,
        neuronpedia=entry.neuronpedia,
        checkpoints=checkpoints,
    )
    return _in_layout(files, layout, list(entry.folders), hints)


def _names(entry: catalogue.ListedSet, layout: Layout) -> tuple[str, ...]:
    """The files of a listed set: known without asking, but for the optional ones."""
    if entry.files:
        return entry.files
    within = [file.replace("*", str(i)) for file in layout.files for i in range(len(entry.layers))]
    names = [joined(folder, file) for folder in entry.folders for file in dict.fromkeys(within)]
    optional = [joined(folder, file) for folder in entry.folders for file in layout.optional]
    present = [o for o in optional if hub.present(entry.repository, o, entry.revision)]
    return (*names, *present)


def _check_neuronpedia(pattern: str) -> str:
    try:
        pattern.format(layer=0, checkpoint=0)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"neuronpedia may hold {{layer}} and {{checkpoint}}, found {pattern!r}"
        ) from error
    return pattern


_Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _FormatConfig(BaseModel):
    """A ``config.yaml`` with ``format``: what the files of another layout do not say."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    format: str = Field(description="a name")
    model_name: str | None = Field(None, description="a name")
    scan: str | None = Field(None, description="a name")
    centred: bool | None = Field(None, description="true or false")
    norm_scaling_factor: _Factor | dict[int, _Factor] | None = Field(
        None, description="a number above 0, or one for each layer"
    )
    neuronpedia: Annotated[str, AfterValidator(_check_neuronpedia)] | None = Field(
        None, description="an id with {layer} or {checkpoint} in it"
    )


def _with_format(path: Path, content: dict[str, Any], hints: Hints) -> tuple[Layout, Hints]:
    """What a ``config.yaml`` with ``format:`` says."""
    config = validate(_FormatConfig, content, f"{path}: ")
    if config.format not in LAYOUTS:
        raise UserError(f"{path}: format {config.format!r} is not one of {', '.join(LAYOUTS)}.")
    more = config.model_dump(exclude_unset=True, exclude={"format"})
    return LAYOUTS[config.format], replace(hints, named=True, **more)


def _holds(folder: Path) -> str:
    """A folder and the first names in it, as the beginning of a sentence."""
    here = sorted((path.name for path in folder.iterdir()), key=natural)
    held = f"{', '.join(here[:6])}{', ...' if len(here) > 6 else ''}" if here else "nothing"
    return f"{folder} has {held}"


def _no_dictionaries(ref: str | Path, problem: str) -> UserError:
    return UserError(
        f"the dictionary folder {ref} {problem}; give a folder with config.yaml, a hub id "
        f"org/name[@revision], or a name of `circuit-tracer-qk dictionaries` such as "
        f"{', '.join(catalogue.MINIATURES)}"
    )
