"""An adapter whose config is of another year: what is taken in, packed or published, plain mlx-lm loads."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import make_adapter

import mlx_adapters as ma
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.publishing.uploads import publish

pytest_plugins = ["helpers.hub_fixtures"]
SETTINGS = {"rank": 4, "scale": 2.0}
NOW = {"dropout": 0.0, "keys": ["self_attn.q_proj"]}
CONFIGS = {
    "lora_layers": {"lora_layers": 2, "lora_parameters": SETTINGS | NOW},
    "no dropout": {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": SETTINGS},
    "keys auto": {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": SETTINGS | NOW | {"keys": ["auto"]}},
    "num_layers null": {"fine_tune_type": "lora", "num_layers": None, "lora_parameters": SETTINGS | NOW},
    "too few layers": {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": SETTINGS | NOW},
    "no keys": {"num_layers": -1, "lora_parameters": SETTINGS | {"dropout": 0.1}},
    "of a program": {"fine_tune_type": "lora", "lora_parameters": SETTINGS | NOW, "run": {"id": 7}, "lora_layers": 4},
}


def logits(base, folder):
    model, _ = mlx_lm.load(str(base), adapter_path=str(folder))
    return np.array(model(mx.array([[5, 9, 2, 77]])))


@pytest.fixture
def old(base, tmp_path):
    """`old(config)`: a sound adapter beside that config, and the logits that it gives."""

    def write(config, type="lora"):
        keys = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
        folder = write_adapter(make_adapter(base, keys=keys, type=type), tmp_path / "old")
        expected = logits(base, folder)
        (folder / "adapter_metadata.json").unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"model": str(base)} | config))
        return folder, expected

    return write


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_added_packed_or_published_plain_mlx_lm_loads(hub, base, old, tmp_path, config):
    folder, expected = old(config)
    added = ma.add(folder, name="taken")
    np.testing.assert_array_equal(logits(base, added.folder), expected)
    kept = json.loads((added.folder / "adapter_config.json").read_text())
    assert kept.items() >= {name: kept[name] for name in ("run", "lora_layers") if name in config}.items()
    ma.pack(str(folder), tmp_path / "old.tar.gz")
    np.testing.assert_array_equal(
        logits(base, ma.add(tmp_path / "old.tar.gz", out=tmp_path / "unpacked").folder), expected
    )
    publish(folder, "user/old", base_model="user/tiny-llama")
    (tmp_path / "there").mkdir()
    for name, content in hub.repos["user/old"].files.items():
        (tmp_path / "there" / name).write_bytes(content)
    np.testing.assert_array_equal(logits(base, tmp_path / "there"), expected)


def test_an_old_adapter_on_the_hub_comes_in_as_mlx_lm_loads_it(hub, base, old):
    folder, expected = old(CONFIGS["lora_layers"])
    hub.add("user/old", {path.name: path.read_bytes() for path in folder.iterdir()})
    np.testing.assert_array_equal(logits(base, ma.download("user/old", name="it").folder), expected)
    assert ma.load_adapter("user/old").fingerprint == ma.load_adapter("it").fingerprint


def test_dora_of_mlx_lm_before_there_was_a_type(base, old):
    folder, expected = old({"lora_layers": 2, "use_dora": True, "lora_parameters": SETTINGS | NOW}, "dora")
    np.testing.assert_array_equal(logits(base, ma.add(folder, name="taken").folder), expected)
    assert ma.load_adapter("taken").config.type == "dora"
