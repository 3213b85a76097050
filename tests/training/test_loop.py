"""What a run says of itself at its end."""

import pytest
from helpers.tiny_configs import tiny_base
from helpers.training_tools import write_data

from mlx_adapters import TrainConfig, train
from mlx_adapters.events import Note


@pytest.mark.parametrize("architecture, told", [("deepseek_v32", True), ("llama", False)])
def test_layers_that_no_gradient_came_to_are_named_in_one_warning(architecture, told, tmp_path):
    """DeepSeek 3.2's indexer only chooses tokens, so nothing flows back to it."""
    notes = []
    training = TrainConfig(iterations=2, batch_size=2, learning_rate=0.01)
    data, base = write_data(tmp_path / "data", rows=4, valid=0), tiny_base(tmp_path / "base", architecture)
    train(base, data, name="x", training=training, on_event=lambda e: notes.append(e) if isinstance(e, Note) else None)
    warnings = [note.text for note in notes if note.level == "warning" and "gradient" in note.text]
    assert len(warnings) == told
    assert not told or all(name in warnings[0] for name in ("6 adapted layers", "layers.0.self_attn.indexer.wq_b"))
