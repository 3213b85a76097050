"""Adapters of mlx-lm before mid-2024 carry alpha beside scale, and were trained at scale · alpha / rank."""

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.fusing import visible_adapter
from helpers.training_tools import write_data

from mlx_adapters.benchmarking.run import benchmark
from mlx_adapters.cli import cli
from mlx_adapters.errors import FormatError
from mlx_adapters.models.adapter import StrengthWarning, read_adapter, write_adapter
from mlx_adapters.models.loading import load_model
from mlx_adapters.serving.residents import Served
from mlx_adapters.sources.bases import resolve_base

IDS = mx.array([[3, 9, 27, 81, 40, 7, 300, 12]])


@pytest.fixture
def old(tiny_model, tmp_path):
    """`old(alpha=8)`: a folder as mlx-lm wrote it in the spring of 2024, rank 4 and scale 10."""

    def old(**parameters):
        folder = write_adapter(visible_adapter(tiny_model(), strength=0.05), tmp_path / "old", overwrite=True)
        settings = {"rank": 4, "scale": 10.0, "dropout": 0.0, **parameters}
        config = {"model": str(tiny_model()), "lora_layers": 2, "lora_parameters": settings}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_metadata.json").unlink(missing_ok=True)
        return folder

    return old


def run(*words):
    return CliRunner().invoke(cli, list(map(str, words)))


@pytest.mark.filterwarnings("ignore:'o")
def test_both_strengths_are_told_and_the_other_can_be_made(old, tiny_model, tmp_path):
    folder, data = old(alpha=8), write_data(tmp_path / "data", rows=4, valid=4)
    for command in (
        ("add", folder, "--name", "old"),
        ("show", "old"),
        ("fuse", folder, tmp_path / "fused", "--base", tiny_model(), "--no-check"),
        ("generate", "List", "--adapter", folder, "--base", tiny_model(), "--max-tokens", "1"),
        ("chat", "--adapter", folder, "--base", tiny_model()),
        ("merge", folder, "old", "--any-base", "--name", "both"),
        ("eval", folder, "--base", tiny_model(), "--data", data),
        ("export-peft", folder, tmp_path / "peft", "--base", tiny_model()),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            result = run(*command)
        assert result.exit_code == 0, result.output
        said = result.stderr + "".join(str(w.message) for w in told)
        assert "alpha 8 beside scale 10" in said and "trained that at 20" in said, command
    assert "alpha 8 beside scale 10" in run("verify", "old").output
    assert run("scale", "old", "2", "--name", "other").exit_code == 0
    assert "alpha" not in run("show", "other").output
    # Layers as they were then: y + scale · alpha / rank · (x a) b
    adapter, module = read_adapter(folder), load_model(resolve_base(tiny_model())).module
    trained = load_model(
        resolve_base(tiny_model()),
        adapter.with_weights(
            {name: 2 * array if name.endswith("b") else array for name, array in adapter.weights.items()}
        ),
    )
    from mlx_adapters import load_adapter

    made = load_model(resolve_base(tiny_model()), load_adapter("other"))
    assert np.allclose(np.array(made.logits(IDS)), np.array(trained.logits(IDS)), atol=1e-4)
    assert np.abs(np.array(made.logits(IDS)) - np.array(module(IDS))).max() > 0.1


def test_serving_tells_the_strength(old, tiny_model):
    with pytest.warns(StrengthWarning, match="trained that at 20"):
        Served("old", str(old(alpha=8))).read()


def test_a_benchmark_tells_what_its_processes_were_told(old, tiny_model):
    report = benchmark([str(old(alpha=8))], str(tiny_model()), prompt_tokens=4, decode_tokens=2, rounds=1, trials=1)
    assert any("trained that at 20" in text for text in report.warnings)


@pytest.mark.parametrize("parameters", [{}, {"alpha": 4}, {"alpha": None}])
def test_nothing_is_said_where_there_is_no_doubt(parameters, old):
    result = run("add", old(**parameters), "--name", "old")
    assert result.exit_code == 0 and "alpha" not in result.stderr


def test_a_scale_without_bounds_is_one_sentence(old):
    for scale in (1e39, -1e300):
        with pytest.raises(FormatError, match="scale"):
            read_adapter(old(scale=scale))
    run("add", old(), "--name", "old")
    for factor in ("1e38", "1e308", "-1e38"):
        result = run("scale", "old", factor, "--name", "huge")
        assert result.exit_code != 0 and "float32" in str(result.exception), factor
        assert run("show", "huge").exit_code != 0
