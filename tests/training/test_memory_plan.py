"""A run keeps to the memory there is, by itself: the same update, whatever is computed again or taken in parts."""

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.training_tools import cut_after, measure_once, outcome, write_data, write_rows_of_each_kind

from mlx_adapters import LoraConfig, TrainConfig, estimate, train
from mlx_adapters.config.training import DPO, KTO, ORPO
from mlx_adapters.data.datasets import read_data
from mlx_adapters.data.preferences import tokenize_for
from mlx_adapters.errors import ConfigError, TrainingError
from mlx_adapters.events import Note
from mlx_adapters.models.layers import named_layers
from mlx_adapters.models.loading import load_model
from mlx_adapters.optimization.distributed import World
from mlx_adapters.optimization.probe import Prober
from mlx_adapters.optimization.step import MemoryPlan, TrainStep
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage.files import read_json
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.training import forecast, setup

DEEP = {"num_hidden_layers": 4, "intermediate_size": 2048}  # a rung is more than a GPU's figures differ
LORA = LoraConfig(rank=4, scale=2.0)
SHORT = TrainConfig(iterations=4, batch_size=4, learning_rate=0.01, eval_every=2, save_every=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_rows_of_each_kind(tmp_path_factory.mktemp("rows"))


def prepared(folder, data, training: TrainConfig, memory: MemoryPlan) -> setup.Prepared:
    model = load_model(resolve_base(folder))
    rows = tokenize_for(read_data(data).rows("train"), model.tokenizer, training).rows
    keys = setup.add_layers(model, LORA, 0).keys
    layers = dict(named_layers(model.module))
    adapted = {key: layers[key] for key in keys}
    reference = {"train": np.full((len(rows), 2), -9.0, np.float32)} if training.objective.reference else None
    return setup.prepare(model, training, rows, (), adapted, reference=reference, memory=memory)


WAYS = {
    "texts": TrainConfig(batch_size=4),
    "packing": TrainConfig(batch_size=4, packing=True, max_seq_length=96),
    "accumulation": TrainConfig(batch_size=3, grad_accumulation=2),
    "dpo": TrainConfig(batch_size=4, objective=DPO()),
    "orpo": TrainConfig(batch_size=4, objective=ORPO()),
    "kto": TrainConfig(batch_size=4, objective=KTO()),
}


@pytest.mark.parametrize("most", [1, 90])
@pytest.mark.parametrize("way", WAYS)
def test_an_update_in_parts_is_the_same(way, most, tiny_model, folders):
    training = WAYS[way]
    data = folders[training.objective.rows]
    taken = {}
    for name, memory in {"whole": MemoryPlan(), "parts": MemoryPlan("mlp", most)}.items():
        made = prepared(tiny_model(), data, training, memory)
        updates = made.feed.updates(0)
        draws = [next(updates) for _ in range(3)]
        result = [made.train_step.take(draw, 0.01) for draw in draws][-1]
        batches, drawn = (sum(len(getattr(draw, what)) for draw in draws) for what in ("batches", "drawn"))
        taken[name] = result, made.train_step.weights, batches, drawn, result.figures
    (whole, weights, batches, drawn, figures), (parts, others, more, same, parted) = taken["whole"], taken["parts"]
    assert drawn == same == batches < more
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    for name, weight in weights.items():
        assert mx.allclose(others[name], weight, atol=1e-4), name
    assert parted.keys() == figures.keys()
    for name, (total, number) in figures.items():
        assert parted[name] == [pytest.approx(total, rel=1e-4, abs=1e-4), number]


def notes_of(run) -> list[str]:
    said: list[str] = []
    run(lambda event: said.append(event.text) if isinstance(event, Note) else None)
    return said


def peaks(base, data) -> dict[str, int]:
    estimated = estimate(base, data, lora=LORA, training=SHORT, timed=False)
    return {rung.again: rung.peak_bytes for rung in estimated.ladder}


@pytest.fixture(autouse=True)
def needed_alone(monkeypatch):
    """The forecast without what a GPU is given beside it, to work ahead."""
    monkeypatch.setattr(forecast, "AHEAD", 0)
    measure_once(monkeypatch)


@pytest.fixture
def deep(tiny_model, tmp_path):
    return tiny_model("llama", **DEEP), write_data(tmp_path / "data", rows=20)


def test_the_ladder_goes_down(deep):
    ladder = peaks(*deep)
    assert sorted(ladder.values(), reverse=True) == list(ladder.values())
    assert on_gpu() or list(ladder) == ["nothing", "mlp", "blocks"]  # whose figures differ by more


def test_MLPs_computed_again_save_what_wide_ones_keep(tiny_model, tmp_path):
    """So wide that it is most of a step's memory, and more than a GPU's figures differ."""
    base = tiny_model("llama", num_hidden_layers=8, intermediate_size=4096)
    ladder = peaks(base, write_data(tmp_path / "data", rows=20))
    assert ladder["mlp"] < 0.8 * ladder["nothing"]


@pytest.mark.parametrize(
    ("needs", "offered"),
    [
        ({"nothing": 60e6, "mlp": 61e6, "blocks": 30e6}, ["nothing", "blocks"]),
        ({"nothing": 60e6, "mlp": 50e6, "blocks": 51e6}, ["nothing", "mlp"]),
    ],
)
def test_a_way_that_saves_nothing_is_passed_over(needs, offered, deep, monkeypatch):
    """A GPU frees at its own time, so that what computes more may be seen to take more."""
    monkeypatch.setattr(Prober, "step_bytes", lambda prober, *_: (needs[prober.memory.again], 0))
    estimated = estimate(*deep, lora=LORA, training=SHORT, timed=False)
    assert [rung.again for rung in estimated.ladder] == offered
    training = replace(SHORT, memory_limit="1MB")
    notes_of(lambda say: train(*deep, name="tight", lora=LORA, training=training, on_event=say))
    assert read_json(adapter_folder("tight") / "recipe.json")["memory"]["again"] == offered[-1]


@pytest.mark.parametrize("again", ["mlp", "blocks"])
def test_the_cheapest_way_that_fits_is_taken(again, deep, monkeypatch):
    """By figures of our own: what a busy GPU is seen to take differs by more than a rung of so small a model."""
    needs = {"nothing": 60e6, "mlp": 45e6, "blocks": 30e6}
    monkeypatch.setattr(Prober, "step_bytes", lambda prober, *_: (needs[prober.memory.again], 0))
    base, data = deep
    ladder = peaks(base, data)
    dearer = ladder["nothing" if again == "mlp" else "mlp"]
    limit = (ladder[again] + dearer) / 2 / forecast.ROOM  # halfway
    training = replace(SHORT, memory_limit=f"{limit / 1e6:.3f}MB")
    estimated = estimate(base, data, lora=LORA, training=training, timed=False)
    assert estimated.fits and next(rung.again for rung in estimated.ladder if rung.fits) == again
    assert all(rung.fits == (rung.peak_bytes <= forecast.ROOM * limit) for rung in estimated.ladder)
    said = notes_of(
        lambda say: train(base, data, name="tight", lora=LORA, training=training, forecast=True, on_event=say)
    )
    what = {"mlp": "MLPs are computed again", "blocks": "blocks are computed again"}[again]
    assert any(what in text and "more time" in text for text in said), said
    assert read_json(adapter_folder("tight") / "recipe.json")["memory"]["again"] == again


def test_batches_are_taken_in_parts_where_nothing_else_helps(deep):
    base, data = deep
    least = min(peaks(base, data).values())
    limit = f"{least * 0.9 / 1e6:.3f}MB"
    estimated = estimate(base, data, lora=LORA, training=replace(SHORT, memory_limit=limit), timed=False)
    last = estimated.ladder[-1]
    assert last.again == "blocks" and last.rows in (1, 2)
    assert "at a time" in str(last) and last.peak_bytes < least
    said = notes_of(
        lambda say: train(
            base, data, name="parts", lora=LORA, training=replace(SHORT, memory_limit=limit), on_event=say
        )
    )
    assert any("at a time" in text for text in said)
    assert read_json(adapter_folder("parts") / "recipe.json")["memory"]["positions"]
    if not estimated.fits:
        assert any("hardly fit" in text for text in said)


def test_what_does_not_fit_is_not_said_to_fit(deep):
    training = replace(SHORT, memory_limit="1MB")
    said = notes_of(lambda say: train(*deep, name="tight", lora=LORA, training=training, on_event=say))
    least = "of 1 MB: blocks are computed again, [12] rows? at a time, the least there is"  # two, if one takes no less
    assert any(re.search(least, text) for text in said)
    assert any("hardly fit" in text for text in said) and not any("so that it fits" in text for text in said)


def test_of_several_processes_each_is_foreseen_with_its_share_of_a_batch(deep, monkeypatch):
    class First(World):
        def share(self, make):
            return make()

    shapes = []

    def step_bytes(prober, draw, blocks):
        assert prober.processes == 2
        shapes.extend(batch.tokens.shape for batch in draw.batches)
        return 1e9 * shapes[-1][0], 0

    monkeypatch.setattr(Prober, "step_bytes", step_bytes)
    base, data = resolve_base(deep[0]), read_data(deep[1])
    rows = tokenize_for(data.rows("train"), load_model(base).tokenizer, SHORT).rows
    limited = replace(SHORT, memory_limit="1.5GB")
    memory = forecast.memory_of_run(
        forecast.Wanted(base, rows, LORA, limited), {}, True, First(0, 2), lambda event: None
    )
    second, longest = sorted(row.length for row in rows)[-2:]
    assert [count for count, _ in shapes] == [2, 2, 2, 1, 1]
    assert all(width >= length for (_, width), length in zip(shapes, [longest] * 3 + [second, longest], strict=True))
    assert memory.again == "blocks" and memory.positions


def test_what_is_asked_for_is_taken(deep):
    base, data = deep
    train(base, data, name="asked", lora=LORA, training=replace(SHORT, memory="mlp"))
    assert (
        read_json(adapter_folder("asked") / "recipe.json")["memory"]
        == {
            "again": "mlp",
            "positions": None,
            "near": None,
        }
        or on_gpu()
    )


def test_a_resume_keeps_the_way_unless_another_is_asked_for(deep, monkeypatch):
    base, data = deep
    limit = f"{min(peaks(base, data).values()) * 1.1 / 1e6:.3f}MB"
    training = replace(SHORT, memory_limit=limit)
    train(base, data, name="whole", lora=LORA, training=training)
    with cut_after(2):
        train(base, data, name="cut", lora=LORA, training=training)
    monkeypatch.setattr(forecast, "usable_memory_bytes", lambda: 10**15)
    train(name="cut", resume=True)
    resumed, expected = outcome(adapter_folder("cut")), outcome(adapter_folder("whole"))
    resumed["adapter_metadata.json"]["name"] = "whole"
    assert resumed == expected
    train(name="cut", resume=True, training=replace(training, memory_limit=None, iterations=5))
    assert read_json(adapter_folder("cut") / "recipe.json")["memory"]["again"] == "nothing"


def no_room_for(most: int, monkeypatch) -> None:
    """Let MLX find no room for batches of more predictions than `most`."""
    true = TrainStep._part

    def part(self, batch, *args):
        mx.random.uniform()
        if batch.tokens[:, 1:].size > most:
            raise RuntimeError("[malloc] Unable to allocate 12345678 bytes.")
        return true(self, batch, *args)

    monkeypatch.setattr(TrainStep, "_part", part)
    monkeypatch.setattr(forecast, "on_gpu", lambda: False)  # else it is foreseen


def test_a_batch_that_finds_no_memory_is_split(tiny_model, tmp_path, monkeypatch):
    data = write_data(tmp_path / "data", rows=20)
    no_room_for(80, monkeypatch)
    said = notes_of(lambda say: train(tiny_model(), data, name="split", lora=LORA, training=SHORT, on_event=say))
    assert any("taken in parts from now on" in text for text in said)
    assert read_json(adapter_folder("split") / "recipe.json")["memory"]["positions"] <= 80
    monkeypatch.undo()


def test_a_forecast_that_finds_no_memory_goes_on_to_what_takes_less(tiny_model, tmp_path, monkeypatch):
    """It tries the steps: what there is no room for does not fit, and is no fault of the model's."""
    data = write_data(tmp_path / "data", rows=20)
    no_room_for(80, monkeypatch)
    said = notes_of(
        lambda say: train(tiny_model(), data, name="split", lora=LORA, training=SHORT, forecast=True, on_event=say)
    )
    assert read_json(adapter_folder("split") / "recipe.json")["memory"]["positions"] <= 80
    assert any("so that it fits" in text for text in said)


def test_a_row_that_finds_no_memory_ends_the_run_in_words(tiny_model, tmp_path, monkeypatch):
    data = write_data(tmp_path / "data", rows=20)
    no_room_for(5, monkeypatch)
    with pytest.raises(TrainingError, match="no memory for a row") as caught:
        train(tiny_model(), data, name="split", lora=LORA, training=SHORT)
    assert caught.value.hint.startswith("use --memory blocks, or a --max-seq-length below ")
    with pytest.raises(TrainingError, match="no memory for a row") as caught:
        train(tiny_model(), data, name="split", lora=LORA, training=replace(SHORT, memory="blocks"))
    assert caught.value.hint.startswith("use a --max-seq-length below ")


@pytest.mark.parametrize(
    "wrong", [{"memory_limit": "much"}, {"memory_limit": "0GB"}, {"memory": "mlp", "grad_checkpoint": True}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        TrainConfig(**wrong)
