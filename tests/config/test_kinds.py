"""Settings that are given in Python are of their kind, or refused by their name before anything begins."""

import numpy as np
import pytest

from mlx_adapters import ConfigError, LoraConfig, TrainConfig, estimate, plan_training, train
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.config.training import DPO

WRONG = {
    "learning_rate": "1e-5",
    "batch_size": 2.0,
    "iterations": True,
    "mask_prompt": "no",
    "packing": None,
    "memory_limit": 12,
    "seed": 1.5,
    "chat_template_args": [],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_kind_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"'{name}'") as caught:
        TrainConfig(**{name: WRONG[name]})
    assert caught.value.hint.startswith("it must be ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", None), ("rank", "4"), ("target_modules", "q_proj"), ("ranks", [("q_proj", 4)]), ("num_layers", "4")],
)
def test_so_is_one_of_an_adapter(name, value):
    with pytest.raises(ConfigError, match=f"'{name}'"):
        LoraConfig(**{name: value})


def test_one_of_an_objective_too():
    with pytest.raises(ConfigError, match="'beta'"):
        DPO(beta="0.1")


def test_numbers_of_NumPy_and_lists_are_what_they_mean():
    training = TrainConfig(batch_size=np.int64(2), learning_rate=np.float32(0.5))
    assert (type(training.batch_size), type(training.learning_rate)) == (int, float)
    assert training == TrainConfig(batch_size=2, learning_rate=0.5)
    lora = LoraConfig(target_modules=["q_proj"], ranks={"q_proj": np.int64(2)})
    assert lora == LoraConfig(target_modules=("q_proj",), ranks={"q_proj": 2})
    assert to_mapping(LoraConfig(scale=2))["scale"] == 2.0


def test_what_is_near_a_choice_is_still_named():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(schedule="cos")
    assert "did you mean 'cosine'" in caught.value.hint


@pytest.mark.parametrize("settings", [{"lora": {"rank": 4}}, {"training": {"iterations": 1}}])
@pytest.mark.parametrize("function", [train, plan_training, estimate])
def test_a_mapping_is_no_settings(function, settings, tiny_model):
    named = {} if function is estimate else {"name": "x"}
    with pytest.raises(ConfigError, match=r"The settings cannot be \{") as caught:
        function(tiny_model(), [{"text": "a b"}] * 4, **named, **settings)
    assert "Config(" in caught.value.hint
