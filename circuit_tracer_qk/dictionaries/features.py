"""The features' labels and examples, and the number by which circuit-tracer's page knows a feature."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import companion_of

FEATURE_BYTES = 16 << 20
"""How long one feature's JSON may be."""

LABELS_BYTES = 1 << 29
"""How long ``labels.json`` may be."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def feature_index(checkpoint: int, feature: int) -> int | None:
    """The Cantor index of (checkpoint - 1, feature), by which circuit-tracer's page knows a feature.

    Features of checkpoint 0 have none.
    """
    x, y = checkpoint - 1, feature
    return None if x < 0 else (x + y) * (x + y + 1) // 2 + y


def indexed_feature(index: int) -> tuple[int, int]:
    """The (checkpoint, feature) that a Cantor index stands for."""
    diagonal = (isqrt(8 * index + 1) - 1) // 2
    feature = index - diagonal * (diagonal + 1) // 2
    return diagonal - feature + 1, feature


def archive_of(folder: Path) -> Path:
    """Where the examples lie that belong to a folder's labels."""
    return companion_of(folder / "labels.json", folder / "features.zip")


@dataclass(frozen=True, eq=False)
class FeatureExamples:
    """The features' JSON in a dictionary folder: ``features.zip``, else ``features/``.

    Files are named by :func:`feature_index`.
    """

    folder: Path

    def read(self, checkpoint: int, feature: int) -> bytes | None:
        """One feature's JSON as stored, None without one.

        Raises:
            UserError: ``features.zip`` cannot be read.
        """
        index = feature_index(checkpoint, feature)
        if index is None:
            return None
        name = f"{index}.json"
        if self._archive is not None and name in self._archive.NameToInfo:
            return read_member(self._archive, name)
        path = self.folder / "features" / name
        try:
            if not path.is_file():
                return None
            with open(path, "rb") as file:
                data = file.read(FEATURE_BYTES + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from error
        if len(data) > FEATURE_BYTES:
            raise UserError(f"{path} is too large: a feature has at most {FEATURE_BYTES} bytes.")
        return data

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        path = archive_of(self.folder)
        return open_archive(path) if path.is_file() else None


def open_archive(path: Path) -> zipfile.ZipFile:
    """A ``features.zip``.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # a damaged list of members raises nearly anything
        raise UserError(f"{path} is not a zip archive: {_reason(error)}") from error


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """One member of a ``features.zip``, whole.

    Raises:
        UserError: it is damaged, or larger than a feature can be.
    """
    try:
        size = archive.getinfo(name).file_size
        if size <= FEATURE_BYTES:
            with archive.open(name) as file:  # which may hold more than its size says
                data = file.read(FEATURE_BYTES + 1)
            size = len(data)
    except Exception as error:  # damaged bytes raise nearly anything: zlib's errors, EOFError, ...
        raise UserError(
            f"{archive.filename} is damaged: {name} cannot be read ({_reason(error)}); make it "
            "again."
        ) from error
    if size > FEATURE_BYTES:
        raise UserError(
            f"{archive.filename}: {name} is too large: it holds {size} bytes, and a feature has at "
            f"most {FEATURE_BYTES}."
        )
    return data


def read_labels(path: Path) -> dict[str, list[str | None]]:
    """The names of features in a ``labels.json``, by the number of the file they are in.

    Raises:
        UserError: it cannot be read, or does not map file numbers to lists of labels.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LABELS_BYTES + 1)
        if len(data) > LABELS_BYTES:
            raise UserError(f"{path} is too large: it may have {LABELS_BYTES} bytes.")
        labels = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {_reason(error)}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {_reason(error)}") from error
    if not isinstance(labels, dict) or not all(
        isinstance(v, list) and all(isinstance(name, str | None) for name in v)
        for v in labels.values()
    ):
        raise UserError(f'{path} should map layers to lists of labels: {{"0": ["label", ...]}}')
    for number, names in labels.items():
        for i, name in enumerate(names):
            if name is not None and _SURROGATE.search(name):
                raise UserError(
                    f"{path}: label {i} of layer {number!a:.20} is not valid Unicode (half a "
                    "surrogate pair): mend it."
                )
    return labels


def _reason(error: Exception) -> str:
    """An error as a part of a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__
