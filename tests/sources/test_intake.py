"""Adapters of other programs, straight from the Hub or out of a subfolder, come in by the road of `add`."""

import json
import shutil
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from helpers.peft import FIXTURES

import mlx_adapters as ma
from mlx_adapters.errors import ConfigError, FormatError, HubError, IncompatibleError, NotFoundError
from mlx_adapters.events import Note
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.registry import names

pytest_plugins = ["helpers.hub_fixtures"]
IDS = mx.array([[3, 9, 27, 81, 40, 7, 300, 12]])
CONFIG = "adapter_config.json"


def npz(folder, weights):
    mx.savez(str(folder / "adapters.npz"), **weights)


def safetensors(name):
    def write(folder, weights):
        (folder / name).parent.mkdir(exist_ok=True)
        mx.save_safetensors(str(folder / name), weights)

    return write


def vlm(folder, weights):
    safetensors("adapters.safetensors")(
        folder, {name.replace("lora_a", "A").replace("lora_b", "B"): array for name, array in weights.items()}
    )


PLAIN = {"rank": 4, "scale": 2.0, "dropout": 0.0}
# What programs leave in a folder; all of it is one adapter.
FOREIGN = {
    "mlx-examples with a config": ({"lora_layers": 2, "lora_parameters": PLAIN}, npz),
    "mlx-vlm": ({"rank": 4, "alpha": 8, "dropout": 0.0}, vlm),
    "mlx-tune": ({"lora_config": {"r": 4, "lora_alpha": 8}}, npz),
    "old mlx-lm": (
        {"lora_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}},
        safetensors("adapters.safetensors"),
    ),
    "optiq": ({"peft_type": "LORA", "r": 4, "lora_parameters": PLAIN}, safetensors("adapters.safetensors")),
    "optiq's best": ({"peft_type": "LORA", "r": 4, "lora_parameters": PLAIN}, safetensors("best/adapters.safetensors")),
    "PEFT's file name": ({"num_layers": 2, "lora_parameters": PLAIN}, safetensors("adapter_model.safetensors")),
}


@pytest.fixture
def written(tmp_path, sql):
    """`written(kind)`: the files of a folder of that kind, by name."""

    def write(kind, weights=sql.weights) -> dict[str, bytes]:
        config, save = FOREIGN[kind]
        folder = tmp_path / "foreign"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save(folder, weights)
        (folder / CONFIG).write_text(json.dumps(config))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return write


def by_plain_mlx_lm(base, folder):
    from mlx_lm import load

    return np.array(load(str(base), adapter_path=str(folder))[0](IDS))


@pytest.mark.parametrize("kind", FOREIGN)
def test_it_comes_straight_from_the_hub_in_the_form_that_plain_mlx_lm_loads(hub, sql, base, written, kind):
    hub.add("org/it", written(kind))
    said = []
    result = ma.download("org/it", on_event=said.append)
    taken = ma.load_adapter(result.name)
    assert taken.config.scale == 2.0 and taken.config.rank == 4 and taken.name == "it"
    assert all(mx.array_equal(taken.weights[name], array) for name, array in sql.weights.items())
    wanted = np.array(load_model(resolve_base(base), sql).logits(IDS))
    assert np.abs(by_plain_mlx_lm(base, result.folder) - wanted).max() < 1e-4
    told = any("alpha" in event.text for event in said if isinstance(event, Note))
    assert told == (kind in ("mlx-vlm", "mlx-tune"))
    assert ma.load_adapter(ma.add("org/it", name="added").name).fingerprint == ma.load_adapter("org/it").fingerprint


def test_what_says_nothing_of_its_strength_is_refused_with_the_way_on(hub, written):
    files = written("mlx-tune")
    hub.add("org/bare", {"adapters.npz": files["adapters.npz"]})
    with pytest.raises(FormatError, match=r"'org/bare': nothing says how strong it is") as caught:
        ma.download("org/bare")
    assert "lora_parameters" in caught.value.hint and names() == ["sql"]


def test_paths_are_fitted_to_the_base_that_is_named(hub, sql, base, written):
    longer = {f"language_model.{name}": array for name, array in sql.weights.items()}
    hub.add("org/vlm", written("mlx-vlm", longer))
    result = ma.download("org/vlm", base=str(base))
    assert ma.load_adapter(result.name).config.keys == sql.config.keys
    with pytest.raises(IncompatibleError, match="no layer 'language_model"):
        hub.add("org/other", written("mlx-vlm", {n.replace("layers.1", "layers.9"): a for n, a in longer.items()}))
        ma.download("org/other", base=str(base))


def test_pickles_are_refused_before_they_are_downloaded(hub):
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/b"}).encode()
    hub.add("org/p", {CONFIG: config, "adapter_model.bin": b"x" * 1000})
    with pytest.raises(FormatError, match=r"'org/p' holds its weights in a pickle") as caught:
        ma.download("org/p", base="demo")
    assert "save it again" in caught.value.hint
    assert not [path for _, path in hub.requests if "adapter_model.bin" in path]


def test_a_base_that_cannot_be_used_is_told_before_the_weights_are_downloaded(hub):
    config = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/home/joe/base"}).encode()
    hub.add("org/p", {CONFIG: config, "adapter_model.safetensors": b"x" * 1000})
    with pytest.raises(HubError, match="does not name its base model"):
        ma.download("org/p")
    assert not [path for _, path in hub.requests if "adapter_model" in path]


def test_shards_come_from_the_hub(hub, tmp_path):
    base = FIXTURES / "llama" / "base"
    tensors = mx.load(str(FIXTURES / "llama" / "all-linear" / "adapter_model.safetensors"))
    files = {CONFIG: (FIXTURES / "llama" / "all-linear" / CONFIG).read_bytes()}
    for i, some in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"adapter_model-{i:05d}-of-00002.safetensors"
        mx.save_safetensors(str(tmp_path / file), {name: tensors[name] for name in some})
        files[file] = (tmp_path / file).read_bytes()
    hub.add("org/big", files)
    wanted = ma.import_peft(FIXTURES / "llama" / "all-linear", base=base, name="whole").fingerprint
    assert ma.load_adapter(ma.download("org/big", base=str(base)).name).fingerprint == wanted
    hub.add("org/half", {name: content for name, content in files.items() if "00002-of" not in name})
    with pytest.raises(FormatError, match="lacks adapter_model-00002-of-00002"):
        ma.download("org/half", base=str(base))


# -- subfolders ------------------------------------------------------------------------------------


def test_a_subfolder_of_a_folder_or_a_repository(hub, cli, sql, base, written, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-100", "checkpoint-200"):
        (run / "out" / name).mkdir(parents=True)
        for file, content in written("old mlx-lm").items():
            (run / "out" / name / file).write_bytes(content)
            hub.add("org/run", {f"{name}/{file}": content})
    with pytest.raises(NotFoundError, match="in folders of it: out/checkpoint-100, out/checkpoint-200") as caught:
        ma.add(run)
    assert "subfolder" in caught.value.hint and "out/checkpoint-200" in caught.value.hint
    assert ma.add(run, subfolder="out/checkpoint-100").name == "checkpoint-100"
    assert ma.add("org/run", subfolder="checkpoint-200").name == "run-checkpoint-200"
    done = cli("add", run, "--subfolder", "out/checkpoint-200", "--name", "two")
    assert done.returncode == 0 and "as 'two'" in done.stdout, done.stderr
    with pytest.raises(ConfigError, match="not a folder inside"):
        ma.add(run, subfolder="../elsewhere")
    with pytest.raises(ConfigError, match="once"):
        ma.add("org/run/checkpoint-100", subfolder="checkpoint-100")
    with pytest.raises(ConfigError, match="is a file"):
        ma.add(run / "out" / "checkpoint-100" / "adapters.safetensors", subfolder="x")
    with pytest.raises(NotFoundError, match="no folder 'out/checkpoint-300'"):
        ma.add(run, subfolder="out/checkpoint-300")
    with pytest.raises(NotFoundError, match="no folder 'outs'") as caught:
        ma.add(run, subfolder="outs")
    assert "out" in caught.value.hint


def test_import_peft_takes_a_subfolder(hub, cli):
    base, folder = FIXTURES / "llama" / "base", FIXTURES / "llama"
    wanted = ma.import_peft(folder / "dora", base=base, name="whole").fingerprint
    assert ma.import_peft(folder, base=base, name="it", subfolder="dora").fingerprint == wanted
    for case in ("dora", "rslora"):
        hub.add("org/run", {f"{case}/{path.name}": path.read_bytes() for path in (folder / case).iterdir()})
    done = cli("import-peft", "org/run", "--base", base, "--name", "hub", "--subfolder", "dora")
    assert done.returncode == 0, done.stderr
    assert ma.load_adapter("hub").fingerprint == wanted
    done = cli("import-peft", "org/run", "--base", base, "--name", "none")
    assert done.returncode == 1 and "several adapters: dora, rslora" in done.stderr and "--subfolder" in done.stderr


# -- text and pictures -----------------------------------------------------------------------------


def test_the_text_part_of_an_mlx_vlm_adapter_is_taken_on_request(sql, base, written, tmp_path):
    tower = {
        "vision_tower.blocks.0.attn.qkv.lora_a": mx.ones((8, 4)),
        "vision_tower.blocks.0.attn.qkv.lora_b": mx.ones((4, 8)),
    }
    folder = tmp_path / "both"
    folder.mkdir()
    for file, content in written("mlx-vlm", {f"language_model.{n}": a for n, a in sql.weights.items()} | tower).items():
        (folder / file).write_bytes(content)
    with pytest.raises(IncompatibleError, match=r"also changes 'vision_tower\.blocks' \(1 layer\)") as caught:
        ma.add(folder, base=base)
    assert "--text-only" in caught.value.hint
    said = []
    added = ma.add(folder, base=base, text_only=True, on_event=said.append)
    assert ma.load_adapter(added.name).config.keys == sql.config.keys
    assert any("Left out" in event.text and "vision_tower" in event.text for event in said if isinstance(event, Note))
    with pytest.raises(ConfigError, match="only its base tells"):
        ma.add(folder, text_only=True, name="nothing")


# -- a base that does not help ---------------------------------------------------------------------


def test_a_base_that_cannot_be_used_is_told(sql, base, written, tmp_path):
    """Its own base is there, but another one, or broken: what is taken in has not been held against anything."""
    folder, own = tmp_path / "it", tmp_path / "its base"
    shutil.copytree(base, own)
    folder.mkdir()
    for file, content in written("PEFT's file name").items():
        (folder / file).write_bytes(content)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"model": str(own)}))

    def told():
        said = []
        ma.add(folder, name="it", overwrite=True, on_event=said.append)
        return [event.text for event in said if isinstance(event, Note)]

    assert not told()
    shutil.rmtree(own / "model.safetensors", ignore_errors=True)
    (own / "model.safetensors").write_bytes(b"")
    (note,) = told()
    assert note.startswith("Taken in as it is, without a look at whether it fits") and "model.safetensors" in note
    shutil.rmtree(own)
    assert not told()
    shutil.copytree(base, own)
    weights = {name.replace("layers.1", "layers.9"): array for name, array in sql.weights.items()}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights)
    (note,) = told()
    assert note.startswith("It does not fit the base that it names.") and "layers.9" in note and "--base" in note


# -- what a download asks --------------------------------------------------------------------------


def test_nothing_takes_more_than_one_request_beyond_what_the_client_itself_needs(hub, sql, base, tmp_path, monkeypatch):
    """The client asks for the revision and the tree, then for head and body of each file."""
    from huggingface_hub import constants, snapshot_download

    own = {name: (sql.folder / name).read_bytes() for name in (CONFIG, "adapters.safetensors")}
    llama = FIXTURES / "llama"
    hub.add("org/own", own)
    hub.add("org/deep", {f"a/{name}": content for name, content in own.items()})
    hub.add("org/peft", {path.name: path.read_bytes() for path in (llama / "dora").iterdir()})
    hub.add("org/model", {path.name: path.read_bytes() for path in base.iterdir()})
    takes = {
        "org/own": lambda: ma.download("org/own"),
        "org/deep": lambda: ma.download("org/deep", subfolder="a"),
        "org/peft": lambda: ma.import_peft("org/peft", base=llama / "base", name="peft"),
        "org/model": lambda: ma.download("org/model"),
    }
    for repo, take in takes.items():
        counts = []
        for place, run in (("theirs", lambda repo=repo: snapshot_download(repo)), ("ours", take)):
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / place))
            hub.requests.clear()
            run()
            counts.append(Counter(path.partition("?")[0] for _, path in hub.requests if "agent-harnesses" not in path))
        assert counts[1].total() <= counts[0].total() + 1, counts
