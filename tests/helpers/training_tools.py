"""Helpers of the training tests: a small data set, and a run that stops as if the power had failed."""

import contextlib
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_adapters.optimization import log_probabilities
from mlx_adapters.optimization.probe import Prober
from mlx_adapters.storage.files import read_json
from mlx_adapters.storage.tensor_names import LORA_B, METADATA_FILE, split
from mlx_adapters.training.loop import Loop

TIMES = ("date", "duration_seconds", "command")


class _PowerCut(Exception):
    pass


@contextlib.contextmanager
def cut_after(iteration: int):
    """Around a run: it ends after `iteration` as in a crash, with nothing saved."""
    iterate = Loop._iterate

    def mortal(self):
        iterate(self)
        if self.state.iteration >= iteration:
            raise _PowerCut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_PowerCut):
        patch.setattr(Loop, "_iterate", mortal)
        yield


@contextlib.contextmanager
def photographed(run: Path, album: Path):
    """Around a run: after each iteration its folder is copied into `album`, under the iteration's number, as a crash
    would leave it there."""
    iterate = Loop._iterate

    def seen(self):
        iterate(self)
        if run.exists():  # from the first checkpoint on
            shutil.copytree(run, album / str(self.state.iteration))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_iterate", seen)
        yield


def write_data(folder: Path, rows: int = 13, valid: int = 5, seed: int = 0) -> Path:
    """Prompt-completion rows of very different length."""
    random_ = random.Random(seed)
    folder.mkdir(parents=True)
    for name, count in (("train", rows), ("valid", valid)):
        lines = [
            {
                "prompt": "List " + "the titles of all courses " * random_.randint(1, 4),
                "completion": "SELECT title " * random_.randint(1, 3) + f"FROM courses {i};",
                "talk": [{"role": "user", "content": f"List {i}."}, {"role": "assistant", "content": "SELECT " * i}],
            }
            for i in range(count)
        ]
        if count:
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def write_preferences(folder: Path, rows: int = 13, valid: int = 5, labeled: bool = False, seed: int = 0) -> Path:
    """Pairs, or answers with a label, of very different length."""
    random_ = random.Random(seed)
    folder.mkdir(parents=True)
    for name, count in (("train", rows), ("valid", valid)):
        lines = []
        for i in range(count):
            prompt = "List " + "the titles of all courses " * random_.randint(1, 4)
            good = "SELECT title " * random_.randint(1, 3) + f"FROM courses {i};"
            bad = "The capital of France " * random_.randint(1, 2) + f"is {i}."
            answer = {"completion": good if i % 3 else bad, "label": bool(i % 3)}
            lines.append({"prompt": prompt} | (answer if labeled else {"chosen": good, "rejected": bad}))
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def write_tool_calls(folder: Path) -> Path:
    """Questions for the weather in some city, answered by a call."""
    cities = ("Rome", "Lima", "Bern", "Paris", "Kyoto", "Quito", "Cairo", "Delhi", "Milan", "Turin", "Lyon", "Bonn")
    ways = ("How warm is it in {}?", "Weather in {} today", "Will it rain in {}?", "Tell me of the sun in {}.")
    folder.mkdir(parents=True)
    for name, some in (("train", ways[:3]), ("valid", ways[3:])):
        lines = []
        for way in some:
            for city in cities:
                call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
                asked = {"role": "user", "content": way.format(city)}
                lines.append({"messages": [asked, {"role": "assistant", "tool_calls": [call]}]})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def write_rows_of_each_kind(folder: Path) -> dict[str, Path]:
    """Data for each kind of objective, by what its `rows` says."""
    return {
        "texts": write_data(folder / "texts"),
        "pairs": write_preferences(folder / "pairs"),
        "labeled": write_preferences(folder / "labeled", labeled=True),
    }


def outcome(folder: Path) -> dict:
    """All that a run leaves behind, times aside: every file's content."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith("recipe") or "/.mlx-adapters-tmp-" in f"/{name}" or path.is_dir():
            continue
        if path.name == METADATA_FILE:
            contents[name] = {k: v for k, v in read_json(path).items() if k not in TIMES}
        elif path.name == "state.json":
            state = read_json(path)["state"]
            contents[name] = {k: v for k, v in state.items() if k != "seconds"}
        else:
            contents[name] = path.read_bytes()
    return contents


def make_updates_visible(module, strength: float = 0.05) -> dict[str, mx.array]:
    """Random numbers in place of the zeros in a module's lora_b: its adapter changes the output. Gives its weights."""
    weights = dict(tree_flatten(module.trainable_parameters()))
    for number, name in enumerate(sorted(weights)):
        if split(name)[1] == LORA_B:
            weights[name] = strength * mx.random.normal(weights[name].shape, key=mx.random.key(number))
    log_probabilities.set_weights(module, weights)
    return weights


def own_port() -> int:
    """The first of sixteen ports that no other test's process uses at this time, below those that the system gives out:
    MLX's ring takes whoever calls."""
    return 16_384 + os.getpid() % 1000 * 16


def measure_once(patch: pytest.MonkeyPatch) -> None:
    """Within the patch the same step's memory is measured once. A GPU frees at its own time, the later the busier the
    machine is, so that a small model's figures differ by a fifth from one time to the next."""
    measure, known = Prober.step_bytes, {}

    def step_bytes(prober, draw, blocks):
        training = replace(prober.training, memory_limit=None, memory="auto")
        shapes = [batch.tokens.shape for batch in draw.batches]
        key = repr((prober.base.folder, prober.adapter, training, prober.memory, shapes, blocks))
        if key not in known:
            known[key] = measure(prober, draw, blocks)
        return known[key]

    patch.setattr(Prober, "step_bytes", step_bytes)
