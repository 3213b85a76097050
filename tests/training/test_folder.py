"""What a run leaves on the disk at every moment: never less than was there before it."""

import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.training_tools import cut_after, outcome, write_data

from mlx_adapters import LoraConfig, TrainConfig, train
from mlx_adapters.adapters.keeping import fill_template, prune, remove, tag, use
from mlx_adapters.errors import AdapterError, ConfigError, FormatError, StorageError, TrainingError
from mlx_adapters.events import CheckpointSaved, ValidationReport
from mlx_adapters.optimization.step import TrainStep
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.sources.registry import list_adapters
from mlx_adapters.storage import files
from mlx_adapters.training import state as states
from mlx_adapters.training.folder import place_of
from mlx_adapters.training.loop import Loop

LORA = LoraConfig(rank=2, scale=2.0, target_modules=("q_proj",))
OTHER = LoraConfig(rank=4, scale=2.0, target_modules=("q_proj",))


def config(**changes):
    return TrainConfig(
        **{"iterations": 6, "batch_size": 3, "learning_rate": 0.01, "eval_every": 2, "save_every": 2} | changes
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("rows") / "data")


@pytest.fixture
def run(tiny_model, data):
    def run(name="run", lora=LORA, **options):
        return train(tiny_model(), data, name=name, lora=lora, training=options.pop("training", config()), **options)

    return run


def there(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


@pytest.fixture(params=["name", "path"])
def place(request, tmp_path):
    return "run" if request.param == "name" else str(tmp_path / "place" / "run")


def test_an_old_adapter_stays_until_the_new_one_has_a_checkpoint(run, place):
    first = run(place)
    before, metadata = outcome(first.folder), files.read_json(first.folder / "adapter_metadata.json")
    beside = there(first.folder.parent)
    diverging = config(learning_rate=1e38, optimizer="sgd", save_every=3)
    with pytest.raises(TrainingError, match="NaN") as caught:
        run(place, OTHER, training=diverging, overwrite=True)
    assert "Nothing was saved yet" in caught.value.hint and "is as it was" in caught.value.hint
    with cut_after(3):
        run(place, OTHER, training=config(eval_every=5, save_every=5), overwrite=True)
    assert outcome(first.folder) == before and there(first.folder.parent) == beside
    assert files.read_json(first.folder / "adapter_metadata.json") == metadata
    with pytest.raises(TrainingError, match="has finished its 6 iterations"):
        train(name=place, resume=True)  # the run that was there before
    assert files.read_json(first.folder / "adapter_metadata.json") == metadata


def test_with_its_first_checkpoint_the_new_one_takes_the_place_whole(run, place):
    folder, seen = run(place).folder, []

    def look(event):
        if isinstance(event, ValidationReport | CheckpointSaved):
            adapter = load_adapter(folder)
            seen.append((type(event).__name__, adapter.config.rank, adapter.metadata["iterations"], there(folder)))
            assert there(folder.parent) == ["run"]

    with cut_after(3):
        run(place, OTHER, training=config(save_every=3, eval_every=3), overwrite=True, on_event=look)
    old, still_old, new = seen
    assert old[:3] == ("ValidationReport", 2, 6) and still_old[:3] == old[:3]
    assert new[:3] == ("CheckpointSaved", 4, 3) and "0000006_adapters.safetensors" not in new[3]
    assert train(name=place, resume=True).final.iteration == 6


def test_a_new_name_is_not_there_before_its_first_checkpoint(run, place):
    names = []
    with cut_after(1):
        run(place, on_event=lambda e: names.append(list_adapters()))
    assert not any(names)
    assert run(place).final.iteration == 6  # and the name is free


def test_only_one_run_at_a_time_begins_a_name(run, place):
    def second(event):
        with pytest.raises(TrainingError, match="'run' is being trained by another process"):
            run(place, overwrite=True)

    with cut_after(1):
        run(place, on_event=second)


def test_a_version_that_is_being_trained_is_taken(run):
    def second(event):
        assert fill_template("{task}_{version}", "run") == "run_v2"

    with cut_after(1):
        run("run_v1", on_event=second)
    assert fill_template("{task}_{version}", "run") == "run_v1"


def test_a_folder_that_somebody_took_away_is_made_anew(run):
    def take_away(event):
        if isinstance(event, CheckpointSaved) and event.iteration == 2:
            shutil.rmtree(Path(event.folder).parent.parent)

    folder = run(on_event=take_away).folder
    assert load_adapter("run").metadata["iterations"] == 6 and states.iterations(folder) == [4, 6]
    assert train(name="run", resume=True, training=config(iterations=8)).final.iteration == 8


def test_a_place_that_takes_nothing_is_told_before_the_model_loads(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_adapters.training.runs.load_model", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        run(str(tmp_path / "file" / "run"))
    closed = tmp_path / "closed"
    closed.mkdir()
    os.chmod(closed, stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid():  # root may write anywhere
        with pytest.raises(StorageError):
            run(str(closed / "run"))


def test_a_full_disk_is_told_before_the_first_step(run, monkeypatch):
    monkeypatch.setattr("mlx_adapters.storage.paths.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(Loop, "run", lambda _: pytest.fail("stepped"))
    with pytest.raises(StorageError, match="but the disk has 1 kB free"):
        run()


def test_room_is_asked_for_a_checkpoint_and_its_copies(run, place, monkeypatch):
    short = config(iterations=2)
    kept = sum(path.stat().st_size for path in run(place, training=short).folder.rglob("*.safetensors"))
    disk = SimpleNamespace(free=kept)
    monkeypatch.setattr("mlx_adapters.storage.paths.shutil.disk_usage", lambda path: disk)
    assert run(place, training=short, overwrite=True).final.iteration == 2
    disk.free = int(0.8 * kept)
    with pytest.raises(StorageError, match="it needs"):
        run(place, training=short, overwrite=True)


def test_a_damaged_recipe_is_told(run):
    path = run().folder / "recipe.json"
    recipe = files.read_json(path)
    changes = [{key: odd} for key in recipe for odd in (None, 5, "x", [], {}, [1], {"x": 1})]
    changes += [{"data": recipe["data"] | {"splits": odd}} for odd in (None, 5, [1], {"train": 5})]
    for change in changes:
        files.write_json(path, recipe | change)
        with pytest.raises(AdapterError):
            train(name="run", resume=True)
        assert files.read_json(path) == recipe | change
    for key in recipe.keys() - {"text", "started", "base_config", "reference", "memory", "lines"}:
        files.write_json(path, {k: v for k, v in recipe.items() if k != key})
        with pytest.raises(FormatError):
            train(name="run", resume=True)


def test_a_resume_changes_only_what_training_knows(run):
    folder = run().folder
    tag("run", ["production"])
    use("run@2")
    path = folder / "adapter_metadata.json"
    files.write_json(path, files.read_json(path) | {"evaluations": [{"iteration": 2}], "note": "theirs"})
    recipe = folder / "recipe.json"
    files.write_json(recipe, files.read_json(recipe) | {"note": "theirs"})
    notes: list[str] = []
    train(name="run", resume=True, training=config(iterations=8, keep=1), on_event=lambda e: notes.append(str(e)))
    assert any("'run' still means its checkpoint 2" in note for note in notes)
    after = files.read_json(path)
    assert after["tags"] == ["production"] and after["evaluations"] == [{"iteration": 2}] and after["note"] == "theirs"
    assert after["iteration"] == 2 and after["chosen_by"] == "use" and after["iterations"] == 8
    assert files.read_json(recipe)["note"] == "theirs"
    assert 2 in states.iterations(folder)  # also what --keep would have taken
    chosen = states.path_of(folder, 2) / "adapters.safetensors"
    assert (folder / "adapters.safetensors").read_bytes() == chosen.read_bytes()
    assert after["sha256"]["adapters.safetensors"] == files.sha256(chosen)


def test_what_lies_among_the_checkpoints_and_is_none_stays(run):
    """Folders of the user's with a number as name, also one that Python reads as a number, and notes in our own."""
    folder = run().folder
    mine = [folder / "checkpoints" / name for name in ("0000007/mine.txt", "1" * 20 + "/mine", "٣/x", "0000002/notes")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    with cut_after(9):
        train(name="run", resume=True, training=config(iterations=10))
    (states.path_of(folder, 8) / "state.json").write_text("damaged")
    train(name="run", resume=True, training=config(iterations=10, keep=1))
    assert states.iterations(folder)[-1] == 10 and 2 not in states.iterations(folder)
    prune("run", keep_best=False)
    assert [path.read_text() for path in mine] == ["mine"] * 4
    assert there(folder / "checkpoints" / "0000002") == ["notes"]


def test_a_resume_that_is_refused_changes_nothing(run):
    folder = run().folder
    before = files.read_json(folder / "adapter_metadata.json")
    for more in ({}, {"training": config(iterations=9, learning_rate=0.5)}):
        with pytest.raises(Exception, match=r"has finished|learning_rate"):
            train(name="run", resume=True, **more)
    assert files.read_json(folder / "adapter_metadata.json") == before


def test_the_bare_name_means_what_its_record_says_when_the_best_is_gone(run, monkeypatch):
    losses = iter([9.0, 1.0, 2.0, 3.0])  # at 0, 2, 4 and 6
    monkeypatch.setattr(TrainStep, "evaluate", lambda *a: (next(losses), {}))
    folder = run().folder
    use("run@4")
    remove("run@2")
    path = folder / "adapter_metadata.json"
    files.write_json(path, {k: v for k, v in files.read_json(path).items() if k != "chosen_by"})
    with cut_after(7):
        train(name="run", resume=True, training=config(iterations=8))
    assert files.read_json(path)["iteration"] == 6
    meant = states.path_of(folder, 6) / "adapters.safetensors"
    assert (folder / "adapters.safetensors").read_bytes() == meant.read_bytes()


def test_a_run_without_checkpoints_is_not_begun_from_other_weights(run):
    run("first")
    folder = run(init_from="first").folder
    files.remove(folder / "checkpoints")
    before = outcome(folder)
    with pytest.raises(FormatError, match="cannot be resumed: it has no checkpoint"):
        train(name="run", resume=True)
    assert outcome(folder) == before


def test_other_versions_of_the_arithmetic_are_told(run):
    folder, notes = run().folder, []
    path = folder / "adapter_metadata.json"
    metadata = files.read_json(path)
    files.write_json(path, metadata | {"versions": metadata["versions"] | {"mlx": "0.0.1", "numpy": "0.0.1"}})
    train(
        name="run", resume=True, training=config(iterations=7), on_event=lambda e: notes.append(getattr(e, "text", ""))
    )
    told = [text for text in notes if "other versions" in text]
    assert len(told) == 1 and "mlx 0.0.1 -> " in told[0] and "numpy" not in told[0]
    assert files.read_json(path)["versions"] == metadata["versions"]


def test_a_run_has_a_name_or_a_place(home, tmp_path):
    assert place_of(tmp_path / "x") == place_of(str(tmp_path / "x")) and place_of("x")[0].kind == "name"
    assert place_of("out/x")[0].kind == "path" and place_of("out/x") == place_of("./out/x")
    for odd in (5, None, ["x"], "x@3", "./x@3"):
        with pytest.raises(ConfigError, match=r" cannot name a training run\.") as error:
            place_of(odd)
        assert "./out" in error.value.hint
