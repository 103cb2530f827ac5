"""A hand-made cache of Hugging Face's hub, laid out as the hub's own client lays it out."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.file_download import repo_folder_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubCache:
    """Repositories that look as if they had been downloaded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, repo: str) -> Path:
        """Where the cache keeps a repository."""
        return self.root / repo_folder_name(repo_id=repo, repo_type="model")

    def add(
        self,
        repo: str,
        files: Path | Mapping[str, bytes],
        revision: str = "main",
        commit: str = COMMIT,
    ) -> Path:
        """Put files in as one commit of a repository; its snapshot folder.

        Args:
            repo: ``org/name``.
            files: a folder, or contents by relative path.
            revision: the branch or tag that points at the commit.
            commit: 40 hexadecimal digits.
        """
        if isinstance(files, Path):
            names = [p for p in files.rglob("*") if p.is_file()]
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in names}
        folder = self.folder(repo)
        snapshot, ref = folder / "snapshots" / commit, folder / "refs" / revision
        for where in (snapshot, ref.parent, folder / "blobs"):
            where.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        for name, content in files.items():
            blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            link = snapshot / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(blob)
        return snapshot

    def use(self, monkeypatch: pytest.MonkeyPatch, *, offline: bool = True) -> None:
        """Make it this process's cache; every module that copied the setting is told."""
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            self._set(monkeypatch, name, str(self.root))
        self._set(monkeypatch, "HF_HUB_OFFLINE", offline)
        reset = getattr(huggingface_hub.utils._http, "reset_sessions", None)
        if reset is not None:  # a session remembers whether it was offline
            reset()

    def unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same, with a hub that is asked and answers nothing."""
        self.use(monkeypatch, offline=False)
        nowhere = "http://127.0.0.1:9"
        self._set(monkeypatch, "ENDPOINT", nowhere)
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        changed = template.replace("https://huggingface.co", nowhere)
        self._set(monkeypatch, "HUGGINGFACE_CO_URL_TEMPLATE", changed)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", nowhere)
        unhurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr(huggingface_hub.utils._http, "time", unhurried)  # five tries a file

    @property
    def environment(self) -> dict[str, str]:
        """The same for another process."""
        return {"HF_HUB_CACHE": str(self.root), "HF_HUB_OFFLINE": "1"}

    def _set(self, monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
        for title, module in list(sys.modules.items()):
            if title.split(".")[0] in ("huggingface_hub", "transformers") and name in vars(module):
                monkeypatch.setattr(module, name, value)
