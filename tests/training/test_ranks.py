"""Processes of one run are compared before its first step, fail together, stop together and go on in another number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.training_tools import own_port, write_data

from mlx_adapters import LoraConfig, TrainConfig, train
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.errors import TrainingError
from mlx_adapters.optimization import distributed
from mlx_adapters.storage import tensor_files
from mlx_adapters.system import gpu_kernels
from mlx_adapters.system.machine import on_gpu

TESTS = Path(__file__).parents[1]
LORA = LoraConfig(rank=4, scale=2.0, target_modules=("q_proj", "v_proj"))
TRAINING = TrainConfig(
    iterations=4, batch_size=4, learning_rate=0.01, mask_prompt=True, eval_every=2, save_every=2, report_every=2
)
HALF = {"iterations": 2}


@pytest.fixture(scope="module")
def said(tiny_model, tmp_path_factory):
    """{scenario: what rank 0 and rank 1 said of it}, and the folder; all in one launch of two processes."""
    work = tmp_path_factory.mktemp("ranks")
    base, data = str(tiny_model()), str(write_data(work / "data", rows=13, valid=5))
    other_data = str(write_data(work / "other", rows=13, valid=5, seed=3))
    other_base = str(tiny_model("qwen2"))
    home = work / "home"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OPENBLAS_NUM_THREADS": "1",
        "MLX_ADAPTERS_HOME": str(home),
    }

    def asked(**options):
        training = to_mapping(TRAINING) | options.pop("training", {})
        lora = to_mapping(LORA) | options.pop("lora", {})
        return {"base": base, "data": data, "training": training, "lora": lora} | options

    def longer(**training):
        return {"training": to_mapping(TRAINING) | training}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(home))
        for name in ("one", "ones"):  # what two processes go on with, and what one does
            train(base, data, name=name, lora=LORA, training=TrainConfig(**vars(TRAINING) | HALF))
    scenarios = [
        {"name": "data", "asked": asked(), "rank1": {"data": other_data}},
        {"name": "base", "asked": asked(), "rank1": {"base": other_base}},
        {"name": "rate", "asked": asked(), "rank1": longer(learning_rate=0.02)},
        {"name": "iterations", "asked": asked(), "rank1": longer(iterations=6)},
        {"name": "absent", "asked": asked(), "rank1": {"data": str(work / "nothing")}},
        {"name": "bug", "asked": asked(), "rank1": {"damage": True}},
        {"name": "template", "asked": asked(), "rank1": longer(chat_template="{{ messages }}")},
        {"name": "mode", "asked": asked(), "rank1": {"overwrite": True}},
        {"name": "stop", "asked": asked(training={"report_every": 1}, stop_at=1)},
        {"name": "fail", "asked": asked(training={"report_every": 1}, fail_at=1)},
        {"name": "one", "asked": {"resume": True, **longer()}},
        {"name": "drop", "asked": asked(lora={"dropout": 0.3})},
        {"name": "early", "asked": asked(training={"early_stop": 1, "learning_rate": 1e-9, "eval_every": 1})},
        {"name": "half", "asked": asked(training=HALF)},
    ]
    (work / "scenarios.json").write_text(json.dumps(scenarios))
    script = [sys.executable, str(TESTS / "helpers" / "rank_scenarios.py"), str(work)]
    command = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring", "-p", str(own_port())]
    done = subprocess.run([*command, "--", *script], env=environment, capture_output=True, text=True, timeout=900)
    ranks = [[json.loads(line) for line in (work / f"rank{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(scenarios), done.stdout + done.stderr
    return {scenario["name"]: pair for scenario, *pair in zip(scenarios, *ranks, strict=True)}, home / "adapters"


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("data", "the data (train: other 13 rows)"),
        ("base", "the base model ("),
        ("rate", "learning_rate (0.01 -> 0.02)"),
        ("iterations", "iterations (4 -> 6)"),
        ("template", "chat_template"),
        ("mode", "overwrite (False -> True)"),
    ],
)
def test_the_one_that_differs_is_named_on_all(scenario, what, said):
    for one in said[0][scenario]:
        assert one["error"] == "IncompatibleError" and what in one["message"]
        assert "(rank 1) differs from '" in one["message"] and "docs/distributed.md" in one["hint"]
    assert not (said[1] / scenario).exists()


def test_what_one_raises_ends_all_by_its_host(said):
    first, second = said[0]["absent"]
    assert first["error"] == second["error"] == "NotFoundError"
    assert first["message"].startswith("On '") and f"(rank 1): {second['message']}" in first["message"]
    first, second = said[0]["bug"]
    assert second["error"] == "ZeroDivisionError" and first["error"] == "TrainingError"
    assert "(rank 1): ZeroDivisionError: division by zero." in first["message"]


def test_a_stop_and_an_error_of_a_callback_end_all_after_the_same_iteration(said):
    first, second = said[0]["stop"]
    assert first["stopped"] and second["stopped"] and first["final"] == second["final"] == 2
    assert first["reports"] == [[2, 1], [2, 2]] and not second["reports"]
    first, second = said[0]["fail"]
    assert first["error"] == "ValueError" and second["error"] == "KeyboardInterrupt"
    assert (said[1] / "fail" / "checkpoints" / "0000002").is_dir()


def weights(folder, iteration=4):
    return tensor_files.read_safetensors(folder / f"{iteration:07d}_adapters.safetensors")


def test_a_run_goes_on_in_another_number_of_processes(said, monkeypatch):
    """On the same global batches: one of two as one of one, and the other way round."""
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(said[1].parent))
    assert [one["final"] for one in said[0]["one"]] == [4, 4]
    whole = train(name="ones", resume=True, training=TRAINING)
    notes = []
    half = train(name="half", resume=True, training=TRAINING, on_event=lambda event: notes.append(str(event)))
    assert any("goes on with 1 process instead of 2 processes" in note for note in notes)
    for folder in (said[1] / "one", half.folder):
        mine, wanted = weights(folder), weights(whole.folder)
        assert all(np.allclose(mine[name], wanted[name], atol=1e-5) for name in wanted)


def test_early_stopping_and_dropout_agree_over_processes(said, monkeypatch):
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(said[1].parent))
    first, second = said[0]["early"]
    assert first["final"] == second["final"]
    assert [one["final"] for one in said[0]["drop"]] == [4, 4]
    assert all(np.isfinite(np.array(array)).all() for array in weights(said[1] / "drop").values())


@pytest.mark.parametrize("shared", [None, "/kernels"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_on_cuda_compile_into_folders_of_their_own(rank, shared, monkeypatch):
    """MLX writes there in place, and another process may read half a file."""
    for name, value in {"MLX_RANK": rank, "MLX_WORLD_SIZE": "2", gpu_kernels.COMPILED: shared}.items():
        monkeypatch.setenv(name, value or "")
    monkeypatch.setattr(gpu_kernels, "on_cuda", lambda: True)
    for _ in range(2):  # a process may train twice
        with pytest.raises(TrainingError):  # nobody is there
            distributed.start()
    own = os.environ[gpu_kernels.COMPILED]
    assert own == (shared or "") if rank == "0" else own.endswith("ptx-1" if shared is None else "/kernels-1")


FORKS = """
import json, os, sys
from mlx_adapters.optimization import distributed
own, *others = json.loads(sys.argv[1])
for other in others:
    if os.fork() == 0:
        own = other
        break
os.environ.update(own)
try:
    distributed.start()
except Exception as error:
    os.write(2, f"{type(error).__name__}: {error}\\n".encode())
"""


def test_a_ring_of_two_runs_is_noticed_by_all(tmp_path):
    """As two runs of three that were started at once over the same ports are wired now and then. Forks of a process
    that has computed nothing, where no GPU is driven: importing MLX once instead of six times."""
    first, places = own_port() + 4, []
    for place in range(6):  # one listens at its own port, and calls the next one's
        ports = {place % 3: place, (place + 1) % 3: (place + 1) % 6}
        hosts = [[f"127.0.0.1:{first + ports.get(rank, place)}"] for rank in range(3)]
        (tmp_path / f"{place}.json").write_text(json.dumps(hosts))
        places.append({"MLX_RANK": str(place % 3), "MLX_HOSTFILE": str(tmp_path / f"{place}.json")})
    environment, started = os.environ | {"PYTHONPATH": str(TESTS.parent)}, []
    for forks in [[place] for place in places] if on_gpu() else [places]:
        command = [sys.executable, "-c", FORKS, json.dumps(forks)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = "".join(process.communicate(timeout=60)[1] for process in started)
    assert said.count("TrainingError: Processes of another run answer at this one's addresses.") == 6, said


@pytest.mark.parametrize("variable", ["MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MLX_HOSTFILE"])
def test_one_of_several_that_reaches_nobody_is_told(variable, monkeypatch, tmp_path):
    """Each would train alone, and the last one to save would win."""
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"], ["127.0.0.1:3"], ["127.0.0.1:4"]]')
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv(variable, str(hosts) if variable == "MLX_HOSTFILE" else "4")
    with pytest.raises(TrainingError, match="as one of 4, but MLX does not reach the others") as caught:
        distributed.start()
    assert "mlx.launch" in caught.value.hint


def test_one_of_one_is_alone(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert distributed.start().size == 1
