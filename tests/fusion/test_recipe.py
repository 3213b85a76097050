"""mlx-lm's recipes of mixed precision, by its names."""

import json

import pytest
from click.testing import CliRunner
from helpers.fusing import visible_adapter

from mlx_adapters.cli import cli
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.errors import ConfigError
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.fusion.recipe import read_recipe
from mlx_adapters.models.adapter import write_adapter

LOW, HIGH = 4, 6


def bits_by_layer(folder):
    config = json.loads((folder / "config.json").read_text())["quantization"]
    own = {path: entry["bits"] for path, entry in config.items() if isinstance(entry, dict)}
    return config["bits"], own


def test_a_recipe_gives_layers_what_mlx_lm_gives_them(tiny_model, tmp_path):
    folder = tiny_model("llama", bits=4, num_hidden_layers=2)
    options = FuseOptions(recipe="mixed_4_6", method="nearest", check=False)
    fuse(folder, visible_adapter(folder), tmp_path / "out", options=options)
    default, own = bits_by_layer(tmp_path / "out")
    bits = {path: own.get(path, default) for path in [*own, "model.layers.0.self_attn.q_proj"]}
    assert bits.pop("model.layers.0.self_attn.q_proj") == LOW
    finer = {path for path, number in own.items() if number == HIGH}
    assert finer and all(path.endswith(("v_proj", "down_proj", "lm_head")) for path in finer)


def test_a_search_starts_from_a_recipe(tiny_model, tmp_path):
    folder = tiny_model("llama", bits=4)
    adapter = visible_adapter(folder)
    start = FuseOptions(recipe="mixed_3_6", calibration_rows=8, check=False)
    plain = fuse(folder, adapter, tmp_path / "plain", options=start)
    more = FuseOptions(recipe="mixed_3_6", calibration_rows=8, check=False, budget_bits=plain.bits_per_weight + 0.5)
    richer = fuse(folder, adapter, tmp_path / "more", options=more)
    assert plain.bits_per_weight < richer.bits_per_weight <= plain.bits_per_weight + 0.5
    recipe = json.loads((tmp_path / "more" / "fuse_recipe.json").read_text())
    assert recipe["options"]["recipe"] == "mixed_3_6"
    for form, meant in ((1, None), (2, True)):  # of the first form it said no more than "not quick"
        older = recipe | {"format": form, "options": recipe["options"] | {"thorough": True}}
        (tmp_path / "fuse_recipe.json").write_text(json.dumps(older))
        assert read_recipe(tmp_path).options["thorough"] is meant


def test_recipes_that_cannot_be(tiny_model, tmp_path, home):
    folder = tiny_model("llama", bits=4)
    write_adapter(visible_adapter(folder), home / "adapters" / "tiny")
    out = str(tmp_path / "out")
    run = CliRunner().invoke(cli, ["fuse", "tiny", out, "--recipe", "mixed_5_7"])
    assert isinstance(run.exception, ConfigError) and "recipe 'mixed_5_7'" in run.exception.message
    assert "mixed_4_6" in str(run.exception.hint)
    run = CliRunner().invoke(cli, ["fuse", "tiny", out, "--recipe", "mixed_4_6", "--bits", "4"])
    assert isinstance(run.exception, ConfigError) and "bits" in str(run.exception.hint)
    with pytest.raises(ConfigError, match="MLX format"):
        FuseOptions(recipe="mixed_4_6", format="gguf")
    other = tiny_model("gpt2", bits=4)
    with pytest.raises(ConfigError, match="does not fit"):
        fuse(other, visible_adapter(other), out, options=FuseOptions(recipe="mixed_4_6", method="nearest", check=False))
