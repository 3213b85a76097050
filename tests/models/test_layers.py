"""Which layers the default targets are: those that the model's code lets be adapted."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.adapters import random_adapter
from helpers.matrix import IDS
from helpers.peft import FIXTURES
from helpers.tiny_configs import make_model, tiny_base, tiny_config
from mlx.utils import tree_flatten

from mlx_adapters.config.training import LoraConfig
from mlx_adapters.generation.live import load_model
from mlx_adapters.models.layers import ADAPTED, SWITCH, resolve_target_modules
from mlx_adapters.models.loading import load_module
from mlx_adapters.sources.bases import resolve_base


def test_layers_whose_weight_the_model_reads_are_left_out():
    module = make_model(tiny_config("gemma3n"))
    names = {path.rpartition(".")[2] for path in resolve_target_modules(module, LoraConfig())}
    assert not names & {"prediction_coefs", "correction_coefs"}
    assert {"q_proj", "down_proj", "modality_router", "linear_left"} <= names
    assert not [layer for layer in module.modules() if isinstance(layer, ADAPTED)]


@pytest.mark.parametrize("name", ["llama", "mamba", "deepseek_v3"])
def test_all_linear_layers_of_other_models_are_adapted(name):
    module = make_model(tiny_config(name))
    linear = {path for path, layer in module.named_modules() if ".layers." in path and isinstance(layer, nn.Linear)}
    assert linear <= set(resolve_target_modules(module, LoraConfig()))


def test_on_a_gpu_experts_weights_lie_row_by_row(monkeypatch):
    """Llama 4's files hold them turned, gate and up in one array."""
    from mlx_adapters.models import loading

    base = resolve_base(FIXTURES / "llama4_text" / "base")
    for gpu in (False, True):
        monkeypatch.setattr(loading, "on_gpu", lambda gpu=gpu: gpu)
        module = loading.load_model(base, dense=True, dtype="float32", together=False).module
        weights = [layer.weight for layer in module.modules() if isinstance(layer, SWITCH)]
        assert {np.array(w, copy=False).flags.c_contiguous for w in weights} == {gpu} and len(weights) == 6


def test_looking_for_targets_leaves_adapters_on(tiny_model):
    model = load_model(tiny_model("llama"))
    model.attach(random_adapter(model, rank=2))
    before = model.logits(IDS)
    resolve_target_modules(model.module, LoraConfig())
    assert mx.array_equal(model.logits(IDS), before)


def test_a_model_whose_code_forgot_to_initialize_itself_is_frozen(tmp_path):
    module, _ = load_module(resolve_base(tiny_base(tmp_path / "base", "recurrent_gemma")))
    module.freeze()
    assert not tree_flatten(module.trainable_parameters())
    assert module(IDS).shape == (*IDS.shape, 512)
