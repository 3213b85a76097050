"""Where adapters lie and models go: snapshots made of links, registries behind links, small disks and other ones."""

import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.adapters import make_adapter

import mlx_adapters as ma
from mlx_adapters.errors import FormatError, NotFoundError, StorageError
from mlx_adapters.models.adapter import write_adapter

NEAREST = ma.FuseOptions(method="nearest", check=False)
KEYS = ("model.layers.1.self_attn.q_proj",)


@pytest.fixture
def base(tiny_model) -> Path:
    return tiny_model("llama", bits=4)


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return write_adapter(make_adapter(base, keys=KEYS), tmp_path / "adapter")


def snapshot(folder: Path, repository: Path) -> Path:
    """The folder as huggingface_hub's cache holds it: links to blobs."""
    place = repository / "snapshots" / ("ab" * 20)
    for number, path in enumerate(folder.iterdir()):
        (repository / "blobs").mkdir(parents=True, exist_ok=True)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, repository / "blobs" / f"{number:040x}")
        (place / path.name).symlink_to(os.path.relpath(repository / "blobs" / f"{number:040x}", place))
    return place


def test_a_snapshot_made_of_links_is_added_and_other_links_are_not(folder, tmp_path):
    place = snapshot(folder, tmp_path / "models--user--sql")
    added = ma.add(place, name="sql")
    assert not any(path.is_symlink() for path in added.folder.iterdir())
    assert ma.load_adapter("sql").fingerprint == ma.read_adapter(folder).fingerprint
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "adapters.safetensors").read_bytes())
    (folder / "adapters.safetensors").unlink()
    (folder / "adapters.safetensors").symlink_to(secret)
    with pytest.raises(FormatError, match="is a link"):
        ma.add(folder, name="other")


def test_an_adapters_config_stands_for_its_folder(folder):
    config = folder / "adapter_config.json"
    ma.add(config, name="by-config")
    read = [ma.load_adapter(place) for place in (config, folder / "adapters.safetensors", "by-config")]
    assert {adapter.fingerprint for adapter in read} == {ma.read_adapter(folder).fingerprint}
    peft = Path(__file__).parents[1] / "fixtures/peft/llama"
    with pytest.raises(NotFoundError, match="is a PEFT adapter") as error:
        ma.load_adapter(peft / "all-linear")
    assert "import-peft" in error.value.hint and "--from-peft" in error.value.hint
    assert ma.import_peft(peft / "all-linear/adapter_config.json", base=peft / "base", name="peft").name == "peft"


def test_a_base_that_is_a_snapshot_of_links_is_fused(base, folder, tmp_path):
    place = snapshot(base, tmp_path / "models--user--base")
    out = ma.fuse(place, folder, tmp_path / "out", options=NEAREST, any_base=True).folder
    assert not any(path.is_symlink() for path in out.iterdir())
    shutil.rmtree(tmp_path / "models--user--base")
    ma.load_model(out)


@pytest.mark.parametrize(("here", "beside"), [("m[12]", "m1"), ("m?", "mm"), ("*", "other")])
def test_a_folder_that_reads_as_a_pattern_is_itself(tiny_model, base, folder, tmp_path, here, beside):
    """mlx-lm looks for weights by a pattern: it found none in the folder, or those beside it."""
    shutil.copytree(tiny_model("llama", seed=1), tmp_path / beside)
    shutil.copytree(base, tmp_path / here)
    read = ma.load_model(tmp_path / here).module.parameters()["model"]["norm"]["weight"]
    assert read.tolist() == mx.load(str(base / "model.safetensors"))["model.norm.weight"].tolist()
    out = ma.fuse(tmp_path / here, folder, tmp_path / "out" / here, any_base=True)
    assert out.fidelity is not None and out.fidelity.kl_mean < 1


def test_a_folder_whose_name_begins_with_a_tilde(base, monkeypatch, tmp_path):
    shutil.copytree(base, tmp_path / "~base")
    monkeypatch.chdir(tmp_path)
    assert ma.load_model("./~base").base.folder == tmp_path / "~base"


@pytest.mark.parametrize("linked", ["home", "adapters", "adapter"])
def test_a_registry_behind_a_link(base, folder, home, tmp_path, linked):
    behind = tmp_path / "other disk"
    if linked == "adapter":
        shutil.copytree(folder, behind)
    else:
        behind.mkdir()
    link = {"home": home, "adapters": home / "adapters", "adapter": home / "adapters" / "sql"}[linked]
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(behind)
    if linked != "adapter":
        ma.add(folder, name="sql")
    fingerprint = ma.load_adapter("sql").fingerprint
    ma.scale("sql", 0.5, name="half")
    ma.add(folder, name="sql", overwrite=True)
    assert ma.load_adapter("sql").fingerprint == fingerprint and link.is_symlink()
    out = ma.fuse(base, "sql", tmp_path / "out", options=NEAREST).folder
    assert (out / "model.safetensors").is_file()
    ma.rename("half", "quarter")
    assert {entry.name for entry in ma.list_adapters()} == {"sql", "quarter"}


def test_out_whose_parent_is_missing_and_out_on_another_disk(base, folder, tmp_path):
    ma.fuse(base, folder, tmp_path / "a" / "b" / "out", options=NEAREST)
    other = Path("/dev/shm")
    if other.is_dir() and os.stat(other).st_dev != os.stat(tmp_path).st_dev:
        place = other / f"mlx-adapters-test-{os.getpid()}"
        try:
            place.mkdir()
            (tmp_path / "link").symlink_to(place)
            for overwrite in (False, True):
                ma.fuse(base, folder, tmp_path / "link", options=NEAREST, overwrite=overwrite)
            assert (tmp_path / "link").is_symlink() and (place / "model.safetensors").is_file()
        finally:
            shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("format", ["mlx", "hf"])
def test_room_is_asked_for_all_that_is_written_before_the_work(base, folder, tmp_path, monkeypatch, format):
    large = tmp_path / "base"
    shutil.copytree(base, large)
    (large / "voices").mkdir()
    (large / "voices" / "one.wav").write_bytes(bytes(3 << 20))
    asked, events = [], []

    def disk_usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(100 << 20, 80 << 20, (16 << 20) + (2 << 20))

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    options = ma.FuseOptions(method="nearest", check=False, format=format)
    bits = "none" if format == "hf" else "keep"
    with pytest.raises(StorageError, match="needs") as caught:
        ma.fuse(
            large, folder, tmp_path / "out", options=options, quantization=bits, on_event=events.append, any_base=True
        )
    assert "free some space" in caught.value.hint and len(asked) == 1 and not (tmp_path / "out").exists()


def test_a_disk_too_small_for_an_adapter_is_told_by_what_is_written(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(StorageError, match="Cannot write the adapter 'small': it needs") as caught:
        ma.add(folder, name="small")
    assert "--home" in caught.value.hint


def test_an_adapter_whose_recorded_base_is_gone_asks_for_one(base, folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    ma.add(write_adapter(make_adapter(moved, keys=KEYS), tmp_path / "other"), name="sql")
    shutil.rmtree(moved)
    with pytest.raises(NotFoundError, match="made for cannot be had") as caught:
        ma.fuse(None, "sql", tmp_path / "out", options=NEAREST)
    assert "--base" in caught.value.hint
    ma.fuse(base, "sql", tmp_path / "out", options=NEAREST)
