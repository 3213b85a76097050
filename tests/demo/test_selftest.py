"""The self-tests pass here, and each notices its fault."""

import contextlib
import json
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_adapters.cli import cli
from mlx_adapters.demo import arithmetic, products, selftest, surroundings
from mlx_adapters.demo.arithmetic import Numbers
from mlx_adapters.demo.products import Products
from mlx_adapters.errors import StorageError
from mlx_adapters.models.model import Model
from mlx_adapters.optimization.step import TrainStep
from mlx_adapters.system.machine import on_gpu


def test_the_block_says_what_was_checked_and_leaves_nothing(home):
    shown = CliRunner().invoke(cli, ["env", "--check"])
    failed = [line for line in shown.stdout.splitlines() if "FAILED" in line]
    if on_gpu():  # MLX's own products may be wrong there, and then it says so
        failed = [line for line in failed if not line.startswith("quantized layers")]
    else:
        assert shown.exit_code == 0, shown.output
    assert not failed
    for name in ("mlx ", "system", "device", "conditions", "gradient", "exact resume", "locks", "open files"):
        assert f"\n{name}" in f"\n{shown.stdout}"
    assert str(home) not in shown.stdout
    assert [path.name for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


@pytest.fixture
def one_precision(monkeypatch):
    """A CPU takes seconds for the products of each; all are tried where the block is looked at."""
    monkeypatch.setattr(products, "PRECISIONS", products.PRECISIONS[:1])


def test_one_document_and_status_1_when_a_check_fails_or_raises(monkeypatch, one_precision):
    monkeypatch.setattr(Numbers, "generation", lambda self: arithmetic.Outcome(False, "off"))
    monkeypatch.setattr(Numbers, "fused_bits", lambda self: 1 / 0)
    monkeypatch.setattr(surroundings, "home_locks", lambda: (Path.home() / "none").read_text())
    shown = CliRunner().invoke(cli, ["env", "--check", "--json"])
    report = json.loads(shown.stdout)
    failed = {check["name"]: check["seen"] for check in report["checks"] if not check["passed"]}
    assert shown.exit_code == 1 and report["passed"] is False and len(report["checks"]) == 9
    assert failed["generate"] == "off" and failed["fuse to 4 bits"].startswith("ZeroDivisionError: division by zero (")
    assert failed["locks"].startswith("FileNotFoundError: ") and str(Path.home()) not in shown.stdout
    assert "home" not in report["environment"]
    assert set(failed) == {"generate", "fuse to 4 bits", "locks"}
    assert report["environment"]["versions"]["mlx"] and "load_average" in report["conditions"]


@pytest.fixture
def checks(tmp_path):
    return Numbers(tmp_path)


def test_a_wrong_gradient_is_noticed(checks, monkeypatch):
    assert checks.gradient().passed
    true = TrainStep.gradient_of

    def too_long(self, *asked, **how):
        return {name: 1.1 * g for name, g in true(self, *asked, **how).items()}

    monkeypatch.setattr(TrainStep, "gradient_of", too_long)
    assert not checks.gradient().passed


def test_a_resume_that_is_not_exact_is_noticed(checks, monkeypatch):
    true = arithmetic.train

    def drifting(*arguments, training, resume=False, **options):
        return true(*arguments, training=training, resume=resume, **options) if not resume else None

    def another(reference):
        adapter = true_load(reference.replace("parts", "once"))
        drift = {name: w + 1e-6 for name, w in adapter.weights.items()}
        return adapter.with_weights(drift) if reference.startswith("parts") else adapter

    true_load = arithmetic.load_adapter
    monkeypatch.setattr(arithmetic, "train", drifting)
    monkeypatch.setattr(arithmetic, "load_adapter", another)
    outcome = checks.resume()
    assert not outcome.passed and "differ" in outcome.seen


def test_a_fuse_that_loses_the_adapter_is_noticed(checks, monkeypatch):
    true = arithmetic.fuse
    monkeypatch.setattr(
        arithmetic, "fuse", lambda base, adapter, out, **options: true(base, halved(adapter), out, **options)
    )
    assert not checks.fused_bits().passed
    assert not checks.generation().passed


def halved(adapter):
    return adapter.with_weights({name: 0.5 * w for name, w in adapter.weights.items()})


def test_a_wrong_product_of_a_quantized_layer_is_noticed(monkeypatch, one_precision):
    true = mx.quantized_matmul

    def wrong(x, *arguments, **options):
        y = true(x, *arguments, **options)
        return y if y.shape[-2] != 5 else mx.zeros_like(y)

    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    outcome = Products(apart=False).outcome(0)
    assert not outcome.passed and "QuantizedLinear 256x512" in outcome.seen


@pytest.mark.parametrize("seconds", [40, 0])
def test_products_that_take_long_are_tried_apart_and_named_when_time_is_up(seconds, monkeypatch):
    """As on CUDA, which compiles each. Of a process that is waited for one will do: a CPU takes seconds."""
    monkeypatch.setattr(products, "PRECISIONS", products.PRECISIONS[: 1 if seconds else 2])
    with contextlib.closing(Products(apart=True)) as tried:
        outcome = tried.outcome(time.perf_counter() + seconds)
    assert outcome.passed
    missing = "linear at 4 bits in 64s, router at 4 bits in 64s, experts at 4 bits in 64s, linear at 8 bits in 64s"
    if not seconds:
        assert outcome.seen.startswith("0 kinds, ")
        assert f"not tried, since MLX compiles each for long at first ({missing}" in outcome.seen
    elif not on_gpu():
        assert outcome.seen.startswith("3 kinds, largest error ") and "not tried" not in outcome.seen


def test_a_process_that_dies_is_no_pass(monkeypatch):
    monkeypatch.setattr(
        products, "_start", lambda _: subprocess.Popen(["sh", "-c", "kill -6 $$"], stdout=-1, text=True)
    )
    outcome = Products(apart=True).outcome(time.perf_counter() + 60)
    assert not outcome.passed and "ended with -6" in outcome.seen


def test_logits_that_depend_on_the_length_are_noticed(checks, monkeypatch):
    true = Model.logits
    calls = []

    def unsteady(self, ids):
        calls.append(len(ids))
        return true(self, ids) * (2 if len(calls) == 3 else 1)

    monkeypatch.setattr(Model, "logits", unsteady)
    assert not checks.generation().passed


def test_a_disk_without_locks_is_noticed(home, monkeypatch):
    home.mkdir()
    assert surroundings.home_locks().passed
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    assert not surroundings.home_locks().passed


def test_few_open_files_are_noticed(monkeypatch):
    monkeypatch.setattr(surroundings, "raise_open_files", lambda: 256)
    outcome = surroundings.open_files()
    assert not outcome.passed and outcome.seen == "up to 256 files"


def test_a_refused_full_flush_is_said_and_passes(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.F_FULLFSYNC", 51, raising=False)

    def refuse(*_):
        raise OSError(45, "Operation not supported")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    outcome = surroundings.flushed_writes(tmp_path)
    assert outcome.passed and "refuses F_FULLFSYNC" in outcome.seen
    monkeypatch.setattr("fcntl.fcntl", lambda *_: 0)
    assert surroundings.flushed_writes(tmp_path).seen == "F_FULLFSYNC"


def test_a_home_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StorageError, match="no folder to write in"):
        selftest.self_test()
