"""Repositories as people leave them: adapters beside models, in several folders, half there, or only in the cache."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.peft import FIXTURES

import mlx_adapters as ma
from mlx_adapters.errors import AdapterError, FormatError, HubError

pytest_plugins = ["helpers.hub_fixtures"]
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


@pytest.fixture
def own(sql) -> dict[str, bytes]:
    return {name: (sql.folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def test_the_adapter_at_the_top_is_it_whatever_lies_in_folders(hub, sql, own):
    hub.add("org/run", own | below("checkpoint-100", own) | below("best", own))
    assert ma.load_adapter(ma.download("org/run", name="top").name).fingerprint == sql.fingerprint
    assert not [path for _, path in hub.requests if "checkpoint-100/" in path]
    assert ma.download("org/run/checkpoint-100", name="inner").kind == "adapter"


def test_a_model_with_an_adapter_in_a_folder_is_both(hub, sql, base, own):
    hub.add("org/both", {path.name: path.read_bytes() for path in base.iterdir()} | below("lora", own))
    with pytest.raises(AdapterError, match="is a model"):
        ma.download("org/both", name="x")
    assert ma.download("org/both").kind == "model"
    assert ma.load_adapter("org/both/lora").fingerprint == sql.fingerprint


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b'{"peft_type": ["LORA"]}', b"null"])
def test_a_config_that_is_none_is_named_as_the_repository_has_it(hub, own, content, home):
    hub.add("org/odd", own | {CONFIG: content})
    with pytest.raises(AdapterError) as caught:
        ma.download("org/odd")
    assert "org/odd" in caught.value.message and "snapshots" not in caught.value.message, caught.value
    assert not (home / "adapters" / "odd").exists()


@pytest.mark.parametrize("lacks", [CONFIG, WEIGHTS])
def test_half_an_adapter_is_no_adapter(hub, own, lacks):
    hub.add("org/half", {name: content for name, content in own.items() if name != lacks} | {"README.md": b"R"})
    with pytest.raises(FormatError, match="'org/half'") as caught:
        ma.download("org/half")
    assert caught.value.hint


def test_what_another_program_cached_is_taken_offline(hub, sql, own, monkeypatch):
    """File by file, without a listing of the repository."""
    from huggingface_hub import constants, hf_hub_download

    hub.add("org/cached", own | {"README.md": b"R"})
    for name in own:
        hf_hub_download("org/cached", name)
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--org--cached" / "trees", ignore_errors=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ma.load_adapter("org/cached").fingerprint == sql.fingerprint


def test_a_weight_that_the_cache_lacks_is_told_offline(hub, own, monkeypatch):
    from huggingface_hub import hf_hub_download

    hub.add("org/part", own)
    hf_hub_download("org/part", CONFIG)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="org/part") as caught:
        ma.load_adapter("org/part")
    assert caught.value.hint


def test_names_with_signs_of_patterns_are_only_names(hub, sql, own):
    hub.add("org/odd", below("v1.0_x", own) | below("v1[0]_x", own))
    assert ma.load_adapter("org/odd/v1.0_x").fingerprint == sql.fingerprint
    assert ma.download("org/odd", subfolder="v1.0_x", name="it").name == "it"


def test_a_repository_without_anything_says_so(hub):
    hub.add("org/empty", {"README.md": b"R"})
    hub.add("org/data", {"train.jsonl": b"{}"})
    for repo in ("org/empty", "org/data"):
        with pytest.raises(HubError, match=f"'{repo}'") as caught:
            ma.download(repo)
        assert caught.value.hint


def test_many_folders_are_not_all_listed(hub, own):
    hub.add("org/many", {name: c for i in range(30) for name, c in below(f"checkpoint-{i:03d}", own).items()})
    with pytest.raises(HubError, match=r"several adapters: checkpoint-000, .*…") as caught:
        ma.download("org/many")
    assert len(caught.value.message) < 400 and "checkpoint-029" in caught.value.hint


def test_a_peft_adapter_on_a_resized_vocabulary_is_fused_straight_from_the_hub(hub, cli, tmp_path):
    """With the tokenizer that lies beside it there."""
    folder = FIXTURES / "llama" / "resized" / "to-save"
    hub.add("org/resized", below("final", {path.name: path.read_bytes() for path in folder.iterdir()}))
    arguments = ["--base", FIXTURES / "llama" / "base", "--no-check", "--subfolder", "final"]
    done = cli("fuse", "--from-peft", "org/resized", tmp_path / "no", *arguments)
    assert done.returncode == 1 and "--resize" in done.stderr and not (tmp_path / "no").exists()
    done = cli("fuse", "--from-peft", "org/resized", tmp_path / "out", *arguments, "--resize")
    assert done.returncode == 0 and "beside the adapter" in done.stderr, done.stderr
    assert "<new2>" in (tmp_path / "out" / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 67
