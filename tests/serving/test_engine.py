"""What the engine says of the model that it serves."""

import pytest
from helpers.tiny_configs import tiny_base

from mlx_adapters.generation.live import load_model
from mlx_adapters.serving.engine import Engine
from mlx_adapters.serving.settings import ServeSettings


@pytest.mark.parametrize("name, in_turn", [("llama4", True), ("qwen3", False)])
def test_it_tells_whether_requests_are_decoded_one_after_another(name, in_turn, tmp_path):
    model = load_model(tiny_base(tmp_path / "base", name))
    assert Engine(model, ServeSettings(), "base").in_turn == in_turn
    assert not Engine(model, ServeSettings(max_batch=1), "base").in_turn
