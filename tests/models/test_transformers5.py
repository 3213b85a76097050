"""Bases saved by transformers 5 compute what transformers computes: rope parameters, windows, experts."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_adapters.models.base import normalized_config
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
BASES = sorted(p.parent for p in FIXTURES.glob("*/base")) + sorted(p.parent for p in FIXTURES.glob("rope/*/base"))


@pytest.mark.parametrize("folder", BASES, ids=lambda p: p.name)
def test_logits_equal_those_of_transformers(folder: Path):
    expected = mx.load(str(folder / "logits.safetensors"))
    logits = load_model(resolve_base(folder / "base")).logits(expected["input_ids"])
    assert mx.abs(logits - expected["base"]).max().item() < 1e-4
    assert mx.abs(expected["base"]).max().item() > 1


def test_nothing_changes_for_a_config_of_transformers_4():
    config = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert normalized_config(config) == config
