"""Files of Hugging Face repositories, through the hub's own cache.

Every way in which a file cannot be had becomes one sentence.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from circuit_tracer_qk.base.errors import UserError


def list_files(repo: str, revision: str | None) -> tuple[list[str], bool]:
    """The files of a repository; those in the cache, and True, where the hub cannot be asked.

    Raises:
        UserError: neither can be had.
    """
    problem: Exception | None = None
    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().list_repo_files(repo, revision=revision), False
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise failure(repo, revision, error) from error
        except Exception as error:  # requests' and httpx's own kinds: no answer
            problem = error
    try:
        folder = snapshot(repo, revision)
    except HFValidationError as error:
        raise failure(repo, revision, error) from error
    if folder is None:
        raise failure(repo, revision, problem or LocalEntryNotFoundError(repo)) from problem
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(names), True


def download(repo: str, name: str, revision: str | None) -> Path:
    """One file of a repository, from the cache or else the hub, which is not asked for cached ones.

    Raises:
        UserError: it cannot be had.
    """
    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # whatever the network library raises
        raise failure(repo, revision, error, name) from error


def present(repo: str, name: str, revision: str | None) -> bool:
    """Whether a file that a repository may lack is there (not, where nobody can say)."""
    try:
        download(repo, name, revision)
    except UserError:
        return False
    return True


def failure(
    repo: str, revision: str | None, error: BaseException, name: str | None = None
) -> UserError:
    """The user's message for a request that failed."""
    causes = (error, error.__cause__, error.__context__)
    kinds = tuple(type(c) for c in causes if c is not None)

    def any_of(*wanted: type[Exception]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    title = repo if revision is None else f"{repo}@{revision}"
    if any_of(HFValidationError):
        return UserError(f"{title} is no hub id: org/name[/folder][@revision] is one.")
    if any_of(RevisionNotFoundError):
        return UserError(f"{repo} has no revision {revision} on the hub: check it there.")
    if any_of(GatedRepoError):
        return UserError(
            f"{repo} is gated on the hub: accept its terms there and run `huggingface-cli login`, "
            "or give a local folder."
        )
    if any_of(RepositoryNotFoundError):
        return UserError(
            f"{repo} is not on the hub (or is private): check the name, run `huggingface-cli "
            "login`, or give a local folder."
        )
    missing = missing_revision(repo, revision)
    if missing is not None:
        return UserError(missing)
    if any_of(EntryNotFoundError) and not any_of(LocalEntryNotFoundError):
        return UserError(
            f"{title} has no file {name}: check the name and the revision, or choose another set."
        )
    if name is not None and cached_revisions(repo):
        return UserError(
            f"{name} of {title} is not in the local cache, which has other files of it, and the "
            "hub cannot be reached: check the network, or fetch it elsewhere."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (
        "offline mode is on"
        if constants.HF_HUB_OFFLINE
        else "it does not answer"
        if status is None
        else f"it answers {status}"
    )
    return UserError(
        f"{title} is no local folder and cannot be had from the Hugging Face hub ({reason}): "
        "check the id and the network, or download it elsewhere and give the folder"
    )


def missing_revision(repo: str, revision: str | None) -> str | None:
    """One sentence where the cache holds a repository at other revisions; None where it does not."""
    cached, wanted = cached_revisions(repo), revision or "main"
    if not cached or wanted in cached:
        return None
    return (
        f"the local cache holds {repo} at {', '.join(cached)} and not at {wanted}, and the hub "
        "cannot be reached: check the revision and the network."
    )


def snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a revision in the cache; None where it has none.

    Raises:
        HFValidationError: ``repo`` is no hub id.
    """
    try:
        return Path(
            snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
        )
    except HFValidationError:
        raise
    except (OSError, ValueError):
        return None


def cached_revisions(repo: str) -> list[str]:
    """The revisions of a repository that the cache knows by name, then by commit."""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    names = [p.relative_to(folder / "refs").as_posix() for p in (folder / "refs").rglob("*")]
    snapshots = folder / "snapshots"
    commits = [p.name for p in snapshots.iterdir()] if snapshots.is_dir() else []
    return sorted(names) + sorted(commits)


def is_cached(folder: Path) -> bool:
    """Whether a folder lies in the hub's cache, where nothing of ours belongs."""
    return Path(constants.HF_HUB_CACHE).resolve() in folder.resolve().parents
