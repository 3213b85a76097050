"""Advice from synthetic reports with known answers, and memory forecasts against real models."""

import dataclasses
import json
import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from click.testing import CliRunner
from helpers.benchmarks import MB, fused_report, registered_adapter
from helpers.training_tools import write_data
from mlx.utils import tree_flatten

from mlx_adapters import FuseOptions, LoraConfig, TrainConfig, benchmark, fuse, train
from mlx_adapters.benchmarking import trials
from mlx_adapters.benchmarking.advice import advise
from mlx_adapters.benchmarking.schedule import BenchmarkConfig, Pace
from mlx_adapters.cli import cli
from mlx_adapters.cli.advise import PROBE, _forecast, _next, _roughly
from mlx_adapters.errors import ConfigError, FormatError, IncompatibleError, StorageError
from mlx_adapters.fusion.recipe import fused_here
from mlx_adapters.generation import memory
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage.files import write_json


def test_a_fused_model_that_keeps_the_fine_tune_and_is_faster_is_taken():
    advice = advise(fused_report((300, 220, 280, 300)), "sql")
    assert advice.choice == "f8" and "'f8'" in advice.decision  # f4 is faster, but lost 10 %
    words = "\n".join(advice.reasons)
    assert "'f8' loses 0.10%" in words and "'f4' loses 10.00%" in words and "more than the 1% allowed" in words
    assert advise(fused_report((300, 220, 280, 300)), "sql", tolerance=0.2).choice == "f4"


def test_a_report_without_figures_to_compare_is_refused():
    """As a hand-edited file has it: no two figures are of one round."""
    measured = fused_report((300, 220, 280, 300))
    runs = [dataclasses.replace(run, round=i) for i, run in enumerate(measured.runs)]
    with pytest.raises(FormatError, match="lacks figures"):
        advise(dataclasses.replace(measured, runs=tuple(runs)), "sql")


def test_an_adapter_that_could_not_be_measured_is_told_with_its_error():
    measured = fused_report((300, 220, 280, 300))
    runs = [dataclasses.replace(run, result={"error": "its base is gone"}) for run in measured.runs]
    with pytest.raises(ConfigError, match="'sql' could not be measured: its base is gone"):
        advise(dataclasses.replace(measured, runs=tuple(runs)), "sql")


def test_no_gain_means_no_fusing():
    advice = advise(fused_report((300, 300, 300, 300)), "sql")
    assert advice.choice == "sql" and "no fused variant was seen to decode faster" in advice.decision


def test_several_adapters_share_one_base():
    advice = advise(fused_report((300, 220, 280, 300)), "sql", adapters=10)
    assert advice.choice == "sql"
    assert advice.storage.as_adapters_bytes == 410 * MB
    assert advice.storage.fused_bytes == {"f8": 6000 * MB, "f4": 3500 * MB}
    assert "14.6 times as much" in advice.reasons[0] and "8.54 times as much" in advice.reasons[1]


def test_memory_decides():
    advice = advise(fused_report((300, 220, 280, 300)), "sql", memory_bytes=500 * MB)
    assert advice.choice == "sql" and "fits the memory" in advice.decision
    assert "Nothing fits" in advise(fused_report((300, 220, 280, 300)), "sql", memory_bytes=100 * MB).decision


def test_what_was_not_measured_is_not_believed():
    blind = dataclasses.replace(fused_report((300, 220, 280, 300)), quality={})
    advice = advise(blind, "sql")
    assert advice.choice == "sql" and any("was not measured" in reason for reason in advice.reasons)
    assert "is known to keep the fine-tune" in advice.decision and "memory" not in advice.decision


def test_speeds_come_with_their_figures():
    words = "\n".join(advise(fused_report((300, 220, 280, 300)), "sql").reasons)
    figure = r"2\d\d against (2|3)\d\d tok/s, \d+\.\d % (slower|faster) \["
    assert re.search(rf"'sql' against the base, decode at \d+ x 1: {figure}", words)
    assert re.search(rf"'f8' against the adapter, decode at \d+ x 1: {figure}", words)
    assert re.search(r"'f8' against the adapter, load: [\d.]+ against [\d.]+ s, ", words)


def test_unknown_adapter_or_batch():
    for options in ({"adapter": "base"}, {"adapter": "no"}, {"adapter": "sql", "batch": 4}):
        with pytest.raises(ConfigError):
            advise(fused_report((1, 1, 1, 1)), **options)


def test_advise_command_takes_a_saved_report(tmp_path):
    write_json(tmp_path / "report.json", fused_report((300, 220, 280, 300), scores=(0, 0.6, 0.6, 0.5)).to_json())
    shown = CliRunner().invoke(cli, ["advise", "sql", "--report", str(tmp_path / "report.json"), "--memory", "8"])
    assert (
        shown.exit_code == 0 and shown.stdout.startswith("Fuse: use 'f8'.") and "score 0.5 against 0.6" in shown.stdout
    )
    as_json = CliRunner().invoke(cli, ["advise", "sql", "--report", str(tmp_path / "report.json"), "--json"])
    assert json.loads(as_json.stdout)["advice"]["choice"] == "f8"


def test_advise_measures_base_adapter_and_fused_variants(tiny_model, monkeypatch):
    registered_adapter(tiny_model("llama"))
    asked = []

    def benchmark(variants, base, **options):
        asked.append((variants, base, options["batch"], options["max_rows"]))
        return fused_report((300, 220, 280, 300))

    monkeypatch.setattr("mlx_adapters.benchmarking.run.benchmark", benchmark)
    monkeypatch.setattr("mlx_adapters.cli.advise._forecast", lambda *_: "This takes a while.")
    shown = CliRunner().invoke(cli, ["advise", "sql", "--bits", "8", "--quality", "data"])
    assert shown.exit_code == 0, shown.output
    assert asked == [(["base", "sql", "fuse:sql:8"], None, 1, 50)]
    for option, value in (("--score", "exact"), ("--max-rows", "20")):  # no data of its own is here
        shown = CliRunner().invoke(cli, ["advise", "sql", option, value])
        assert shown.exit_code == 2 and f"{option} needs --quality" in shown.output and len(asked) == 1


def test_advise_foretells_how_long_it_takes(tiny_model, tmp_path, monkeypatch):
    """From one short process: 10 s of overhead, 2 of them the load, 0.1 s a token written, 1,000 a second read."""
    registered_adapter(tiny_model("llama"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(3 * ('{"text": "' + "a " * 100 + '"}\n'))
    result = {
        "process_seconds": 10 + 2 * 0.128 + 16 * 0.1,
        "load_seconds": 2.0,
        "weights_bytes": 4 * 60e6,
        "shapes": [{"prompt_tokens": 128, "trials": [{"ttft_seconds": 0.128, "decode_tps": 10.0}]}],
    }
    monkeypatch.setattr("mlx_adapters.benchmarking.run.run_worker", lambda *_: result)
    config = BenchmarkConfig(prompt_tokens=(1000,), decode_tokens=40, trials=2, rounds=3)
    pace = Pace.of(result, PROBE, 1e6)
    assert pace.process(config) == pytest.approx(10 + 2 + (1 + 0.8) + 2 * (1 + 4))
    assert pace.fusing(True, 5_000_000, 2000, 1000) == pytest.approx(2 + 3 + 4.5 * 2 + 5)
    assert pace.fusing(False, 5_000_000, 2000, 1000) == pytest.approx(2 + 3)
    said = _forecast(["base", "sql", "fuse:sql:4", "fuse:sql:8"], None, config, str(rows), 2)
    assert "measuring 5 min" in said and 12 * pace.process(config) == pytest.approx(286, abs=1)
    assert re.fullmatch(r"This takes about \d+ min: fusing (\d+ min|\d0 s), .*, judging 9 s\.", said)
    told = {0.02: "1 s", 1.2: "1 s", 7.6: "8 s", 31: "30 s", 54: "50 s", 56: "1 min", 100: "2 min", 3700: "1 h 2 min"}
    assert {seconds: _roughly(seconds) for seconds in told} == told
    monkeypatch.setattr("mlx_adapters.benchmarking.run.run_worker", lambda *_: {"error": "no memory"})
    assert _forecast(["base", "sql"], None, config, None, 2) == ""


def test_the_fuse_that_advise_ends_with_names_the_same_base(tiny_model):
    assert _next("fuse:sql:4", "sql", "my base").endswith("out/sql-4bit --bits 4 --base 'my base'")
    assert _next("fuse:sql:4", "sql", None).endswith("out/sql-4bit --bits 4")
    assert _next("sql", "sql", None) == "mlx-adapters serve BASE --adapter sql"
    registered_adapter(tiny_model("llama"))
    assert _next("sql", "sql", None) == f"mlx-adapters serve {tiny_model('llama')} --adapter sql"


def test_only_what_a_plain_fuse_makes_stands_in_for_it(tiny_model, tmp_path):
    folder, other = tiny_model("llama"), tiny_model("llama", bits=8)
    adapter, unchecked = registered_adapter(folder), {"options": FuseOptions(check=False, method="nearest")}
    plain = {"options": FuseOptions(check=False, calibration_rows=4, check_rows=1)}
    fuse(folder, adapter, tmp_path / "b", quantization=4, **plain)
    fuse(folder, adapter, tmp_path / "c", quantization=4, **plain)
    fuse(folder, adapter, tmp_path / "eight", quantization=8, **unchecked)
    grouped = {"bits": 4, "group_size": 32}
    fuse(folder, adapter, tmp_path / "a-groups", quantization=grouped, **plain)
    found = {"4": tmp_path / "b", "8": tmp_path / "eight", "4 bits in groups of 32": tmp_path / "a-groups"}
    fuse(folder, adapter, tmp_path / "a-nearest", quantization=4, **unchecked)
    fuse(folder, adapter, tmp_path / "a-half", quantization=8, weights=[0.5], **unchecked)
    fuse(other, adapter, tmp_path / "a-other", quantization="none", any_base=True, **unchecked)
    fuse(folder, adapter, tmp_path / "a-mode", quantization={"bits": 8, "mode": "mxfp8"}, **unchecked)
    assert fused_here(adapter, resolve_base(folder), tmp_path) == found


def test_data_that_nobody_named_is_read_as_it_was_trained_on_and_may_be_damaged(tiny_model, tmp_path, monkeypatch):
    data, asked = tmp_path / "rows.jsonl", []
    data.write_text('{"q": "1 + 1?", "a": "2"}\n{"q": "2 + 2?", "a": "4"}\n')
    columns = TrainConfig(iterations=1, batch_size=1, prompt_column="q", completion_column="a")
    train(tiny_model("llama"), data, name="sql", lora=LoraConfig(rank=2), training=columns)

    def stop(variants, *_, **__):
        asked.append([variant.label for variant in variants])
        raise StorageError("Measured enough.")

    monkeypatch.setattr("mlx_adapters.benchmarking.run.run", stop)
    with pytest.raises(StorageError):  # as `advise` names it, and from Python
        benchmark(["base", "fuse:sql:4"], quality=str(data))
    with pytest.raises(StorageError):
        benchmark(["base", "sql"], quality=[{"q": "3 + 3?", "a": "6"}])
    assert asked == [["base", "fuse:sql:4"], ["base", "sql"]]

    def measured(variants, base, **options):
        asked.append((options["quality"], options["score"], options["max_rows"]))
        return fused_report((300, 220, 280, 300))

    monkeypatch.setattr("mlx_adapters.benchmarking.run.benchmark", measured)
    shown = CliRunner().invoke(cli, ["advise", "sql", "--max-rows", "20", "--score", "exact"])
    assert shown.exit_code == 0, shown.output
    data.write_text("{")
    shown = CliRunner().invoke(cli, ["advise", "sql"])
    assert shown.exit_code == 0 and "Not judged by the adapter's own data" in shown.stderr, shown.output
    assert asked[2:] == [(str(data), "exact", 20), (None, None, None)]


def test_advise_takes_what_is_fused_already_and_the_data_that_this_machine_trained_on(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data, asked = write_data(tmp_path / "rows", rows=6, valid=2), []
    settings = TrainConfig(iterations=1, batch_size=2)
    train(tiny_model("llama"), data, name="sql", lora=LoraConfig(rank=2), training=settings)
    fuse(None, "sql", "out/eight", quantization=8, options=FuseOptions(check=False))
    (tmp_path / "out" / "broken").mkdir()
    (tmp_path / "out" / "broken" / "fuse_recipe.json").write_text("{}")

    def benchmark(variants, base, **options):
        asked.append((variants, options["quality"]))
        return fused_report((300, 220, 280, 300))

    monkeypatch.setattr("mlx_adapters.benchmarking.run.benchmark", benchmark)
    shown = CliRunner().invoke(cli, ["advise", "sql"])
    assert shown.exit_code == 0, shown.output
    assert asked == [(["base", "sql", "fuse:sql:4", "./out/eight"], str(data))]
    assert "'./out/eight' is fused of it already." in shown.stderr and "own data, rows" in shown.stderr
    assert "4 variants in 5 rounds, 20 fresh processes" in shown.stderr and "Next: mlx-adapters " in shown.stderr
    (adapter_folder("sql") / "adapter_metadata.json").write_text("{}")  # a stranger's says nothing
    CliRunner().invoke(cli, ["advise", "sql"])
    assert asked[1][1] is None


# -- memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "mixtral", "gpt2"])
def test_kv_cache_is_exact_and_nothing_is_computed(tiny_model, architecture):
    folder = tiny_model(architecture)
    module, _ = load_module(resolve_base(folder))
    size = memory.kv_cache_bytes(module, 100, 2, 4)
    trial = trials.run_trial(load_model(resolve_base(folder)).module, trials.random_prompts(512, 2, 100, 0), 2)
    assert size == trial["kv_cache_bytes"]
    assert memory.kv_cache_bytes(module, 100, 2, 2) * 2 == size


@pytest.mark.parametrize("architecture", ["llama", "phi3", "mixtral"])
def test_weights_are_counted_as_mlx_packs_them(tiny_model, architecture):
    module, _ = load_module(resolve_base(tiny_model(architecture, dtype="float16")))
    assert memory.parameter_count(module) == sum(a.size for _, a in tree_flatten(module.parameters()))
    expected = memory.weights_bytes(module, 4, 32)
    assert memory.weights_bytes(module, 16, 32) == memory.bytes_of(module)
    nn.quantize(module, 32, 4)
    mx.eval(module.parameters())
    assert expected == pytest.approx(memory.bytes_of(module), rel=0.02)  # mlx-lm leaves small router gates whole
    assert memory.weights_bytes(module, 8, 32) > expected


def test_packed_models_are_counted_unpacked(tiny_model):
    dense, _ = load_module(resolve_base(tiny_model("llama")))
    packed, _ = load_module(resolve_base(tiny_model("llama", bits=4)))
    assert memory.parameter_count(packed) == memory.parameter_count(dense)


def test_estimate_names_what_does_not_fit(tiny_model):
    folder = tiny_model("llama", bits=4)
    adapter = registered_adapter(tiny_model("llama"))
    estimate = memory.estimate_inference(folder, adapter, contexts=(64, 2048), batch=3, memory_bytes=3 * MB)
    assert [f.precision for f in estimate.forecasts] == ["as stored", "4-bit", "8-bit", "16-bit"]
    first = estimate.forecasts[0]
    assert first.adapter_bytes == sum(w.nbytes for w in adapter.weights.values())
    assert first.fits(estimate.memory_bytes) == {64: True, 2048: False}
    with pytest.raises(IncompatibleError):
        memory.estimate_inference(tiny_model("gpt2"), adapter)
    with pytest.raises(ConfigError):
        memory.estimate_inference(folder, contexts=())
    with pytest.raises(ConfigError):
        memory.estimate_inference(folder, bits=(7,))


def test_estimate_command(tiny_model):
    folder = str(tiny_model("llama"))
    shown = CliRunner().invoke(cli, ["estimate", folder, "--context", "128", "--memory", "0.0001"])
    assert shown.exit_code == 0 and "KV 128" in shown.stdout and "(too much)" in shown.stdout
    told = json.loads(CliRunner().invoke(cli, ["estimate", folder, "--json"]).stdout)
    assert told["forecasts"][0]["fits"]["2048"] is True
