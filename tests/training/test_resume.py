"""A run that was stopped ends, to the bit, as one that never was."""

import json
import os
import signal

import mlx.core as mx
import pytest
from helpers.training_tools import cut_after, outcome, write_data

from mlx_adapters import LoraConfig, TrainConfig, train
from mlx_adapters.errors import ConfigError, ExistsError, FormatError, IncompatibleError, NotFoundError, TrainingError
from mlx_adapters.events import CheckpointSaved, Note
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage import files, locks, paths, temporaries, tensor_files
from mlx_adapters.training import state as states

LORA = LoraConfig(rank=4, scale=2.0, dropout=0.1, target_modules=("q_proj", "v_proj"))
SETTINGS = {
    "iterations": 11,
    "batch_size": 3,
    "learning_rate": 0.01,
    "mask_prompt": True,
    "eval_every": 4,
    "save_every": 3,
    "report_every": 2,
    "seed": 7,
    "grad_accumulation": 2,
    "schedule": "cosine",
    "warmup": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("rows") / "data")


def config(**changes):
    return TrainConfig(**SETTINGS | changes)


def test_dropout_counts_in_the_comparison(tiny_model, data):
    """Without the random state the runs would part: another seed gives other weights."""
    a = train(tiny_model(), data, name="a", lora=LORA, training=config())
    b = train(tiny_model(), data, name="b", lora=LORA, training=config(seed=8))
    c = train(tiny_model(), data, name="c", lora=LORA, training=config())
    weights = [tensor_files.read_safetensors(run.folder / "adapters.safetensors") for run in (a, b, c)]
    assert not all(mx.array_equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert all(mx.array_equal(weights[0][n], weights[2][n]) for n in weights[0])


@pytest.fixture
def stopped(tiny_model, data):
    with cut_after(8):
        train(tiny_model(), data, name="run", lora=LORA, training=config())
    return adapter_folder("run")


def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(stopped, tiny_model, data):
    train(tiny_model(), data, name="whole", lora=LORA, training=config())
    newest = states.path_of(stopped, max(states.iterations(stopped))) / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.unlink()
    newest.write_bytes(bytes(content))
    notes = []
    train(name="run", resume=True, on_event=lambda e: isinstance(e, Note) and notes.append(e.text))
    assert any("optimizer.safetensors' is damaged" in text and "before it" in text for text in notes)
    resumed = outcome(stopped)
    resumed["adapter_metadata.json"]["name"] = "whole"
    assert resumed == outcome(adapter_folder("whole"))


def test_a_half_written_checkpoint_is_ignored_and_reported(stopped):
    half = stopped / "checkpoints" / f"{paths.TEMPORARY_PREFIX}abc"
    (half / "new").mkdir(parents=True)
    (half / temporaries.MARKER).touch()
    (half / "new" / "adapters.safetensors").write_bytes(b"half")
    notes = []
    run = train(name="run", resume=True, on_event=lambda e: isinstance(e, Note) and notes.append(e.text))
    assert run.final.iteration == 11 and "A half-written checkpoint was removed" in notes[0]
    assert not half.exists()


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(stopped):
    for path in (stopped / "checkpoints").glob("*/optimizer.safetensors"):
        path.unlink()
        path.write_bytes(b"half")
    before = outcome(stopped)
    with pytest.raises(FormatError, match="No checkpoint of 'run' is whole") as caught:
        train(name="run", resume=True)
    assert "--init-from run" in caught.value.hint and outcome(stopped) == before


def test_resume_of_finished_missing_newer_and_running(stopped):
    for given in ({"init_from": "run"}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="goes on as it is"):
            train(name="run", resume=True, **given)
    with pytest.raises(NotFoundError, match="'other' cannot be resumed"):
        train(name="other", resume=True)
    with locks.lock_file(stopped), pytest.raises(TrainingError, match="by another process"):
        train(name="run", resume=True)
    with pytest.raises(TrainingError, match=r"has done \d+ iterations already") as caught:
        train(name="run", resume=True, training=config(iterations=4))
    assert "or without for all 11." in caught.value.hint
    train(name="run", resume=True)
    with pytest.raises(TrainingError, match="has finished its 11 iterations") as caught:
        train(name="run", resume=True)
    assert "--iterations above 11" in caught.value.hint
    with pytest.raises(TrainingError, match="has finished its 11 iterations"):
        train(name="run", resume=True, training=config(iterations=4))
    path = states.path_of(stopped, 11) / "state.json"
    files.write_json(path, files.read_json(path) | {"version": 2})
    with pytest.raises(FormatError, match="newer version"):
        train(name="run", resume=True)


def test_more_iterations_go_on(stopped):
    train(name="run", resume=True)
    run = train(name="run", resume=True, training=config(iterations=14))
    assert run.final.iteration == 14
    assert files.read_json(stopped / "recipe.json")["training"]["iterations"] == 14


def test_what_changed_is_named(stopped, tiny_model, data, tmp_path):
    with pytest.raises(IncompatibleError, match=r"learning_rate \(0.01 -> 0.02\)"):
        train(name="run", resume=True, training=config(learning_rate=0.02))
    with pytest.raises(IncompatibleError, match=r"scale \(2.0 -> 3.0\)"):
        train(
            name="run", resume=True, lora=LoraConfig(rank=4, scale=3.0, dropout=0.1, target_modules=LORA.target_modules)
        )
    with pytest.raises(IncompatibleError, match="the base model"):
        train(tiny_model("llama", seed=1), name="run", resume=True)
    with pytest.raises(IncompatibleError, match=r"the data \(train: 13 -> 9 rows\)"):
        train(None, write_data(tmp_path / "other", rows=9), name="run", resume=True)


def test_a_name_that_exists_is_not_overwritten(stopped, tiny_model, data):
    before = outcome(stopped)
    with pytest.raises(ExistsError):
        train(tiny_model(), data, name="run", lora=LORA, training=config())
    assert outcome(stopped) == before


def test_keep_never_removes_the_best_or_the_last(tiny_model, data):
    settings = config(iterations=12, keep=1, save_every=2, eval_every=2, learning_rate=0.5, optimizer="sgd")
    seen = []
    run = train(
        tiny_model(),
        data,
        name="run",
        lora=LORA,
        training=settings,
        on_event=lambda e: isinstance(e, CheckpointSaved) and seen.append(e.iteration),
    )
    assert seen == [2, 4, 6, 8, 10, 12]
    assert set(states.iterations(run.folder)) == {run.best.iteration, 12}
    best = run.folder / f"{run.best.iteration:07d}_adapters.safetensors"
    assert best.read_bytes() == (run.folder / "adapters.safetensors").read_bytes()


def send(number, at):
    def on_event(event):
        if type(event).__name__ == "Progress" and event.done == at:
            os.kill(os.getpid(), number)

    return on_event


def test_nohup_ignores_a_closed_terminal(tiny_model, data):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run = train(tiny_model(), data, name="run", lora=LORA, training=config(), on_event=send(signal.SIGHUP, 4))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run.final.iteration == 11


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def number(request):
    before = signal.signal(request.param, signal.SIG_DFL)  # whatever the tests were started under
    yield request.param
    signal.signal(request.param, before)


def test_interrupts_save_and_leave_no_trace(number, tiny_model, data):
    notes = []
    train(tiny_model(), data, name="whole", lora=LORA, training=config())
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_model(),
            data,
            name="run",
            lora=LORA,
            training=config(),
            on_event=lambda e: (send(number, 4)(e), notes.append(str(e))),
        )
    assert max(states.iterations(adapter_folder("run"))) in (4, 5)
    assert any("mlx-adapters train --resume run" in note for note in notes)
    train(name="run", resume=True)
    resumed = outcome(adapter_folder("run"))
    resumed["adapter_metadata.json"]["name"] = "whole"
    assert json.dumps(sorted(resumed)) == json.dumps(sorted(outcome(adapter_folder("whole"))))
    assert resumed == outcome(adapter_folder("whole"))


def test_compiled_as_on_a_gpu_it_resumes_to_the_bit_too(tiny_model, data, monkeypatch):
    """On a GPU loss and update are compiled; here the compiled functions run on the CPU."""
    from mlx_adapters.optimization import optimizers

    monkeypatch.setattr(optimizers, "on_gpu", lambda: True)
    settings = config(grad_checkpoint=True, iterations=7)
    plain_losses = train(tiny_model(), data, name="whole", lora=LORA, training=settings).train_losses
    with cut_after(4):
        train(tiny_model(), data, name="run", lora=LORA, training=settings)
    assert train(name="run", resume=True).train_losses == plain_losses
    resumed = outcome(adapter_folder("run"))
    resumed["adapter_metadata.json"]["name"] = "whole"
    assert resumed == outcome(adapter_folder("whole"))


def test_a_step_that_fails_while_it_is_traced_leaves_what_can_be_computed_with(monkeypatch):
    """MLX leaves its tracers in the random state and in an optimizer's: whatever came next failed."""
    from mlx_adapters.optimization import optimizers

    monkeypatch.setattr(optimizers, "on_gpu", lambda: True)
    mx.random.seed(5)
    expected, state = mx.random.normal((3,)), {"v": {"a": mx.ones(2)}}

    def step(x: mx.array) -> mx.array:
        state["v"]["a"] = state["v"]["a"] + mx.random.normal(x.shape)
        raise KeyboardInterrupt

    mx.random.seed(5)
    with pytest.raises(KeyboardInterrupt):
        optimizers.compiled(step, [mx.random.state, state])(mx.zeros(2))
    assert mx.array_equal(mx.random.normal((3,)), expected) and state["v"]["a"].tolist() == [1, 1]
