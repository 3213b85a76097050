"""A schedule and a run that goes on: a longer one says that its rate jumps, and a schedule's own end keeps it."""

import pytest
from helpers.training_tools import outcome, write_data

from mlx_adapters import ConfigError, LoraConfig, TrainConfig, plan_training, train
from mlx_adapters.config.training import passes, settled
from mlx_adapters.errors import IncompatibleError, TrainingError
from mlx_adapters.events import Note
from mlx_adapters.optimization.optimizers import learning_rate
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage.files import read_json

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
    said: list[str] = []
    with pytest.raises(IncompatibleError, match=r"learning_rate \(0.01 -> 0.02\)"):  # and nothing of a schedule
        other = TrainConfig(**SHORT | {"iterations": 12, "learning_rate": 0.02})
        train(name="flat", resume=True, training=other, on_event=lambda event: said.append(str(event)))
    assert not any("jumps" in text for text in said)


@pytest.mark.parametrize(
    ("settings", "lines", "iterations", "every"),
    [
        ({}, 48, 120, 12),  # ten passes
        ({}, 4, 100, 10),  # few rows: as many iterations as it takes to learn anything
        ({}, 100_000, 600, 60),
        ({"epochs": 3}, 10, 9, 1),  # batches of 4, 4 and 2
        ({"epochs": 0.01}, 48, 1, 1),
        ({"epochs": 2, "grad_accumulation": 8}, 48, 3, 1),
        ({"epochs": 50, "batch_size": 1}, 48, 2400, 100),
        ({"iterations": 7}, 48, 7, 100),
        ({"eval_every": 5, "save_every": 5}, 48, 120, 5),
    ],
)
def test_the_rows_say_how_long_a_run_is(settings, lines, iterations, every):
    known = settled(TrainConfig(**settings), lines)
    assert known.course == (iterations, every, every) and known.iterations == iterations
    assert known.epochs is None and settled(known, 1) == known
    assert passes(known, lines) >= settings.get("epochs", 0)


def test_what_does_not_go_with_the_length_is_refused_when_it_is_known():
    with pytest.raises(ConfigError, match="iterations and epochs say the same"):
        TrainConfig(iterations=5, epochs=1)
    with pytest.raises(ConfigError, match="warmup must be shorter"):
        settled(TrainConfig(epochs=1, warmup=30), 48)
    with pytest.raises(ConfigError, match="epochs must be"):
        TrainConfig(epochs=0)
    assert settled(TrainConfig(early_stop=2), 8).course.eval_every == 10


def test_a_run_records_its_length_and_goes_on_by_epochs(tiny_model, tmp_path):
    data, notes = write_data(tmp_path / "data", rows=6, valid=2), []
    on_event = lambda event: notes.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    by_epochs = TrainConfig(epochs=1, batch_size=2, learning_rate=0.01)
    asked = {"name": "run", "lora": LoraConfig(rank=2)}
    plan = plan_training(tiny_model(), data, training=by_epochs, **asked)
    assert (plan.rows, plan.validation_rows, plan.iterations, plan.passes, plan.save_every) == (6, 2, 3, 1.0, 1)
    assert not plan.folder.exists()
    run = train(tiny_model(), data, training=by_epochs, on_event=on_event, **asked)
    assert "3 iterations = 1 pass over 6 rows." in notes and run.final.iteration == 3
    recorded = read_json(run.folder / "recipe.json")
    assert recorded["training"]["iterations"] == 3 and recorded["training"]["epochs"] is None
    further = plan_training(name="run", resume=True, training=TrainConfig(epochs=2, batch_size=2, learning_rate=0.01))
    assert (further.iteration, further.iterations, further.eval_every) == (3, 6, 1)
    with pytest.raises(TrainingError, match="has finished its 3 iterations"):
        plan_training(name="run", resume=True)
    again = train(name="run", resume=True, training=TrainConfig(epochs=2, batch_size=2, learning_rate=0.01))
    assert again.final.iteration == 6 and read_json(run.folder / "recipe.json")["training"]["save_every"] == 1


def test_a_dry_resume_leaves_a_damaged_checkpoint_alone(tiny_model, tmp_path):
    data = write_data(tmp_path / "data", rows=6, valid=2)
    run = train(tiny_model(), data, name="run", lora=LoraConfig(rank=2), training=TrainConfig(**SHORT))
    (damaged := max((run.folder / "checkpoints").iterdir()) / "state.json").write_text("{")
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    plan = plan_training(name="run", resume=True)
    assert (plan.iteration, plan.iterations) == (2, 4) and damaged.exists()
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
