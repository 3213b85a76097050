"""A schedule and a run that goes on: a longer one says that its rate jumps, and a schedule's own end keeps it."""

import pytest
from helpers.training_tools import outcome, write_data

from mlx_adapters import ConfigError, LoraConfig, TrainConfig, train
from mlx_adapters.events import Note
from mlx_adapters.optimization.optimizers import learning_rate
from mlx_adapters.sources.registry import adapter_folder

SHORT = {"iterations": 4, "batch_size": 2, "eval_every": 4, "save_every": 2, "learning_rate": 0.01}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_ends_where_it_is_told(schedule):
    whole = TrainConfig(iterations=10, schedule=schedule, warmup=2)
    part = TrainConfig(iterations=6, schedule=schedule, warmup=2, schedule_iterations=10)
    longer = TrainConfig(iterations=20, schedule=schedule, warmup=2, schedule_iterations=10)
    rates = [[learning_rate(config, i) for i in range(1, 21)] for config in (whole, part, longer)]
    assert rates[0] == rates[1] == rates[2]
    assert rates[0][10:] == [0.0] * 10 and min(rates[0][:10]) > 0


def test_a_schedule_that_cannot_end_is_refused():
    with pytest.raises(ConfigError, match="needs a schedule that ends"):
        TrainConfig(schedule_iterations=10)
    with pytest.raises(ConfigError, match="warmup must be shorter than the schedule"):
        TrainConfig(schedule="cosine", warmup=10, schedule_iterations=10)


def resumed(name: str, **settings) -> list[str]:
    """What is said when the run goes on with these settings."""
    notes = []
    on_event = lambda event: notes.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    train(name=name, resume=True, training=TrainConfig(**SHORT | settings), on_event=on_event)
    return [note for note in notes if "learning rate" in note]


def test_a_longer_resume_says_that_its_rate_jumps_unless_the_schedule_keeps_its_end(tiny_model, tmp_path):
    data = write_data(tmp_path / "data", rows=6, valid=2)

    def begin(name, **settings):
        train(tiny_model(), data, name=name, lora=LoraConfig(rank=2), training=TrainConfig(**SHORT | settings))

    begin("jumps", schedule="cosine")
    (note,) = resumed("jumps", schedule="cosine", iterations=8)
    assert note.startswith(
        "The learning rate jumps from 0 to 0.005: the cosine schedule now ends at iteration 8, not 4"
    )
    assert "--schedule-iterations 4" in note
    begin("keeps", schedule="cosine")
    assert resumed("keeps", schedule="cosine", iterations=8, schedule_iterations=4) == []
    begin("parts", schedule="linear", schedule_iterations=8)
    assert resumed("parts", schedule="linear", schedule_iterations=8, iterations=8) == []
    begin("whole", schedule="linear", iterations=8)
    parts, whole = (outcome(adapter_folder(name))["adapters.safetensors"] for name in ("parts", "whole"))
    assert parts == whole
    begin("flat")
    assert resumed("flat", iterations=8) == []
