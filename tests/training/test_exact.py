"""However a run is set up: stopped anywhere and resumed, it ends with the same bits as one that never was."""

import dataclasses
import shutil
import typing
from dataclasses import replace

import pytest
from helpers.training_table import LORA, TRAINING, WAYS
from helpers.training_tools import outcome, photographed, write_rows_of_each_kind

from mlx_adapters import LoraConfig, TrainConfig, train
from mlx_adapters.config.training import OBJECTIVES
from mlx_adapters.events import CheckpointSaved
from mlx_adapters.sources.registry import adapter_folder

CONFIGS = (LoraConfig, TrainConfig, *OBJECTIVES.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows_of_each_kind(tmp_path_factory.mktemp("rows"))


def values_of(config: type) -> dict[str, set]:
    """Setting -> the values that it takes in the table."""
    values: dict[str, set] = {field.name: set() for field in dataclasses.fields(config)}
    for way in WAYS.values():
        for settings in (*way.settings, way.settings[1].objective):
            for name in values if type(settings) is config else ():
                values[name].add(repr(getattr(settings, name)))
    return values


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_is_in_the_table(config):
    """Each is set to something else than its default, and each choice is made, somewhere."""
    hints, values = typing.get_type_hints(config), values_of(config)
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        others = values[field.name] if field.name == "name" else values[field.name] - {repr(default)}
        assert others, f"no way to train in the table sets '{field.name}'"
        for choice in typing.get_args(hints[field.name]):
            chosen = typing.get_args(choice) if typing.get_origin(choice) is typing.Literal else (choice,)
            missing = {repr(c) for c in chosen if isinstance(c, str)} - values[field.name]
            assert not missing, f"no way to train in the table has '{field.name}' {missing}"


def one_of_each(cuts, saved: list[int]) -> list[int]:
    """The first of those cuts that leave the same checkpoints behind."""
    first: dict[int, int] = {}
    for cut in cuts:
        first.setdefault(sum(iteration <= cut for iteration in saved), cut)
    return list(first.values())


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_an_uninterrupted_one(way, tiny_model, data, tmp_path):
    (base, lora, training), data = WAYS[way].made(tiny_model), WAYS[way].data_in(data)
    more = {}
    if WAYS[way].init_from or WAYS[way].reference:
        train(base, data, name="first", lora=lora, training=replace(training, iterations=2))
        more = {"init_from" if WAYS[way].init_from else "reference": "first"}
    saved: list[int] = []
    more["on_event"] = lambda event: isinstance(event, CheckpointSaved) and saved.append(event.iteration)
    folder = adapter_folder("run")
    with photographed(folder, tmp_path):
        whole = train(base, data, name="run", lora=lora, training=training, **more)
    expected = outcome(folder)
    for cut in one_of_each((4, 5, whole.final.iteration - 1), saved):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / str(cut), folder)
        assert outcome(folder) != expected
        train(name="run", resume=True)
        assert outcome(folder) == expected, f"cut after {cut}"
    assert whole.stopped_early == (way == "early stop")


def test_the_table_changes_what_is_computed():
    assert all(way.settings != (LoraConfig(**LORA), TrainConfig(**TRAINING)) or way.init_from for way in WAYS.values())
