"""PEFT's own adapters, made by the real peft, give PEFT's own logits here, or are refused with the reason."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_adapters import registry
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.model import load_model
from mlx_adapters.peft_format import import_peft

FIXTURES = Path(__file__).parent / "peft_fixtures"
ADAPTERS = sorted(p.parent for p in FIXTURES.glob("*/*/adapter_config.json"))
ADAPTERS += sorted(p.parent.parent for p in FIXTURES.glob("*/*/*/adapter_config.json") if p.parts[-3] != "refused")
REFUSED = sorted(p.parent for p in FIXTURES.glob("*/refused/*/adapter_config.json"))
REASONS = {
    "lora-bias": "lora_bias",
    "modules-to-save": "modules_to_save",
    "norms-to-save": "modules_to_save",
    "tied-modules-to-save": "modules_to_save",
    "trainable-tokens": "single tokens",
    "embedding-dora": "DoRA on the embedding",
    "pissa": "changes the base",
    "olora": "changes the base",
    "alora": "aLoRA",
    "layer-replication": "layer_replication",
    "adalora": "ADALORA",
    "ia3": "IA3",
    "loha": "LOHA",
    "lokr": "LOKR",
    "vera": "VERA",
    "prompt-tuning": "PROMPT_TUNING",
    "tied-lm-head": "tied embedding",
    "bias-all": "biases",
    "bias-lora-only": "biases",
    "resized": "resized vocabulary",
}


def case(folder: Path) -> str:
    return "/".join(folder.relative_to(FIXTURES).parts)


def base_of(folder: Path) -> Path:
    return FIXTURES / folder.relative_to(FIXTURES).parts[0] / "base"


@pytest.mark.parametrize("folder", ADAPTERS, ids=case)
def test_logits_equal_those_of_peft(folder: Path):
    base, key = base_of(folder), "/".join(folder.relative_to(FIXTURES).parts[1:])
    expected = mx.load(str(base.parent / "logits.safetensors"))
    adapter = import_peft(folder, base=base, name="it")
    model = load_model(base, adapter)
    logits = model.logits(expected["input_ids"])
    assert mx.abs(logits - expected[key]).max().item() < 1e-4
    assert mx.abs(logits - expected["base"]).max().item() > 0.05
    plain = registry.load_adapter("it")
    assert plain.fingerprint == adapter.fingerprint
    assert plain.metadata["peft"]["config"] == json.loads((next(folder.rglob("adapter_config.json"))).read_text())


@pytest.mark.parametrize("folder", REFUSED, ids=case)
def test_what_mlx_cannot_hold_is_refused_with_the_reason(folder: Path, home: Path):
    with pytest.raises((FormatError, IncompatibleError)) as raised:
        import_peft(folder, base=base_of(folder), name="it")
    assert REASONS[folder.name] in raised.value.message
    assert not (home / "adapters").exists()
