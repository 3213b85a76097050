"""Publishing to the Hub and taking from it, through the real client and a real HTTP server on loopback."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from click.testing import CliRunner
from helpers.hub_server import READ_TOKEN, WRITE_TOKEN

import mlx_adapters as ma
from mlx_adapters import errors
from mlx_adapters.cli import cli as program
from mlx_adapters.models.adapter import write_adapter_files
from mlx_adapters.models.loading import load_model
from mlx_adapters.publishing.uploads import publish
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, tensor_files

pytest_plugins = ["helpers.hub_fixtures"]
TOKENS = [5, 9, 2, 77, 31]
REPO = "user/sql-lora"


def uploaded(hub, repo=REPO) -> bytes:
    return b"\n".join(name.encode() + content for name, content in hub.repos[repo].files.items())


def changes(publication) -> dict[str, str]:
    return {file.path: file.change for file in publication.files}


# -- what goes up ----------------------------------------------------------------------------------


def test_only_the_adapter_and_its_card_go_up(hub, sql):
    result = publish("sql", REPO)
    repo = hub.repos[REPO]
    assert repo.private and result.private and result.commit == repo.branches["main"][-1][0]
    assert set(repo.files) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_metadata.json",
        "adapters.safetensors",
        "loss.svg",
    }
    assert set(result.left_out) == {
        "checkpoints",
        "train.jsonl",
        "log.jsonl",
        "recipe.json",
        "0000020_adapters.safetensors",
    }
    others = {name for name, why in result.left_out.items() if "checkpoints" in why}
    assert others == {"checkpoints", "0000020_adapters.safetensors"}
    everything = uploaded(hub) + b"".join(hub.bodies)
    for secret in (b"joe", b"a secret row", b"moments", os.fsencode(sql.folder.parent.parent), WRITE_TOKEN.encode()):
        assert secret not in everything, secret
    metadata = json.loads(repo.files["adapter_metadata.json"])
    assert metadata["data"]["source"] == "sql" and metadata["base"]["name"] == "user/tiny-llama"
    assert metadata["command"] == "mlx-adapters train tiny --data sql --name sql"


def test_publishing_twice_changes_nothing(hub, sql):
    first = publish("sql", REPO)
    assert set(changes(first).values()) == {"new"} and first.changed
    second = publish("sql", REPO)
    assert set(changes(second).values()) == {"unchanged"} and not second.changed
    assert second.commit == first.commit and len(hub.repos[REPO].branches["main"]) == 2


def test_a_dry_run_tells_everything_and_changes_nothing(hub, sql, base, make_adapter):
    publish("sql", REPO)
    hub.requests.clear()
    ma.write_adapter(make_adapter(base, "dora", name="sql"), sql.folder.parent / "other")
    result = publish(sql.folder.parent / "other", REPO, dry_run=True)
    assert hub.writes() == [] and result.commit is None
    told = changes(result)
    assert told["adapters.safetensors"] == "changed" and told["README.md"] == "changed"
    assert "DoRA" in result.card and "DoRA" not in hub.repos[REPO].files["README.md"].decode()
    assert sum(file.size_bytes for file in result.files) > 1000


def test_a_dry_run_needs_no_account_and_no_network(cli, hub, sql):
    done = cli("publish", "sql", REPO, "--dry-run", "--json", token=None, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert {file["change"] for file in shown["files"]} == {"unknown"} and "base_model: user/tiny-llama" in shown["card"]
    assert not hub.requests


def test_message_revision_exclude_and_pull_request(hub, sql):
    publish("sql", REPO, message="First try", revision="v2", exclude=["*.svg"])
    branches = hub.repos[REPO].branches
    assert len(branches["main"]) == 1 and branches["v2"][-1][1] == "First try"
    assert "loss.svg" not in branches["v2"][-1][2]
    proposed = publish("sql", REPO, create_pr=True)
    assert len(hub.repos[REPO].pulls) == 1 and "/discussions/1" in proposed.url
    assert len(branches["main"]) == 1
    with pytest.raises(errors.ConfigError, match="useless"):
        publish("sql", REPO, exclude=["*.safetensors"])
    with pytest.raises(errors.ConfigError, match="pull request"):
        publish("sql", REPO, create_pr=True, revision="v2")


def test_a_checkpoint_is_published_as_the_adapter(hub, sql):
    weights = {name: weight * 2 for name, weight in sql.weights.items()}
    tensor_files.write_safetensors(sql.folder / "0000020_adapters.safetensors", weights)
    publish("sql@20", REPO)
    there = hub.repos[REPO].files
    assert there["adapters.safetensors"] == (sql.folder / "0000020_adapters.safetensors").read_bytes()
    metadata = json.loads(there["adapter_metadata.json"])
    assert metadata["iteration"] == 20
    assert metadata["sha256"]["adapters.safetensors"] == files.sha256(sql.folder / "0000020_adapters.safetensors")


def test_visibility(hub, sql):
    publish("sql", REPO, private=False)
    assert not hub.repos[REPO].private
    asked = [json.loads(body) for body in hub.bodies if b"visibility" in body]
    assert [entry["visibility"] for entry in asked] == ["private", "public"]
    with pytest.raises(errors.HubError, match="is public"):
        publish("sql", REPO)


# -- what is refused -------------------------------------------------------------------------------


def plant(sql, base, how):
    metadata = json.loads((sql.folder / "adapter_metadata.json").read_text())
    if how == "token":
        metadata["command"] += " --token hf_" + "x" * 34
        (sql.folder / "adapter_metadata.json").write_text(json.dumps(metadata))
    elif how == "token in LICENSE":
        (sql.folder / "LICENSE").write_text("MIT\n\nhf_" + "x" * 34)
    elif how == "token in safetensors":
        tensor_files.write_safetensors(sql.folder / "adapters.safetensors", sql.weights, {"by": "hf_" + "x" * 34})
    elif how == "path in LICENSE":
        (sql.folder / "LICENSE").write_text("MIT\nsee /Users/joe/LICENSE")
    elif how == "NaN":
        name, weight = next(iter(sql.weights.items()))
        broken = dict(sql.weights) | {name: mx.full(weight.shape, float("nan"))}
        mx.save_safetensors(str(sql.folder / "adapters.safetensors"), broken)
    elif how == "missing":
        (sql.folder / "adapters.safetensors").unlink()
    elif how == "license":
        (base / "README.md").write_text("---\nlicense: apache\nbase_model: user/tiny-llama\n---\n")
    elif how == "base":
        (base / "README.md").write_text("---\nlicense: mit\nbase_model: tiny llama\n---\n")
    elif how == "no base":
        (base / "README.md").unlink()
    elif how == "token in card":
        (sql.folder / "README.md").write_text("<!-- yours -->\nhf_" + "x" * 34 + "\n<!-- /yours -->")
    elif how == "path in card":
        (sql.folder / "README.md").write_text("<!-- yours -->\nsee /home/joe/x\n<!-- /yours -->")


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ("token", errors.HubError, "token in line"),
        ("token in LICENSE", errors.HubError, "'LICENSE' holds a Hugging Face token in line 3"),
        ("token in safetensors", errors.HubError, "token"),
        ("path in LICENSE", errors.HubError, "path of this machine in line 2"),
        ("NaN", errors.FormatError, "NaN"),
        ("missing", errors.NotFoundError, "adapters.safetensors"),
        ("license", errors.ConfigError, "license 'apache'"),
        ("base", errors.ConfigError, "tiny llama"),
        ("no base", errors.HubError, "cannot name the base"),
        ("token in card", errors.HubError, "README.md"),
        ("path in card", errors.HubError, "README.md"),
    ],
)
def test_refused_before_anything_is_sent(hub, sql, base, how, error, match, dry_run):
    plant(sql, base, how)
    with pytest.raises(error, match=match) as caught:
        publish("sql", REPO, dry_run=dry_run)
    assert caught.value.hint and hub.writes() == [] and not hub.repos


def test_license_and_base_can_be_given(hub, sql, base):
    (base / "README.md").unlink()
    result = publish("sql", REPO, base_model="user/tiny", license="mit")
    assert "license: mit" in result.card and "base_model: user/tiny\n" in result.card


def test_a_card_that_the_hub_refuses_leaves_no_repository(hub, sql):
    with pytest.raises(errors.HubError, match=r"refuses the card.*license"):
        publish("sql", REPO, license="cc0-1.0")  # a license, but not one of this server's
    assert not hub.repos


@pytest.mark.parametrize(
    ("token", "match", "hint"),
    [
        ("", "not signed in", "hf auth login"),
        ("hf_" + "b" * 34, "does not accept", "hf auth login"),
        (READ_TOKEN, "may not", "write access"),
    ],
)
def test_tokens(hub, sql, monkeypatch, token, match, hint):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(errors.HubError, match=match) as caught:
        publish("sql", REPO)
    assert hint in caught.value.hint and not hub.repos
    assert not token or token not in str(caught.value)


def test_a_namespace_of_somebody_else(hub, sql):
    with pytest.raises(errors.HubError, match="may not"):
        publish("sql", "somebody/sql")
    for bad in ("sql", "a/b/c", "user/x@v1", "user/"):
        with pytest.raises(errors.ConfigError, match="no repository"):
            publish("sql", bad)


# -- a bad connection ------------------------------------------------------------------------------


def test_a_broken_upload_goes_on(hub, sql):
    events = []
    hub.fail("PUT", "/lfs/", times=8)  # more often than the client itself tries again
    publish("sql", REPO, on_event=events.append)
    assert any("Going on" in getattr(event, "text", "") for event in events)
    assert hub.repos[REPO].files["adapters.safetensors"] == (sql.folder / "adapters.safetensors").read_bytes()


def test_an_upload_through_xet(hub, sql, tmp_path, monkeypatch):
    """What the client does by default with the real Hub: contents go to the Xet store, the commit names them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.xet_folder = tmp_path / "cas"
    publish("sql", REPO)
    named = hub.repos[REPO].files["adapters.safetensors"].decode()
    assert named == f"oid sha256:{files.sha256(sql.folder / 'adapters.safetensors')}"
    assert sum(p.stat().st_size for p in hub.xet_folder.rglob("*") if p.is_file()) > 5000
    assert not any("/lfs/" in path for _, path in hub.requests)


def test_what_arrived_is_not_sent_again(hub, sql):
    hub.fail("POST", "/commit/", 503, times=2)
    publish("sql", REPO)
    assert len([1 for method, path in hub.requests if method == "PUT" and path.startswith("/lfs/")]) == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "match"),
    [
        ("POST", "/commit/", 429, "slow down"),
        ("POST", "/commit/", 500, "answered 500"),
        ("POST", "/commit/", 403, "may not"),
        ("PUT", "/lfs/", None, "connection"),
    ],
)
@pytest.mark.parametrize("public", [False, True])
def test_a_failed_publish_leaves_no_repository(hub, sql, method, path, status, match, public):
    hub.fail(method, path, status, times=1000, message="no", Retry_After="7")
    with pytest.raises(errors.HubError, match=match):
        publish("sql", REPO, private=not public)
    assert not hub.repos


def test_a_failed_publish_into_an_existing_repository_leaves_it(hub, sql):
    hub.add(REPO, {"notes.txt": b"mine"}, private=True)
    hub.fail("POST", "/commit/", 403, times=1000)
    with pytest.raises(errors.HubError):
        publish("sql", REPO)
    assert hub.repos[REPO].files["notes.txt"] == b"mine"


def test_the_part_by_hand_is_taken_from_where_it_is(hub, sql):
    empty, filled = "<!-- yours -->\n\n<!-- /yours -->", "<!-- yours -->\nKept by {}.\n<!-- /yours -->"
    (sql.folder / "README.md").write_text("By hand, without markers.")
    publish("sql", REPO)
    assert b"By hand, without markers." in hub.repos[REPO].files["README.md"]
    (sql.folder / "README.md").write_text(empty)
    hub.repos[REPO].files["README.md"] = filled.format("the Hub").encode()
    publish("sql", REPO)
    assert b"Kept by the Hub." in hub.repos[REPO].files["README.md"]
    (sql.folder / "README.md").write_text(filled.format("the folder"))
    publish("sql", REPO)
    assert b"Kept by the folder." in hub.repos[REPO].files["README.md"]


def test_interrupted_before_the_commit(hub, sql, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_adapters.publishing.sending.Uploader._upload", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish("sql", REPO)
    assert not hub.repos


# -- and back --------------------------------------------------------------------------------------


def test_there_and_back(hub, sql, base):
    publish("sql", REPO)
    result = ma.download(REPO, name="again")
    again = ma.load_adapter("again")
    assert again.fingerprint == sql.fingerprint and result.name == "again"
    assert again.metadata["hub"] == {"repo": REPO, "revision": hub.repos[REPO].branches["main"][-1][0]}
    plain, _ = mlx_lm.load(str(base), adapter_path=str(result.folder))
    expected = load_model(resolve_base(base), sql).logits(TOKENS)
    assert mx.abs(plain(mx.array([TOKENS]))[0] - expected).max() < 1e-5
    with pytest.raises(errors.ExistsError):
        ma.download(REPO, name="again")


def test_a_reference_to_the_hub_is_pinned_and_works_offline(hub, sql, monkeypatch):
    first = publish("sql", REPO).commit
    assert ma.load_adapter(f"{REPO}@main").fingerprint == sql.fingerprint
    sql_twice = sql.with_weights({name: weight * 2 for name, weight in sql.weights.items()})
    write_adapter_files(sql_twice, sql.folder)
    publish("sql", REPO)
    assert ma.load_adapter(REPO).fingerprint == sql_twice.fingerprint
    assert ma.load_adapter(f"{REPO}@{first}").fingerprint == sql.fingerprint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ma.load_adapter(REPO).fingerprint == sql_twice.fingerprint
    assert ma.load_adapter(f"{REPO}@{first}").fingerprint == sql.fingerprint
    with pytest.raises(errors.HubError, match="not in the cache"):
        ma.load_adapter("user/other")


def test_a_plain_mlx_lm_adapter_comes_in(hub, sql):
    config = json.dumps(sql.config.to_mlx_lm() | {"model": "user/tiny-llama"}).encode()
    weights = (sql.folder / "adapters.safetensors").read_bytes()
    hub.add("user/plain", {"adapters.safetensors": weights, "adapter_config.json": config})
    got = ma.load_adapter("user/plain")
    assert got.fingerprint == sql.fingerprint and got.base_name == "user/tiny-llama" and got.name == "plain"


def test_add_copies_a_repository_at_a_revision(hub, sql, home):
    first = publish("sql", REPO).commit
    twice = sql.with_weights({name: weight * 2 for name, weight in sql.weights.items()})
    write_adapter_files(twice, sql.folder)
    second = publish("sql", REPO).commit
    added = CliRunner().invoke(program, ["add", f"{REPO}@{first}", "--name", "old", "--json"])
    assert added.exit_code == 0 and json.loads(added.stdout)["name"] == "old", added.output
    ma.add(REPO)
    for name, expected, commit in (("old", sql, first), ("sql-lora", twice, second)):
        adapter = ma.load_adapter(name)
        assert adapter.fingerprint == expected.fingerprint and adapter.metadata["hub"]["revision"] == commit
        assert adapter.metadata["added_from"].startswith(REPO)
    assert not (home / "adapters" / "old" / "train.jsonl").exists()
    for source, reason in ((f"{REPO}@v9", "no such revision"), ("user/nothing", "no such repository")):
        with pytest.raises(errors.HubError, match=reason):
            ma.add(source, name="x")
    assert not (home / "adapters" / "x").exists()


def test_a_broken_download_goes_on(hub, sql):
    publish("sql", REPO)
    hub.fail("GET", "adapters.safetensors", times=2)
    assert ma.load_adapter(REPO).fingerprint == sql.fingerprint


@pytest.mark.parametrize(
    ("repo", "match"),
    [("user/nothing", "no such repository"), (f"{REPO}@v9", "no such revision"), ("user/empty", "no adapter")],
)
def test_download_errors(hub, sql, repo, match):
    publish("sql", REPO)
    hub.add("user/empty", {"notes.txt": b"x"})
    with pytest.raises(errors.HubError, match=match):
        ma.load_adapter(repo)


def test_a_private_adapter_needs_a_token(hub, sql, monkeypatch):
    publish("sql", REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(errors.HubError, match="no such repository, or you may not see it") as caught:
        ma.download(REPO)
    assert "hf auth login" in caught.value.hint


def test_a_damaged_adapter_on_the_hub_is_refused(hub, sql, home):
    publish("sql", REPO)
    hub.add(REPO, {"adapters.safetensors": hub.repos[REPO].files["adapters.safetensors"][:-40]})
    with pytest.raises(errors.FormatError):
        ma.download(REPO, name="x")
    assert not (home / "adapters" / "x").exists()


# -- PEFT ------------------------------------------------------------------------------------------

PEFT = Path(__file__).parents[1] / "fixtures" / "peft" / "llama"


def push_peft(hub, case, base_name="user/tiny", repo="user/peft"):
    folder = PEFT / case
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in [path for path in contents if path.endswith("adapter_config.json")]:
        contents[path] = json.dumps(json.loads(contents[path]) | {"base_model_name_or_path": base_name}).encode()
    hub.add(repo, contents)


@pytest.mark.parametrize("case", ["all-linear", "dora", "subfolder"])
def test_a_peft_adapter_comes_in_and_gives_pefts_logits(hub, case):
    push_peft(hub, case, "/home/joe/base")
    result = ma.download("user/peft", name="it", base=PEFT / "base")
    expected = mx.load(str(PEFT / "logits.safetensors"))
    adapter = ma.load_adapter("it")
    logits = load_model(resolve_base(PEFT / "base"), adapter).logits(expected["input_ids"])
    assert mx.abs(logits - expected[case]).max().item() < 1e-4
    assert adapter.metadata["hub"] == {"repo": "user/peft", "revision": result.commit}


def test_import_peft_takes_a_repository_at_a_revision(hub):
    push_peft(hub, "subfolder")
    first = hub.repos["user/peft"].branches["main"][-1][0]
    push_peft(hub, "dora")
    for name, source, expected in (("old", f"user/peft@{first}", "lora"), ("new", "user/peft", "dora")):
        adapter = ma.import_peft(source, base=PEFT / "base", name=name)
        assert adapter.config.type == expected and adapter.metadata["hub"]["repo"] == "user/peft"
    assert ma.load_adapter("old").metadata["hub"]["revision"] == first


def test_a_reference_to_a_peft_adapter_takes_the_base_from_its_config(hub, monkeypatch):
    hub.add("user/tiny", {path.name: path.read_bytes() for path in (PEFT / "base").iterdir()})
    push_peft(hub, "all-linear", "user/tiny")
    got = ma.load_adapter("user/peft")
    assert got.base_name == "user/tiny" and got.name == "peft"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ma.load_adapter("user/peft").fingerprint == got.fingerprint


def test_a_peft_adapter_of_an_unknown_base_is_refused(hub, home):
    push_peft(hub, "all-linear", "/home/joe/base")
    with pytest.raises(errors.HubError, match="does not name its base") as caught:
        ma.download("user/peft", name="it")
    assert "--base" in caught.value.hint and not (home / "adapters" / "it").exists()


def test_a_peft_export_goes_up_as_peft(hub, tmp_path):
    ma.import_peft(PEFT / "all-linear", base=PEFT / "base", name="it")
    out = tmp_path / "export"
    ma.export_peft("it", out)
    result = publish(out, "user/export", base_model="user/tiny", license="mit")
    there = hub.repos["user/export"].files
    assert there["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()
    assert "library_name: peft" in result.card and "PeftModel.from_pretrained" in result.card
    assert str(tmp_path).encode() not in uploaded(hub, "user/export")
    again = ma.download("user/export", name="again", base=PEFT / "base")
    expected = mx.load(str(PEFT / "logits.safetensors"))
    logits = load_model(resolve_base(PEFT / "base"), ma.load_adapter("again")).logits(expected["input_ids"])
    assert again.kind == "adapter" and mx.abs(logits - expected["all-linear"]).max().item() < 1e-4


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture
def fused(sql, base, tmp_path):
    folder = tmp_path / "out" / "sql-4bit"
    options = ma.FuseOptions(method="nearest", check=False)
    ma.fuse(base, sql, folder, quantization=ma.Quantization(4, 32), options=options)
    return folder


def test_a_fused_model_there_and_back(hub, sql, fused, base):
    (fused / "data.jsonl").write_text("secret")
    result = publish(fused, "user/fused", base_model="user/tiny-llama")
    there = set(hub.repos["user/fused"].files)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= there and "data.jsonl" not in there
    assert "4-bit" in result.card
    back = ma.download("user/fused")
    assert back.kind == "model"
    expected, got = (
        load_model(resolve_base(fused)).logits(TOKENS),
        load_model(resolve_base("user/fused")).logits(TOKENS),
    )
    assert mx.array_equal(got, expected)
    with mx.stream(mx.cpu):  # CUDA computes some of these small quantized matrices wrong
        plain, _ = mlx_lm.load(str(back.folder))
        plain.set_dtype(mx.float32)
        assert mx.abs(plain(mx.array([TOKENS]))[0] - expected).max() < 1e-4


def test_old_shards_are_removed(hub, fused):
    hub.add("user/fused", {"model-00002-of-00002.safetensors": b"old", "notes.txt": b"mine"}, private=True)
    result = publish(fused, "user/fused", base_model="user/tiny-llama")
    assert changes(result)["model-00002-of-00002.safetensors"] == "deleted"
    there = set(hub.repos["user/fused"].files)
    assert "model-00002-of-00002.safetensors" not in there and "notes.txt" in there


@pytest.mark.parametrize("how", ["NaN", "shard", "list", "tokenizer", "config", "weights", "truncated"])
def test_damaged_models_are_refused(hub, fused, how):
    weights = fused / "model.safetensors"
    if how == "NaN":
        tensors = mx.load(str(weights))
        name = next(n for n in tensors if n.endswith("norm.weight"))
        mx.save_safetensors(str(weights), tensors | {name: mx.full(tensors[name].shape, float("inf"))})
    elif how in ("shard", "list"):
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors" if how == "shard" else [1]}}
        (fused / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        {"tokenizer": fused / "tokenizer.json", "config": fused / "config.json", "weights": weights}[how].unlink()
    with pytest.raises((errors.FormatError, errors.NotFoundError)):
        publish(fused, "user/fused", base_model="user/tiny-llama")
    assert not hub.repos


# -- the command line ------------------------------------------------------------------------------


def test_the_command_line_end_to_end(cli, hub, sql):
    done = cli("publish", "sql", REPO, "--public", "-m", "From the shell")
    assert done.returncode == 0, done.stderr
    assert re.search(r"adapters.safetensors +\S+ \S+ +new", done.stdout) and "public adapter" in done.stderr
    assert not hub.repos[REPO].private and hub.repos[REPO].branches["main"][-1][1] == "From the shell"
    done = cli("download", REPO, "--name", "back", "--json", token=None)
    assert done.returncode == 0 and json.loads(done.stdout)["name"] == "back", done.stderr
    done = cli("publish", "sql", "user/two", token="hf_" + "b" * 34)
    assert done.returncode == 1 and done.stderr.startswith("Error: ") and "Hint: sign in" in done.stderr
    assert "Traceback" not in done.stderr and "hf_bbb" not in done.stderr + done.stdout


def test_the_models_example_in_a_card_runs(hub, sql, base, tmp_path):
    """The snippet for mlx-lm, word for word but for the base's name."""
    card = publish("sql", REPO).card
    code = re.search(r"```python\n(.*?)```", card, re.S)[1].replace("user/tiny-llama", str(base))
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf2"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_programs_example_in_a_card_finds_the_base_on_the_hub(cli, hub, sql, base):
    """Which was a folder of the machine that published."""
    hub.add("user/tiny", {path.name: path.read_bytes() for path in base.iterdir()})
    card = publish("sql", REPO, base_model="user/tiny").card
    metadata, config = (json.loads(hub.repos[REPO].files[f"adapter_{name}.json"]) for name in ("metadata", "config"))
    assert metadata["base"]["name"] == config["model"] == "user/tiny"
    assert metadata["base"]["fingerprint"] == sql.metadata["base"]["fingerprint"]
    line = re.search(r"^mlx-adapters generate.*$", card, re.M)[0]
    done = cli(*shlex.split(line)[1:], "--max-tokens", "2")
    assert done.returncode == 0 and done.stdout, done.stderr


def test_a_gguf_model_goes_up(hub, sql, base, tmp_path):
    folder = tmp_path / "gguf"
    ma.fuse(base, sql, folder, quantization="none", options=ma.FuseOptions(format="gguf"))
    result = publish(folder, "user/gguf", base_model="user/tiny-llama")
    assert hub.repos["user/gguf"].files["model.gguf"] == (folder / "model.gguf").read_bytes()
    assert "library_name: gguf" in result.card and "llama-cli -hf user/gguf" in result.card
