"""`train` on the command line: flags, config file, resume, log, reports and errors."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers.training_tools import write_data

from mlx_adapters import LoraConfig, TrainConfig
from mlx_adapters.cli import cli
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.config.training import DPO, KTO, ORPO, SimPO
from mlx_adapters.errors import AdapterError, ConfigError, StorageError
from mlx_adapters.optimization.step import TrainStep
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage import files


@pytest.fixture
def run(tiny_model, tmp_path):
    data = write_data(tmp_path / "data")

    def run(*arguments: str, new: bool = True):
        start = [str(tiny_model()), "--data", str(data), "--name", "run", "--batch-size", "2"] if new else []
        return CliRunner().invoke(cli, ["train", *start, *arguments], catch_exceptions=True)

    run.data = data
    return run


def test_train_then_resume_with_more_iterations(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mlx-adapters", "train", "..."])
    log = tmp_path / "log.jsonl"
    done = run("--iterations", "4", "--rank", "4", "--rank", "v_proj=2", "--alpha", "8", "--rslora", "--log", str(log))
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("run@4, validation loss") and "Predicted peak memory" in done.stderr
    config = files.read_json(adapter_folder("run") / "adapter_config.json")
    assert config["lora_parameters"]["rank"] == 4 and config["lora_parameters"]["scale"] == 4.0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"TrainReport", "ValidationReport", "CheckpointSaved"} <= {e["event"] for e in events}
    assert files.read_json(adapter_folder("run") / "adapter_metadata.json")["command"].startswith("mlx-adapters")
    again = run("--resume", "run", "--iterations", "14", "--json", new=False)
    assert json.loads(again.stdout)["final"]["iteration"] == 14
    assert "Predicted peak memory" in again.stderr
    assert (
        "s per iteration, " in again.stderr and "for the remaining 4." in again.stderr
    )  # of 10: 3 to warm up, 3 timed
    finished = run("--resume", "run", new=False)
    assert isinstance(finished.exception, AdapterError) and "has finished" in finished.exception.message


def test_a_validation_loss_of_nothing_is_one(run, monkeypatch):
    """As of answers that are all told apart, with the loss `hinge`."""
    monkeypatch.setattr(TrainStep, "evaluate", lambda *_: (0.0, {}))
    result = run("--name", "perfect", "--iterations", "2", "--eval-every", "1")
    assert "perfect@1, validation loss 0;" in result.output


def test_a_run_is_named_by_a_template(run):
    done = run("--iterations", "2", "--rank", "2", "--name-template", "{task}-r{rank}-{version}", "--json")
    assert done.exit_code == 0, done.output
    assert adapter_folder("run-r2-v1").is_dir() and not adapter_folder("run").exists()
    template = ("--name-template", "{task}-r{rank}-{version}")
    done = run("--iterations", "2", "--init-from", "run-r2-v1", *template)  # the rank is that of the other adapter
    assert done.exit_code == 0 and adapter_folder("run-r2-v2").is_dir(), done.output


@pytest.mark.parametrize("ignored", ["--name x", "--name-template {task}", "--init-from x", "--overwrite"])
def test_what_resuming_would_ignore_is_refused(run, ignored):
    done = run("--resume", "run", *ignored.split(), new=False)
    assert done.exit_code == 2 and f"{ignored.split()[0]} does not go with --resume" in done.stderr


def test_a_flag_wins_over_the_config_file(run, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("lora: {rank: 3, scale: 1.5}\ntraining: {iterations: 9, learning_rate: 1e-3, mask_prompt: true}\n")
    shown = yaml.safe_load(run("--config", str(file), "--iterations", "5", "--print-config").stdout)
    assert shown["lora"]["rank"] == 3 and shown["lora"]["scale"] == 1.5
    assert shown["training"]["iterations"] == 5 and shown["training"]["learning_rate"] == 1e-3
    assert shown["training"]["mask_prompt"] is True and shown["name"] == "run"
    file.write_text(yaml.safe_dump(shown))
    assert yaml.safe_load(run("--config", str(file), "--print-config", new=False).stdout) == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "x"], "neither a number nor NAME=NUMBER"),
        (["--num-layers", "some"], "neither a number nor 'all'"),
        (["--num-layers", "0"], "num_layers must be at least 1, not 0"),
        (["--rank", "9999999999"], "rank must be at most 65,536, not 9999999999"),
        (["--grad-accumulation", "9" * 22], "grad_accumulation must be at most 1,000,000"),
        (["--rank", "v_proj=9999999999"], "the rank of 'v_proj' must be at most 65,536"),
        (["--alpha", "8", "--scale", "1"], "not both"),
        (["--rslora"], "--rslora needs --alpha"),
        (["--fuse-aware-mode", "affine"], "need --fuse-aware"),
        (["--fuse-aware", "7"], "has no 7 bits"),
        (["--learning-rate", "-1"], "learning_rate must be a number above 0"),
        (["--optimizer", "adam", "--weight-decay", "1"], "adam has no weight decay"),
        (["--last-turn-only"], "needs mask_prompt"),
        (["--warmup", "700"], "warmup must be shorter"),
    ],
)
def test_wrong_settings_are_config_errors_and_leave_nothing(run, arguments, message):
    done = run(*arguments)
    assert isinstance(done.exception, ConfigError) and message in done.exception.message
    assert not adapter_folder("run").exists()


@pytest.mark.parametrize(("bits", "group"), [("4", 32), ("3", 64)])
def test_fuse_aware_takes_the_grouping_that_a_fuse_will_take(run, tiny_model, tmp_path, bits, group):
    base = tiny_model("llama", bits=4, group_size=32)
    file = tmp_path / "train.yaml"
    file.write_text(f"base: {base}\ntraining: {{fuse_aware: {{bits: {bits}}}}}\n")
    for arguments in (["--config", str(file)], [str(base), "--data", "d", "--name", "n", "--fuse-aware", bits]):
        shown = yaml.safe_load(run(*arguments, "--print-config", new=False).stdout)
        assert shown["training"]["fuse_aware"] == {"bits": int(bits), "group_size": group, "mode": "affine"}


def test_unknown_keys_in_the_config_file_are_named(run, tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("trainig: {}\n")
    done = run("--config", str(file))
    assert "Unknown setting 'trainig'" in done.exception.message and "training" in done.exception.hint
    file.write_text("training: {iteration: 3}\n")
    assert "Unknown setting 'iteration'" in run("--config", str(file)).exception.message
    for line, hint in (
        ("iterations: 3", "it goes below 'training:', indented."),
        ("rank: 8", "it goes below 'lora:', indented."),
        ("model: m", "mlx-lm's configs name it so; it may hold: base, "),
        ("base_model: m", "did you mean 'base'? it may hold: "),
    ):
        file.write_text(line + "\n")
        assert run("--config", str(file)).exception.hint.startswith(hint)


# Option -> (what is typed, the settings that it changes). What the settings do: test_training_options.py.
PAIR = ["--prompt-column", "question", "--completion-column", "reply"]
OBJECTIVES = {
    "--objective": ("--objective orpo", ORPO()),
    "--beta": ("--objective simpo --beta 3", SimPO(beta=3.0)),
    "--loss": ("--objective dpo --loss ipo", DPO(loss="ipo")),
    "--label-smoothing": ("--objective dpo --label-smoothing 0.1", DPO(label_smoothing=0.1)),
    "--length-normalization": ("--objective dpo --length-normalization", DPO(length_normalization=True)),
    "--gamma": ("--objective simpo --gamma 0.5", SimPO(gamma=0.5)),
    "--desirable-weight": ("--objective kto --desirable-weight 2", KTO(desirable_weight=2.0)),
    "--undesirable-weight": ("--objective kto --undesirable-weight 2", KTO(undesirable_weight=2.0)),
}
SETTINGS = {
    "--rank": (["--rank", "3", "--rank", "v_proj=5"], {"lora.rank": 3, "lora.ranks": {"v_proj": 5}}),
    "--scale": (["--scale", "3"], {"lora.scale": 3.0}),
    "--alpha": (["--alpha", "32"], {"lora.scale": 4.0}),
    "--rslora": (["--alpha", "32", "--rslora", "--rank", "16"], {"lora.rank": 16, "lora.scale": 8.0}),
    "--dropout": (["--dropout", "0.1"], {"lora.dropout": 0.1}),
    "--type": (["--type", "dora"], {"lora.type": "dora"}),
    "--target-modules": (["--target-modules", "q_proj,v_proj"], {"lora.target_modules": ["q_proj", "v_proj"]}),
    "--num-layers": (["--num-layers", "1"], {"lora.num_layers": 1}),
    "--iterations": (["--iterations", "7"], {"training.iterations": 7}),
    "--batch-size": (["--batch-size", "3"], {"training.batch_size": 3}),
    "--learning-rate": (["--learning-rate", "1e-3"], {"training.learning_rate": 1e-3}),
    "--schedule": (["--schedule", "linear"], {"training.schedule": "linear"}),
    "--warmup": (["--warmup", "5"], {"training.warmup": 5}),
    "--optimizer": (["--optimizer", "muon"], {"training.optimizer": "muon"}),
    "--weight-decay": (["--weight-decay", "0.1"], {"training.weight_decay": 0.1}),
    "--lora-plus-ratio": (["--lora-plus-ratio", "4"], {"training.lora_plus_ratio": 4.0}),
    "--max-grad-norm": (["--max-grad-norm", "1"], {"training.max_grad_norm": 1.0}),
    "--grad-accumulation": (["--grad-accumulation", "2"], {"training.grad_accumulation": 2}),
    "--max-seq-length": (["--max-seq-length", "64"], {"training.max_seq_length": 64}),
    **{
        flag: ([*typed.split()], {"training.objective": to_mapping(made)}) for flag, (typed, made) in OBJECTIVES.items()
    },
    "--chunked-loss": (["--chunked-loss", "off"], {"training.chunked_loss": "off"}),
    "--eval-every": (["--eval-every", "9"], {"training.eval_every": 9}),
    "--eval-batches": (["--eval-batches", "2"], {"training.eval_batches": 2}),
    "--report-every": (["--report-every", "3"], {"training.report_every": 3}),
    "--save-every": (["--save-every", "5"], {"training.save_every": 5}),
    "--save-every-minutes": (["--save-every-minutes", "2.5"], {"training.save_every_minutes": 2.5}),
    "--keep": (["--keep", "2"], {"training.keep": 2}),
    "--early-stop": (["--early-stop", "2"], {"training.early_stop": 2}),
    "--seed": (["--seed", "5"], {"training.seed": 5}),
    "--dtype": (["--dtype", "bfloat16"], {"training.dtype": "bfloat16"}),
    "--mask-prompt": (["--mask-prompt"], {"training.mask_prompt": True}),
    "--last-turn-only": (
        ["--mask-prompt", "--last-turn-only"],
        {"training.mask_prompt": True, "training.last_turn_only": True},
    ),
    "--packing": (["--packing"], {"training.packing": True}),
    "--grad-checkpoint": (["--grad-checkpoint"], {"training.grad_checkpoint": True}),
    "--fuse-aware": (["--fuse-aware", "3"], {"training.fuse_aware": {"bits": 3, "group_size": 64, "mode": "affine"}}),
    "--fuse-aware-group-size": (
        ["--fuse-aware", "4", "--fuse-aware-group-size", "32"],
        {"training.fuse_aware": {"bits": 4, "group_size": 32, "mode": "affine"}},
    ),
    "--fuse-aware-mode": (
        ["--fuse-aware", "4", "--fuse-aware-group-size", "32", "--fuse-aware-mode", "mxfp4"],
        {"training.fuse_aware": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
    ),
    "--fuse-aware-from": (
        ["--fuse-aware", "4", "--fuse-aware-from", "8"],
        {"training.fuse_aware": {"bits": 4, "group_size": 64, "mode": "affine"}, "training.fuse_aware_from": 8},
    ),
    "--schedule-iterations": (
        ["--schedule", "cosine", "--schedule-iterations", "9"],
        {"training.schedule": "cosine", "training.schedule_iterations": 9},
    ),
    "--valid-fraction": (["--valid-fraction", "0.1"], {"training.valid_fraction": 0.1}),
    "--prompt-column": (PAIR, {"training.prompt_column": "question", "training.completion_column": "reply"}),
    "--completion-column": (PAIR, {"training.prompt_column": "question", "training.completion_column": "reply"}),
    "--text-column": (["--text-column", "body"], {"training.text_column": "body"}),
    "--messages-column": (["--messages-column", "talk"], {"training.messages_column": "talk"}),
    "--chat-template": (["--chat-template", __file__], {"training.chat_template": Path(__file__).read_text()}),
    "--chat-template-arg": (
        ["--chat-template-arg", "enable_thinking=False", "--chat-template-arg", "style=brief"],
        {"training.chat_template_args": {"enable_thinking": False, "style": "brief"}},
    ),
    "--init": (["--init", "pissa"], {"lora.init": "pissa"}),
    "--original": (["--init", "loftq", "--original", "a/b"], {"lora.init": "loftq", "lora.original": "a/b"}),
    "--epochs": (["--epochs", "1.5"], {"training.epochs": 1.5}),
    "--memory": (["--memory", "mlp"], {"training.memory": "mlp"}),
    "--memory-limit": (["--memory-limit", "12GB"], {"training.memory_limit": "12GB"}),
    "--data": (["--data", "elsewhere"], {"data": "elsewhere"}),
    "--name": (["--name", "other"], {"name": "other"}),
}
# The other options, and the tests of this file that hold them to their effect.
ACTIONS = {
    "--name-template": "test_a_run_is_named_by_a_template",
    "--config": "test_a_flag_wins_over_the_config_file",
    "--print-config": "test_a_flag_wins_over_the_config_file",
    "--resume": "test_train_then_resume_with_more_iterations",
    "--log": "test_train_then_resume_with_more_iterations",
    "--json": "test_train_then_resume_with_more_iterations",
    "--overwrite": "test_overwrite_and_init_from",
    "--init-from": "test_overwrite_and_init_from",
    "--report-to": "test_reports_go_where_they_are_asked_to",
}


def settings(run, *arguments: str) -> dict:
    """The settings by dotted name."""
    shown = yaml.safe_load(run(*arguments, "--print-config").stdout)
    nested = {f"{group}.{key}": v for group in ("lora", "training") for key, v in shown.pop(group).items()}
    return shown | nested


def test_every_option_of_train_changes_its_setting_and_no_other(run):
    plain = settings(run)
    for option, (typed, expected) in SETTINGS.items():
        changed = {key: value for key, value in settings(run, *typed).items() if plain.get(key) != value}
        assert option in typed and changed == expected


@pytest.mark.parametrize("typed", ["--beta 0.2", "--objective orpo --gamma 0.5"])
def test_a_setting_that_the_objective_does_not_have_is_told_by_its_flag(typed, tmp_path):
    given = ["train", "demo", "--data", str(tmp_path), "--name", "x", *typed.split()]
    error = CliRunner().invoke(cli, given, standalone_mode=False).exception
    flag, has = ("--beta", "dpo|orpo|simpo|kto") if "beta" in typed else ("--gamma", "simpo")
    assert isinstance(error, ConfigError) and str(error).endswith(f" has no {flag}.") and has in error.hint


def test_no_option_is_forgotten_here():
    options = {name for p in cli.get_command(None, "train").params for name in p.opts if name.startswith("--")}
    elsewhere = {
        "--trust-remote-code",
        "--reference",
        "--dry-run",
    }  # tests/models/test_own_code.py, tests/training/test_preferences.py, tests/cli/test_small_data.py
    assert options == SETTINGS.keys() | ACTIONS.keys() | elsewhere
    assert all(callable(globals()[test]) for test in ACTIONS.values())


ODD_VALUES = [
    *("4", "-1", "1.5", "1e400", ".nan", "true", "2026-01-01", "12:30", "word", "''", "[]", "[1, [2]]", "{}"),
    *("{1: 2}", "{bits: 4}", "{bits: 7}", "{bits: x}", "!!binary aGk=", "!!set {a}", "[q_proj, 1]"),
]


@pytest.mark.parametrize("value", ODD_VALUES)
def test_whatever_a_config_file_holds_is_settled_in_a_sentence(run, value, tmp_path):
    path = tmp_path / "config.yaml"
    groups = {"lora": LoraConfig, "training": TrainConfig}
    lines = [f"{key}: {value}" for key in ("base", "data", "name", *groups)]
    lines += [f"{group}: {{{f.name}: {value}}}" for group, c in groups.items() for f in dataclasses.fields(c)]
    lines += [f"lora: {{? {value} : 1}}", f"? {value}\n: 1"]
    for line in (*lines, f"training: {{seed: {'9' * 400}}}"):
        path.write_text(line + "\n")
        done = CliRunner().invoke(cli, ["train", "--config", str(path), "--print-config"])
        assert done.exit_code == 0 or isinstance(done.exception, ConfigError), f"{line}: {done.exception!r}"
        assert done.exit_code == 0 or "<class" not in f"{done.exception.message}{done.exception.hint}"


@pytest.mark.parametrize(
    ("line", "told", "hint"),
    [
        ("name: 2026-01-01", "'name' in the config file must be text, not 2026-01-01", "name: '...'"),
        ("data: [a, b]", "'data' in the config file must be text", "in quotes"),
        ("training: {fuse_aware: x}", "fuse_aware cannot be 'x'", "a number of bits"),
        ("training: {fuse_aware: {bits: x}}", "'bits' in fuse_aware cannot be 'x'", "a whole number"),
        ("training: {seed: 18446744073709551616}", "seed must be below 2", ""),
        ("lora: false", "'lora' in the config file must hold 'key: value' lines", ""),
    ],
)
def test_a_config_file_of_wrong_types_says_what_is_right(run, line, told, hint, tmp_path):
    (tmp_path / "config.yaml").write_text(line + "\n")
    done = CliRunner().invoke(cli, ["train", "base", "--config", str(tmp_path / "config.yaml"), "--print-config"])
    assert isinstance(done.exception, ConfigError) and told in done.exception.message
    assert hint in (done.exception.hint or "")


def test_overwrite_and_init_from(run):
    assert run("--iterations", "2", "--rank", "4").exit_code == 0
    assert "already exists" in run("--iterations", "3").exception.message
    assert run("--iterations", "3", "--rank", "4", "--overwrite").stdout.startswith("run@3")
    assert run("--iterations", "1", "--init-from", "run", "--name", "next").exit_code == 0
    first, second = (files.read_json(adapter_folder(name) / "adapter_metadata.json") for name in ("run", "next"))
    assert second["rank"] == 4 and second["validation_losses"][0][1] == pytest.approx(first["final_validation_loss"])


@pytest.mark.parametrize("service", ["wandb", "trackio", "tensorboard"])
def test_reports_go_where_they_are_asked_to(run, monkeypatch, service, tmp_path):
    seen = []

    class SummaryWriter:
        def __init__(self, logdir=None):
            seen.append(Path(logdir).name)

        def add_scalar(self, tag, scalar_value, global_step=None):
            seen.append((global_step, tag))

        def close(self):
            seen.append("finished")

    def init(project=None, *, name=None, config=None):
        assert project == "mlx_adapters" and config["rank"] == 8 and config["iterations"] == 2
        seen.append(name)

    def log(data, step=None):
        seen.extend((step, key) for key in data)

    fake = types.SimpleNamespace(
        init=init, log=log, finish=lambda: seen.append("finished"), SummaryWriter=SummaryWriter
    )
    monkeypatch.setitem(sys.modules, "tensorboardX" if service == "tensorboard" else service, fake)
    ours = ["--iterations", "2", "--report-every", "1", "--report-to", service]
    assert run(*ours).exit_code == 0
    assert seen[0] == "run" and (0, "validation_loss") in seen and seen[-1] == "finished"
    assert [s[0] for s in seen if "train_loss" in s] == [1, 2]
    seen.clear()
    assert "already exists" in run(*ours).exception.message and not seen  # a refused run is not reported
    place = tmp_path / "place"
    assert run(*ours, "--name", str(place)).exit_code == 0 and seen[0] == "place"
    monkeypatch.setattr("mlx_adapters.training.loop.Loop._step", lambda *a: 1 / 0)
    seen.clear()
    assert run(*ours, "--overwrite").exit_code == 1 and seen[-1] == "finished"  # also after a crash


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("api_key not configured\n(no-tty)."), SystemExit(1), OSError()])
def test_a_report_that_fails_is_one_warning_and_the_run_goes_on(run, monkeypatch, fails, error):
    calls = []

    def call(name):
        calls.append(name)
        if name == fails:
            raise error

    fake = types.SimpleNamespace(
        init=lambda **k: call("init"), log=lambda *a, **k: call("log"), finish=lambda: call("finish")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    done = run("--iterations", "3", "--report-every", "1", "--report-to", "wandb")
    assert done.exit_code == 0 and done.stdout.startswith("run@") and "iteration 3/3" in done.stderr
    assert done.stderr.count("The report to wandb failed") == 1
    assert calls.count(fails) == 1 and (fails == "init") != ("finish" in calls)


def test_a_log_that_cannot_be_written_is_told_before_or_once(run, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--iterations", "1", "--log", str(tmp_path / "file" / "log"))
    assert isinstance(done.exception, StorageError) and not adapter_folder("run").exists()
    if not os.path.exists("/dev/full"):  # Linux's device
        return
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "log").symlink_to("/dev/full")
    done = run("--iterations", "2", "--report-every", "1", "--log", str(tmp_path / "gone" / "log"))
    assert done.exit_code == 0 and done.stderr.count("the run goes on without it") == 1


@pytest.mark.parametrize("package", ["wandb", "trackio", "tensorboardX"])
def test_a_missing_reporting_package_is_told_before_anything_begins(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = run("--report-to", package.removesuffix("X").lower())
    assert isinstance(done.exception, ConfigError) and f"needs the package '{package}'" in done.exception.message
    assert done.exception.hint == f"pip install {package}." and not adapter_folder("run").exists()


def test_a_run_that_will_hardly_fit_says_so(run, monkeypatch):
    from mlx_adapters.training import forecast

    monkeypatch.setattr(forecast, "usable_memory_bytes", lambda: 1000)
    done = run("--iterations", "1")
    assert done.exit_code == 0 and "This will hardly fit" in done.stderr


def test_data_commands(run, tiny_model, tmp_path):
    check = CliRunner().invoke(cli, ["data", "check", str(run.data), "--base", str(tiny_model()), "--mask-prompt"])
    assert check.exit_code == 0 and "[[SELECT title" in check.stdout and "IN TRAIN TOO" in check.stdout
    long = tmp_path / "long.jsonl"
    turns = [{"role": role, "content": "word " * 200} for role in ("user", "assistant") * 7]
    long.write_text(json.dumps({"messages": turns}) + "\n")
    check = CliRunner().invoke(
        cli, ["data", "check", str(long), "--base", str(tiny_model()), "--mask-prompt", "--max-seq-length", "100000"]
    )
    assert len(check.stdout) < 9000 and "characters more …" in check.stdout and "parts more …" in check.stdout
    assert check.stdout.count("[[") == check.stdout.count("]]") > 5
    split = ["data", "split", str(run.data / "train.jsonl"), str(tmp_path / "out"), "--json"]
    counts = json.loads(CliRunner().invoke(cli, split).stdout)
    assert counts["train"] + counts["valid"] + counts["test"] == 13
