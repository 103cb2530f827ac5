"""The features' labels and examples, and the number by which circuit-tracer's page knows a feature."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.files import companion_of


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
        if self._archive is not None:
            try:
                return self._archive.read(f"{index}.json")
            except KeyError:
                pass
            except zipfile.BadZipFile as error:
                raise UserError(f"{self.folder / 'features.zip'} is damaged: {error}") from error
        path = self.folder / "features" / f"{index}.json"
        return path.read_bytes() if path.is_file() else None

    @cached_property
    def _archive(self) -> zipfile.ZipFile | None:
        path = archive_of(self.folder)
        if not path.is_file():
            return None
        try:
            return zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path} is not a zip archive: {error}") from error
