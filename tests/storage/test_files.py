"""What is written is whole or absent, replaces nothing of anybody else's, and leaves nothing lying about."""

import errno
import fcntl
import logging
import os
import stat
import time
from pathlib import Path

import pytest

from mlx_adapters.errors import ExistsError, StorageError
from mlx_adapters.storage import files, locks, paths, replacing, temporaries
from mlx_adapters.storage.replacing import Output

OURS = Output("config.json", r"weights\.bin|sub/\d+")
PREFIX = paths.TEMPORARY_PREFIX


def make(folder: Path, *names: str, text: str = "x") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def age(path: Path, seconds: float = 3600) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


# -- drafts ------------------------------------------------------------------------------------------


def test_only_what_proves_to_be_ours_is_swept(tmp_path):
    """Name, marker, age, no lock: what lacks one of them stays."""
    make(tmp_path, ".tmp-notes/thesis.txt", f"{PREFIX}notes/thesis.txt", text="mine")
    (tmp_path / f"{PREFIX}file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / temporaries.MARKER).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
    for name in ("dead", "young", "busy"):
        make(tmp_path / f"{PREFIX}{name}", "new/model", temporaries.MARKER)
    (tmp_path / f"{PREFIX}empty").mkdir()
    for path in tmp_path.iterdir():
        age(path)
    age(tmp_path / f"{PREFIX}young", 0)
    with locks.lock_file(tmp_path / f"{PREFIX}busy" / temporaries.MARKER):
        assert temporaries.sweep(tmp_path) == 2
    assert {path.name.removeprefix(PREFIX) for path in tmp_path.iterdir()} == {
        ".tmp-notes",
        "notes",
        "file",
        "elsewhere",
        "link",
        "young",
        "busy",
    }
    assert (tmp_path / ".tmp-notes" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / f"{PREFIX}notes" / "thesis.txt").read_text() == "mine"


def test_every_writer_uses_a_draft_that_a_later_one_sweeps(tmp_path, monkeypatch):
    """What a kill leaves of any of them carries the marker, and goes with the next write beside it."""
    (tmp_path / "source").write_text("x")
    (tmp_path / "old").mkdir()
    writers = [
        lambda: files.write_text(tmp_path / "a", "x"),
        lambda: files.copy_file(tmp_path / "source", tmp_path / "b"),
        lambda: files.remove(tmp_path / "old"),
        lambda: files.atomic_folder(tmp_path / "c").__enter__(),
    ]
    for number, write in enumerate(writers, 1):
        with monkeypatch.context() as killed:
            killed.setattr(temporaries, "_discard", lambda folder: None)
            held = write()
        left = list(tmp_path.glob(f"{PREFIX}*"))
        assert len(left) == 1 and (left[0] / temporaries.MARKER).is_file(), number
        del held
        age(left[0])
        files.write_text(tmp_path / "again", "y")
        assert not list(tmp_path.glob(f"{PREFIX}*")), number


def test_the_marker_goes_last(tmp_path, monkeypatch):
    folder = make(tmp_path / f"{PREFIX}x", "new/a", "zzz", temporaries.MARKER)
    gone, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **k: (gone.append(self.name), unlink(self, **k))[0])
    temporaries._discard(folder)
    assert gone[-1] == temporaries.MARKER and not folder.exists()


def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    """On a disk that cannot exchange two folders in one step, the next writer puts the old one back."""
    monkeypatch.setattr(temporaries, "exchange", lambda one, other: False)
    target, rename, calls = make(tmp_path / "out", "config.json", text="old"), os.rename, []

    def killed(source, to):
        calls.append(to)
        if len(calls) == 3:  # new onto old is refused, old goes aside, and then
            raise KeyboardInterrupt
        rename(source, to)

    monkeypatch.setattr(temporaries, "_discard", lambda folder: None)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(target, True, OURS) as folder:
        make(folder, "config.json", text="new")
    monkeypatch.undo()
    assert not target.exists()
    age(next(tmp_path.glob(f"{PREFIX}*")))
    files.write_text(tmp_path / "other", "x")
    assert (target / "config.json").read_text() == "old"
    assert everything(tmp_path) == {"out", "out/config.json", "other"}


def test_without_exchange_a_folder_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(temporaries, "exchange", lambda one, other: False)
    target = make(tmp_path / "out", "config.json", text="old")
    with files.atomic_folder(target, True, OURS) as folder:
        make(folder, "config.json", text="new")
    assert (target / "config.json").read_text() == "new" and everything(tmp_path) == {"out", "out/config.json"}


# -- what may be replaced -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "there, stranger",
    [
        ("config.json weights.bin sub/1", None),
        ("config.json .DS_Store ._weights.bin sub/.localized", None),
        ("config.json notes.md", "notes.md"),
        ("config.json sub/x", "sub/x"),
        ("config.json .git/HEAD", ".git/HEAD"),
        ("weights.bin", "weights.bin"),  # its mark is missing
        (".env", ".env"),
    ],
)
def test_only_an_earlier_output_is_replaced(tmp_path, there, stranger):
    folder = make(tmp_path / "out", *there.split())
    before = everything(tmp_path)
    if stranger is None:
        with files.atomic_folder(folder, True, OURS) as new:
            make(new, "config.json", text="new")
        assert everything(folder) == {"config.json"}
    else:
        with pytest.raises(ExistsError) as caught, files.atomic_folder(folder, True, OURS) as new:
            make(new, "config.json", text="new")
        assert stranger in caught.value.message and everything(tmp_path) == before


def test_a_stranger_that_comes_during_the_work_is_kept(tmp_path):
    folder = make(tmp_path / "out", "config.json", text="old")
    with pytest.raises(ExistsError, match=r"thesis\.txt"), files.atomic_folder(folder, True, OURS) as new:
        make(new, "config.json", text="new")
        make(folder, "thesis.txt", text="mine")
    assert (folder / "thesis.txt").read_text() == "mine" and (folder / "config.json").read_text() == "old"
    with pytest.raises(ExistsError, match="already exists"), files.atomic_folder(tmp_path / "fresh") as new:
        make(tmp_path / "fresh", "thesis.txt", text="mine")
    assert everything(tmp_path) == {"out", "out/thesis.txt", "out/config.json", "fresh", "fresh/thesis.txt"}


def test_pipes_devices_and_the_links_of_the_system_are_not_replaced(tmp_path):
    """For whoever may write in /dev, a report to /dev/null would be the end of it for everybody."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "other").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link", "other"):
        with pytest.raises(StorageError, match=f"{name}' is no file that could be replaced"):
            files.write_text(tmp_path / name, "x")
        with pytest.raises(ExistsError, match=f"{name}' is no file, so it is no earlier output"):
            replacing.refuse_existing(tmp_path / name, overwrite=True)
    with pytest.raises(StorageError, match="is no file"):
        files.refuse_device(Path("/dev/stdout"))  # a link, also where the output goes to a file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "other", "pipe"]


def test_a_folder_that_finder_opened_is_empty(tmp_path):
    for litter in (".DS_Store", ".localized", "._model.safetensors"):
        out = tmp_path / litter.strip("._")
        out.mkdir()
        (out / litter).touch()
        with files.atomic_folder(out) as folder:
            make(folder, "config.json", text="new")
        assert everything(out) == {"config.json"}


def test_a_file_or_a_folder_in_the_other_ones_place_is_no_earlier_output(tmp_path):
    make(tmp_path, "file", "folder/x", text="mine")
    with pytest.raises(ExistsError, match="not a folder"), files.atomic_folder(tmp_path / "file", True, OURS):
        pass
    with pytest.raises(ExistsError, match="a folder, not a file"):
        replacing.refuse_existing(tmp_path / "folder", True)
    with pytest.raises(StorageError, match="a folder, not a file"), files.atomic_file(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").read_text() == "mine" and everything(tmp_path) == {"file", "folder", "folder/x"}


def test_the_folder_behind_a_link_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    with pytest.raises(StorageError, match=r"is a link to .*real', which is not there"):
        files.atomic_folder(tmp_path / "link").__enter__()
    (tmp_path / "disk" / "real").mkdir()
    for text in ("one", "two"):
        with files.atomic_folder(tmp_path / "link", True, OURS) as folder:
            make(folder, "config.json", text=text)
        assert (tmp_path / "disk" / "real" / "config.json").read_text() == text and (tmp_path / "link").is_symlink()
    make(tmp_path / "disk" / "real", "thesis.txt", text="mine")
    with pytest.raises(ExistsError, match="thesis"), files.atomic_folder(tmp_path / "link", True, OURS):
        pass


def test_what_is_read_is_not_replaced(tmp_path):
    out, elsewhere = make(tmp_path / "out", "base/config.json", "rows.jsonl"), make(tmp_path / "other", "x")
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "in").symlink_to(out / "base")
    inside = [out, out / "base", out / "rows.jsonl", tmp_path / "link" / "base", tmp_path / "in", f"{out}/../out/base"]
    for read in inside:
        for spelled in (out, tmp_path / "link"):
            with pytest.raises(ExistsError, match="is read, and would be replaced"):
                replacing.refuse_reading_inside(spelled, [None, read])
    replacing.refuse_reading_inside(out, [None, elsewhere, tmp_path, "user/repo", "demo", "a\0b", "x" * 5000])
    replacing.refuse_reading_inside(tmp_path / "new", [out, tmp_path / "new" / "base"])


# -- who may read it, and whether it reached the disk --------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask, file, folder", [(0o077, 0o600, 0o700), (0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_the_umask_says_who_may_read(tmp_path, umask, mask, file, folder):
    umask(mask)
    (tmp_path / "source").write_text("x")
    os.chmod(tmp_path / "source", 0o644)
    with files.atomic_folder(tmp_path / "new" / "out") as place:
        files.write_text(place / "a", "x")
    files.write_text(tmp_path / "b", "x")
    files.append_line(tmp_path / "log", "x")
    files.copy_file(tmp_path / "source", tmp_path / "c")
    with locks.lock("x"):
        lock = paths.home() / "locks" / "x.lock"
    assert {
        mode(path) for path in (tmp_path / "new" / "out" / "a", *map(tmp_path.joinpath, ("b", "log", "c")), lock)
    } == {file}
    assert mode(tmp_path / "new") == mode(tmp_path / "new" / "out") == mode(lock.parent) == folder


def test_what_replaces_a_private_thing_is_private(tmp_path, umask):
    make(tmp_path, "secret", "out/config.json")
    os.chmod(tmp_path / "secret", 0o600)
    os.chmod(tmp_path / "out", 0o700)
    files.write_text(tmp_path / "secret", "y")
    with files.atomic_folder(tmp_path / "out", True, OURS) as folder:
        make(folder, "config.json", text="y")
    assert (mode(tmp_path / "secret"), mode(tmp_path / "out")) == (0o600, 0o700)
    umask(0o077)
    os.chmod(tmp_path / "secret", 0o644)
    files.write_text(tmp_path / "secret", "z")
    assert mode(tmp_path / "secret") == 0o600


def recorded(monkeypatch, refuse: bool) -> list[str]:
    """Every flush by the name of its file, past the drive's cache in capitals, as macOS would do it."""
    calls, plain = [], fcntl.fcntl
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)

    def name(descriptor) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def fake(descriptor, command, *rest):
        if command != 51:
            return plain(descriptor, command, *rest)
        if refuse:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        calls.append(name(descriptor).upper())
        return 0

    monkeypatch.setattr(fcntl, "fcntl", fake)
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(name(descriptor)))
    return calls


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads names of descriptors as Linux gives them")
@pytest.mark.parametrize("refuse", [False, True])
def test_macos_flushes_the_drive_and_not_only_the_system(tmp_path, monkeypatch, refuse):
    calls = recorded(monkeypatch, refuse)
    files.write_text(tmp_path / "a", "x")
    file, folder = calls
    assert file.lower().startswith(PREFIX) and folder.lower() == tmp_path.name.lower()
    assert refuse or (file.isupper() and folder == tmp_path.name.upper())
    calls.clear()
    with files.atomic_folder(tmp_path / "out") as place:
        make(place, "config.json", "sub/1")
    # All files and folders first, then once the drive, and the rename at the end.
    last, renamed = calls[-2:]
    assert sorted(calls[:-2]) == sorted(["config.json", "1", "out", "sub"])
    assert last.lower() in ("config.json", "1") and renamed.lower() == tmp_path.name.lower()
    assert refuse or (last == last.upper() and renamed == tmp_path.name.upper())
    calls.clear()
    files.remove(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_cannot_flush_a_folder_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


# -- what the disk refuses -----------------------------------------------------------------------------


def test_without_locks_the_work_goes_on_and_it_is_said_once(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING), locks.lock("one"), locks.lock_file(tmp_path, wait=True) as held:
        files.write_text(tmp_path / "a", "x")
        with files.atomic_folder(tmp_path / "out") as folder:
            make(folder, "config.json")
    assert held is False and [record.getMessage()[:35] for record in caplog.records] == [
        "This disk or network share has no l"
    ]
    left = make(tmp_path / f"{PREFIX}x", "new/a", temporaries.MARKER)
    age(left, 24 * 3600)
    assert temporaries.sweep(tmp_path) == 0  # somebody may be at work in it
    age(left, 8 * 24 * 3600)
    assert temporaries.sweep(tmp_path) == 1
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"), locks.lock("two"):
        pass


@pytest.mark.parametrize("below", ["file/home", "gone"])
def test_a_home_that_cannot_be_is_told_with_another_way(below, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere" / "at all")
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(tmp_path / below))
    with pytest.raises(StorageError, match="There can be no folder") as caught, locks.lock("x"):
        pass
    assert "MLX_ADAPTERS_HOME" in caught.value.hint


def test_a_locks_name_knows_no_case(home):
    """On many disks two spellings are one file, for which a process would wait that holds it."""
    for name in ("one-SQL", "One-sql"):
        with locks.lock(name):
            assert [path.name for path in (home / "locks").iterdir()] == ["one-sql.lock"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_refusal_of_the_disk_is_a_sentence_with_a_hint(tmp_path, number):
    with pytest.raises(StorageError, match=r"Cannot write .*out'") as caught, files.atomic_file(tmp_path / "out"):
        raise OSError(number, "no")
    assert caught.value.hint and everything(tmp_path) == set()


def test_an_error_names_a_file_by_the_path_it_would_have_had(tmp_path):
    with (
        pytest.raises(StorageError) as caught,
        files.atomic_folder(tmp_path / "out") as folder,
        files.atomic_folder(folder / "sub" / "0001") as inner,
        files.atomic_file(inner / "weights"),
    ):
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.message.startswith(f"Cannot write '{tmp_path}/out/sub/0001/weights': ")
    with pytest.raises(StorageError) as caught, files.atomic_folder(tmp_path / "out") as folder:
        paths.require_free_space(folder / "weights", 1 << 60)
    assert caught.value.message.startswith(f"Cannot write '{tmp_path}/out/weights': it needs ")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EIO, errno.EISDIR])
def test_a_refusal_while_reading_names_what_was_read(tmp_path, number):
    """An error inside a block that writes is about the file it names, which need not be the one that is written."""
    for writer in (files.atomic_file, files.atomic_folder):
        with (
            pytest.raises(StorageError, match=r"Cannot read .*base/model\.safetensors'") as caught,
            writer(tmp_path / "out"),
        ):
            raise OSError(number, os.strerror(number), str(tmp_path / "base" / "model.safetensors"))
        assert "/out'" not in caught.value.message and everything(tmp_path) == set()
    with pytest.raises(StorageError, match=r"Cannot read .*absent"):
        files.copy_file(tmp_path / "absent", tmp_path / "copy")
    with pytest.raises(StorageError, match=r"Cannot write .*out"), files.atomic_folder(tmp_path / "out") as folder:
        raise OSError(errno.EACCES, "Permission denied", str(folder / "x"))


def test_what_lies_on_a_full_disk_can_be_removed(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(temporaries.tempfile, "mkdtemp", full)
    files.remove(make(tmp_path / "parts", "a", "sub/b"))
    assert os.listdir(tmp_path) == []


def test_what_is_protected_from_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def as_a_user(folder, rmtree=temporaries.shutil.rmtree):
        if any(not os.stat(place).st_mode & stat.S_IWUSR for place, _, _ in os.walk(folder)):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        rmtree(folder)

    monkeypatch.setattr(temporaries.shutil, "rmtree", as_a_user)
    make(tmp_path / "run", "weights.bin", "checkpoints/2/state")
    for folder in ("run/checkpoints/2", "run/checkpoints"):
        (tmp_path / folder).chmod(0o555)
    files.remove(tmp_path / "run")
    assert os.listdir(tmp_path) == []
