"""The repository as it stands before publishing: what is in it, what would change, and who may write there."""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_adapters.errors import HubError
from mlx_adapters.events import Note, OnEvent
from mlx_adapters.publishing.subject import matches
from mlx_adapters.sources.hub import hub_errors, readme
from mlx_adapters.storage import files


@dataclass(frozen=True)
class PublishedFile:
    """One file of the repository and what publishing does to it; "unknown" if the Hub cannot be asked."""

    path: str
    size_bytes: int
    change: Literal["new", "changed", "unchanged", "deleted", "unknown"]


@dataclass(frozen=True)
class Remote:
    """The repository as it stands: {path: (size, hash)}, the hash SHA-256 for large files, else git's.

    `head`: the commit of the main branch, None if there is no repository.
    """

    known: bool = True
    exists: bool = False
    private: bool = True
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    readme: str = ""
    has_revision: bool = True
    head: str | None = None


def look(repo: str, revision: str | None, dry_run: bool, on_event: OnEvent) -> Remote:
    """What is in the repository now. A dry run goes on without knowing."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        with hub_errors(f"look at '{repo}'"):
            api = HfApi()
            try:
                info = api.repo_info(repo)
            except RepositoryNotFoundError:
                return Remote()
            try:
                entries = list(api.list_repo_tree(repo, recursive=True, revision=revision))
                has_revision = True
            except RevisionNotFoundError:  # a branch that publishing makes, from main
                entries, has_revision = list(api.list_repo_tree(repo, recursive=True)), False
            there = {e.path: (e.size, e.lfs.sha256 if e.lfs else e.blob_id) for e in entries if isinstance(e, RepoFile)}
            text = readme(repo, revision if has_revision else None) if "README.md" in there else ""
            return Remote(True, True, bool(info.private), there, text, has_revision, info.sha)
    except HubError as error:
        if not dry_run:
            raise
        on_event(Note(f"What is there already is not known. {error.message}", "warning"))
        return Remote(known=False)


def foresee_refusal(repo: str, on_event: OnEvent) -> None:
    """Warn if the Hub will refuse an upload to `repo`: a token that only reads, or somebody else's namespace.

    What cannot be known (no token, no network) is not said.
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        return
    with contextlib.suppress(HubError), hub_errors("ask who you are"):
        me = HfApi().whoami()
        orgs = [str(org.get("name")) for org in me.get("orgs") or ()]
        owner = repo.partition("/")[0]
        if owner.lower() not in (str(name).lower() for name in (me["name"], *orgs)):
            yours = f"you are '{me['name']}'" + (f", in {', '.join(orgs)}" if orgs else "")
            on_event(Note(f"The Hub would refuse this: '{owner}' is not yours ({yours}).", "warning"))
        elif ((me.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            on_event(Note("The Hub would refuse this: your token may only read.", "warning"))


def changes(folder: Path, remote: Remote, deletes: Sequence[str]) -> tuple[PublishedFile, ...]:
    """What putting the files of `folder` there does to each, and to those that match `deletes`."""
    changed = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        size, there = path.stat().st_size, remote.files.get(name)
        change: Any = "new" if remote.known else "unknown"
        if there:
            change = "unchanged" if there[0] == size and _hash_like(there[1], path) == there[1] else "changed"
        changed.append(PublishedFile(name, size, change))
    gone = sorted(n for n in remote.files if matches(n, deletes) and not (folder / n).exists())
    return (*changed, *(PublishedFile(name, remote.files[name][0], "deleted") for name in gone))


def _hash_like(other: str, path: Path) -> str:
    """The file's SHA-256, or its git blob id where `other` is one."""
    if len(other) == 64:
        return files.sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
