"""Two processes under `mlx.launch` (ring, CPU) train as one does; a lost one leaves a whole checkpoint."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.training_tools import outcome, own_port, write_data, write_preferences

from mlx_adapters import LoraConfig, TrainConfig, train
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.data.batches import epoch_batches
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import TrainingError
from mlx_adapters.optimization.distributed import LostPeerError, World
from mlx_adapters.optimization.feed import make_feed
from mlx_adapters.optimization.step import TrainStep
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage import files, tensor_files
from mlx_adapters.training import state as states
from mlx_adapters.training.folder import RunFolder, place_of

TESTS = Path(__file__).parents[1]
LORA = LoraConfig(rank=4, scale=2.0, target_modules=("q_proj", "v_proj"))
TRAINING = TrainConfig(
    iterations=8,
    batch_size=4,
    learning_rate=0.01,
    mask_prompt=True,
    eval_every=4,
    save_every=3,
    report_every=2,
    grad_accumulation=2,
)


PREFERENCES = {"dpo": "pairs", "orpo": "pairs", "kto": "labeled"}


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """What two processes said, by what it is of, and the home and data they used: a run, the same name again, one for
    each objective, all of one launch; a run whose rank 1 dies after five iterations, and its resumption."""
    work = tmp_path_factory.mktemp("two")
    data = write_data(work / "data", rows=13, valid=5)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OPENBLAS_NUM_THREADS": "1",
        "MLX_ADAPTERS_HOME": str(work / "home"),
    }

    def request(name: str, die_at: int | None = None, **options) -> dict:
        return {
            "base": str(tiny_model()),
            "data": str(data),
            "name": name,
            "lora": to_mapping(LORA),
            "training": to_mapping(TRAINING),
            "die_at": die_at,
            **options,
        }

    def launch(**requests: dict) -> dict[str, str]:
        (work / "requests.json").write_text(json.dumps(requests))
        script = [sys.executable, str(TESTS / "helpers" / "train_two.py"), str(work / "requests.json")]
        program = str(Path(sys.executable).parent / "mlx.launch")
        command = [program, "-n", "2", "--backend", "ring", "-p", str(own_port()), "--", *script]
        beside = {} if "lost" in requests else {"NCCL_HOST_IP": "127.0.0.1"}  # connections, as where NCCL sums
        done = subprocess.run(command, env=environment | beside, capture_output=True, text=True, timeout=900)
        lines = (done.stdout or done.stderr).splitlines()
        return {of: "\n".join(line for line in lines if f"{of}: " in line) or done.stderr for of in requests}

    wanted = {"two": request("two"), "again": request("two")}
    for objective, rows in PREFERENCES.items():
        where = write_preferences(work / objective, labeled=rows == "labeled")
        wanted[objective] = request(objective, data=str(where), objective=objective)
    said = launch(**wanted) | launch(lost=request("lost", die_at=5))
    newest = states.newest(work / "home" / "adapters" / "lost")[0]
    assert newest is not None, said
    said |= launch(resumed=request("lost", resume=True))
    return said, work / "home" / "adapters", data, newest.state.iteration


def test_two_processes_train_as_one(runs, tiny_model):
    said, adapters, data, _ = runs
    assert said["two"].count("finished") == 2
    one = train(tiny_model(), data, name="one", lora=LORA, training=TRAINING)
    two = files.read_json(adapters / "two" / "adapter_metadata.json")
    assert np.allclose(one.train_losses, two["train_losses"], rtol=1e-4)
    assert np.allclose(one.validation_losses, two["validation_losses"], rtol=1e-4)
    assert one.trained_tokens == two["trained_tokens"]
    a, b = (tensor_files.read_safetensors(folder / "adapters.safetensors") for folder in (one.folder, adapters / "two"))
    assert all(np.allclose(a[n], b[n], atol=1e-4) for n in a)


@pytest.mark.parametrize("objective", PREFERENCES)
def test_two_processes_learn_preferences_as_one(objective, runs, tiny_model):
    said, adapters, data, _ = runs
    assert said[objective].count("finished") == 2
    where = data.parent / objective
    one = train(tiny_model(), where, name="one", lora=LORA, training=TRAINING, objective=objective)
    two = files.read_json(adapters / objective / "adapter_metadata.json")
    for name in ("train_losses", "validation_losses"):
        assert np.allclose(getattr(one, name), two[name], rtol=1e-4)
    mine = files.read_json(one.folder / "adapter_metadata.json")
    for name in ("train_figures", "validation_figures"):
        for (i, ours), (j, theirs) in zip(mine[name], two[name], strict=True):
            assert i == j and ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert one.trained_tokens == two["trained_tokens"]
    a, b = (tensor_files.read_safetensors(f / "adapters.safetensors") for f in (one.folder, adapters / objective))
    assert all(np.allclose(a[n], b[n], atol=1e-4) for n in a)


def test_a_lost_process_ends_the_run_with_a_whole_checkpoint_that_resumes(runs):
    said, adapters, _, saved = runs
    assert "finished" not in said["lost"] and saved == 5
    assert "Another process of this run was lost after iteration 5" in said["lost"]
    assert said["resumed"].count("finished") == 2
    a, b = (tensor_files.read_safetensors(adapters / n / "0000008_adapters.safetensors") for n in ("two", "lost"))
    assert all(np.array_equal(a[n], b[n]) for n in a)


def test_a_sum_takes_as_much_memory_as_its_rehearsal(tmp_path):
    """Beside the arrays their copy in one message, and the sum, which stays."""
    script = tmp_path / "sums.py"
    script.write_text(
        "from mlx_adapters.optimization.distributed import start\n"
        "from mlx_adapters.optimization.probe import Rehearsal\n"
        "from mlx_adapters.system.door import mx\n"
        "for world in (Rehearsal(), start()):\n"
        "    arrays = {str(i): mx.full((256, 1024), float(i)) for i in range(4)}\n"
        "    mx.eval(arrays)\n"
        "    mx.synchronize()\n"  # a GPU gives back what it worked in a moment later
        "    mx.reset_peak_memory()\n"
        "    before = mx.get_active_memory()\n"
        "    sums = world.sum_all(arrays)\n"
        "    mx.eval(sums)\n"
        "    mx.synchronize()\n"
        "    print('bytes', mx.get_peak_memory() - before, mx.get_active_memory() - before)\n"
        "    del sums\n"
    )
    program = str(Path(sys.executable).parent / "mlx.launch")
    command = [program, "-n", "2", "--backend", "ring", "-p", str(own_port()), "--", sys.executable, str(script)]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    told = [line.split("bytes ")[1] for line in done.stdout.splitlines() if "bytes " in line]
    megabytes = [tuple(round(int(number) / 4 / 2**20, 1) for number in line.split()) for line in told]
    assert sorted(megabytes) == [(2, 1)] * 4, done.stderr


def test_what_one_process_refuses_all_refuse(runs):
    assert runs[0]["again"].count("already exists") == 2


def test_each_row_goes_to_one_process():
    rows = [Row(np.arange(n), np.arange(n) > 0, str(n), n) for n in range(3, 20)]
    config = TrainConfig(batch_size=4)
    feeds = [make_feed(rows, config, gpu=False, world=World(rank, 3)) for rank in range(3)]
    for indexes in epoch_batches([len(r.tokens) for r in rows], 4, 0, 0):
        shares = [feed.batch(indexes) for feed in feeds]
        named = [where for share in shares if share.trained_tokens for where in share.where]
        assert sorted(named) == sorted(rows[i].where for i in indexes)
        assert sum(s.trained_tokens for s in shares) == sum(rows[i].trained_tokens for i in indexes)


@pytest.mark.parametrize("at", [0, 2])
def test_one_that_is_lost_while_the_run_validates_costs_no_step(at, tiny_model, tmp_path, monkeypatch):
    """Before the first step, or after one that nothing has saved yet; a resume ends as a whole run."""
    data, training = write_data(tmp_path / "data", rows=6), TrainConfig(iterations=4, batch_size=2, eval_every=2)
    evaluate, done = TrainStep.evaluate, iter(range(0, 100, 2))

    def lost(step, *args):
        if next(done) == at:
            raise LostPeerError("gone")
        return evaluate(step, *args)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=f"lost after iteration {at}") as caught:
        patch.setattr(TrainStep, "evaluate", lost)
        train(tiny_model(), data, name="lost", lora=LORA, training=training)
    assert caught.value.hint == ("Go on with: mlx-adapters train --resume lost" if at else "Nothing was saved yet.")
    if not at:
        assert not adapter_folder("lost").exists()
        return
    train(name="lost", resume=True)
    train(tiny_model(), data, name="whole", lora=LORA, training=training)
    a, b = (outcome(adapter_folder(name)) for name in ("lost", "whole"))
    assert a["adapters.safetensors"] == b["adapters.safetensors"]
    assert (
        files.read_json(adapter_folder("lost") / "adapter_metadata.json")["validation_losses"]
        == (files.read_json(adapter_folder("whole") / "adapter_metadata.json")["validation_losses"])
    )


def test_a_process_that_writes_nothing_promises_no_checkpoint(tmp_path):
    with contextlib.ExitStack() as held:
        folder = RunFolder(*place_of(str(tmp_path / "x")), {}, held, writes=False)
        assert folder.how_to_resume().startswith("If the first process has saved it, go on with:")
