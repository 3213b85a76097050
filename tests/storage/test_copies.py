"""Two files of ours never are one: who writes in place, as mlx-lm's trainer does, changes that file alone."""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.adapters import make_adapter, make_run
from helpers.training_tools import outcome, write_data
from mlx_lm import load
from mlx_lm.lora import CONFIG_DEFAULTS, train_model
from mlx_lm.tuner.datasets import CompletionsDataset

import mlx_adapters as ma
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.storage import files
from mlx_adapters.storage.tensor_names import METADATA_FILE
from mlx_adapters.training import state as states

LORA = ma.LoraConfig(rank=4, scale=3.0, target_modules=("q_proj",))
SETTINGS = ma.TrainConfig(iterations=4, save_every=2, eval_every=2, batch_size=2, report_every=2)


def weights_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*adapters.safetensors")}


def train_with_mlx_lm(base: Path, folder: Path) -> None:
    """What `mlx_lm.lora --adapter-path FOLDER --iters 3 --save-every 2` does, with its own settings for layers."""
    arguments = SimpleNamespace(
        **CONFIG_DEFAULTS
        | {
            "adapter_path": str(folder),
            "num_layers": 1,
            "iters": 3,
            "save_every": 2,
            "batch_size": 2,
            "val_batches": 1,
        }
    )
    model, tokenizer = load(str(base))
    rows = [{"prompt": "List", "completion": f"SELECT {i}"} for i in range(4)]
    rows = CompletionsDataset(rows, tokenizer, "prompt", "completion", mask_prompt=False)
    train_model(arguments, model, rows, rows)


def test_mlx_lms_trainer_in_a_runs_folder_leaves_the_checkpoints(tiny_model, tmp_path):
    data, told = write_data(tmp_path / "data"), []
    whole, run = (ma.train(tiny_model(), data, name=name, lora=LORA, training=SETTINGS) for name in ("whole", "run"))
    before = weights_in(run.folder)
    train_with_mlx_lm(tiny_model(), run.folder)
    after = weights_in(run.folder)
    assert {name for name in before if after[name] != before[name]} == {
        "adapters.safetensors",
        "0000002_adapters.safetensors",
    }
    assert len(ma.verify("run").problems) > 0 and states.newest(run.folder)[1] == []
    longer = replace(SETTINGS, iterations=6)
    for name in ("whole", "run"):
        ma.train(name=name, resume=True, training=longer, on_event=told.append)
    ended = [outcome(run.folder) for run in (whole, run)]
    for one in ended:
        del one[METADATA_FILE]["name"]
    assert ended[0] == ended[1] and ma.verify("run").sound


def test_verify_tells_of_a_checkpoints_copy_that_was_written_over(tiny_model, tmp_path):
    run = ma.train(tiny_model(), write_data(tmp_path / "data"), name="run", lora=LORA, training=SETTINGS)
    written_in_place(run.folder / "0000002_adapters.safetensors")
    (problem,) = ma.verify("run").problems
    assert "run/0000002_adapters.safetensors' is not the file that was recorded" in problem.detail
    assert "as it was saved it is in 'checkpoints/0000002/adapters.safetensors'" in problem.detail


def test_a_checkpoint_that_is_damaged_spoils_no_copy_of_it(tiny_model, tmp_path):
    run = ma.train(tiny_model(), write_data(tmp_path / "data"), name="run", lora=LORA, training=SETTINGS)
    before = ma.load_adapter("run@2").fingerprint
    written_in_place(run.folder / "checkpoints" / "0000002" / "adapters.safetensors")
    ma.train(name="run", resume=True, training=replace(SETTINGS, iterations=6))
    assert ma.load_adapter("run@2").fingerprint == before


def written_in_place(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(bytes(4))


def test_what_use_chose_is_no_checkpoint(tiny_model):
    folder = make_run(tiny_model("llama"), "sql")
    ma.use("sql@100")
    chosen = ma.load_adapter("sql@100").fingerprint
    written_in_place(folder / "adapters.safetensors")
    assert ma.load_adapter("sql@100").fingerprint == chosen != ma.load_adapter("sql").fingerprint
    assert ma.use("sql@100").iteration == 100 and ma.load_adapter("sql").fingerprint == chosen
    written_in_place(folder / "0000100_adapters.safetensors")
    assert ma.load_adapter("sql").fingerprint == chosen != ma.load_adapter("sql@100").fingerprint


def test_the_hubs_cache_is_not_the_adapters_file(tiny_model, tmp_path):
    made = write_adapter(make_adapter(tiny_model("llama")), tmp_path / "made")
    snapshot, blobs = tmp_path / "models--user--sql" / "snapshots" / "ab", tmp_path / "models--user--sql" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in made.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    written_in_place(ma.add(snapshot, name="sql").folder / "adapters.safetensors")
    assert (blobs / "adapters.safetensors").read_bytes() == (made / "adapters.safetensors").read_bytes()


def test_a_copy_has_the_originals_time_and_nothing_else_of_it(tmp_path):
    """By its size and time is known which checkpoint it is of."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"weights")
    os.utime(source, ns=(5, 1_234_567_891))
    files.copy_file(source, target)
    assert target.read_bytes() == b"weights" and target.stat().st_mtime_ns == 1_234_567_891
    assert not target.samefile(source) and source.stat().st_nlink == target.stat().st_nlink == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="Linux's way")
@pytest.mark.parametrize("refused", [None, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY])
def test_on_linux_a_copy_shares_blocks_where_the_disk_can(tmp_path, monkeypatch, refused):
    """FICLONE, of linux/fs.h, takes the descriptor of the original."""
    asked = []

    def ioctl(out, request, original):
        asked.append(request)
        if refused:
            raise OSError(refused, os.strerror(refused))
        os.pwrite(out if isinstance(out, int) else out.fileno(), os.pread(original, 100, 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    (tmp_path / "source").write_bytes(b"weights")
    with monkeypatch.context() as patch:
        if not refused:
            patch.setattr(shutil, "copyfileobj", None)
        files.copy_file(tmp_path / "source", tmp_path / "target")
    assert asked == [0x40049409] and (tmp_path / "target").read_bytes() == b"weights"


@pytest.fixture
def umask():
    old = os.umask(0o077)
    yield
    os.umask(old)


@pytest.mark.parametrize("can", [True, False])
def test_on_macos_a_copy_is_a_clone_where_the_disk_can(tmp_path, monkeypatch, umask, can):
    """`clonefile(source, target, flags)`, of sys/clonefile.h, makes the target, with the original's rights and time."""
    asked = []

    def clonefile(source, target, flags):
        asked.append(flags)
        assert not os.path.lexists(target)
        return shutil.copy2(source, target) and 0 if can else -1

    (tmp_path / "source").write_bytes(b"weights")
    os.chmod(tmp_path / "source", 0o644)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(clonefile=clonefile))
    with monkeypatch.context() as patch:
        if can:
            patch.setattr(shutil, "copyfileobj", None)
        files.copy_file(tmp_path / "source", tmp_path / "target")
    assert asked == [0] and (tmp_path / "target").read_bytes() == b"weights"
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_a_run_whose_files_all_have_one_time_is_derived_anew(tiny_model, tmp_path):
    """As an archive that keeps no times leaves it: size and time tell no checkpoint from another."""
    run = ma.train(tiny_model(), write_data(tmp_path / "data"), name="run", lora=LORA, training=SETTINGS)
    for meant in (2, 4, 2):
        for path in run.folder.rglob("*adapters.safetensors"):
            os.utime(path, (1_700_000_000, 1_700_000_000))
        states.copy_weights(run.folder, meant)
        saved = states.path_of(run.folder, meant) / "adapters.safetensors"
        assert (run.folder / "adapters.safetensors").read_bytes() == saved.read_bytes()


def test_of_several_checkpoints_of_one_time_the_bytes_tell(tiny_model, monkeypatch):
    """As an archive that keeps whole seconds leaves them; a kill comes between the weights and the record."""
    folder = make_run(tiny_model("llama"), "sql")
    for path in folder.glob("*adapters.safetensors"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    files.copy_file(folder / "0000100_adapters.safetensors", folder / "adapters.safetensors")
    assert ma.load_adapter("sql").metadata["iteration"] == 100
    assert {entry.iteration for entry in ma.list_adapters()} == {100}
