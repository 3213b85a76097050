"""The commands that manage and merge, as they are typed."""

import io
import json
import os
import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import LLAMA, make_adapter, make_mlx_lm_folder, make_run

from mlx_adapters import cli
from mlx_adapters.adapters.inspecting import Comparison, LayerComparison
from mlx_adapters.config.mapping import from_mapping, read_yaml
from mlx_adapters.config.merging import MergeSettings
from mlx_adapters.config.settings import settings_of
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.datasets import read_data
from mlx_adapters.evaluation.tokens import judged_rows
from mlx_adapters.merging.methods import METHODS
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources import lookup, registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import tensor_files

OURS = ("adapters", "keeping", "packing", "merge")


@pytest.fixture
def run(monkeypatch, capsys):
    """run("list", "--json") -> (exit status, stdout, stderr), through the program's own door."""

    def run(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["mlx-adapters", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == status, err
        assert "Traceback" not in err
        return out, err

    return run


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


def as_json(output):
    return json.loads(output[0])


@pytest.mark.parametrize("command", [name for name, (module, _) in cli.COMMANDS.items() if module in OURS])
def test_every_command_has_help_with_an_example(run, command):
    out, _ = run(command, "--help")
    assert "Example:" in out and f"mlx-adapters {command}" in out and "--json" in out


def test_what_leaves_by_exit_keeps_its_status(monkeypatch):
    import mlx_adapters.cli as program

    for status in (3, "no such dataset"):

        def leave(standalone_mode: bool, status: int | str = status) -> None:
            raise SystemExit(status)

        monkeypatch.setattr(program.cli, "main", leave)
        with pytest.raises(SystemExit) as caught:
            program.main()
        assert caught.value.code == status


def test_a_reader_that_went_away_and_a_closed_output_are_no_errors():
    program = [sys.executable, "-m", "mlx_adapters", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        ended = subprocess.run(program, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    ended = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *program], stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_tilde_is_the_home_wherever_the_shell_leaves_it(run, base, tmp_path, monkeypatch):
    user = tmp_path / "user ö"
    user.mkdir()
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.chdir(tmp_path)
    make_run(base, "sql")
    run("show", "sql", "--plot=~/losses.svg")
    run("export-peft", "sql", "~/peft")
    run("import-peft", "~/peft", "--base", base, "--name", "back")
    run("pack", "sql", "~/sql.tar.gz")
    run("add", "~/sql.tar.gz", "--out=~/copy")
    run("fuse", "sql", "~/fused", "--no-check")
    run("init", "~/project")
    assert {path.name for path in user.iterdir()} == {"losses.svg", "peft", "sql.tar.gz", "copy", "fused", "project"}
    assert not (tmp_path / "~").exists()
    assert "~nobody-here" in run("export-peft", "sql", "~nobody-here/x", status=2)[1]
    assert "~nobody-here" in run("import-peft", "~nobody-here/x", "--base", base, "--name", "x", status=1)[1]


def test_the_commands_know_every_method():
    assert set(settings_of(MergeSettings)["method"].choices) == set(METHODS)


def test_list_sorts_filters_and_shows_damage(run, base):
    make_run(base, "sql")
    make_run(base, "chat", losses=[(100, 3.0), (200, 0.5)])
    folder = make_run(base, "bad")
    (folder / "adapter_config.json").write_text("{")
    out, err = run("list", "--sort", "loss")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["chat", "bad", "sql"]
    assert "chat (@200)" in lines[1] and "not readable JSON" in lines[2]
    assert "1 of 3 have a problem" in err
    names = [entry["name"] for entry in as_json(run("list", "--sort", "name", "--reverse", "--json"))["adapters"]]
    assert names == ["sql", "chat", "bad"]
    assert as_json(run("list", "--base", "another", "--json")) == {"schema": "mlx_adapters/1", "adapters": []}
    assert "No such adapters" in run("list", "--tag", "x")[1]


def test_show_tells_settings_layers_losses_and_files(run, base, tmp_path):
    make_run(base, "sql", keys=LLAMA)
    out, _ = run("show", "sql", "--plot", tmp_path / "losses.svg")
    for text in ("rank 4, scale 2", "512 × 64", "@200 *", "adapter_metadata.json", str(base), "rows train 600"):
        assert text in out
    assert "<svg" in (tmp_path / "losses.svg").read_text()
    assert "── training   ━━ validation" in out
    run("show", "sql", "--plot", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "model.layers.1.mlp.down_proj" in run("show", "sql@100", "--layers")[0]
    shown = as_json(run("show", "sql", "--json"))
    assert [c["validation_loss"] for c in shown["checkpoints"]] == [2.0, 1.0, 1.5]
    assert {layer["key"] for layer in shown["layers"]} == set(LLAMA)
    from mlx_adapters.models.low_rank import update_of

    exact = np.linalg.norm(update_of(lookup.load_adapter("sql"), LLAMA[0]).matrix())
    norm = next(layer["norm"] for layer in shown["layers"] if layer["key"] == LLAMA[0])
    assert norm == pytest.approx(exact, rel=1e-5)
    assert "must end in .png or .svg" in run("show", "sql", "--plot", tmp_path / "x.gif", status=2)[1]
    registry.register(make_adapter(base), "fresh")
    assert "No losses" in run("show", "fresh", "--plot", tmp_path / "y.svg", status=1)[1]
    assert "did you mean 'sql'" in run("show", "sqll", status=1)[1]


def test_norms_of_dora_are_said_to_be_of_its_low_rank_part(run, base):
    """Its magnitudes change the weights as well, by how much its base tells."""
    registry.register(make_adapter(base, LLAMA[:2], type="dora", name="x"), "x")
    registry.register(make_adapter(base, LLAMA[:2], name="y"), "y")
    assert "of the low-rank part of 'x'; DoRA's magnitudes are left aside" in run("compare", "x", "y")[1]
    assert "low-rank part" not in run("compare", "y", "y")[1]
    assert "‖scale·BA‖" in run("show", "x")[0] and "‖ΔW‖" in run("show", "y")[0]


def test_compare_shows_what_differs_and_the_angle(run, base):
    registry.register(make_adapter(base, LLAMA, name="x"), "x")
    registry.register(make_adapter(base, LLAMA[:2], factor=4.0, name="y"), "y")
    told = as_json(run("compare", "x", "y", "--json"))
    assert ["scale", 2.0, 4.0] in told["settings"] and ["layers", 3, 2] in told["settings"]
    same, _, alone = (next(layer for layer in told["layers"] if layer["key"] == key) for key in LLAMA)
    assert same["cosine"] == pytest.approx(1) and same["norm_b"] == pytest.approx(2 * same["norm_a"])
    assert alone["norm_b"] is None and alone["cosine"] is None
    assert "COSINE" in run("compare", "x", "y")[0]
    each = run("compare", "x", "y", "--layers")[0]
    assert all(re.search(rf"^{re.escape(key)} ", each, re.M) for key in LLAMA) and "Most different" not in each
    other = as_json(run("compare", "x", "x", "--json"))
    assert other["settings"] == [] and other["cosine"] == pytest.approx(1)


def test_compare_of_many_layers_fits_a_screen(run, base, monkeypatch):
    comparison = [
        LayerComparison(f"model.layers.{i}.{name}", 1.0 + i, 2.0, None if i == 7 else 1 - i / 100)
        for i in range(30)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    ]
    compared = Comparison("x", "y", (), tuple(comparison), 30.0, 2.0, 0.9)
    monkeypatch.setattr("mlx_adapters.adapters.inspecting.compare", lambda *_, **__: compared)
    shown, _ = run("compare", "x", "y")
    assert shown.count("\n") < 20
    assert re.search(r"^30 × model\.layers\.\*\.mlp\.up_proj +1 to 30 +2 +0\.71 to 1$", shown, re.M)
    *farthest, alone = [line.split() for line in shown.partition("Most different")[2].splitlines()[2:]]
    assert [row[0].split(".")[2] for row in farthest] == ["29", "29", "28", "28", "27"] and alone[3:5] == [
        "2",
        "layers:",
    ]
    assert run("compare", "x", "y", "--layers")[0].count("\n") > 60
    assert len(as_json(run("compare", "x", "y", "--json"))["layers"]) == 60


def test_verify_exits_with_1_if_anything_is_wrong(run, base):
    make_run(base, "sql")
    make_mlx_lm_folder(base, registry.adapter_folder("plain"))
    out, _ = run("verify", "--all")
    assert out.count(": sound") == 2 and "fits" in out
    folder = registry.adapter_folder("sql")
    (folder / "adapters.safetensors").unlink()  # a link to the checkpoint, which stays whole
    (folder / "adapters.safetensors").write_bytes((folder / "0000300_adapters.safetensors").read_bytes())
    out, _ = run("verify", "sql", status=1)
    assert "not the file that was recorded" in out and "it is checkpoint 300: 'use sql@300'" in out
    run("use", "sql@300")
    run("verify", "sql")
    assert as_json(run("verify", "--all", "--json"))["sound"] is True
    run("verify", status=2)
    run("verify", "sql", "--all", status=2)


def test_verify_holds_the_adapter_against_its_base(run, base, tiny_model):
    registry.register(make_adapter(base), "sql")
    other = tiny_model("llama", hidden_size=96)
    assert "does not fit" in run("verify", "sql", "--base", other, status=1)[0]
    assert "other weights" in run("verify", "sql", "--base", tiny_model("llama", seed=5), status=1)[0]
    adapter = make_adapter(base)
    adapter.metadata["base"] = {"name": "nobody/here"}
    registry.register(adapter, "far")
    assert "base: not checked: 'nobody/here' is not on this machine yet" in run("verify", "far")[0]


READERS = (
    "show bad",
    "show {folder}",
    "verify bad",
    "add {folder} --name newbad",
    "fuse bad {out} --no-check",
    "generate hello --base {base} --adapter bad",
    "merge good bad --name new",
    "export-peft bad {out}",
    "compare good bad",
    "scale bad 2 --name new",
    "subtract good bad --name new",
    "interpolate bad good --name new",
    "pack bad {out}.tar.gz",
    "publish bad user/bad --dry-run",
    "card bad",
    "verify --all",
    "prune bad --keep-last 0 --yes",
)


@pytest.mark.parametrize("damage", ["truncated", "random", "nan", "empty", "huge header", "no weights"])
def test_every_command_that_reads_a_damaged_adapter_says_so_and_writes_nothing(run, base, tmp_path, damage):
    write_adapter(make_adapter(base), registry.adapter_folder("good"))
    folder = write_adapter(make_adapter(base, name="bad"), registry.adapter_folder("bad"))
    path = folder / "adapters.safetensors"
    whole = path.read_bytes()
    if damage == "nan":
        tensors = {name: array * mx.nan for name, array in make_adapter(base).weights.items()}
        tensor_files.write_safetensors(path, tensors)
    elif damage == "no weights":
        path.unlink()
    else:
        path.write_bytes(
            {
                "truncated": whole[:-9],
                "random": bytes(np.random.default_rng(0).bytes(len(whole))),
                "empty": b"",
                "huge header": b"\xff" * 7 + b"\x7f{}",
            }[damage]
        )
    before = {p: p.stat().st_mtime_ns for p in registry.adapters_folder().rglob("*")}
    for command in READERS:
        words = command.format(folder=folder, out=tmp_path / "out", base=base).split()
        out, err = run(*words, status=0 if words[0] == "prune" else 1)
        assert "bad" in out + err
    assert {p: p.stat().st_mtime_ns for p in registry.adapters_folder().rglob("*")} == before
    assert not list(tmp_path.glob("out*"))


def test_managing_by_commands(run, base, monkeypatch):
    make_run(base, "sql")
    assert "'sql' is now 'queries'" in run("rename", "sql", "queries")[0]
    assert as_json(run("tag", "queries", "prod", "v1", "--json"))["tags"] == ["prod", "v1"]
    assert "v1" in run("tag", "queries", "--remove", "prod")[0]
    assert run("tag", "queries")[0].strip() == "queries: v1"
    assert as_json(run("use", "queries@100", "--json"))["iteration"] == 100
    plan = as_json(run("prune", "queries", "--keep-last", "0", "--no-keep-best", "--dry-run", "--json"))
    assert plan["pruned"][0]["iterations"] == [200, 300]
    out, err = run("prune", "--all", "--yes")
    assert "nothing to remove" in out and "0 checkpoints" in err
    run("prune", status=2)
    run("remove", "queries", "queris", "--yes", status=1)
    assert registry.names() == ["queries"], "a wrong name among several removes nothing"
    for wrong in ("queries@150", "queries@100", "./queries"):  # not there, the one in use, not in the registry
        run("remove", "queries@200", "queries@200", wrong, "--yes", status=2 if wrong != "queries@150" else 1)
    assert registry.read_entry(registry.adapter_folder("queries")).iterations == (100, 200, 300)
    for answer, status in (("", 2), ("n\n", 1), ("y\n", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        run("remove", "queries@200", status=status)
        assert (200 in registry.read_entry(registry.adapter_folder("queries")).iterations) == (status > 0)
    twice = ("queries", "Queries", "queries@300", "queries@300")
    assert [r["whole"] for r in as_json(run("remove", *twice, "--yes", "--json"))["removed"]] == [False, True]
    assert registry.names() == []


def test_packing_by_commands(run, base, tmp_path):
    make_run(base, "sql")
    packed = as_json(run("pack", "sql", tmp_path / "sql.tar.gz", "--checkpoints", "--json"))
    assert len(packed["files"]) == 6
    assert "with 3 checkpoints as 'copy'" in run("add", tmp_path / "sql.tar.gz", "--name", "copy")[0]
    assert "more than it may" in run("add", tmp_path / "sql.tar.gz", "--name", "z", "--max-size", "1kB", status=1)[1]
    run("add", tmp_path / "sql.tar.gz", "--max-size", "huge", status=2)
    assert "already exists" in run("pack", "sql", tmp_path / "sql.tar.gz", status=1)[1]
    assert as_json(run("add", tmp_path / "sql.tar.gz", "--out", tmp_path / "o", "--json"))["name"] is None


def test_init_writes_a_config_that_train_takes(run, tmp_path):
    folder = tmp_path / "project"
    assert as_json(run("init", folder, "--json"))["files"] == [".gitattributes", ".gitignore", "train.yaml"]
    settings = read_yaml(folder / "train.yaml")
    assert from_mapping(LoraConfig, settings["lora"]) and from_mapping(TrainConfig, settings["training"])
    assert "*.safetensors filter=lfs" in (folder / ".gitattributes").read_text()
    (folder / "train.yaml").write_text("mine")
    (folder / ".gitignore").unlink()
    run("init", folder, status=1)
    assert (folder / "train.yaml").read_text() == "mine" and not (folder / ".gitignore").exists()
    run("init", folder, "--overwrite")


def test_merging_by_commands(run, base):
    registry.register(make_adapter(base, LLAMA, name="x"), "x")
    registry.register(make_adapter(base, LLAMA[:2], seed=1, rank=2, name="y"), "y")
    out, _ = run("merge", "x", "y", "--weight", "0.7", "--weight", "-0.3", "--name", "exact")
    assert "exact: rank 6" in out
    assert "cat: 0.7 · x + -0.3 · y" in run("show", "exact")[0]
    out, _ = run("merge", "x", "y", "--method", "svd", "--rank", "auto", "--energy", "0.8", "--name", "small")
    assert "energy kept: " in out and "at least" in out
    done = as_json(
        run("merge", "x", "x", "--method", "dare-ties", "--density", "0.5", "--seed", "3", "--name", "d", "--json")
    )
    assert done["metadata"]["merge"]["seed"] == 3
    run("subtract", "x", "y", "--weight", "0.5", "--name", "minus")
    run("scale", "x", "-0.5", "--name", "turned")
    assert lookup.load_adapter("turned").config.scale == -1.0
    out, _ = run("interpolate", "x", "y", "--steps", "3", "--name", "way")
    assert "way-0.5" in out and {"way-0", "way-0.5", "way-1"} <= set(registry.names())
    run("merge", "x", "y", "--name", "mix", "--name-template", "{task}-{version}")
    assert "mix-v1" in registry.names()
    for wrong, status in (
        (["merge", "x", "y", "--method", "ties", "--name", "n"], 2),
        (["merge", "x", "y", "--rank", "0", "--name", "n"], 2),
        (["merge", "x", "y", "--method", "linear", "--name", "n"], 1),
        (["merge", "x", "y", "--name", "exact"], 1),
        (["merge", "x", "y"], 2),
        (["merge", "x", "nobody", "--name", "n"], 1),
        (["scale", "x", "0", "--name", "n"], 2),
        (["interpolate", "x", "y"], 2),
        (["interpolate", "x", "y", "--best", "--name", "n"], 2),
        (["extract", base, base, "--name", "n"], 1),
        (["extract", base, "./nowhere", "--name", "n"], 1),
    ):
        _, err = run(*wrong, status=status)
        assert "Error" in err
    assert "n" not in registry.names()


def test_extract_by_command(run, base, tiny_model):
    tuned = tiny_model("llama", seed=3)
    out, err = run("extract", tuned, base, "--rank", "2", "--target-modules", "q_proj", "--name", "drawn")
    assert "ENERGY KEPT" in out and "drawn: rank 2" in out and "not in the adapter" in err


def test_losses_on_data(run, base, tmp_path):
    for name, seed in (("x", 0), ("y", 1)):
        registry.register(make_adapter(base, LLAMA, seed=seed, name=name), name)
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("course", "student", "title")]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    points = as_json(run("interpolate", "x", "y", "--data", tmp_path, "--name", "w", "--best", "--json"))["points"]
    best = min(points, key=lambda point: point["loss"])
    assert [point["name"] for point in points].count("w") == 1 and best["name"] == "w"
    for name, order in (("v", ["x", "y"]), ("u", ["y", "x"])):  # what to try next is the best, not the first
        at = best["t"] if order == ["x", "y"] else 1 - best["t"]
        _, err = run("interpolate", *order, "--data", tmp_path, "--name", name)
        assert f"--adapter {name}-{at:g}\n" in err
    losses = as_json(run("compare", "x", "y", "--data", tmp_path, "--json"))["losses"]
    assert losses == pytest.approx([points[0]["loss"], points[-1]["loss"]], rel=1e-5)
    model = load_model(resolve_base(base), lookup.load_adapter("w"))
    by_hand = []
    for row in judged_rows(read_data(tmp_path).rows("test"), model, 2048):
        logits = np.array(model.logits(row.tokens[:-1].tolist()), dtype=np.float64)
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        by_hand += [-log[i - 1, row.tokens[i]] for i in np.flatnonzero(row.trained)]
    assert best["loss"] == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_a_question_that_nobody_can_answer_names_yes(run, base, monkeypatch):
    make_run(base, "sql", losses=[(100, 2.0), (200, 1.0), (300, 1.5)])
    for command in (("remove", "sql"), ("prune", "sql", "--keep-last", "0")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        _, err = run(*command, status=2)
        assert "nobody can answer here: pass --yes" in err and "Interrupted" not in err
        monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
        _, err = run(*command, status=1)
        assert "Nothing was removed." in err
    assert lookup.load_adapter("sql@100").iteration == 100
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    run("remove", "sql")
    assert registry.names() == []


@pytest.mark.parametrize("option", ["-q", "--quiet", "--debug", "--home", "--version"])
def test_a_global_option_after_the_command_is_told_to_go_before(run, option):
    for command in ("list", "train", "data check"):
        _, err = run(*command.split(), option, status=2)
        assert f"{option} goes before the command: mlx-adapters {option} {command.split()[0]}" in err
    _, err = run("list", "--qiet", status=2)
    assert "before the command" not in err
