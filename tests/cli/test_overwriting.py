"""--overwrite, command by command: nothing of anybody else's goes, and nothing that the command reads."""

import builtins
import errno
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.adapters import make_adapter, make_run

from mlx_adapters.adapters import keeping
from mlx_adapters.adapters.inspecting import describe
from mlx_adapters.adapters.packing import pack
from mlx_adapters.adapters.verifying import verify_all
from mlx_adapters.benchmarking.worker import files_of
from mlx_adapters.cli import cli
from mlx_adapters.errors import NotFoundError
from mlx_adapters.evaluation.scores import parse_score
from mlx_adapters.evaluation.variants import Variant
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.publishing.cards import MINE
from mlx_adapters.publishing.subject import read_subject
from mlx_adapters.sources import registry
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.tensor_names import ADAPTER_OUTPUT
from mlx_adapters.training import state as states

ROWS = "".join(json.dumps({"prompt": f"List {i}.", "completion": f"SELECT {i};"}) + "\n" for i in range(20))


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama", bits=4, group_size=32)


@pytest.fixture
def place(tmp_path, base, monkeypatch):
    """An adapter `a` in the registry and as a folder, a PEFT folder, a fused model, data and its splits, a pack."""
    place = tmp_path / "place"
    (place / "data").mkdir(parents=True)
    (place / "data" / "train.jsonl").write_text(ROWS)
    monkeypatch.chdir(place)
    registry.register(make_adapter(base), "a")
    write_adapter(make_adapter(base), place / "folder")
    run("export-peft", "a", "peft", "--base-model", "x/y")
    run(*FUSE, "fused")
    run("data", "split", "data/train.jsonl", "split")
    run("pack", "a", "a.tar.gz")
    run("pack", "./fused", "fused.tgz")
    run("add", "fused.tgz", "--out", "unpacked")
    return place


FUSE = ("fuse", "a", "--method", "nearest", "--no-check")
FOLDERS = {
    "export-peft": ("export-peft", "a", "{}", "--base-model", "x/y", "--overwrite"),
    "fuse": (*FUSE, "{}", "--overwrite"),
    "data split": ("data", "split", "data/train.jsonl", "{}", "--overwrite"),
    "add adapter": ("add", "./folder", "--out", "{}", "--overwrite"),
    "add model": ("add", "fused.tgz", "--out", "{}", "--overwrite"),
}
OWN = {"export-peft": "peft", "fuse": "fused", "data split": "split", "add adapter": "folder", "add model": "unpacked"}


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
    error = result.exception
    assert (error is None) == (code == 0), (arguments, error, result.output)
    return "" if error is None else getattr(error, "message", repr(error))


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("command", FOLDERS)
def test_only_its_own_earlier_output_is_replaced(place, command):
    arguments, own = FOLDERS[command], place / OWN[command]
    if command != "add adapter":  # which reads it
        (own / ".DS_Store").touch()
        run(*(part.format(own) for part in arguments))
        assert not (own / ".DS_Store").exists()
    shutil.copytree(own, place / "copy")
    for name in ("thesis.txt", "data/rows.jsonl", ".git/HEAD", "notes.md"):
        shutil.rmtree(place / "target", ignore_errors=True)
        shutil.copytree(place / "copy", place / "target")
        (place / "target" / name).parent.mkdir(exist_ok=True)
        (place / "target" / name).write_text("mine")
        before = tree(place / "target")
        assert name in run(*(part.format("target") for part in arguments), code=1)
        assert tree(place / "target") == before
    shutil.rmtree(place / "target")
    strange = {"README.md": "mine", "data/x.jsonl": "rows", "config.json": "{}", "tokenizer.json": "{}"}
    for names in (["README.md"], ["README.md", "data/x.jsonl"], ["config.json", "tokenizer.json", "README.md"]):
        if command == "add model" and "config.json" in names:
            continue  # what a model's files look like
        for name in names:
            (place / "target" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "target" / name).write_text(strange[name])
        before = tree(place / "target")
        assert "other things" in run(*(part.format("target") for part in arguments), code=1)
        assert tree(place / "target") == before
        shutil.rmtree(place / "target")
    for kind in ("file", "link to nothing"):
        target = place / kind.replace(" ", "-")
        target.write_text("mine") if kind == "file" else target.symlink_to(place / "absent")
        message = run(*(part.format(target) for part in arguments), code=1)
        assert any(words in message for words in ("not a folder", "is a file", "is not there"))
        assert (target.read_text() == "mine") if kind == "file" else target.is_symlink()
    (place / "link").symlink_to(place / "copy")
    if command != "add adapter":
        run(*(part.format("link") for part in arguments))
        assert (place / "link").is_symlink() and not list(place.glob(f"{paths.TEMPORARY_PREFIX}*"))


READS = {  # {}: what would be replaced
    "split of itself": ("data", "split", "split/train.jsonl", "{split}", "--overwrite"),
    "base": (*FUSE, "--base", "fused", "{fused}", "--any-base", "--overwrite"),
    "recipe": ("fuse", "--again", "fused", "{fused}", "--overwrite"),
    "recipe's file": ("fuse", "--again", "fused/fuse_recipe.json", "{fused}", "--overwrite"),
    "adapter": ("export-peft", "./folder", "{folder}", "--overwrite"),
    "added to itself": ("add", "./folder", "--out", "{folder}", "--overwrite"),
    "unpacked over itself": ("add", "./fused", "--out", "{fused}", "--overwrite"),
    "PEFT's own": ("fuse", "--from-peft", "peft", "--base", "fused", "{peft}", "--overwrite"),
    "merged into itself": ("merge", "a", "./folder", "--name", "{a}", "--overwrite"),
    "subtracted from itself": ("subtract", "./folder", "a", "--name", "{a}", "--overwrite"),
    "scaled": ("scale", "a", "0.5", "--name", "{a}", "--overwrite"),
    "interpolated": ("interpolate", "a", "./folder", "--data", "split", "--best", "--name", "{a}", "--overwrite"),
}
SPELLINGS = ("as it is", "in capital letters", "by a link", "below a link")
SPELLED = [(what, spelling) for what in READS for spelling in SPELLINGS[: 2 if "{a}" in READS[what] else 4]]


def spelled(spelling: str, name: str, place: Path, knows_no_case) -> str:
    """A path or name in `place`, made to be spelled otherwise; /tmp is a link on a Mac, its disk knows no case."""
    if name == "a":
        return knows_no_case(registry.adapter_folder("a")).name if spelling == "in capital letters" else name
    if spelling == "by a link":
        (place / "link").symlink_to(place / name)
        return "link"
    if spelling == "below a link":
        (place.parent / "linked").symlink_to(place.name)
        return str(place.parent / "linked" / name)
    return str(knows_no_case(place / name)) if spelling == "in capital letters" else name


@pytest.mark.parametrize("what, spelling", SPELLED)
def test_what_a_command_reads_is_not_replaced(place, what, spelling, knows_no_case):
    out = next(part for part in READS[what] if part[0] == "{")
    target = spelled(spelling, out[1:-1], place, knows_no_case)
    before = tree(place)
    message = run(*(target if part == out else part for part in READS[what]), code=1)
    assert "is read, and would be replaced" in message or "other things" in message
    assert tree(place) == before


def test_what_is_read_is_known_in_other_letters(place, knows_no_case):
    for read, out in ((knows_no_case(place / "fused"), "./fused"), ("./split", knows_no_case(place / "split"))):
        before = tree(place)
        source = (*FUSE, "--base", read, "--any-base") if out == "./fused" else ("data", "split", f"{read}/train.jsonl")
        assert "is read, and would be replaced" in run(*source, out, "--overwrite", code=1)
        assert tree(place) == before


READMES = {
    "export-peft": (OWN["export-peft"], FOLDERS["export-peft"]),
    "fuse": (OWN["fuse"], FOLDERS["fuse"]),
    "scale": ("home/adapters/a", ("scale", "./folder", "0.5", "--name", "a", "--overwrite")),
}


@pytest.mark.parametrize("what", READMES)
def test_a_readme_that_somebody_wrote_in_is_not_replaced(place, home, what):
    own, arguments = READMES[what]
    own = place / own if (place / own).is_dir() else home / "adapters" / "a"
    arguments = [part.format(own) for part in arguments]
    if what != "export-peft":  # which writes one itself
        run("card", "a" if what == "scale" else own, "--write", "--base-model", "x/y")
    made = (own / "README.md").read_text()
    edited = [made + "My own findings.\n", made.replace("# ", "# My ", 1)]
    if MINE in made:
        edited.append(made.replace(MINE, f"{MINE}\nMy own findings.\n"))
    edited.append("# Mine alone\n")
    for text in edited:
        (own / "README.md").write_text(text)
        assert "README.md" in run(*arguments, code=1)
        assert (own / "README.md").read_text() == text
    (own / "README.md").write_text(made)
    run(*arguments)


def test_a_readme_that_came_along_goes_as_long_as_nobody_wrote_in_it(place, home):
    (place / "folder" / "README.md").write_text("# Theirs\n")
    again = ("add", "./folder", "--name", "theirs", "--overwrite")
    run("add", "./folder", "--name", "theirs")
    run(*again)
    readme = home / "adapters" / "theirs" / "README.md"
    readme.write_text("# Theirs\nand mine\n")
    assert "README.md" in run(*again, code=1) and readme.read_text().endswith("mine\n")


def test_no_report_is_written_into_an_adapter_that_is_read(place, home):
    metadata = home / "adapters" / "a" / "adapter_metadata.json"
    before = metadata.read_bytes()
    for name in ("a", "a@best"):
        said = run("eval", "base", name, "--base", "./base", "--data", "data", "-o", str(metadata), code=1)
        assert "would be written, and belongs to" in said
    assert metadata.read_bytes() == before


def test_export_peft_says_nothing_before_it_refuses(place, monkeypatch):
    result = CliRunner().invoke(cli, ["export-peft", "a", "peft/adapter_config.json/x"])
    assert result.exit_code == 1 and "PEFT cannot load it yet" not in result.output
    assert "PEFT cannot load it yet" in CliRunner().invoke(cli, ["export-peft", "a", "again"]).output


def test_a_pack_replaces_a_pack_only(place):
    run("pack", "a", "a.tar.gz", "--overwrite")
    shutil.make_archive(str(place / "photos"), "gztar", place / "data")
    for name, content in (("photos.tar.gz", None), ("thesis.tar.gz", b"words"), ("empty.tgz", b"")):
        if content is not None:
            (place / name).write_bytes(content)
        before = (place / name).read_bytes()
        assert "no pack" in run("pack", "a", name, "--overwrite", code=1)
        assert (place / name).read_bytes() == before
    (place / "folder.tgz").mkdir()
    assert "is a directory" in run("pack", "a", "folder.tgz", "--overwrite", code=1)


def test_all_that_we_put_into_an_adapter_is_known_to_be_ours(base, home):
    """Whatever training, `use`, `tag`, `eval --save` and `card` leave there does not hinder --overwrite."""
    folder = make_run(base, "sql")
    registry.register(make_adapter(base), "a")
    states.save(folder, states.State(iteration=400), make_adapter(base).weights, {})
    files.write_json(folder / states.RUN_RECIPE_FILE, {})
    keeping.use("sql@100")
    keeping.tag("sql", ["good"])
    run("card", "sql", "--write", "--base-model", "x/y")
    assert len(tree(folder)) > 8 and ADAPTER_OUTPUT.strangers(folder) == []
    (folder / "notes.md").write_text("mine")
    assert "notes.md" in run("scale", "a", "0.5", "--name", "sql", "--overwrite", code=1)
    (folder / "notes.md").unlink()
    run("scale", "a", "0.5", "--name", "sql", "--overwrite")
    assert registry.read_entry(folder).problem is None


def test_what_is_called_like_a_checkpoint_but_is_none_stays(base, home):
    folder = make_run(base, "sql")
    for name in ("my_adapters.safetensors", "._0000100_adapters.safetensors"):
        (folder / name).write_text("mine")
    states.copy_weights(folder, 100)
    assert {"my_adapters.safetensors", "._0000100_adapters.safetensors"} <= tree(folder).keys()


# -- names that begin with a dot --------------------------------------------------------------------------


def litter(folder: Path) -> Path:
    """What macOS leaves in a folder on a disk of another system: a hidden twin of every file."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7")
    for name in (".DS_Store", ".localized", ".hidden.json", ".x.sqlite"):
        (folder / name).write_bytes(b"x")
    (folder / ".Trashes").mkdir()
    (folder / ".Trashes" / "adapter_config.json").write_bytes(b"{}")
    return folder


def hidden(names) -> list[str]:
    return [name for name in map(str, names) if any(part.startswith(".") for part in Path(name).parts)]


def test_what_is_hidden_is_never_data_and_never_goes_along(place, base):
    model = litter(Path(shutil.copytree(base, place / "model")))
    for folder in ("folder", "fused", "peft", "data", "split"):
        litter(place / folder)
    run(*FUSE, "--base", "model", "--any-base", "new")
    assert not hidden(tree(place / "new")) and files.read_json(place / "new" / "fuse_report.json")["files"]
    assert not hidden(pack("./fused", place / "f.tgz").files) and not hidden(pack("./folder", place / "g.tgz").files)
    for source in ("./fused", "./folder", "./peft"):
        subject = read_subject(source)
        assert subject.sources and not hidden([*subject.sources, *subject.left_out])
    run("add", "./folder", "--name", "b")
    run("import-peft", "./peft", "--base", "model", "--name", "c")
    assert not hidden([*tree(registry.adapter_folder("b")), *tree(registry.adapter_folder("c"))])
    assert not hidden(path.name for path in files_of(Variant("model", str(model))))
    litter(registry.adapters_folder())
    litter(registry.adapter_folder("a"))
    assert [(entry.name, entry.problem) for entry in registry.list_adapters()] == [(n, None) for n in "abc"]
    assert not hidden(describe("a").files)
    with pytest.raises(NotFoundError, match=r"no \.sqlite files"):
        parse_score("sqlite", place / "data")
    run("scale", "a", "0.5", "--name", "a", "--overwrite", code=1)  # .hidden.json may be somebody's


# -- reports --------------------------------------------------------------------------------------------


OUTPUTS = {
    "benchmark": ("benchmark", "base", "./folder", "--base", "model", "--quality", "data", "--rounds", "1"),
    "eval": ("eval", "base", "./folder", "--base", "model", "--data", "data"),
    "show": ("show", "./folder"),
    "train": ("train", "model", "--data", "data", "--name", "t"),
}


@pytest.mark.parametrize(
    "command, option, target",
    [
        ("benchmark", "-o", "data/train.jsonl"),
        ("benchmark", "--markdown", "folder/adapter_config.json"),
        ("benchmark", "--html", "link/config.json"),
        ("eval", "-o", "model/config.json"),
        ("show", "--plot", "folder/loss.svg"),
        ("train", "--log", "data/train.jsonl"),
    ],
)
def test_a_report_is_not_written_over_what_was_read_for_it(place, base, command, option, target, knows_no_case):
    shutil.copytree(base, place / "model")
    (place / "link").symlink_to(place / "model")
    (place / "folder" / "loss.svg").write_text("mine")
    whole = place / target
    for spelling in (target, knows_no_case(whole), knows_no_case(whole.parent) / whole.name):
        before = tree(place)
        assert "is read" in run(*OUTPUTS[command], option, spelling, code=1).replace("which is", "is")
        assert tree(place) == before


def test_no_report_of_a_fuse_lies_in_the_model(place, knows_no_case):
    for out, html in (("new", "new/r.html"), ("fused", knows_no_case(place / "fused") / "r.html")):
        assert "beside the model" in run(*FUSE, out, "--overwrite", "--html", html, code=1)


def test_reports_may_lie_among_the_plots(place, monkeypatch):
    def reached(*_, **__):
        raise NotFoundError("reached")

    monkeypatch.setattr("mlx_adapters.benchmarking.run.benchmark", reached)
    (place / "plots").mkdir()
    (place / "plots" / "b.json").write_text("{}")
    assert run("benchmark", "base", "-o", "plots/b.json", "--plots", "plots", code=1) == "reached"
    (place / "plots" / "train.jsonl").write_text(ROWS)
    options = ("--quality", "plots", "--plots", "plots")
    assert "which is read" in run("benchmark", "base", *options, code=1)


# -- folders that may not be read -----------------------------------------------------------------------


def test_an_unreadable_adapter_hides_no_other(base, home, monkeypatch):
    """As the system refuses it to all but root: looking into the folder and opening its files."""
    for name in "abc":
        registry.register(make_adapter(base), name)
    closed = str(registry.adapter_folder("b"))

    def guarded(function):
        def call(path, *rest, **keywords):
            inside = isinstance(path, str | Path) and str(path).startswith(closed + "/")
            if inside or (function is listdir and str(path) == closed):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *rest, **keywords)

        return call

    listdir = os.listdir
    for module, name in ((os, "stat"), (os, "listdir"), (os, "open"), (builtins, "open"), (io, "open")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    problems = {entry.name: entry.problem for entry in registry.list_adapters()}
    assert problems["a"] is None and problems["c"] is None and "Permission denied" in problems["b"]
    assert [(one.name, one.sound) for one in verify_all()] == [("a", True), ("b", False), ("c", True)]
