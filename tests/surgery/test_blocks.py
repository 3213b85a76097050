"""Where a model's blocks are, and whether what holds them is called."""

import pytest
from helpers.matrix import IDS, close
from helpers.tiny_configs import make_model, tiny_config

from mlx_adapters.surgery.blocks import find_blocks, find_body
from mlx_adapters.surgery.calls import head_logits, hidden_states


@pytest.mark.parametrize("name", ["llama", "mamba", "plamo"])
def test_a_body_is_what_is_called(name):
    """PlaMo keeps its blocks in a module of their own, and goes through them from the one around it."""
    module = make_model(tiny_config(name))
    blocks, body = find_blocks(module), find_body(module)
    assert (body is blocks.owner) == (name != "plamo")
    hidden = hidden_states(module, body, IDS)
    assert hidden.shape == (*IDS.shape, 64)
    close(head_logits(module, body, hidden.reshape(-1, 64)), module(IDS)[0])
