"""Publish adapters and models to the Hugging Face Hub.

A new repository is created private and becomes public, if asked for, when everything is in it; if the upload
fails, an empty repository or branch that was made for it is removed. The same publish twice changes nothing.
"""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlx_adapters.benchmarking.reports import Report
from mlx_adapters.config.mapping import require
from mlx_adapters.errors import AdapterError, HubError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.adapter import AdapterOrBase
from mlx_adapters.models.base import INDEX_FILE, OTHER_FILE
from mlx_adapters.publishing import cards, staging
from mlx_adapters.publishing.cleaning import check_paths, check_secrets
from mlx_adapters.publishing.remote import PublishedFile, Remote, changes, foresee_refusal, look
from mlx_adapters.publishing.sending import Uploader
from mlx_adapters.publishing.subject import Answers, Subject, matches, read_subject
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.hub import (
    address,
    check_branch,
    check_repo,
    progress_bars,
    readme,
    require_token,
)
from mlx_adapters.sources.references import hub_id
from mlx_adapters.storage import paths
from mlx_adapters.units import count

# Old shards beside new ones would be loaded too.
REPLACED = ["model*.safetensors", OTHER_FILE, INDEX_FILE]


@dataclass(frozen=True)
class Publication:
    """What was published, or would be (`commit` is None then). `left_out`: the folder's other files, and why."""

    repo: str
    kind: str
    private: bool
    files: tuple[PublishedFile, ...]
    left_out: dict[str, str]
    card: str = field(repr=False)
    commit: str | None = None
    url: str | None = None

    @property
    def changed(self) -> bool:
        """Whether anything differs from what is there."""
        return any(file.change != "unchanged" for file in self.files)


def make_card(
    source: AdapterOrBase,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    benchmark: Report | str | Path | None = None,
    answers: Answers | None = None,
    old: str | None = None,
) -> cards.Card:
    """The card (README.md) of an adapter or model, from its metadata.

    Args:
        source: an adapter, or a model's folder.
        repo: where it will be, for the commands that the card shows.
        base_model: where the metadata does not tell.
        license: likewise.
        benchmark: a report to show, or the file of one.
        answers: example questions to show: question -> whose answer -> its text.
        old: the README to take the user's part from; None: README.md in the folder.

    Raises NotFoundError, FormatError or, for a license or base that the Hub would refuse, ConfigError.

    Example:
        >>> card = ma.make_card("sql", license="apache-2.0")
        >>> card.front["license"]
        'apache-2.0'
    """
    return _card_of(read_subject(source, benchmark, answers), repo, base_model, license, old)


def write_card(
    source: AdapterOrBase,
    *,
    repo: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    benchmark: Report | str | Path | None = None,
    answers: Answers | None = None,
    on_event: OnEvent = log_warnings,
) -> Path:
    """Write the card as README.md, with its pictures, into the folder of `source`; the user's part is kept."""
    subject = read_subject(source, benchmark, answers)
    card = _card_of(subject, repo, base_model, license)
    _tell_lost(card, "README.md", _local_readme(subject.folder), on_event)
    return cards.write_readme(card, subject.folder)


def _card_of(
    subject: Subject, repo: str | None, base_model: str | None, license: str | None, old: str | None = None
) -> cards.Card:
    if old is None:
        old = _local_readme(subject.folder)
    return cards.make_card(subject, _base_card(subject), repo=repo, old=old, license=license, base_model=base_model)


def _local_readme(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(errors="replace") if path.is_file() else ""


def _named_by_the_hub(subject: Subject, base_model: str | None) -> Subject:
    """An adapter whose base is a folder of this machine names in its files what the base is called on the Hub, so that
    whoever downloads it has it found."""
    if subject.kind != "adapter" or not paths.is_path(subject.local_base or ""):
        return subject
    if not (base_id := base_model or _base_card(subject).hub_id):
        return subject
    metadata = {**subject.metadata, "base": {**subject.base, "name": base_id}}
    return replace(subject, metadata=metadata, config={**subject.config, "model": base_id})


def _base_card(subject: Subject) -> cards.BaseCard:
    """The base's id, license and languages: from its README in its folder, in the cache or on the Hub."""
    recorded = subject.local_base
    if not recorded:
        return cards.BaseCard()
    if hub_id(recorded) and not Path(recorded).is_dir():
        repo, _, revision = recorded.partition("@")
        return cards.base_card(recorded, readme(repo, revision or None), True)
    text = ""
    with contextlib.suppress(AdapterError):
        text = _local_readme(resolve_base(recorded).folder)
    return cards.base_card(recorded, text, False)


def publish(
    source: AdapterOrBase,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exclude: Sequence[str] = (),
    base_model: str | None = None,
    license: str | None = None,
    benchmark: Report | str | Path | None = None,
    answers: Answers | None = None,
    show_progress: bool = False,
    on_event: OnEvent = log_warnings,
) -> Publication:
    """Upload an adapter or a fused model with its card to the Hub, private unless told otherwise.

    Args:
        source: an adapter, or a model's folder.
        repo: "user/name".
        private: who may see it; a pull request changes nothing of that.
        dry_run: upload nothing, only say what would be uploaded.
        message: of the commit.
        revision: a branch, made if it is not there.
        create_pr: propose the change instead.
        exclude: patterns of files to leave out.
        base_model: for the card, where the metadata does not tell.
        license: likewise.
        benchmark: a report that the card shows, or the file of one.
        answers: example questions that it shows: question -> whose answer -> its text.
        show_progress: the bars of huggingface_hub.
        on_event: called with notes.

    Raises ConfigError, NotFoundError, FormatError or HubError; then the Hub is as it was before, as far
    as the connection allows.

    Example:
        >>> publication = ma.publish("sql", "user/sql-lora", dry_run=True)
        >>> publication.private, publication.commit
        (True, None)
    """
    check_repo(repo)
    cards.check_given(license, base_model)
    if revision is not None:
        check_branch(revision)
    require(not (create_pr and revision), "A pull request is made against 'main': give no revision with it.")
    if not dry_run:
        require_token(f"upload to '{repo}'")
    subject = _named_by_the_hub(read_subject(source, benchmark, answers).without(exclude), base_model)
    staging.check(subject)
    remote = look(repo, revision, dry_run, on_event)
    if dry_run and remote.known and not create_pr:
        foresee_refusal(repo, on_event)
    if create_pr and remote.known:
        if not remote.exists:
            raise HubError(
                f"There is no repository '{repo}' to propose a change to.", "leave out --create-pr to make it."
            )
        private = remote.private or private
    if remote.exists and private and not remote.private:
        raise HubError(f"'{repo}' is public.", "pass --public to publish there, or choose another name.")
    with tempfile.TemporaryDirectory(prefix="mlx-adapters-") as name:
        folder = Path(name)
        card = _stage(subject, folder, repo, remote, exclude, base_model, license, on_event)
        staging.check_finite(subject, on_event)
        deletes = REPLACED if subject.kind == "model" else []
        left_out = {name: why for name, why in subject.left_out.items() if not (folder / name).exists()}
        publication = Publication(repo, subject.kind, private, changes(folder, remote, deletes), left_out, card)
        if dry_run:
            return publication
        if create_pr and not publication.changed:
            return replace(publication, commit=remote.head, url=address(repo))
        uploader = Uploader(repo, folder, private, revision, create_pr, message, deletes, on_event)
        with progress_bars(show_progress):
            commit, url = uploader.run(remote, card)
    return replace(publication, commit=commit, url=url)


def _stage(
    subject: Subject,
    folder: Path,
    repo: str,
    remote: Remote,
    exclude: Sequence[str],
    base_model: str | None,
    license: str | None,
    on_event: OnEvent,
) -> str:
    """Fill `folder` with everything that goes up, and return the card's text."""
    staging.stage(subject, folder)
    local = _local_readme(subject.folder)
    old = _readme_to_keep(local, remote.readme, repo, on_event)
    card = _card_of(subject, repo, base_model, license, old).check()
    _tell_lost(card, "README.md in the folder", local, on_event)
    if remote.readme != local:
        _tell_lost(card, f"README.md of '{repo}'", remote.readme, on_event)
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


def _readme_to_keep(local: str, there: str, repo: str, on_event: OnEvent) -> str:
    """The README whose part by hand is kept: of two that have one, the folder's if it has our markers."""
    here_by_hand, there_by_hand = cards.handwritten(local), cards.handwritten(there)
    local_wins = bool(here_by_hand) and (cards.is_ours(local) or not there_by_hand)
    if here_by_hand and there_by_hand and here_by_hand != there_by_hand:
        kept, lost = ("the folder's", f"that of '{repo}'") if local_wins else (f"that of '{repo}'", "the folder's")
        on_event(Note(f"Two READMEs differ in the part by hand: {kept} is kept, {lost} is not.", "warning"))
    return local if local_wins else there or local


def _tell_lost(card: cards.Card, where: str, text: str, on_event: OnEvent) -> None:
    """Warn of words outside the marks of the README `text`, which the new card has no more."""
    if lost := cards.lost_lines(text, card):
        words = f"The new card drops {count(lost, 'line')} that somebody wrote outside the marks of {where}"
        keep = f"put what is to stay between '{cards.MINE}' and '{cards.END_MINE}'."
        on_event(Note(f"{words}: {keep}", "warning"))
