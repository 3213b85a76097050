"""The door to the Hugging Face Hub: one client, and its failures as HubError with a next step.

Tokens come from huggingface_hub's own places (`hf auth login`, HF_TOKEN) and pass through nothing of ours.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import AdapterError, ConfigError, HubError
from mlx_adapters.sources.references import hub_id
from mlx_adapters.storage import paths

log = logging.getLogger("mlx_adapters.hub")
CACHE_HINT = "free some space, or name a place on another disk for downloads with HF_HOME."
SIGN_IN = "sign in with 'hf auth login', or set HF_TOKEN."
COMMIT = re.compile(r"[0-9a-f]{40}")
BAD_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/.]|/\.|[/.]$|\.lock(?=/|$)|^@$")
SNAPSHOTS = "snapshots"  # the folder of all commits that the cache has something of


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into HubError, or ConfigError for a name that no repository can have, and
    keep its warnings off the screen; `what` says what was tried ("upload to user/repo")."""
    theirs = logging.getLogger("huggingface_hub")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        translated = _translate(what, error)
        if translated is None:
            raise
        raise translated from error
    finally:
        theirs.setLevel(level)


def check_repo(repo: str) -> None:
    """Raise ConfigError unless `repo` is "user/name" and a name that the Hub accepts."""
    from huggingface_hub.utils import validate_repo_id

    require(hub_id(repo) == (repo, None), f"'{repo}' is no repository: it is 'user/name'.")
    with hub_errors(f"use '{repo}'"):
        validate_repo_id(repo)


def address(repo: str) -> str:
    """The page of a repository."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def check_branch(name: str) -> None:
    """Raise ConfigError for what git does not accept as the name of a branch (git-check-ref-format)."""
    bad = BAD_BRANCH.search(name)
    require(
        bool(name) and not bad,
        f"'{name}' cannot be the name of a branch.",
        f"it has {bad[0]!r} in it." if bad else "it is empty.",
    )


def _translate(what: str, error: BaseException) -> AdapterError | None:
    """The error of ours for an exception of huggingface_hub; None for one that is a bug."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return _from_status(what, error)
    if isinstance(error, HFValidationError):
        return ConfigError(f"Cannot {what}: {_short(error)}", "a repository is 'user/name'.")
    if isinstance(error, LocalEntryNotFoundError):
        some = re.search(r"missing \(([^()]+)\)", str(error))
        lacks = f"the cache lacks {some[1]}" if some else "it is not in the cache"
        return NotCached(f"Cannot {what}: {lacks}, and the Hub cannot be reached.", _why_no_hub())
    if type(error) is RuntimeError and error.__cause__ is not None:  # a thread of an upload failed
        return _translate(what, error.__cause__)
    if type(error) is RuntimeError or isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return Unreachable(
            f"Cannot {what}: the connection failed ({_short(error)}).",
            "check the network and run the same command again; it goes on where it stopped.",
        )
    return None


def _why_no_hub() -> str:
    from huggingface_hub import constants

    check = "HF_HUB_OFFLINE is set, which keeps it away" if constants.HF_HUB_OFFLINE else "check the network"
    return f"if a folder of this machine is meant, is its path spelled right? For the Hub: {check}."


class NotCached(HubError):
    """It is not in the cache, and the Hub was not asked or did not answer."""


class Unusable(HubError):
    """What the repository holds is nothing that can be used here: trying again does not help."""


class Disconnected(HubError):
    """The connection broke or the Hub is overloaded: trying again may help."""


class Unreachable(Disconnected):
    """The Hub does not answer at all."""


def _from_status(what: str, error: Any) -> HubError:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    said = _short(getattr(error, "server_message", None) or error)
    if isinstance(error, GatedRepoError):
        return HubError(f"Cannot {what}: access must be asked for on the repository's page.", SIGN_IN)
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"Cannot {what}: there is no such revision.", "give a branch, tag or commit that exists.")
    if status == 401 and "nvalid" in said:
        return HubError(f"Cannot {what}: the Hub does not accept your token.", SIGN_IN)
    if status in (401, 404):
        return HubError(
            f"Cannot {what}: there is no such repository, or you may not see it.",
            f"check its name; for a private one {SIGN_IN}",
        )
    if status == 403:
        return HubError(f"Cannot {what}: you may not ({said}).", "use a token with write access to that namespace.")
    if status == 429:
        wait = response.headers.get("Retry-After") if response is not None else None
        return HubError(
            f"Cannot {what}: the Hub asks to slow down.",
            f"wait {wait} seconds and try again." if wait else "wait a while and try again.",
        )
    if status >= 500 or status == 408:
        return Disconnected(f"Cannot {what}: the Hub answered {status}.", "try again later.")
    return HubError(f"Cannot {what}: {said}", "the repository's page may tell more.")


def _short(error: Any) -> str:
    """The first sentence of a message, without what looks like a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}", "hf_...", " ".join(lines[:3]))
    return text[:300] or type(error).__name__


def require_token(what: str) -> None:
    """Raise HubError if nobody is signed in."""
    from huggingface_hub import get_token

    if not get_token():
        raise HubError(f"Cannot {what}: you are not signed in to the Hub.", SIGN_IN)


@contextlib.contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """huggingface_hub's own bars (on stderr), or none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if not show:
        disable_progress_bars()
    try:
        yield
    finally:
        if not show and not before:
            enable_progress_bars()


def snapshot(
    repo: str, revision: str | None, patterns: Sequence[str], *, show_progress: bool = False, again: bool = False
) -> tuple[Path, str]:
    """Download the files of `repo` that match, once, into huggingface_hub's cache: (folder, commit).

    Where the Hub does not answer (no network, no token for a private one) cached files are taken, which the
    logger of this module tells. again: download what is there, too. Raises HubError, or StorageError that names the
    cache.
    """
    from huggingface_hub import constants, snapshot_download

    problem = None if COMMIT.fullmatch(revision or "") else _problem(repo, revision)
    try:
        with (
            hub_errors(f"download '{repo}'"),
            progress_bars(show_progress),
            paths.storage_errors(Path(constants.HF_HUB_CACHE), CACHE_HINT),
        ):
            folder = Path(
                snapshot_download(repo, revision=revision, allow_patterns=list(patterns), force_download=again)
            )
    except NotCached:
        if problem is None or isinstance(problem, Unreachable):
            raise
        raise problem from None
    if problem:
        log.info("'%s' comes from the cache, commit %s. %s", repo, folder.name[:12], problem.message)
    return folder, folder.name


def _problem(repo: str, revision: str | None) -> HubError | None:
    """Why the Hub does not tell what a revision means now; None if it does."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(f"download '{repo}'"):
            HfApi().repo_info(repo, revision=revision)
    except HubError as error:
        return error
    return None


def cached(repo: str, revision: str | None) -> Path | None:
    """The folder that the cache has of a repository's revision, whole or not; None if it has none.

    Where the cache does not know which commit the main branch is, but has one commit alone, it is that.
    """
    from huggingface_hub import snapshot_download

    with contextlib.suppress(HubError), hub_errors(f"find '{repo}'"):
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
        if folder.parent.name == SNAPSHOTS:  # a branch whose file is empty is none
            return folder
    kept = _kept(repo)
    return kept[0] if revision is None and len(kept) == 1 else None


def _kept(repo: str) -> list[Path]:
    """The folders of all commits of a repository that the cache has something of."""
    from huggingface_hub import constants

    return paths.visible(Path(constants.HF_HUB_CACHE), f"models--{repo.replace('/', '--')}/{SNAPSHOTS}/*")


def cached_repositories() -> list[tuple[str, str]]:
    """(user, name) of each model in the cache."""
    from huggingface_hub import constants

    folders = paths.visible(Path(constants.HF_HUB_CACHE), "models--*--*")
    return [(user, "--".join(name)) for _, user, *name in (folder.name.split("--") for folder in folders)]


def cached_tree(repo: str, commit: str) -> dict[str, int] | None:
    """The files of a commit and their bytes, as the cache has them listed; None if it has not."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # older versions keep none
        return None
    with contextlib.suppress(CachedRepoTreeNotFoundError):
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=commit)}
    return None


def tree(repo: str, commit: str) -> dict[str, int]:
    """The files of a commit and their bytes; the Hub is asked if the cache has them not listed. Raises HubError."""
    from huggingface_hub import HfApi, RepoFile

    listed = cached_tree(repo, commit)
    if listed is None:
        with hub_errors(f"look at '{repo}'"):
            entries = HfApi().list_repo_tree(repo, recursive=True, revision=commit)
            listed = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    return listed


def require_online(repo: str, revision: str | None = None, here: Path | None = None) -> None:
    """Raise HubError if huggingface_hub was told not to use the network; `here`: what the cache has of the revision."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        if here is None and revision is None and (kept := _kept(repo)):
            message = f"The cache has {len(kept)} commits of '{repo}' and does not know which one is meant."
            raise NotCached(message, f"name it: {repo}@{kept[-1].name}, for example. {_why_no_hub()}")
        where = "" if here else "it is not in the cache, and "
        raise NotCached(f"Cannot download '{repo}': {where}the Hub is not asked.", _why_no_hub())


def require_room(repo: str, needed_bytes: int) -> None:
    """Raise StorageError unless the disk of the cache has so many bytes free."""
    from huggingface_hub import constants

    paths.require_free_space(Path(constants.HF_HUB_CACHE), needed_bytes, f"download '{repo}'", CACHE_HINT)


def readme(repo: str, revision: str | None = None) -> str:
    """The README.md of a repository, "" if there is none that can be read (offline: from the cache)."""
    from huggingface_hub import hf_hub_download

    with contextlib.suppress(AdapterError, OSError), hub_errors("read a README"), progress_bars(False):
        return Path(hf_hub_download(repo, "README.md", revision=revision)).read_text(errors="replace")
    return ""
