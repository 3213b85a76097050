"""Fixtures for the tests that talk to the Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.hub_server import WRITE_TOKEN, HubServer

from mlx_adapters.config.training import LoraConfig
from mlx_adapters.models import layers
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.sources import registry
from mlx_adapters.sources.bases import resolve_base

BASE_CARD = """---
license: apache-2.0
language:
- en
base_model: {base}
---

# Tiny
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's server, the real client pointed at it and signed in, an empty cache, and no waiting."""
    import huggingface_hub.utils._http as http
    from huggingface_hub import constants

    with HubServer() as server:
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        values = {
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in values.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(http.time, "sleep", lambda _: None)
        monkeypatch.setattr("mlx_adapters.publishing.sending.FIRST_WAIT_SECONDS", 0.0)
        yield server


@pytest.fixture
def cli(hub, tmp_path, home):
    """Run the program in a process of its own, pointed at the loopback Hub."""

    def run(*arguments, token=WRITE_TOKEN, **environment):
        env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), **environment}
        if token:
            env["HF_TOKEN"] = token
        command = [sys.executable, "-m", "mlx_adapters", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    return run


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    """A tiny base that says which Hub model it was converted from, and its license."""
    folder = tmp_path / "base"
    folder.mkdir()
    for path in tiny_model("llama").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "README.md").write_text(BASE_CARD.format(base="user/tiny-llama"))
    return folder


def new_adapter(base: Path, kind: str = "lora", **metadata) -> Adapter:
    """A rank-4 adapter of random weights on the tiny base."""
    model = load_model(resolve_base(base))
    keys = layers.resolve_target_modules(model.module, LoraConfig(target_modules=("q_proj", "up_proj")))
    config, weights, random = AdapterConfig(4, 2.0, keys, kind), {}, np.random.default_rng(0)
    for key in keys:
        for leaf, shape in layers.expected_shapes(layers.adaptable_layers(model.module)[key], config).items():
            weights[f"{key}.{leaf}"] = mx.array(random.normal(size=shape, scale=0.2).astype(np.float32))
    return Adapter(config, weights, {"base": model.base.record(), **metadata})


@pytest.fixture
def make_adapter():
    """`make_adapter(base, kind, **metadata)`."""
    return new_adapter


TRAINED = {
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"mlx_adapters": "0.1.0", "mlx": "0.32.4"},
    "command": "mlx-adapters train /home/joe/models/tiny --data /home/joe/secret/sql --name sql",
    "data": {"source": "/home/joe/secret/sql", "splits": {"train": {"rows": 600, "sha256": "ab" * 32}}},
    "training": {"iterations": 40, "learning_rate": 1e-4, "max_seq_length": 512},
    "train_losses": [[10, 2.5], [20, 1.5], [30, 1.1], [40, 0.9]],
    "validation_losses": [[20, 1.8], [40, 1.25]],
    "best_validation_loss": 1.25,
    "iteration": 40,
    "checkpoints": {"20": {"train": 1.5, "validation": 1.8}, "40": {"train": 0.9, "validation": 1.25}},
}


@pytest.fixture
def sql(base) -> Adapter:
    """The registered adapter `sql`, with a training's metadata and the litter of a run around it."""
    adapter = registry.register(new_adapter(base, **TRAINED), "sql")
    folder = adapter.folder
    (folder / "checkpoints" / "0000040").mkdir(parents=True)
    (folder / "checkpoints" / "0000040" / "optimizer.safetensors").write_bytes(b"moments")
    (folder / "train.jsonl").write_text('{"text": "a secret row"}\n')
    (folder / "log.jsonl").write_text(json.dumps({"host": "joes-mac"}))
    (folder / "recipe.json").write_text(json.dumps({"data": "/home/joe/secret"}))
    (folder / "0000020_adapters.safetensors").write_bytes((folder / "adapters.safetensors").read_bytes())
    return adapter
