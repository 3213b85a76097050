"""Models in huggingface_hub's cache as other programs and accidents leave it, against a Hub on loopback."""

import json
import logging
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from huggingface_hub import constants, hf_hub_download, snapshot_download

import mlx_adapters as ma
from mlx_adapters.errors import HubError, NotFoundError, StorageError
from mlx_adapters.sources import hub as client
from mlx_adapters.sources.bases import resolve_base

pytest_plugins = ["helpers.hub_fixtures"]
REPO = "org/m"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
META = {"original/tokenizer.model": b"Meta's", "original/params.json": b"{}"}  # as in every Llama repository
BESIDE = {
    "LICENSE": b"L",
    "USE_POLICY": b"U",
    "README.md": b"---\n---\n",
    "extra": b"E",
    "pytorch_model.bin": b"P",
}


@pytest.fixture(scope="module")
def sharded(tiny_model, tmp_path_factory) -> dict[str, bytes]:
    """A tiny model in two shards with an index, as a repository's files."""
    folder = tiny_model("llama", bits=4)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("model")}
    weights, place = mx.load(str(folder / "model.safetensors")), tmp_path_factory.mktemp("shards")
    parts = {SHARDS[0]: sorted(weights)[::2], SHARDS[1]: sorted(weights)[1::2]}
    for file, names in parts.items():
        mx.save_safetensors(str(place / file), {name: weights[name] for name in names}, {"format": "mlx"})
        files[file] = (place / file).read_bytes()
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture
def model(hub, sharded):
    """The repository `org/m`; its commit."""
    return hub.add(REPO, sharded | META | BESIDE)


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def place(commit: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / "models--org--m" / "snapshots" / commit


def forget_listing():
    """As a cache of huggingface_hub before 2, or of another program, is."""
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--org--m" / "trees")
    from huggingface_hub import _tree_cache

    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def loads() -> np.ndarray:
    return np.array(ma.load_model(REPO).logits([5, 9, 2, 77]))


def test_what_mlx_lm_cached_loads_offline(hub, model, offline):
    mlx_lm.load(REPO)
    assert not (place(model) / "original" / "tokenizer.model").exists()
    offline()
    hub.requests.clear()
    loads()
    assert not hub.requests and resolve_base(REPO).revision == model


def test_a_fuse_fetches_what_belongs_to_a_model_that_mlx_lm_cached(hub, model, tmp_path, offline):
    from helpers.adapters import make_adapter

    mlx_lm.load(REPO)
    hub.requests.clear()
    loads()
    assert not hub.requests and not (place(model) / "LICENSE").exists()
    options = ma.FuseOptions(method="nearest", check=False)
    adapter = make_adapter(resolve_base(REPO), keys=("model.layers.1.self_attn.q_proj",))
    ma.fuse(REPO, adapter, tmp_path / "out", options=options)
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "USE_POLICY", "extra"} <= there and not there & {"README.md", "pytorch_model.bin"}
    offline()
    shutil.rmtree(place(model) / "LICENSE", ignore_errors=True)
    ma.fuse(REPO, adapter, tmp_path / "again", options=options)


def fail_always(hub, status):
    for method in ("GET", "HEAD"):
        hub.fail(method, "/", status, times=1000)


def unlink(name):
    def damage(folder):
        blob = (folder / name).resolve()
        (folder / name).unlink()
        blob.unlink()

    return damage


def link_to_nothing(folder):
    (folder / SHARDS[1]).resolve().unlink()


def cut(folder):
    blob = (folder / SHARDS[1]).resolve()
    blob.write_bytes(blob.read_bytes()[:-100])


def pointer(folder):
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def interrupted(folder):
    blob = (folder / SHARDS[1]).resolve()
    (folder / SHARDS[1]).unlink()
    blob.rename(blob.with_name(blob.name + ".incomplete"))


def only_config(folder):
    for path in folder.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


DAMAGES = {
    "second shard": unlink(SHARDS[1]),
    "both shards": lambda folder: [unlink(shard)(folder) for shard in SHARDS],
    "a link to nothing": link_to_nothing,
    "cut off": cut,
    "an LFS pointer": pointer,
    "interrupted": interrupted,
    "only the config": only_config,
    "config": unlink("config.json"),
    "tokenizer": unlink("tokenizer.json"),
    "index and a shard": lambda f: [unlink(name)(f) for name in (SHARDS[0], "model.safetensors.index.json")],
}


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_partial_cache_is_completed_or_named(hub, model, offline, monkeypatch, damage, listed):
    resolve_base(REPO)
    expected = loads()
    damage(place(model))
    if not listed:
        forget_listing()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match=r"The copy of 'org/m' in the cache lacks ") as caught:
            ma.load_model(REPO)
        lacks = caught.value.message
        assert "fetches what is missing" in caught.value.hint
        named = {damage: SHARDS[1] for damage in (DAMAGES["second shard"], link_to_nothing, cut, pointer, interrupted)}
        assert named.get(damage, "") in lacks
    np.testing.assert_array_equal(loads(), expected)
    offline()
    np.testing.assert_array_equal(loads(), expected)


def test_a_cache_of_copies_without_links_and_without_a_listing(hub, model, offline):
    resolve_base(REPO)
    for path in place(model).iterdir():
        if path.is_symlink():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    shutil.rmtree(place(model).parent.parent / "blobs")
    forget_listing()
    offline()
    loads()


def test_a_cache_that_does_not_know_its_main_branch(hub, model, offline):
    resolve_base(REPO)
    shutil.rmtree(place(model).parent.parent / "refs")
    offline()
    loads()
    with pytest.raises(HubError, match="not in the cache"):
        resolve_base(f"{REPO}@v1")


def test_a_branch_whose_file_is_empty_is_none(hub, model, offline):
    """As a kill leaves it: huggingface_hub takes the folder of all commits for the commit."""
    resolve_base(REPO)
    (place(model).parent.parent / "refs" / "main").write_text("")
    offline()
    loads()


def test_of_several_commits_one_is_named(hub, model, offline):
    resolve_base(REPO)
    shutil.copytree(place(model), place("b" * 40), symlinks=True)
    shutil.rmtree(place(model).parent.parent / "refs")
    offline()
    with pytest.raises(HubError, match="has 2 commits of 'org/m' and does not know which one is meant") as caught:
        resolve_base(REPO)
    assert f"{REPO}@{sorted([model, 'b' * 40])[-1]}" in caught.value.hint
    resolve_base(f"{REPO}@{model}")


def test_what_is_taken_from_the_cache_is_not_said_to_be_missing_there(hub, model, offline, caplog):
    resolve_base(REPO)
    forget_listing()
    offline()
    caplog.set_level(logging.INFO, logger="mlx_adapters.hub")
    loads()
    assert any("comes from the cache" in m and "the Hub is not asked" in m for m in caplog.messages)
    assert not any("not in the cache" in m for m in caplog.messages)


def test_a_cache_filled_file_by_file(hub, model, offline):
    for name in ("config.json", "tokenizer.json", *SHARDS):
        hf_hub_download(REPO, name)
    loads()
    assert (place(model) / "tokenizer_config.json").exists() and (place(model) / "LICENSE").exists()
    offline()
    loads()


def test_what_a_cache_holds_is_taken_while_the_hub_fails(hub, model, caplog):
    snapshot_download(REPO, allow_patterns=["config.json", "tokenizer*", "model*"])
    forget_listing()
    caplog.set_level(logging.INFO, logger="mlx_adapters.hub")
    for status in (401, 403, 404, 429, 503):
        hub.faults.clear()
        fail_always(hub, status)
        loads()
        assert any("comes from the cache" in message for message in caplog.messages)
        caplog.clear()


@pytest.mark.parametrize(("status", "said"), [(429, "slow down"), (503, "answered 503"), (401, "may not see it")])
def test_why_there_is_no_model_is_said(hub, model, status, said):
    fail_always(hub, status)
    with pytest.raises(HubError, match=said):
        ma.load_model(REPO)


def test_an_index_of_another_model_says_nothing(hub, sharded, offline):
    files = {name: content for name, content in sharded.items() if name not in SHARDS}
    whole = one_file(sharded)
    hub.add(REPO, files | {"model.safetensors": whole})
    loads()
    forget_listing()
    offline()
    loads()


def one_file(files: dict[str, bytes]) -> bytes:
    """Both shards as one file."""
    folder = Path(constants.HF_HUB_CACHE).parent
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for shard in SHARDS:
        (folder / "part.safetensors").write_bytes(files[shard])
        tensors |= dict(mx.load(str(folder / "part.safetensors")))
        mx.eval(tensors)
    mx.save_safetensors(str(folder / "whole.safetensors"), tensors, {"format": "mlx"})
    return (folder / "whole.safetensors").read_bytes()


def test_a_download_takes_one_request_more_than_it_needs(hub, model):
    result = ma.download(REPO)
    files = {path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*") if path.is_file()}
    assert "LICENSE" in files and "pytorch_model.bin" not in files
    about = [path for method, path in hub.requests if "/resolve/" not in path and "agent-harnesses" not in path]
    needed = 2  # what main is, and what is in it
    assert len(about) <= needed + 1, about
    assert len([path for method, path in hub.requests if method == "GET" and "/resolve/" in path]) == len(files)
    hub.requests.clear()
    loads()
    ma.download(f"{REPO}@{model}")
    assert not hub.requests


def test_a_branch_and_a_pull_request_are_revisions(hub, model, sharded):
    hub.repos[REPO].branches["v1"] = list(hub.repos[REPO].branches["main"])
    hub.commit(REPO, "v1", "other", sharded | {"LICENSE": b"of v1"})
    assert (resolve_base(f"{REPO}@v1").folder / "LICENSE").read_bytes() == b"of v1"
    hub.repos[REPO].pulls.append(("7" * 40, "a pull", sharded | {"NOTICE": b"of a pull"}))
    assert (resolve_base(f"{REPO}@refs/pr/1").folder / "NOTICE").read_bytes() == b"of a pull"


def test_a_disk_without_room_is_told_before_the_weights_are_fetched(hub, model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(StorageError, match="Cannot download 'org/m': it needs") as caught:
        resolve_base(REPO)
    assert "HF_HOME" in caught.value.hint
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]


def test_a_disk_that_fills_up_names_the_place_of_downloads(hub, model, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(Path(constants.HF_HUB_CACHE) / "x.incomplete"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        client.snapshot(REPO, "1" * 40, ["*"])
    assert "HF_HOME" in caught.value.hint


def test_nothing_is_asked_without_leave(hub, model):
    with pytest.raises(NotFoundError, match="not on this machine yet"):
        resolve_base(REPO, download=False)
    assert not hub.requests
