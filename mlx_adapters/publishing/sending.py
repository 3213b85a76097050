"""One upload: the repository, branch or pull request is made, filled with retries, and cleaned up if that fails."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.errors import HubError
from mlx_adapters.events import Note, OnEvent
from mlx_adapters.publishing.remote import Remote
from mlx_adapters.sources.hub import Disconnected, hub_errors

ATTEMPTS, FIRST_WAIT_SECONDS = 5, 2.0


@dataclass
class Uploader:
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
        self.made_branch = False
        self.pull: Any = None  # the pull request, once there is one
        with hub_errors(f"upload to '{self.repo}'"):
            if (self.folder / "README.md").exists():
                self._validate(ModelCard(card))
            if not remote.exists:
                self.api.create_repo(self.repo, private=True)
        try:
            info = self._upload_with_retries()
        except BaseException:
            self._clean_up(remote)
            raise
        if remote.private and not self.private and not self.create_pr:
            with hub_errors(f"make '{self.repo}' public, though everything is uploaded"):
                self.api.update_repo_settings(self.repo, private=False)
        return str(info.oid), str(self.pull.url if self.pull else info.commit_url)

    def _validate(self, card: Any) -> None:
        try:
            card.validate()
        except ValueError as error:
            raise HubError(
                f"The Hub refuses the card: {' '.join(str(error).split())}", "see --license and --base-model."
            ) from error

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
        if self.new_branch and not self.made_branch:
            self.made_branch = self._make_branch(self.new_branch)
        message = self.message or "Upload with mlx_adapters"
        if self.create_pr and self.pull is None:  # by ourselves: each upload with `create_pr` would open another one
            self.pull = self.api.create_pull_request(self.repo, title=message)
        return self.api.upload_folder(
            repo_id=self.repo,
            folder_path=self.folder,
            revision=self.pull.git_reference if self.pull else self.revision,
            commit_message=message,
            delete_patterns=list(self.deletes) or None,
        )

    def _make_branch(self, branch: str) -> bool:
        """Make a branch; False if somebody made it meanwhile."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self.api.create_branch(self.repo, branch=branch)
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            self.new_branch = None
        return self.new_branch is not None

    def _clean_up(self, remote: Remote) -> None:
        """Remove what was made for this and has nothing in it. Best effort: without a connection it stays."""
        with contextlib.suppress(HubError), hub_errors("clean up"):
            if self.pull:
                self.api.change_discussion_status(self.repo, self.pull.num, "closed")
            elif not remote.exists:
                if set(self.api.list_repo_files(self.repo)) <= {".gitattributes"}:
                    self.api.delete_repo(self.repo)
            elif self.new_branch and self.made_branch and self._head(self.new_branch) == remote.head:
                self.api.delete_branch(self.repo, branch=self.new_branch)

    def _head(self, branch: str) -> str | None:
        return self.api.repo_info(self.repo, revision=branch).sha
