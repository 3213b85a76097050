"""Who may see what is published: on main, on branches, in pull requests; through Git LFS and through Xet."""

import json

import pytest

from mlx_adapters.errors import HubError
from mlx_adapters.publishing.uploads import publish
from mlx_adapters.storage import files

pytest_plugins = ["helpers.hub_fixtures"]
REPO = "user/sql-lora"


@pytest.fixture(params=["lfs", "xet"])
def way(request, hub, tmp_path, monkeypatch):
    """How the contents of large files go up."""
    if request.param == "xet":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        hub.xet_folder = tmp_path / "cas"
    return request.param


def arrived(hub, sql, there, way) -> bool:
    """Whether the commit's weights are the adapter's."""
    path = sql.folder / "adapters.safetensors"
    content = there["adapters.safetensors"]
    return content == (path.read_bytes() if way == "lfs" else f"oid sha256:{files.sha256(path)}".encode())


def settings(hub) -> list[str]:
    return [json.loads(body)["visibility"] for body in hub.bodies if b'"visibility"' in body]


def test_public_only_when_everything_is_in_it(hub, sql, way):
    publish("sql", REPO, private=False)
    assert arrived(hub, sql, hub.repos[REPO].files, way) and not hub.repos[REPO].private
    order = [path for method, path in hub.requests if path.endswith("/settings") or "/commit/" in path]
    assert "/commit/" in order[0] and order[-1].endswith("/settings") and settings(hub) == ["private", "public"]


def test_public_on_a_branch(hub, sql, way):
    publish("sql", REPO, private=False, revision="v2")
    repo = hub.repos[REPO]
    assert arrived(hub, sql, repo.branches["v2"][-1][2], way) and not repo.private
    assert "adapters.safetensors" not in repo.files
    commits = len(repo.branches["v2"])
    again = publish("sql", REPO, private=False, revision="v2")
    assert settings(hub) == ["private", "public"]
    assert way == "xet" or (not again.changed and len(repo.branches["v2"]) == commits)


@pytest.mark.parametrize("private", [True, False])
def test_a_pull_request_leaves_the_visibility_as_it_is(hub, sql, way, private):
    """Its author may not own the repository."""
    hub.add(REPO, {"notes.txt": b"mine"}, private=private)
    for asked in {private, False}:
        result = publish("sql", REPO, private=asked, create_pr=True)
        assert "/discussions/" in result.url and result.private is private
    assert arrived(hub, sql, hub.repos[REPO].pulls[-1][2], way)
    assert hub.repos[REPO].private is private and settings(hub) == []
    assert set(hub.repos[REPO].files) == {".gitattributes", "notes.txt"}


def test_a_pull_request_needs_something_to_pull_into(hub, sql):
    for dry_run in (True, False):
        with pytest.raises(HubError, match="no repository 'user/sql-lora' to propose") as caught:
            publish("sql", REPO, create_pr=True, dry_run=dry_run)
        assert "--create-pr" in caught.value.hint
    assert not hub.repos


def test_a_pull_request_to_a_public_repository_asks_for_no_leave(hub, sql):
    """What is proposed there is public in any case, and the author of the pull request did not decide that."""
    hub.add("somebody/lora", {"README.md": b"# Theirs"})
    with pytest.raises(HubError, match="is public"):
        publish("sql", "somebody/lora", create_pr=True)
    publish("sql", "somebody/lora", create_pr=True, private=False)
    assert len(hub.repos["somebody/lora"].pulls) == 1


def test_a_pull_request_that_breaks_goes_on_in_the_same_one(hub, sql, way):
    hub.add(REPO, {"notes.txt": b"mine"}, private=True)
    hub.fail("POST", "/commit/", 503, times=2)
    publish("sql", REPO, create_pr=True, message="Better")
    (pull,) = hub.repos[REPO].pulls
    assert arrived(hub, sql, pull[2], way) and hub.repos[REPO].closed == [False]


def test_a_pull_request_that_fails_is_closed(hub, sql, way):
    hub.add(REPO, {"notes.txt": b"mine"}, private=True)
    hub.fail("POST", "/commit/", 403, times=1000)
    with pytest.raises(HubError, match="may not"):
        publish("sql", REPO, create_pr=True)
    assert hub.repos[REPO].closed == [True]


def test_nothing_new_is_not_proposed(hub, sql):
    publish("sql", REPO)
    result = publish("sql", REPO, create_pr=True)
    assert not result.changed and not hub.repos[REPO].pulls and result.url.endswith(REPO)


def test_the_program_says_what_became_public(cli, hub, sql):
    done = cli("publish", "sql", REPO, "--public", "--revision", "v1")
    assert done.returncode == 0 and "public adapter" in done.stderr, done.stderr
    hub.add("user/mine", {"notes.txt": b"mine"}, private=True)
    done = cli("publish", "sql", "user/mine", "--create-pr", "--public")
    assert done.returncode == 0 and "/discussions/1" in done.stdout, done.stderr
    assert "private adapter" in done.stderr and hub.repos["user/mine"].private
    done = cli("publish", "sql", "user/mine", "--create-pr", "--revision", "x")
    assert done.returncode == 2 and "pull request" in done.stderr and "Traceback" not in done.stderr
