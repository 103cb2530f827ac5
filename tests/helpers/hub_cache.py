"""A hand-made cache of Hugging Face's hub, laid out as the hub's own client lays it out."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.file_download import repo_folder_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"


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
            link.symlink_to(os.path.relpath(blob, link.parent))
        return snapshot

    def use(self, monkeypatch: pytest.MonkeyPatch, *, offline: bool = True) -> None:
        """Make it this process's cache; every module that copied the setting is told."""
        for name in ("HF_HUB_CACHE", "TRANSFORMERS_CACHE"):
            self._set(monkeypatch, name, str(self.root))
        for name in ("HF_HUB_OFFLINE", "_is_offline_mode"):  # transformers has its own
            self._set(monkeypatch, name, offline)
        _new_session()

    def online(self, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
        """The same, with a hub that is asked for what is missing."""
        self.use(monkeypatch, offline=False)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        self._set(monkeypatch, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        self._set(monkeypatch, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        unhurried = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})
        monkeypatch.setattr(huggingface_hub.utils._http, "time", unhurried)  # five tries a file

    def unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same, with a hub that is asked and answers nothing."""
        self.online(monkeypatch, NOWHERE)

    @property
    def environment(self) -> dict[str, str]:
        """The same as ``use`` for another process."""
        return {"HF_HUB_CACHE": str(self.root), "HF_HUB_OFFLINE": "1"}

    def _set(self, monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
        for title, module in list(sys.modules.items()):
            if title.split(".")[0] in ("huggingface_hub", "transformers") and name in vars(module):
                monkeypatch.setattr(module, name, value)


def _new_session() -> None:
    """Let go of the session, which remembers whether it was offline."""
    reset = getattr(huggingface_hub.utils, "reset_sessions", None)
    if reset is not None:
        reset()


class Hub:
    """A hub that answers, on this machine.

    Attributes:
        endpoint: its address.
        repositories: hub id -> contents by path, all at ``main``.
        gated: hub ids whose files nobody may read.
        asked: what it was asked for, in order.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []

    def add(self, repo: str, folder: Path) -> None:
        """Publish the files of a folder."""
        self.repositories[repo] = {p.name: p.read_bytes() for p in folder.iterdir()}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        self.asked.append(path)
        parts = path.split("?")[0].strip("/").split("/")
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        files = self.repositories.get(repo)
        if files is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if api:
            listed = [{"type": "file", "path": n, "size": len(files[n]), "oid": n} for n in files]
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            found = (listed if len(rest) == 2 else []) if rest[:1] == ["tree"] else about
            return 200, {}, json.dumps(found).encode()
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        content = files.get("/".join(rest[2:]))
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        tag = hashlib.sha256(content).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, content


@contextmanager
def answering() -> Iterator[Hub]:
    """A hub while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
