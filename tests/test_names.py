"""What a name means, at every moment: kills, refusals, two processes, disks that know no case."""

import threading
from pathlib import Path

import pytest
from adapters import make_adapter, make_run

import mlx_adapters as ma
from mlx_adapters import files, housekeeping, locks, paths, project, registry
from mlx_adapters.errors import ExistsError, TrainingError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


@pytest.mark.parametrize("keep_last", [2, 3, 4, 5, 6, 100])
def test_prune_that_keeps_more_than_there_is_removes_nothing_it_should_keep(base, keep_last):
    make_run(base, "sql")
    removed = housekeeping.prune("sql", keep_last=keep_last, keep_best=False).iterations
    assert removed == ((100,) if keep_last == 2 else ())  # 200 is in use


def test_a_killed_init_can_be_repeated(tmp_path):
    whole = tmp_path / "whole"
    names = project.start_project(whole)
    for made in range(len(names) + 1):
        cut = tmp_path / f"cut-{made}"
        for name in names[:made]:
            files.write_text(cut / name, project.FILES[name])
        assert project.start_project(cut) == names
        assert {p.name: p.read_text() for p in cut.iterdir()} == {p.name: p.read_text() for p in whole.iterdir()}
    (cut / "train.yaml").write_text("base: mine\n")
    (cut / ".gitignore").unlink()
    with pytest.raises(ExistsError, match=r"train\.yaml"):
        project.start_project(cut)
    assert not (cut / ".gitignore").exists() and (cut / "train.yaml").read_text() == "base: mine\n"


# -- locks ------------------------------------------------------------------------------------------------


def test_a_place_has_one_lock_however_it_is_spelled(tmp_path, home):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    spellings = ("real/x", "link/x", "real/X", "real/../link/x")
    names = {locks.place_name(tmp_path / spelling).casefold() for spelling in spellings}
    assert len(names) == 1
    assert locks.place_name(tmp_path / "real/y") not in names


def test_the_same_place_is_told_by_the_disk(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private/base").mkdir()
    (tmp_path / "tmp").symlink_to("private")
    (tmp_path / "private/BASE").symlink_to("base")  # as a disk that knows no case would find it
    assert paths.same_place(tmp_path / "tmp/base", tmp_path / "private/base")
    assert paths.same_place(tmp_path / "private/BASE", tmp_path / "private/base")
    assert paths.same_place(tmp_path / "tmp/not-there", tmp_path / "private/not-there")
    assert not paths.same_place(tmp_path / "private", tmp_path / "private/base")
    assert not paths.same_place(tmp_path / "a", tmp_path / "b") and not paths.same_place("a\0", "b")


def test_a_name_that_is_being_trained_is_held_before_its_folder_is_there(base, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_adapters.training.runs.load_model", None)
    data = tmp_path / "data"
    for split in ("train", "valid"):
        files.write_text(data / f"{split}.jsonl", '{"prompt": "one", "completion": "two"}\n' * 8)
    with registry.training_lock(registry.adapter_folder("new")):
        for name in ("new", "NEW"):
            with pytest.raises(TrainingError, match="being trained"):
                registry.register(make_adapter(base), name, overwrite=True)
            with pytest.raises(TrainingError, match="being trained"):
                ma.train(base, data, name=name, overwrite=True)
        assert registry.names() == []
    registry.register(make_adapter(base), "new")


def test_a_run_waits_for_a_short_change(base):
    order, begun = [], threading.Event()

    def change():
        with registry.changing("sql"):
            begun.set()
            threading.Event().wait(0.2)
            order.append("changed")

    thread = threading.Thread(target=change)
    thread.start()
    begun.wait()
    with registry.training_lock(registry.adapter_folder("sql")):
        order.append("training")
    thread.join()
    assert order == ["changed", "training"]
