"""Weights that a PEFT config names as parameters (target_parameters), or ties: in, and back as they came."""

from pathlib import Path

import mlx.core as mx
import pytest
from helpers.peft import FIXTURES, picked_adapter

from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.errors import FormatError, IncompatibleError
from mlx_adapters.fusion.peft import fuse_peft
from mlx_adapters.storage import files


@pytest.mark.parametrize("form", ["tying", "parameter"])
def test_an_embedding_goes_back_as_the_config_has_it(form: str, tmp_path: Path):
    """One that its config ties to an output layer of the base's own, which PEFT does not heed; one that it names as a
    parameter, whose matrix PEFT writes as that of a linear layer."""
    base, folder = FIXTURES / "llama" / "base", tmp_path / "peft"
    wanted = ("embed_tokens", "lm_head") if form == "tying" else ("embed_tokens",)
    adapter = picked_adapter(base, lambda key: key.endswith(wanted))
    export_peft(adapter, folder, base_model="a/b")
    stored, config = mx.load(str(folder / "adapter_model.safetensors")), folder / "adapter_config.json"
    changes: dict = {"ensure_weight_tying": True}
    if form == "parameter":
        name = "base_model.model.model.embed_tokens.lora_{}.weight"
        a, b = (stored[f"base_model.model.model.embed_tokens.lora_embedding_{x}"] for x in "AB")
        stored = {name.format("A"): b.T, name.format("B"): a.T}
        changes = {"target_modules": [], "target_parameters": ["embed_tokens.weight"]}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stored)
    files.write_json(config, files.read_json(config) | changes)
    again = import_peft(folder, base=base, name="it")
    assert all(mx.array_equal(w, again.weights[name]) for name, w in adapter.weights.items())
    export_peft(again, tmp_path / "back")
    back = mx.load(str(tmp_path / "back" / "adapter_model.safetensors"))
    assert set(back) == set(stored) and all(mx.array_equal(back[name], w) for name, w in stored.items())


def test_a_convolution_named_as_a_parameter_is_refused_for_what_it_is(tmp_path: Path):
    """PEFT takes its (channels, 1, width) for so many experts; the rank of the factors is none that the config has."""
    folder, base = tmp_path / "peft", FIXTURES / "lfm2_moe" / "base"
    export_peft(picked_adapter(base, lambda key: key.endswith("q_proj")), folder, base_model="a/b")
    place, config = "base_model.model.model.layers.0.conv.conv", folder / "adapter_config.json"
    tensors = {f"{place}.lora_A.weight": mx.ones((96, 3)), f"{place}.lora_B.weight": mx.ones((1, 96))}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    named = {"target_modules": [], "target_parameters": ["conv.conv.weight"]}
    files.write_json(config, files.read_json(config) | named)
    with pytest.raises(FormatError, match=r"'model.layers.0.conv.conv'.*is no linear layer"):
        import_peft(folder, base=base, name="it")


@pytest.mark.parametrize("named", [["experts.up_proj"], ["experts.up_proj", "experts.down_proj"]], ids=len)
def test_experts_of_another_form_are_refused_by_the_name_that_the_config_has(named: list[str], tmp_path: Path):
    """Experts without a gate, as Nemotron-H's: the config does say which parameter it is."""
    folder, base = tmp_path / "peft", FIXTURES / "qwen3_moe" / "base"
    export_peft(picked_adapter(base, lambda key: key.endswith("q_proj")), folder, base_model="a/b")
    place, config = "base_model.model.model.layers.0.mlp.experts", folder / "adapter_config.json"
    places = [place, f"{place}.base_layer"][: len(named)]
    tensors = {
        f"{place}.lora_{x}.weight": mx.ones((32, 64) if x == "A" else (64, 32)) for place in places for x in "AB"
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    files.write_json(config, files.read_json(config) | {"target_modules": [], "target_parameters": named})
    with pytest.raises(FormatError, match=r"updates 'model\.layers\.0\.mlp\.experts\.up_proj'; experts of that form"):
        import_peft(folder, base=base, name="it")


def test_a_bias_that_the_base_has_not_is_told_as_such(tmp_path: Path):
    folder, base = tmp_path / "peft", FIXTURES / "lfm2_moe" / "base"
    export_peft(picked_adapter(base, lambda key: key.endswith("q_proj")), folder, base_model="a/b")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    bias = {"base_model.model.model.layers.0.conv.conv.bias": mx.ones((32,))}
    mx.save_safetensors(str(weights), mx.load(str(weights)) | bias)
    files.write_json(config, files.read_json(config) | {"bias": "all"})
    with pytest.raises(IncompatibleError, match=r"The base's 'model\.layers\.0\.conv\.conv' has no bias"):
        fuse_peft(folder, tmp_path / "out", base=base)
