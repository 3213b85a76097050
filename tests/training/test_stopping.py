"""A run that its `on_event` ends: by `Stop`, an error, Ctrl-C in it, from another thread; all is kept, and goes on."""

import signal
import threading

import pytest
from helpers.training_tools import outcome, write_data

import mlx_adapters as ma
from mlx_adapters.optimization.step import TrainStep

LORA = ma.LoraConfig(rank=2, target_modules=("q_proj",))
SETTINGS = ma.TrainConfig(
    iterations=8, batch_size=2, learning_rate=0.01, eval_every=2, save_every=4, report_every=2, mask_prompt=True
)


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model):
    return tiny_model(), write_data(tmp_path_factory.mktemp("stopping") / "data", rows=9, valid=3)


@pytest.fixture
def whole(given, home, tmp_path):
    name = str(tmp_path / "run")
    return outcome(ma.train(*given, name=name, lora=LORA, training=SETTINGS).folder)


def at(iteration, kind, answer):
    """An `on_event` that answers so at the event of this kind."""

    def on_event(event):
        seen = event.done if isinstance(event, ma.Progress) else getattr(event, "iteration", -1)
        return answer(event) if isinstance(event, kind) and seen == iteration else None

    return on_event


def fail(error):
    def answer(event):
        raise error

    return answer


PLACES = [(3, ma.Progress), (2, ma.TrainReport), (2, ma.ValidationReport), (4, ma.CheckpointSaved)]


@pytest.mark.parametrize("answer", [ma.Stop, ma.Stop()], ids=["class", "object"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1].__name__)
def test_a_stop_saves_and_returns_what_there_is(answer, place, given, whole, home):
    run = ma.train(*given, name="run", lora=LORA, training=SETTINGS, on_event=at(*place, lambda _: answer))
    assert run.stopped and run.final.iteration == place[0] and not run.stopped_early
    assert run.validation_losses and ma.load_adapter(run.final).iteration == place[0]
    again = ma.train(name="run", resume=True)
    assert not again.stopped and outcome(again.folder) == whole


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[1].__name__)
def test_an_error_in_it_is_raised_after_saving(error, place, given, whole, home):
    with pytest.raises(type(error)) as caught:
        ma.train(*given, name="run", lora=LORA, training=SETTINGS, on_event=at(*place, fail(error)))
    assert caught.value is error and f"Saved at iteration {place[0]}: resume=True goes on." in error.__notes__
    assert outcome(ma.train(name="run", resume=True).folder) == whole


def test_a_stop_before_the_first_iteration_lets_it_end(given, home):
    run = ma.train(*given, name="run", lora=LORA, training=SETTINGS, on_event=lambda _: ma.Stop)
    assert run.final.iteration == 1 and run.stopped


def test_a_run_in_a_thread_is_stopped_from_outside(given, home):
    enough, begun, runs = threading.Event(), threading.Event(), []

    def on_event(event):
        begun.set()
        return ma.Stop if enough.is_set() else None

    many = ma.TrainConfig(iterations=1_000_000, batch_size=2, eval_every=1_000_000, save_every=1_000_000)
    thread = threading.Thread(
        target=lambda: runs.append(ma.train(*given, name="run", lora=LORA, training=many, on_event=on_event))
    )
    thread.start()
    assert begun.wait(60)
    enough.set()
    thread.join(60)
    assert runs and runs[0].stopped and ma.load_adapter(runs[0].final).iteration == runs[0].final.iteration


def test_a_finished_run_was_not_stopped(given, home):
    run = ma.train(*given, name="run", lora=LORA, training=SETTINGS, on_event=at(8, ma.Progress, lambda _: ma.Stop))
    assert run.final.iteration == 8 and not run.stopped


@pytest.mark.parametrize(("method", "time", "saved"), [("evaluate", 1, None), ("take", 4, 3), ("evaluate", 3, 4)])
def test_a_signal_ends_what_is_computed_in_the_middle(on_cpu, method, time, saved, given, whole, home, monkeypatch):
    """On a CPU, as a GPU's steps are compiled. An iteration or an evaluation is left between two blocks; the run
    goes on as if it had not begun it."""
    original, calls, heard = getattr(TrainStep, method), [], []

    def interrupted(self, *arguments):
        calls.append(method)
        if len(calls) == time and not heard:
            heed = self.heed

            def first_block_is_done():
                heard.append(signal.raise_signal(signal.SIGINT))
                heed()

            self.heed = first_block_is_done
        return original(self, *arguments)

    monkeypatch.setattr(TrainStep, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ma.train(*given, name="run", lora=LORA, training=SETTINGS)
    assert len(heard) == 1, "nothing is computed any more"
    if saved is None:
        assert not ma.list_adapters()
    else:
        assert ma.load_adapter(f"run@{saved}").iteration == saved
        assert outcome(ma.train(name="run", resume=True).folder) == whole
