"""What publishing and downloading say and refuse: wrong names, what is kept, what is known beforehand."""

import json
import logging
import re

import pytest
from click.testing import CliRunner
from helpers.hub_server import READ_TOKEN

import mlx_adapters as ma
from mlx_adapters import errors
from mlx_adapters.cli import cli as program
from mlx_adapters.publishing import cards
from mlx_adapters.publishing.uploads import make_card, publish, write_card
from mlx_adapters.units import size

pytest_plugins = ["helpers.hub_fixtures"]
REPO = "user/sql-lora"
BY_HAND = "<!-- yours -->\nKept by {}.\n<!-- /yours -->"


def notes(publishing, *arguments, **options) -> list[str]:
    """What a publish says."""
    events = []
    publishing(*arguments, **options, on_event=events.append)
    return [event.text for event in events if hasattr(event, "text")]


def test_of_two_parts_by_hand_it_is_said_which_one_is_kept(hub, sql):
    readme = sql.folder / "README.md"
    readme.write_text(BY_HAND.format("the folder"))
    assert not notes(publish, "sql", REPO) and not notes(publish, "sql", REPO)
    hub.add(REPO, {"README.md": BY_HAND.format("the Hub").encode()})
    for dry_run in (True, False):
        (said,) = notes(publish, "sql", REPO, dry_run=dry_run)
        assert said.endswith(f"the folder's is kept, that of '{REPO}' is not.")
    assert b"Kept by the folder." in hub.repos[REPO].files["README.md"]
    readme.write_text("# No markers here")
    (said,) = notes(publish, "sql", REPO)
    assert said.endswith(f"that of '{REPO}' is kept, the folder's is not.")
    assert b"Kept by the folder." in hub.repos[REPO].files["README.md"]
    hub.add(REPO, {"README.md": b"<!-- yours -->\n\n<!-- /yours -->"})
    assert not notes(publish, "sql", REPO)
    assert b"# No markers here" in hub.repos[REPO].files["README.md"]


@pytest.mark.parametrize("repo", ["user/sql..x", "user/-sql", "user/sql.git", "user/sql--x", "user/" + "x" * 97, "sql"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_name_that_the_hub_does_not_accept_is_a_usage_error(hub, sql, repo, dry_run):
    with pytest.raises(errors.ConfigError, match=re.escape(repo)):
        publish("sql", repo, dry_run=dry_run)
    assert not hub.requests


@pytest.mark.parametrize("branch", ["a b", "a..b", "-a", "a/", "/a", "a.lock", "a~1", "a:b", "@{u}", "a//b", ".a", ""])
def test_a_branch_that_git_does_not_accept_is_a_usage_error(hub, sql, branch):
    with pytest.raises(errors.ConfigError, match="name of a branch") as caught:
        publish("sql", REPO, revision=branch, dry_run=True)
    assert caught.value.hint and not hub.requests
    publish("sql", REPO, revision="refs/feature-1/v2.0_x", dry_run=True)


def test_a_dry_run_foresees_that_the_hub_refuses(hub, sql, monkeypatch):
    (said,) = notes(publish, "sql", "somebody/sql", dry_run=True)
    assert "'somebody' is not yours (you are 'user')" in said
    assert not notes(publish, "sql", "user/sql", dry_run=True) and not notes(publish, "sql", "User/sql", dry_run=True)
    hub.orgs = ["team"]
    assert not notes(publish, "sql", "team/sql", dry_run=True)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    (said,) = notes(publish, "sql", "user/sql", dry_run=True)
    assert "may only read" in said
    monkeypatch.delenv("HF_TOKEN")
    assert not notes(publish, "sql", "somebody/sql", dry_run=True)


def test_what_the_card_makes_anew_is_not_left_out(hub, sql):
    (sql.folder / "loss.svg").write_text("<svg/>")
    result = publish("sql", REPO, dry_run=True)
    assert "loss.svg" not in result.left_out and "loss.svg" in {file.path for file in result.files}
    assert "loss.svg" in publish("sql", REPO, exclude=["*.svg"], dry_run=True).left_out


def test_only_our_own_words_reach_the_screen(cli, hub, sql):
    first, second = (cli("publish", "sql", REPO) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "No files have been modified" not in second.stderr and "is up to date" in second.stderr
    assert "reading weights for NaN: 1/1 file" in first.stderr


@pytest.mark.parametrize("options", [{"license": ""}, {"license": "apache"}, {"base_model": ""}, {"base_model": "x y"}])
def test_an_empty_or_unknown_license_or_base_is_refused(hub, sql, options):
    for make in (lambda: make_card("sql", **options), lambda: publish("sql", REPO, dry_run=True, **options)):
        with pytest.raises(errors.ConfigError, match="The card's") as caught:
            make()
        assert caught.value.hint


def test_a_name_for_a_whole_model_is_refused(hub, base):
    hub.add("user/model", {path.name: path.read_bytes() for path in base.iterdir()})
    for options in ({"name": "x"}, {"base": "demo"}):
        with pytest.raises(errors.ConfigError, match="'user/model' is a model"):
            ma.download("user/model", **options)
    assert ma.download("user/model").kind == "model"


def test_an_adapter_named_as_the_base_is_told_apart(hub, sql, tmp_path):
    publish("sql", REPO)
    for name in (REPO, sql.folder):
        with pytest.raises(errors.NotFoundError, match=r"no config\.json") as caught:
            ma.load_model(name)
        assert "it is an adapter" in caught.value.hint
    hub.requests.clear()
    with pytest.raises(errors.ConfigError, match="cannot be an adapter's name"):
        ma.download(REPO, name="a b")
    assert not hub.requests


def test_what_comes_from_the_cache_is_said_to(hub, sql, monkeypatch, caplog):
    publish("sql", REPO)
    caplog.set_level(logging.INFO, logger="mlx_adapters.hub")
    commit = hub.repos[REPO].branches["main"][-1][0]
    ma.load_adapter(REPO)
    assert not caplog.messages
    monkeypatch.delenv("HF_TOKEN")
    ma.load_adapter(REPO)
    (said,) = caplog.messages
    assert said.startswith(f"'{REPO}' comes from the cache, commit {commit[:12]}. ") and "you may not see it" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ma.load_adapter(REPO)
    assert "connection" in caplog.messages[1]
    ma.load_adapter(f"{REPO}@{commit}")  # pinned: the cache holds just that
    assert len(caplog.messages) == 2


def test_the_program_says_what_comes_from_the_cache(cli, hub, sql):
    publish("sql", REPO)
    assert cli("show", REPO).returncode == 0
    done = cli("show", REPO, token=None)
    assert done.returncode == 0 and "comes from the cache" in done.stderr
    assert "comes from the cache" not in cli("-q", "show", REPO, token=None).stderr


def test_the_card_of_an_adapter_out_of_others_has_the_command(sql, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/joe/bin/mlx-adapters", "scale", "sql", "0.5", "--name", "half"])
    done = CliRunner().invoke(program, ["scale", "sql", "0.5", "--name", "half"])
    assert done.exit_code == 0, done.output
    assert "```shell\nmlx-adapters scale sql 0.5 --name half\n```" in str(make_card("half"))


def test_words_outside_the_marks_are_not_dropped_without_a_word(hub, sql):
    path = write_card("sql")
    publish("sql", REPO)
    metadata = json.loads((sql.folder / "adapter_metadata.json").read_text())
    (sql.folder / "adapter_metadata.json").write_text(json.dumps(metadata | {"best_validation_loss": 1.125}))
    assert not notes(publish, "sql", REPO, dry_run=True)  # the card says something new; nobody wrote the old
    made, add = path.read_text(), "## Limits\n\nIt knows no dates.\n\nNor joins.\n"
    path.write_text(made.replace("## Limits\n", add))
    for dry_run in (True, False):
        (said,) = notes(publish, "sql", REPO, dry_run=dry_run)
        assert "2 lines" in said and "README.md in the folder" in said and f"'{cards.MINE}'" in said
    path.write_text(made)
    there = hub.repos[REPO].files
    hub.add(REPO, {"README.md": there["README.md"].replace(b"## Limits\n", add.encode())})
    (said,) = notes(publish, "sql", REPO)
    assert "2 lines" in said and f"README.md of '{REPO}'" in said and not notes(publish, "sql", REPO)
    assert b"joins" not in hub.repos[REPO].files["README.md"]


def test_writing_a_card_over_edited_words_says_so(sql):
    path = write_card("sql")
    for text in (path.read_text().replace("# sql\n", "# sql\n\nMine.\n"), "Mine.\n<!-- made: 0123456789abcdef -->\n"):
        path.write_text(text)
        done = CliRunner().invoke(program, ["card", "sql", "--write"])
        assert done.exit_code == 0 and "Warning: The new card drops 1 line that" in done.stderr
        assert "Mine." not in path.read_text()
    assert "Warning" not in CliRunner().invoke(program, ["card", "sql", "--write"]).stderr


def test_the_card_and_the_list_of_files_give_the_same_sizes(hub, sql):
    result = publish("sql", REPO)
    shown = dict(re.findall(r"\| `(.+?)` \| (.+?) \|", result.card))
    assert {"adapters.safetensors", "adapter_config.json", "adapter_metadata.json"} <= set(shown)
    listed = {file.path: file.size_bytes for file in result.files}
    raw = (sql.folder / "adapter_metadata.json").stat().st_size
    assert size(listed["adapter_metadata.json"]) != size(raw)  # paths of this machine are cut out
    assert shown == {name: size(listed[name]) for name in shown}


@pytest.mark.parametrize("options", [{"license": "apache"}, {"base_model": "x y"}, {}, {"private": True}])
def test_what_is_cheap_is_refused_before_weights_are_read(hub, sql, base, options):
    (base / "README.md").write_text("---\nlicense: nobody's\nbase_model: user/tiny-llama\n---\n")
    if "private" in options:
        hub.add(REPO, {"x": b""})
    said = []
    with pytest.raises((errors.ConfigError, errors.HubError)):
        publish("sql", REPO, on_event=said.append, **options)
    assert not said


def test_a_failed_publish_leaves_no_branch_of_its_own(hub, sql, monkeypatch):
    hub.add(REPO, {"notes.txt": b"mine"}, private=True)
    branches = hub.repos[REPO].branches
    branches["old"] = list(branches["main"])
    hub.fail("POST", "/commit/", 403, times=1000)
    for name in ("new", "feature/new", "old"):
        with pytest.raises(errors.HubError):
            publish("sql", REPO, revision=name)
    assert set(branches) == {"main", "old"}

    def meanwhile(event):  # somebody makes the branch after we have looked
        branches.setdefault("theirs", list(branches["main"]))

    with pytest.raises(errors.HubError):
        publish("sql", REPO, revision="theirs", on_event=meanwhile)
    assert set(branches) == {"main", "old", "theirs"}

    def committed(*_, **__):
        hub.commit(REPO, "full", "weights", {})
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", committed)
    with pytest.raises(KeyboardInterrupt):
        publish("sql", REPO, revision="full")
    assert len(branches["full"]) == 3
