"""What a name means, at every moment: kills, refusals, two processes, disks that know no case."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from helpers.adapters import make_adapter, make_run

import mlx_adapters as ma
import mlx_adapters.models.adapter as adapter_module
from mlx_adapters.adapters import adding, inspecting, keeping, packing, project, verifying
from mlx_adapters.cli import cli
from mlx_adapters.errors import ConfigError, ExistsError, HubError, NotFoundError, StorageError, TrainingError
from mlx_adapters.sources import lookup, registry
from mlx_adapters.storage import files, locks, paths

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


@pytest.mark.parametrize("keep_last", [2, 3, 4, 5, 6, 100])
def test_prune_that_keeps_more_than_there_is_removes_nothing_it_should_keep(base, keep_last):
    make_run(base, "sql")
    removed = keeping.prune("sql", keep_last=keep_last, keep_best=False).iterations
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


def test_a_path_is_trained_by_one_run_whatever_home_each_has(tmp_path, monkeypatch):
    place = tmp_path / "run"
    with registry.training_lock(place):
        monkeypatch.setenv("MLX_ADAPTERS_HOME", str(tmp_path / "another"))
        with pytest.raises(TrainingError, match="being trained by another process"), registry.training_lock(place):
            pass
        with registry.training_lock(registry.adapter_folder("run")), registry.training_lock(tmp_path / "run2"):
            pass
    with registry.training_lock(place):
        pass


def test_a_place_has_one_lock_however_it_is_spelled(tmp_path, home):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    spellings = ("real/x", "link/x", "real/X", "real/../link/x")
    names = {locks.place_name(tmp_path / spelling) for spelling in spellings}
    assert len(names) == 1
    assert locks.place_name(tmp_path / "real/y") not in names
    with registry.training_lock(tmp_path / ("\U0001f600" * 60)):
        pass


def test_the_same_place_is_told_by_the_disk(tmp_path, knows_no_case):
    (tmp_path / "private").mkdir()
    (tmp_path / "private/base").mkdir()
    (tmp_path / "tmp").symlink_to("private")
    assert paths.same_place(tmp_path / "tmp/base", tmp_path / "private/base")
    assert paths.same_place(knows_no_case(tmp_path / "private/base"), tmp_path / "private/base")
    (tmp_path / "file").touch()
    os.link(tmp_path / "file", tmp_path / "twin")  # which no spelling tells
    assert paths.same_place(tmp_path / "file", tmp_path / "twin")
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


# -- disks that know no case -------------------------------------------------------------------------------


def test_names_that_differ_in_case_alone_are_one(base):
    make_run(base, "sql")
    assert lookup.load_adapter("SQL@100").name == "sql@100"
    with pytest.raises(ExistsError):
        registry.register(make_adapter(base), "Sql")
    registry.register(make_adapter(base), "Sql", overwrite=True)
    assert registry.names() == ["sql"]
    keeping.tag("SQL", ["kept"])
    assert keeping.rename("sql", "SQL").name == "SQL" and registry.names() == ["SQL"]
    assert lookup.load_adapter("sql").metadata["name"] == "SQL" and registry.read_entry(
        registry.adapter_folder("sQl")
    ).tags == ("kept",)
    with pytest.raises(ConfigError, match="already"):
        keeping.rename("sql", "SQL")
    make_run(base, "chat")
    with pytest.raises(ExistsError, match="'sql'"):
        keeping.rename("chat", "sql")


def test_a_pure_change_of_case_where_both_spellings_are_there(base, knows_no_case):
    capital = knows_no_case(make_run(base, "sql"))
    assert keeping.rename("sql", "SQL").iterations == (100, 200, 300)
    assert registry.names() == ["SQL"] and not capital.is_symlink()


def test_a_named_adapter_is_known_by_its_folder_however_that_is_spelled(base, home, tmp_path, knows_no_case):
    make_run(base, "sql")
    (tmp_path / "linked").symlink_to(home)
    for spelled in (tmp_path / "linked", knows_no_case(home)):
        assert lookup.registered(str(spelled / "adapters" / "sql")).target == "sql"


def test_adapters_of_a_base_are_found_however_its_path_is_spelled(base, tmp_path, knows_no_case):
    base = shutil.copytree(base, tmp_path / "base")
    make_run(base, "sql")
    (tmp_path / "link").symlink_to(base)
    for spelled in (tmp_path / "link", knows_no_case(base)):
        assert [e.name for e in registry.list_adapters(base=str(spelled))] == ["sql"]
    assert registry.list_adapters(base=str(tmp_path)) == []


# -- kills and refusals at every step ----------------------------------------------------------------------


class Killed(BaseException):
    """What a kill is here: from this disk operation on nothing reaches the disk, not even clearing up."""


class Killer:
    """Counts what changes the disk, and from the operation `at` on lets none through."""

    CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.symlink")

    def __init__(self):
        self.at, self.done, self.on = 0, 0, False
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.on and (event in self.CHANGES or (event == "open" and self._writes(*arguments))):
            self.done += 1
            if self.at and self.done >= self.at:
                raise Killed

    @staticmethod
    def _writes(path, mode, flags) -> bool:
        return isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) != 0 and "locks" not in str(path)

    @contextlib.contextmanager
    def killing(self, at: int):
        self.at, self.done, self.on = at, 0, True
        try:
            yield
        finally:
            self.on = False


killer = Killer()


def state(home: Path):
    """Of each adapter what the name means, by the list, by loading it and to plain mlx-lm."""
    contents = {}
    for entry in registry.list_adapters():
        assert entry.problem is None, entry.problem
        adapter = lookup.load_adapter(entry.name)
        plain = mx.load(str(entry.folder / "adapters.safetensors"))
        assert all(mx.array_equal(adapter.weights[name], plain[name]) for name in plain)
        if entry.iterations:
            assert adapter.fingerprint == lookup.load_adapter(f"{entry.name}@{entry.iteration}").fingerprint
        assert adapter.metadata.get("iteration") == entry.iteration
        for iteration in entry.iterations:
            lookup.load_adapter(f"{entry.name}@{iteration}")
        checks = {check.what: check for check in verifying.verify(entry.name, base="nowhere").checks}
        assert checks["checksums"].sound is not False, checks["checksums"].detail
        contents[entry.name] = (entry.iterations, entry.iteration, entry.tags, adapter.fingerprint)
    for path in home.glob("*.tar.gz"):
        assert adding.add(path, out=home / "unpacked", overwrite=True).kind == "adapter"
        contents[path.name] = files.sha256(path)
    for name in project.FILES:
        if (home / "project" / name).exists():
            assert (home / "project" / name).read_text() == project.FILES[name]
    return contents


COMMANDS = {
    "use": lambda home: keeping.use("a@100"),
    "rename": lambda home: keeping.rename("a", "z"),
    "tag": lambda home: keeping.tag("a", ["good"]),
    "prune": lambda home: keeping.prune("a"),
    "remove": lambda home: keeping.remove("a"),
    "remove one": lambda home: keeping.remove("a@100"),
    "register": lambda home: registry.register(lookup.load_adapter("b"), "a", overwrite=True),
    "pack": lambda home: packing.pack("a", home / "a.tar.gz", checkpoints=True, overwrite=True),
    "init": lambda home: project.start_project(home / "project"),
}


def link_as_earlier_versions_did(folder: Path) -> None:
    """Hard links, where copies are made today."""
    for iteration in files.iterations_of(folder):
        copy = folder / f"{iteration:07d}_adapters.safetensors"
        copy.unlink()
        os.link(folder / "checkpoints" / f"{iteration:07d}" / "adapters.safetensors", copy)
    best = folder / f"{registry.read_entry(folder).iteration:07d}_adapters.safetensors"
    (folder / "adapters.safetensors").unlink()
    os.link(best, folder / "adapters.safetensors")


@pytest.mark.parametrize(
    ("command", "links"), [*((command, False) for command in COMMANDS), ("use", True), ("prune", True)]
)
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_can_be_repeated(base, home, tmp_path, command, links):
    run = COMMANDS[command]
    folder = make_run(base, "a")
    if links:
        link_as_earlier_versions_did(folder)
    registry.register(make_adapter(base, seed=9), "b")
    packing.pack("b", home / "a.tar.gz")
    fresh = tmp_path / "fresh"
    subprocess.run(["cp", "-a", home, fresh], check=True)
    before = state(home)
    with killer.killing(0):
        run(home)
    steps, after = killer.done, state(home)
    assert steps >= 2
    for at in range(1, steps + 1):
        shutil.rmtree(home)
        subprocess.run(["cp", "-a", fresh, home], check=True)
        with pytest.raises(Killed), killer.killing(at):
            run(home)
        after_kill = state(home)
        if command != "prune":  # checkpoint by checkpoint
            assert after_kill in (before, after), f"step {at} of {steps}"
        drafts = list(home.rglob(f"{paths.TEMPORARY_PREFIX}*"))
        for draft in drafts:
            os.utime(draft, (0, 0))
        if after_kill != after or command == "init":
            run(home)
            assert not any(draft.exists() for draft in drafts)
        assert state(home) == after


def test_a_refused_use_changes_nothing(base, home, monkeypatch):
    """The disk is full when the metadata are written, or when the weights are copied."""
    folder = make_run(base, "a")
    before, kept = state(home), sorted(p.name for p in folder.iterdir())
    full = OSError(errno.ENOSPC, "full")
    for what in ("os.replace", "shutil.copyfileobj", "os.utime", "mlx_adapters.storage.files.json_text"):
        with monkeypatch.context() as patch:
            patch.setattr(what, lambda *_, **__: (_ for _ in ()).throw(full))
            with pytest.raises(StorageError):
                keeping.use("a@100")
            assert state(home) == before and sorted(p.name for p in folder.iterdir()) == kept
    assert keeping.use("a@100").iteration == 100


# -- changes in the middle of a read ---------------------------------------------------------------------


@pytest.mark.parametrize("step", ["read_config", "read_safetensors", "read_metadata", "first_not_finite"])
@pytest.mark.parametrize("change", ["overwrite", "use"])
def test_a_read_that_is_overtaken_by_a_change_is_of_the_new_version(base, monkeypatch, step, change):
    make_run(base, "x")
    other = make_adapter(base, seed=5, factor=777.0, rank=2)
    module = adapter_module.tensor_files if step == "read_safetensors" else adapter_module
    read, overtaken = getattr(module, step), []

    def overtaking(*arguments):
        if not overtaken:
            overtaken.append(step)
            registry.register(other, "x", overwrite=True) if change == "overwrite" else keeping.use("x@300")
        return read(*arguments)

    monkeypatch.setattr(module, step, overtaking)
    x = lookup.load_adapter("x")
    if change == "overwrite":
        assert (x.fingerprint, x.config.rank) == (other.fingerprint, 2) and "iteration" not in x.metadata
    else:
        assert x.metadata["iteration"] == 300 and x.fingerprint == lookup.load_adapter("x@300").fingerprint
        assert registry.checksums_of(x.metadata)["adapters.safetensors"] == files.sha256(
            x.folder / "adapters.safetensors"
        )


def test_no_reader_sees_the_new_weights_with_the_old_record(base, home, monkeypatch):
    """They come in the instant between; after a kill there nobody is waited for."""
    folder, copy, seen = make_run(base, "x"), files.copy_file, {}
    readers = {
        "load": lambda: lookup.load_adapter("x").metadata,
        "list": lambda: registry.list_adapters()[0].metadata,
        "show": lambda: inspecting.describe("x").metadata,
        "checkpoint": lambda: lookup.load_adapter("x@300").metadata,
        "pack": lambda: packing.pack("x", home / "x.tar.gz").sha256,
    }

    def reading(source: Path, target: Path) -> None:
        copy(source, target)
        threads = [
            threading.Thread(target=lambda n=name, r=read: seen.update({n: r()})) for name, read in readers.items()
        ]
        for thread in threads:
            thread.start()
        threads[-1].join(0.3)
        running.extend(threads)

    running: list[threading.Thread] = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "copy_file", reading)
        keeping.use("x@100")
    for thread in running:
        thread.join()
    (home / "x.tar.gz").unlink()
    assert seen == {name: read() for name, read in readers.items()}
    assert seen["list"]["iteration"] == 100 and seen["list"]["chosen_by"] == "use"
    copy(folder / "0000300_adapters.safetensors", folder / "adapters.safetensors")  # as a kill leaves it
    assert registry.read_entry(folder).iteration == 300


def test_a_change_after_a_killed_use_does_not_wait_for_itself(base):
    folder, removed = make_run(base, "x"), []
    files.copy_file(folder / "0000300_adapters.safetensors", folder / "adapters.safetensors")
    thread = threading.Thread(target=lambda: removed.append(keeping.prune("x").iterations), daemon=True)
    thread.start()
    thread.join(30)
    assert removed == [(100,)]


@pytest.mark.parametrize("change", [lambda: keeping.rename("a", "z"), lambda: keeping.remove("a")])
def test_a_list_beside_a_rename_or_removal_is_from_before_or_after_it(base, monkeypatch, change):
    for name in "ab":
        registry.register(make_adapter(base), name)
    read, changed = registry.read_entry, []

    def overtaking(folder):
        if not changed:
            changed.append(folder)
            change()
        return read(folder)

    monkeypatch.setattr(registry, "read_entry", overtaking)
    listed = [(entry.name, entry.problem) for entry in registry.list_adapters()]
    assert changed and listed == [(name, None) for name in registry.names()]


def test_a_check_that_is_overtaken_by_a_change_is_made_anew(base, monkeypatch):
    make_run(base, "x")
    keeping.use("x@100")
    read, overtaken = files.sha256, []

    def overtaking(path):
        if not overtaken:
            overtaken.append(path)
            keeping.use("x@300")
        return read(path)

    monkeypatch.setattr(files, "sha256", overtaking)
    assert [check for check in verifying.verify("x", base="nowhere").problems if check.what == "checksums"] == []


def test_what_is_shown_beside_changes_is_of_one_version(base, monkeypatch):
    """Another checkpoint is chosen after the weights are read."""
    make_run(base, "x")
    before, read, changed = inspecting.describe("x"), registry.read_entry, []

    def overtaking(folder):
        if not changed:
            changed.append(True)
            keeping.use("x@100")
        return read(folder)

    monkeypatch.setattr(registry, "read_entry", overtaking)
    shown = inspecting.describe("x")
    assert changed and shown == inspecting.describe("x") != before
    assert [c.iteration for c in shown.checkpoints if c.in_use] == [100]


def test_a_pack_beside_changes_is_of_one_version(base, tmp_path, monkeypatch):
    """The adapter is replaced while its files are opened, and again while they are packed."""
    make_run(base, "x")
    others = [make_adapter(base, seed=seed, factor=777.0, rank=2) for seed in (5, 6)]
    packs = (
        (lambda *_: registry.register(others[0], "x", overwrite=True)),
        (lambda event: registry.register(others[1], "x", overwrite=True)),
    )
    read, changed = packing.read_adapter, []

    def overtaking(*arguments):
        answer = read(*arguments)
        if not changed:
            changed.append(packs[0]())
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(packing, "read_adapter", overtaking)
        packing.pack("x", tmp_path / "x.tar.gz", checkpoints=True, on_event=packs[1])
    adding.add(tmp_path / "x.tar.gz", out=tmp_path / "out")
    assert lookup.load_adapter(tmp_path / "out").fingerprint == others[0].fingerprint
    assert lookup.load_adapter("x").fingerprint == others[1].fingerprint


# -- two processes ------------------------------------------------------------------------------------------

OVERWRITE = """
import dataclasses, sys
from mlx_adapters.sources import lookup, registry
a, b = lookup.load_adapter("a"), lookup.load_adapter("b")
print("ready", flush=True)
while True:
    for adapter in (a, b):
        registry.register(adapter, "x", overwrite=True)
"""


def test_a_read_beside_overwrites_is_of_one_adapter(base, home):
    wanted = set()
    for name, factor in (("a", 2.0), ("b", 777.0)):
        adapter = registry.register(make_adapter(base, seed=int(factor), factor=factor), name)
        wanted.add((adapter.fingerprint, factor))
    registry.register(adapter, "x")
    environment = os.environ | {"MLX_ADAPTERS_HOME": str(home), "PYTHONPATH": str(ROOT)}
    writer = subprocess.Popen([sys.executable, "-c", OVERWRITE], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline().strip() == "ready"
        seen = Counter()
        while len(seen) < 2 or seen.total() < 300:
            x = lookup.load_adapter("x")
            seen[x.fingerprint, x.config.scale] += 1
            entry = registry.read_entry(registry.adapter_folder("x"))
            assert entry.problem is None and entry.scale in (2.0, 777.0)
    finally:
        writer.kill()
        writer.communicate()
    assert set(seen) == wanted


def test_a_folder_is_meant_with_its_slash_or_without(base, tmp_path, monkeypatch):
    """As it is for models; a name of the registry comes first, and what is neither is told how folders are spelled."""
    run = make_run(base, "sql")
    for place in ("plain", "out/sql", "sql"):
        shutil.copytree(run, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    for text in ("plain", "./plain", "out/sql", Path("plain"), "plain@200", Path("./out/sql")):
        folder, iteration = lookup.locate(text)
        assert folder == tmp_path / str(text).partition("@")[0] and iteration == (200 if "@" in str(text) else None)
        assert lookup.load_adapter(text).folder == folder
    assert lookup.locate("sql") == (run, None) and lookup.locate("./sql") == (tmp_path / "sql", None)
    with pytest.raises(HubError) as caught:
        lookup.locate("home/out/sql")
    assert "a folder of this machine" in caught.value.hint
    assert lookup.locate("out//sql")[0] == tmp_path / "out" / "sql"
    with pytest.raises(ConfigError, match="There is no folder 'out//no'"):
        lookup.locate("out//no")


def test_what_is_no_reference_is_told():
    for wrong in (None, 5, ["sql"], object()):
        with pytest.raises(ConfigError, match="is no adapter and no model") as caught:
            lookup.load_adapter(wrong)
        assert "give a name, a folder" in caught.value.hint


def test_a_link_to_a_disk_that_is_not_connected_is_listed_and_told(base, tmp_path):
    """`list`, `rename` and `prune --all` agree on it, and what they advise can be done."""
    make_run(base, "sql")
    link = registry.adapters_folder() / "away"
    link.symlink_to(tmp_path / "disk" / "away")
    assert {entry.name: entry.problem is None for entry in registry.list_adapters()} == {"sql": True, "away": False}
    with pytest.raises(NotFoundError, match=r"is a link to .*disk/away'") as caught:
        lookup.load_adapter("away")
    assert str(link) in caught.value.hint
    with pytest.raises(ExistsError, match="stands in the way"):
        keeping.rename("sql", "away")
    run = CliRunner().invoke(cli, ["prune", "--all", "--keep-last", "0", "--no-keep-best", "--yes"])
    assert run.exit_code == 0 and "'away' is left alone" in run.stderr and "@300" in run.stdout
    link.unlink()
    assert registry.names() == ["sql"]


def test_a_rename_that_the_disk_refuses_changes_nothing(base, monkeypatch):
    registry.register(make_adapter(base), "sql")

    def refused(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))

    with monkeypatch.context() as patched, pytest.raises(StorageError, match=r"Cannot write .*adapters/new'"):
        patched.setattr(files.os, "rename", refused)
        keeping.rename("sql", "new")
    assert registry.read_entry(registry.adapter_folder("sql")).metadata["name"] == "sql"
