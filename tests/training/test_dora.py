"""DoRA is trained where plain mlx-lm can load the result, and nowhere else; rows of zeros are refused."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.training_tools import write_data

from mlx_adapters import LoraConfig, TrainConfig, estimate, load_adapter, load_model, train
from mlx_adapters.errors import ConfigError

TRAINING = TrainConfig(iterations=2, batch_size=2, learning_rate=0.01)
IDS = mx.array([[3, 9, 27, 81, 40, 7, 300, 12]])
LAYERS = ("q_proj", "down_proj")
ON = {f"{bits} bits": ({"bits": bits}, LAYERS) for bits in (None, 2, 3, 4, 5, 6, 8)} | {
    "mxfp4": ({"bits": 4, "mode": "mxfp4"}, LAYERS),
    "an embedding": ({}, ("embed_tokens",)),
    "a quantized embedding": ({"bits": 4}, ("embed_tokens",)),
}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("on", ON)
def test_what_is_trained_loads_in_mlx_lm_or_is_refused(on, kind, tiny_model, tmp_path):
    options, targets = ON[on]
    base, data = tiny_model("llama", **options), write_data(tmp_path / "data", rows=6, valid=0)
    lora = LoraConfig(rank=4, type=kind, target_modules=targets)
    try:
        run = train(base, data, name="run", lora=lora, training=TRAINING)
    except ConfigError as error:
        assert "mlx-lm could not load" in error.message and kind == "dora"
        assert on in ("3 bits", "5 bits", "6 bits", "a quantized embedding")
        with pytest.raises(ConfigError, match="mlx-lm could not load"):
            estimate(base, data, lora=lora, training=TRAINING)
        return
    with mx.stream(mx.cpu):  # a GPU's quantized products may be wrong, and plain mlx-lm does not look
        theirs, _ = mlx_lm.load(str(base), adapter_path=str(run.folder))
        theirs.set_dtype(mx.float32)
        expected = np.array(theirs(IDS))
    ours = load_model(base, load_adapter("run"))
    assert np.allclose(expected, np.array(ours.module(IDS)), atol=2e-3)


def test_experts_are_named_with_the_targets_that_are_left(tiny_model, tmp_path):
    base, data = tiny_model("qwen3_moe"), write_data(tmp_path / "data", rows=6, valid=0)
    with pytest.raises(ConfigError, match="switch_mlp") as caught:
        train(base, data, name="run", lora=LoraConfig(rank=4, type="dora"), training=TRAINING)
    left = "gate,k_proj,o_proj,q_proj,v_proj"
    assert caught.value.hint == f"train LoRA, or --target-modules {left}."  # it is unquantized already
    train(
        base, data, name="run", lora=LoraConfig(rank=4, type="dora", target_modules=left.split(",")), training=TRAINING
    )


def test_rows_of_zeros_are_refused_under_dora(tmp_path):
    """Padding rows of an embedding, and layers that a maker cut: DoRA divides by the row's norm."""
    from helpers import tiny_models

    folder = tiny_models.build_model(tmp_path / "base", "llama")
    file = folder / "model.safetensors"
    weights = dict(mx.load(str(file)))
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = mx.concatenate([mx.zeros((3, 64)), weights[name][3:]])
    mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    data = write_data(tmp_path / "data", rows=6, valid=0)
    lora = LoraConfig(rank=4, type="dora", target_modules=("q_proj",))
    with pytest.raises(ConfigError, match=r"3 rows of 'model\.layers\.1\.self_attn\.q_proj'"):
        train(folder, data, name="run", lora=lora, training=TRAINING)
    train(folder, data, name="run", lora=LoraConfig(rank=4, target_modules=("q_proj",)), training=TRAINING)
