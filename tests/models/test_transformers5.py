"""Bases saved by transformers 5 compute what transformers computes: rope parameters, windows, experts."""

from pathlib import Path

import mlx.core as mx
import pytest
from transformers import AutoConfig

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


@pytest.mark.parametrize("kind", ["proportional", "linear"])
def test_transformers_reads_the_config_that_a_fused_model_gets(kind):
    """Its tokenizers ask for it; Gemma 4's own turns a part of each head in one of its two kinds of layers."""
    full = {"rope_type": kind, "rope_theta": 1e6, "partial_rotary_factor": 0.25, "factor": 8.0}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = normalized_config({"model_type": "gemma4_text", "rope_parameters": rope})
    read = AutoConfig.for_model(**config).rope_parameters
    assert read.get("full_attention", read)["rope_theta"] == 1e6
