"""Publish adapters and models to the Hugging Face Hub.

A new repository is created private and becomes public, if asked for, when everything is in it; if the upload
fails, an empty repository that was made for it is removed. The same publish twice changes nothing.
"""

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_adapters import files
from mlx_adapters.adapter import Adapter
from mlx_adapters.config import require
from mlx_adapters.errors import AdapterError, HubError
from mlx_adapters.events import Note, OnEvent, ignore
from mlx_adapters.hub import cards, staging
from mlx_adapters.hub.cleaning import check_paths, check_secrets
from mlx_adapters.hub.client import Disconnected, hub_errors, progress_bars, readme, require_token
from mlx_adapters.hub.subject import Subject, matches, read_subject
from mlx_adapters.model import HUB_ID, resolve_base

ATTEMPTS, FIRST_WAIT_SECONDS = 5, 2.0
# Old shards beside new ones would be loaded too.
REPLACED = ["model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class PublishedFile:
    """One file of the repository and what publishing does to it; "unknown" if the Hub cannot be asked."""

    path: str
    size_bytes: int
    change: Literal["new", "changed", "unchanged", "deleted", "unknown"]


@dataclass(frozen=True)
class Publication:
    """What was published, or would be (`commit` is None then). `left_out` names the folder's other files."""

    repo: str
    kind: str
    private: bool
    files: tuple[PublishedFile, ...]
    left_out: tuple[str, ...]
    card: str = field(repr=False)
    commit: str | None = None
    url: str | None = None

    @property
    def changed(self) -> bool:
        """Whether anything differs from what is there."""
        return any(file.change != "unchanged" for file in self.files)


@dataclass(frozen=True)
class Remote:
    """The repository as it stands: {path: (size, hash)}, the hash SHA-256 for large files, else git's."""

    known: bool = True
    exists: bool = False
    private: bool = True
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    readme: str = ""
    has_revision: bool = True


def make_card(
    source: str | Path | Adapter, *, repo: str | None = None, base_model: str | None = None, license: str | None = None,
    benchmark: str | Path | None = None, old: str | None = None,
) -> cards.Card:  # fmt: skip
    """The card of an adapter or model, from its metadata. benchmark: a saved report to show. `old` is the README
    to take the user's part from (default: README.md in the folder).

    Raises NotFoundError or FormatError.
    """
    return _card_of(read_subject(source, benchmark), repo, base_model, license, old)


def write_card(
    source: str | Path | Adapter, *, repo: str | None = None, base_model: str | None = None, license: str | None = None,
    benchmark: str | Path | None = None,
) -> Path:  # fmt: skip
    """Write the card as README.md, with its pictures, into the folder of `source`; the user's part is kept."""
    subject = read_subject(source, benchmark)
    return cards.write_readme(_card_of(subject, repo, base_model, license), subject.folder)


def _card_of(
    subject: Subject, repo: str | None, base_model: str | None, license: str | None, old: str | None = None
) -> cards.Card:
    if old is None:
        old = _local_readme(subject.folder)
    return cards.make_card(subject, _base_card(subject), repo=repo, old=old, license=license, base_model=base_model)


def _local_readme(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(errors="replace") if path.is_file() else ""


def _base_card(subject: Subject) -> cards.BaseCard:
    """The base's id, license and languages: from its README in its folder, in the cache or on the Hub."""
    recorded = subject.local_base
    if not recorded:
        return cards.BaseCard()
    if HUB_ID.fullmatch(recorded) and not Path(recorded).is_dir():
        repo, _, revision = recorded.partition("@")
        return cards.base_card(recorded, readme(repo, revision or None), True)
    text = ""
    with contextlib.suppress(AdapterError):
        text = _local_readme(resolve_base(recorded).folder)
    return cards.base_card(recorded, text, False)


def publish(
    source: str | Path | Adapter, repo: str, *, private: bool = True, dry_run: bool = False, message: str | None = None,
    revision: str | None = None, create_pr: bool = False, exclude: Sequence[str] = (), base_model: str | None = None,
    license: str | None = None, benchmark: str | Path | None = None, show_progress: bool = False,
    on_event: OnEvent = ignore,
) -> Publication:  # fmt: skip
    """Upload an adapter or a fused model with its card to `repo` ("user/name"), private unless told otherwise.

    source: an adapter's name, NAME@ITERATION, or a folder. revision: a branch, made if it is not there.
    create_pr: propose the change instead. exclude: patterns of files to leave out. base_model, license: for the
    card, where the metadata does not tell. benchmark: a saved report that the card shows. show_progress: the bars
    of huggingface_hub.

    Raises ConfigError, NotFoundError, FormatError or HubError; then the Hub is as it was before.
    """
    require(HUB_ID.fullmatch(repo) is not None and "@" not in repo, f"'{repo}' is no repository: it is 'user/name'.")
    require(not (create_pr and revision), "A pull request is made against 'main': give no revision with it.")
    if not dry_run:
        require_token(f"upload to '{repo}'")
    subject = read_subject(source, benchmark).without(exclude)
    staging.check(subject, on_event)
    remote = _look(repo, revision, dry_run, on_event)
    if remote.exists and private and not remote.private:
        raise HubError(f"'{repo}' is public.", "pass --public to publish there, or choose another name.")
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-") as name:
        folder = Path(name)
        card = _stage(subject, folder, repo, remote, exclude, base_model, license)
        deletes = REPLACED if subject.kind == "model" else []
        publication = Publication(
            repo, subject.kind, private, _changes(folder, remote, deletes), subject.left_out, card
        )  # fmt: skip
        if dry_run:
            return publication
        uploader = _Uploader(repo, folder, private, revision, create_pr, message, deletes, on_event)
        with progress_bars(show_progress):
            commit, url = uploader.run(remote, card)
    return Publication(repo, subject.kind, private, publication.files, subject.left_out, card, commit, url)


def _look(repo: str, revision: str | None, dry_run: bool, on_event: OnEvent) -> Remote:
    """What is in the repository now. A dry run goes on without knowing."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        with hub_errors(f"look at '{repo}'"):
            api = HfApi()
            try:
                private = bool(api.repo_info(repo).private)
            except RepositoryNotFoundError:
                return Remote()
            try:
                entries = list(api.list_repo_tree(repo, recursive=True, revision=revision))
                has_revision = True
            except RevisionNotFoundError:  # a branch that publishing makes, from main
                entries, has_revision = list(api.list_repo_tree(repo, recursive=True)), False
            there = {e.path: (e.size, e.lfs.sha256 if e.lfs else e.blob_id) for e in entries if isinstance(e, RepoFile)}
            text = readme(repo, revision if has_revision else None) if "README.md" in there else ""
            return Remote(True, True, private, there, text, has_revision)
    except HubError as error:
        if not dry_run:
            raise
        on_event(Note(f"What is there already is not known. {error.message}", "warning"))
        return Remote(known=False)


def _stage(
    subject: Subject, folder: Path, repo: str, remote: Remote, exclude: Sequence[str], base_model: str | None,
    license: str | None,
) -> str:  # fmt: skip
    """Fill `folder` with everything that goes up, and return the card's text."""
    staging.stage(subject, folder)
    local = _local_readme(subject.folder)
    mine = cards.handwritten(local) and (cards.is_ours(local) or not remote.readme)
    card = _card_of(subject, repo, base_model, license, local if mine else remote.readme or local).check()
    if card.front.get("base_model") is None and not subject.is_model:
        raise HubError(
            f"The card cannot name the base model: '{subject.base.get('name', 'unknown')}' is not on the Hub.",
            "say which one it is with --base-model user/name.",
        )
    text = str(card)
    check_secrets("README.md", text)
    check_paths("README.md", text)
    cards.write_readme(card, folder)
    for path in list(folder.iterdir()):
        if matches(path.name, exclude):
            path.unlink()
    return text


def _changes(folder: Path, remote: Remote, deletes: Sequence[str]) -> tuple[PublishedFile, ...]:
    found = []
    for path in sorted(folder.iterdir()):
        size, there = path.stat().st_size, remote.files.get(path.name)
        change: Any = "new" if remote.known else "unknown"
        if there:
            change = "unchanged" if there[0] == size and _hash_like(there[1], path) == there[1] else "changed"
        found.append(PublishedFile(path.name, size, change))
    gone = sorted(n for n in remote.files if matches(n, deletes) and not (folder / n).exists())
    return (*found, *(PublishedFile(name, remote.files[name][0], "deleted") for name in gone))


def _hash_like(other: str, path: Path) -> str:
    """The file's SHA-256, or its git blob id where `other` is one."""
    if len(other) == 64:
        return files.sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class _Uploader:
    """One upload: creates, uploads with retries, and cleans up after itself."""

    repo: str
    folder: Path
    private: bool
    revision: str | None
    create_pr: bool
    message: str | None
    deletes: Sequence[str]
    on_event: OnEvent

    def run(self, remote: Remote, card: str) -> tuple[str, str]:
        """Returns (commit, address). Raises HubError."""
        from huggingface_hub import HfApi, ModelCard

        self.api = HfApi(library_name="mlx_adapters")
        self.new_branch = self.revision if not (remote.exists and remote.has_revision) else None
        with hub_errors(f"upload to '{self.repo}'"):
            if (self.folder / "README.md").exists():
                self._validate(ModelCard(card))
            if not remote.exists:
                self.api.create_repo(self.repo, private=True)
        try:
            info = self._upload_with_retries()
        except BaseException:
            if not remote.exists:
                self._remove_if_empty()
            raise
        if remote.private and not self.private:
            with hub_errors(f"make '{self.repo}' public, though everything is uploaded"):
                self.api.update_repo_settings(self.repo, private=False)
        return str(info.oid), str(info.pr_url or info.commit_url)

    def _validate(self, card: Any) -> None:
        try:
            card.validate()
        except ValueError as error:
            raise HubError(f"The Hub refuses the card: {' '.join(str(error).split())}",
                           "see --license and --base-model.") from error  # fmt: skip

    def _upload_with_retries(self) -> Any:
        """What is already there is not sent again, so each attempt goes on where the last one broke."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with hub_errors(f"upload to '{self.repo}'"):
                    return self._upload()
            except Disconnected as error:
                if attempt == ATTEMPTS:
                    raise
                self.on_event(Note(f"{error.message} Going on (attempt {attempt + 1} of {ATTEMPTS}).", "warning"))
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
        raise AssertionError

    def _upload(self) -> Any:
        if self.new_branch:
            self.api.create_branch(self.repo, branch=self.new_branch, exist_ok=True)
        return self.api.upload_folder(
            repo_id=self.repo, folder_path=self.folder, revision=self.revision, create_pr=self.create_pr,
            commit_message=self.message or "Upload with mlx_adapters", delete_patterns=list(self.deletes) or None,
        )  # fmt: skip

    def _remove_if_empty(self) -> None:
        """Best effort: without a connection an empty private repository stays."""
        with contextlib.suppress(HubError), hub_errors("clean up"):
            if set(self.api.list_repo_files(self.repo)) <= {".gitattributes"}:
                self.api.delete_repo(self.repo)
