"""What goes wrong without stopping a run is told: at once, also where nobody gave an `on_event`, and in the result."""

import logging
import sys
import types

import pytest
from helpers.adapters import make_adapter
from helpers.training_tools import write_data

import mlx_adapters as ma
from mlx_adapters.calibration import strategy
from mlx_adapters.errors import FormatError
from mlx_adapters.events import Note, Progress, ignore

TINY = ma.LoraConfig(rank=2, num_layers=1)
SHORT = ma.TrainConfig(iterations=2, batch_size=2, eval_every=1, max_seq_length=32, mask_prompt=True)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def train(tiny_model, data, **more):
    return ma.train(tiny_model("llama"), data, name="a", lora=TINY, training=SHORT, **more)


def test_dropped_rows_stand_in_the_result_and_in_the_log(tiny_model, data, caplog):
    run = train(tiny_model, data)
    dropped = next(note for note in run.notes if "nothing to train within max_seq_length 32" in note)
    assert f"{len(run.notes)} warnings in notes" in repr(run) and dropped in run._repr_html_()
    logged = [record for record in caplog.records if record.name.startswith("mlx_adapters")]
    assert [record.getMessage() for record in logged] == list(run.notes)
    assert {record.levelno for record in logged} == {logging.WARNING}


def test_who_listens_is_told_and_the_log_is_quiet(tiny_model, data, caplog):
    events = []
    run = train(tiny_model, data, on_event=events.append)
    assert [e.text for e in events if isinstance(e, Note) and e.level == "warning"] == list(run.notes) != []
    assert not caplog.records
    again = ma.train(name="a", resume=True, training=ma.TrainConfig(**vars(SHORT) | {"iterations": 4}), on_event=ignore)
    assert set(again.notes) >= {note for note in run.notes if "cut at" in note} and not caplog.records


@pytest.mark.parametrize("notebook", [False, True])
def test_the_progress_bar_writes_notes(notebook, monkeypatch, capsys):
    """Beside the bars: in a notebook on stdout, where stderr is red."""
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    on_event = ma.progress_bar()
    for event in (
        Progress("train", 1, 2),
        Note("41 of 50 rows dropped.", "warning"),
        Note("So be it."),
        Progress("train", 2, 2),
    ):
        on_event(event)
    out, err = capsys.readouterr()
    told = out if notebook else err
    assert "Warning: 41 of 50 rows dropped.\n" in told and "So be it.\n" in told and "Warning: So" not in told
    assert "41 of" not in (err if notebook else out)


def test_a_fuse_without_a_check_says_so_in_its_result(tiny_model, tmp_path, monkeypatch, caplog):
    def none(*arguments):
        raise FormatError("There is no text.")

    monkeypatch.setattr(strategy, "choose_text", none)
    folder = tiny_model("llama")
    result = ma.fuse(folder, make_adapter(folder), tmp_path / "out", quantization=4)
    assert "No calibration and no check: There is no text" in result.notes and result.fidelity is None
    assert "No calibration and no check" in caplog.text
