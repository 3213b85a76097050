"""Benchmarks: statistics on synthetic samples, the plan, real processes on tiny models; no test asserts a time."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.benchmarks import registered_adapter, synthetic

from mlx_adapters.benchmarking import page, trials, words
from mlx_adapters.benchmarking.reports import changes, other_conditions, read_report
from mlx_adapters.benchmarking.run import BenchmarkInterrupted, benchmark, run
from mlx_adapters.benchmarking.schedule import BenchmarkConfig, schedule
from mlx_adapters.cli import cli
from mlx_adapters.errors import AdapterError, ConfigError, NotFoundError, StorageError
from mlx_adapters.evaluation.statistics import (
    Ratio,
    bootstrap_error,
    mean,
    paired_ratio,
    student,
    summarize,
    unpaired_ratio,
    weighted_mean,
)
from mlx_adapters.evaluation.variants import Variant, parse_variant, parse_variants, prepare, short_names
from mlx_adapters.generation import memory
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage.files import write_json
from mlx_adapters.system import conditions

# -- statistics ---------------------------------------------------------------------------------------


def rounds(random, speed, count=6, trials=3, drift=0.1, process=0.01, trial=0.01, drifts=None):
    """Blocks as a machine would give them: slow drift shared by all, noise per process and per trial."""
    drifts = random.normal(0, drift, count) if drifts is None else drifts
    return {
        r: list(speed * np.exp(drifts[r] + random.normal(0, process) + random.normal(0, trial, trials)))
        for r in range(count)
    }


def test_summary_of_a_known_sample():
    summary = summarize([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (summary.median, summary.minimum, summary.maximum, summary.count) == (3, 1, 5, 5)
    assert summary.p5 == pytest.approx(1.2) and summary.p95 == pytest.approx(4.8)
    assert summarize([]) is None


def test_two_equal_variants_seldom_differ():
    """The interval holds the truth in about 19 of 20 samples, even with few rounds."""
    random = np.random.default_rng(0)
    for count in (3, 5, 10):
        false = 0
        for _ in range(300):
            drifts = random.normal(0, 0.1, count)
            a, b = (rounds(random, 100, count, drifts=drifts) for _ in range(2))
            false += paired_ratio(a, b).differs
        assert 3 <= false <= 30, (count, false)


def test_five_percent_slower_is_found_through_ten_percent_drift():
    random = np.random.default_rng(1)
    told_apart = 0
    for _ in range(100):
        drifts = random.normal(0, 0.1, 6)
        base, slow = rounds(random, 100, drifts=drifts), rounds(random, 95, drifts=drifts)
        ratio = paired_ratio(slow, base)
        told_apart += ratio.differs and ratio.high < 1
    assert told_apart >= 95


def test_blocks_count_not_trials():
    """Many trials in few processes make no narrow interval: what a process shares does not average out."""
    random = np.random.default_rng(2)
    wide = paired_ratio(*(rounds(random, 100, 4, trials=200, process=0.05, trial=0.001) for _ in range(2)))
    assert math.log(wide.high / wide.low) > 0.05


def test_repeated_reports_agree_within_their_interval():
    """Also when the machine's state differs between the two as much as between rounds."""
    random = np.random.default_rng(3)

    def report(speed=50):
        return rounds(random, speed, drifts=random.normal(random.normal(0, 0.1), 0.1, 6))

    assert 3 <= sum(unpaired_ratio(report(), report()).differs for _ in range(300)) <= 20
    assert sum(unpaired_ratio(report(25), report()).differs for _ in range(100)) >= 90


def test_fewer_than_three_rounds_give_no_interval_and_no_claim():
    """Two rounds that agree by chance have an interval of almost no width."""
    for compare in (paired_ratio, unpaired_ratio):
        for count in (1, 2, 3):
            ratio = compare({i: [2.0 + i / 1e6, 4.0] for i in range(count)}, {i: [1.0] for i in range(count)})
            assert ratio.value == pytest.approx(3) and ratio.rounds == count
            assert (ratio.low is None, ratio.differs) == (count < 3, count == 3)
    assert paired_ratio({0: [1.0]}, {1: [1.0]}) is None


def test_with_too_few_rounds_the_ratios_of_a_variant_share_a_line():
    (line,) = words.sentences(synthetic({"base": 100.0, "slow": 83.0}, noise=0.0, count=2))
    assert line.startswith("slow against base: decode -17.0 %, prefill ") and line.endswith("(too few rounds to say)")
    assert (
        "%" in line and "[" not in line and "too few rounds" in words.markdown(synthetic({"a": 1.0, "b": 2.0}, count=2))
    )


def test_bootstrap_error_is_that_of_the_mean():
    sample = np.random.default_rng(4).normal(0, 1, 40)
    assert bootstrap_error(sample) == pytest.approx(sample.std(ddof=1) / math.sqrt(40), rel=0.1)
    assert student(1) == 12.706 and student(10_000) == pytest.approx(1.96, abs=0.001)


def test_means_and_their_errors():
    assert mean([1.0, 1.0, 0.0, 0.0]).value == 0.5
    assert mean([1.0, 1.0, 0.0, 0.0]).error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert mean([0.4, 0.5, 0.6, 0.5]).differs and not mean([-1.0, 1.0, 0.5]).differs
    tokens = weighted_mean([2.0, 12.0], [1.0, 3.0])  # 2.0 a token in the first row, 4.0 in the second
    assert tokens.value == pytest.approx(3.5)


# -- the plan -----------------------------------------------------------------------------------------


def test_variants_by_their_spelling(tiny_model, tmp_path):
    folder = tiny_model("llama")
    registered_adapter(folder)
    variants = parse_variants(["base", "sql", "fuse:sql:4", str(folder), "sql"])
    assert [v.label for v in variants] == ["base", "sql", "fuse:sql:4", str(folder), "sql (2)"]
    assert {v.base for v in variants} == {str(folder)}
    assert [v.adapter for v in variants] == [None, "sql", "sql", None, "sql"] and variants[2].fuse_bits == "4"
    assert parse_variant(str(tmp_path / "home" / "adapters" / "sql")).adapter
    assert parse_variants(["base"], base="demo")[0].base == "demo"
    assert parse_variant("SQL").adapter == "SQL"  # names that differ in case alone are one
    registered_adapter(folder, name="Base")
    with pytest.raises(ConfigError, match="an adapter of that name") as caught:
        parse_variant("base")
    assert "rename Base base-1" in caught.value.hint


def test_a_variant_to_fuse_is_what_fuse_makes_of_it(tiny_model, tmp_path):
    registered_adapter(tiny_model("llama", bits=4, group_size=32))
    variant = prepare(parse_variants(["fuse:sql:4"])[0], tmp_path, False, print)
    assert resolve_base(variant.base).config["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}


@pytest.mark.parametrize("wrong", ["fuse:sql", "fuse:sql:7", "fuse::4", "sql@x", "a b"])
def test_misspelled_variants_are_refused(wrong):
    with pytest.raises(ConfigError):
        parse_variant(wrong)


def test_what_is_missing_becomes_a_problem_of_its_row(tiny_model):
    registered_adapter(tiny_model("llama"))
    variants = parse_variants(["base", "sq", "sql"])
    assert [bool(v.problem) for v in variants] == [False, True, False]
    with pytest.raises(NotFoundError) as caught:
        parse_variants(["sq"])
    assert "sql" in caught.value.hint
    with pytest.raises(ConfigError, match="not known which model"):
        parse_variants(["base"])


def test_settings_check_themselves():
    for wrong in ({"rounds": 0}, {"prompt_tokens": ()}, {"batch": (0,)}, {"decode_tokens": 1}, {"dtype": "int4"}):
        with pytest.raises(ConfigError):
            BenchmarkConfig(**wrong)


def test_schedule_runs_all_in_each_round_in_shuffled_order():
    plan = schedule(4, 6, seed=1)
    orders = [[v for r, v in plan if r == number] for number in range(6)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len({tuple(o) for o in orders}) > 2
    assert plan == schedule(4, 6, seed=1) != schedule(4, 6, seed=2)


# -- what is measured ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_trial_writes_what_the_model_would_write(tiny_model, architecture):
    model = load_model(resolve_base(tiny_model(architecture)))
    prompt = trials.random_prompts(512, 2, 9, seed=0)
    trial = trials.run_trial(model.module, prompt, 6)
    ids = prompt[0].tolist()
    for token in trial["token_ids"]:
        assert token == int(mx.argmax(model.logits(ids)[-1]).item())
        ids.append(token)
    assert len(trial["token_ids"]) == 6 and trial["kv_cache_bytes"] > 0


def test_prefill_in_chunks_changes_nothing(tiny_model, monkeypatch):
    model = load_model(resolve_base(tiny_model("llama")))
    prompt = trials.random_prompts(512, 1, 20, seed=0)
    whole = trials.run_trial(model.module, prompt, 4)["token_ids"]
    monkeypatch.setattr(trials, "PREFILL_CHUNK", 7)
    assert trials.run_trial(model.module, prompt, 4)["token_ids"] == whole


def test_bytes_read_per_token(tiny_model):
    tied, untied, experts = (load_model(resolve_base(tiny_model(name))) for name in ("llama", "phi3", "mixtral"))
    assert trials.bytes_per_token(tied.module, tied.config) == memory.bytes_of(tied.module)
    embedding = 512 * 64 * 4
    assert trials.bytes_per_token(untied.module, untied.config) == memory.bytes_of(untied.module) - embedding + 64 * 4
    per_block = 3 * 4 * 128 * 64 * 4  # three matrices of four experts, of which two are chosen
    assert (
        trials.bytes_per_token(experts.module, experts.config)
        == memory.bytes_of(experts.module) - embedding + 64 * 4 - 2 * per_block // 2
    )


QUICK = {"rounds": 2, "trials": 2, "decode_tokens": 4, "prompt_tokens": (8, 16)}


@pytest.fixture(scope="module")
def measured(tiny_model, tmp_path_factory):
    """One real benchmark: base, adapter, a missing folder."""
    home = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_ADAPTERS_HOME", str(home))
        registered_adapter(tiny_model("llama"))
        report = benchmark(["base", "sql", str(home / "nothing")], **QUICK)
        assert not list(home.glob(".mlx-adapters-tmp-*"))
    return report


def test_report_has_every_figure(measured):
    base, adapter, missing = measured.rows
    assert missing.error and "nothing" in missing.error
    assert base.size_bytes and adapter.size_bytes > base.size_bytes and adapter.adapter_bytes and not base.adapter_bytes
    assert [(s.prompt_tokens, s.batch) for s in base.shapes] == [(8, 1), (16, 1)]
    for row in (base, adapter):
        assert row.load_seconds.count == 2 and row.peak_resident_bytes and row.bandwidth_bytes_per_second
        for shape in row.shapes:
            assert shape.decode_tps.count == 4 and shape.peak_memory_bytes >= row.weights_bytes
            assert shape.ttft_seconds.minimum > 0 and shape.ceiling_share > 0
    assert {(c.variant, c.against) for c in measured.comparisons} == {("sql", "base")}
    assert measured.measured_seconds < measured.seconds


def test_report_states_its_conditions(measured):
    said = "\n".join([*words.head(measured), *words.failures(measured), *words.notes(measured)])
    for part in ("mlx 0.32", "random prompts of 8, 16 tokens", "computed in float32", "2 rounds", "'nothing' failed"):
        assert part in said.replace(str(measured.rows[2].label), "nothing"), part


def test_report_survives_the_disk(measured, tmp_path):
    write_json(tmp_path / "report.json", measured.to_json())
    again = read_report(tmp_path / "report.json")
    assert again.rows == measured.rows and again.comparisons == measured.comparisons
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["shapes"][0]["decode_tps"]["count"] == 4


def test_a_damaged_report_is_refused_or_can_be_shown(measured, tmp_path):
    from helpers.odd_values import every_change

    path = tmp_path / "report.json"
    refused = 0
    without = measured.to_json() | {"quality": 0}
    for change in (without, *itertools.islice(every_change(measured.to_json()), 600)):
        path.write_text(json.dumps(change))
        try:
            report = read_report(path)
            words.table(report.readable), words.head(report), report.judged
        except AdapterError as error:
            refused += 1
            assert "report" in error.message or error.message.endswith(".")
    assert refused > 20


def test_a_report_names_no_foreign_command(measured):
    """Called from a notebook or a test, there is no command line of ours to repeat."""
    assert measured.command == "" and "``" not in words.markdown(measured)
    assert repr(measured).startswith("Report(") and "/" not in repr(measured).replace(measured.labels[-1], "")


def test_markdown_is_a_table(measured):
    verdict, _, *lines = words.markdown(measured).splitlines()
    assert verdict == words.verdict(measured.readable)
    assert len({line.count("|") for line in lines[:6]}) == 1 and lines[0].startswith("| VARIANT")


def test_dense_copies_are_admitted(tiny_model):
    report = benchmark([str(tiny_model("llama", bits=4))], rounds=1, trials=1, decode_tokens=2, prompt_tokens=4)
    for told in (report.rows[0].conditions["dense"], "made dense" in "\n".join(words.head(report))):
        assert told != (mx.default_device().type == mx.DeviceType.gpu)  # in a program of its own
    assert len(words.sentences(report)) == 0


def test_people_read_short_names_of_folders():
    home = Path.home()
    told = short_names(
        [
            "base",
            "sql",
            "sql@500",
            "/x/fused-8bit",
            "/x/sql-4@60",
            "fuse:/x/sql:4",
            "user/repo",
            "out/fused",
            "a/b/c/",
            "user/repo@refs/pr/1",
            "/x/m (2)",
        ]
    )
    assert list(told.values()) == [
        "base",
        "sql",
        "sql@500",
        "fused-8bit",
        "sql-4@60",
        "fuse:sql:4",
        "user/repo",
        "out/fused",
        "c",
        "user/repo@refs/pr/1",
        "m (2)",
    ]
    alike = [f"{home}/a/sql", "/b/sql", "sql", "./sql", "~/base", f"fuse:{home}/sql:4", "fuse:/x/sql:4"]
    assert list(short_names(alike).values()) == [
        "~/a/sql",
        "/b/sql",
        "sql",
        "./sql",
        "~/base",
        "fuse:~/sql:4",
        "fuse:/x/sql:4",
    ]
    assert short_names(short_names(alike).values()) == {name: name for name in short_names(alike).values()}


def test_reports_show_short_names_and_keep_the_references(tmp_path):
    report = synthetic({"base": 100.0, "/x/y/fused-8bit": 90.0})
    evaluations = [{"variant": label, "error": None, "loss": {"value": 1.0, "error": 0.1}} for label in report.labels]
    quality = {
        "data": {"rows": 1, "split": "test", "source": "d"},
        "reference": "/x/y/fused-8bit",
        "score": None,
        "evaluations": evaluations,
    }
    report = dataclasses.replace(report, quality=quality)
    for told in (
        words.markdown(report),
        report._repr_html_(),
        str(page.overview(report) | page.details(report)),
        repr(report),
    ):
        assert "fused-8bit" in told and "/x/y" not in told
    old = synthetic({"base": 100.0, "/x/y/fused-8bit": 200.0}, seed=1)
    assert any(str(change).startswith("fused-8bit, decode at 8 x 1: 5") for change in changes(report, old))
    assert "/x/y/fused-8bit" in page.html(report)  # among the conditions
    assert json.dumps(report.to_json()).count("/x/y/fused-8bit") > 5


# -- when things go wrong -----------------------------------------------------------------------------

FAKE = """
import json, sys
job = json.load(open(sys.argv[1]))
{body}
"""


def fake_worker(folder: Path, body: str) -> tuple[str, ...]:
    script = folder / "worker.py"
    script.write_text(FAKE.format(body=body))
    return (str(script),)


def test_a_worker_that_dies_is_a_row_and_runs_once(tmp_path):
    worker = fake_worker(tmp_path, "open(sys.argv[1] + '.count', 'a').write('x'); import os; os.kill(os.getpid(), 9)")
    report = run([Variant("a", "m")], BenchmarkConfig(rounds=3), lambda _: None, tmp_path, worker=worker)
    assert "signal 9" in report.rows[0].error
    assert (tmp_path / "job.json.count").read_text() == "x"


def test_interrupt_keeps_the_finished_rows(tmp_path):
    worker = fake_worker(
        tmp_path, "open(sys.argv[2], 'w').write('{}') if job['variant']['label'] == 'a' else sys.exit(130)"
    )
    report = run(
        [Variant("a", "m"), Variant("b", "m")], BenchmarkConfig(rounds=4), lambda _: None, tmp_path, worker=worker
    )
    assert report.interrupted and {r.variant for r in report.runs} <= {"a"}


@pytest.mark.parametrize("judging", [False, True])
def test_an_interrupted_benchmark_raises_with_what_is_finished(tiny_model, tmp_path, monkeypatch, judging):
    """So that a notebook that runs all its cells stops there, and hours of measuring are not lost."""
    (tmp_path / "rows.jsonl").write_text('{"text": "The cat sat on the mat."}\n')
    done = {"metrics": {}}

    def worker(variant, *arguments):
        if variant.label != "base" and not judging:
            raise KeyboardInterrupt
        return done

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_adapters.benchmarking.run.run_worker", worker)
    monkeypatch.setattr("mlx_adapters.benchmarking.run._quality", interrupted)
    registered_adapter(tiny_model("llama"), "a")
    quality = tmp_path / "rows.jsonl" if judging else None
    with pytest.raises(KeyboardInterrupt, match="interrupted") as caught:
        benchmark(["base", "a"], rounds=2, quality=quality)
    report = caught.value.report
    assert report.interrupted and isinstance(caught.value, BenchmarkInterrupted)
    assert {run.variant for run in report.runs} == ({"base", "a"} if judging else {"base"}) or not report.runs


def test_prompt_longer_than_the_context(tiny_model, measured_here):
    report = benchmark([str(tiny_model("llama"))], prompt_tokens=2047, decode_tokens=3, rounds=1)
    assert "longer than the model's context of 2048" in report.rows[0].error


def test_wrong_data_is_noticed_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_adapters.benchmarking.run.run", lambda *_: pytest.fail("measured"))
    with pytest.raises(NotFoundError):
        benchmark(["demo"], quality=tmp_path / "none")
    with pytest.raises(NotFoundError):
        benchmark(["demo"], data=tmp_path / "none")
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ConfigError):
        benchmark(["demo"], quality=tmp_path, score="exactly")


def test_command_prints_table_and_json(tiny_model, tmp_path, measured, monkeypatch):
    monkeypatch.setattr("mlx_adapters.benchmarking.run.benchmark", lambda *_, **__: measured)
    shown = CliRunner().invoke(cli, ["benchmark", "base", "sql", "-o", str(tmp_path / "r.json")])
    assert "DECODE tok/s" in shown.stdout and "against base" in shown.stdout
    assert read_report(tmp_path / "r.json").rows == measured.rows
    (tmp_path / "file").touch()
    unsaved = CliRunner().invoke(cli, ["benchmark", "base", "--html", str(tmp_path / "file" / "r.html")])
    assert unsaved.stdout == shown.stdout and isinstance(unsaved.exception, StorageError)
    as_json = CliRunner().invoke(cli, ["benchmark", "base", "--json"])
    assert [row["label"] for row in json.loads(as_json.stdout)["rows"]] == measured.labels
    for done in (shown, as_json):  # what was measured is there, and that one failed too
        assert done.exit_code == 1 and "Error: 'nothing' failed: There is no adapter folder" in done.stderr
    assert CliRunner().invoke(cli, ["benchmark", "base", "--batch", "0"]).exit_code == 2


def test_a_hold_up_does_not_touch_what_is_compared(tiny_model, monkeypatch):
    """A clock that stands still for 5 s once: the trial's speed shows it, its fastest stretch does not."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: (tick := next(ticks)) * 0.1 + (5.0 if tick >= 30 else 0.0))
    monkeypatch.setattr(trials, "time", clock)
    module = load_model(resolve_base(tiny_model("llama"))).module
    trial = trials.run_trial(module, mx.array([[1, 2, 3]]), 41)
    assert trial["decode_tps"] == pytest.approx(40 / (40 * 0.1 + 5.0))
    assert trial["stretch_tps"] == pytest.approx(1 / 0.1)
    assert trials.run_trial(module, mx.array([[1, 2, 3]]), 2)["stretch_tps"] == pytest.approx(1 / 0.1)


def test_a_disturbed_trial_in_each_round_hides_no_difference():
    report = synthetic({"one": 100, "two": 90})
    for process in report.runs:
        trial = process.result["shapes"][0]["trials"][process.round % 2]
        trial["stretch_tps"] *= 0.3 + 0.1 * process.round
    ratio = next(c.ratio for c in report.comparisons if c.metric == "decode_tps")
    assert ratio.differs and ratio.value == pytest.approx(0.9, abs=0.01)
    (change,) = (
        c
        for c in changes(report, synthetic({"one": 100, "two": 90}))
        if c.variant == "two" and c.metric == "decode_tps"
    )
    assert not change.ratio.differs


def test_the_head_names_as_many_steps_as_were_compared():
    short = synthetic({"base": 100.0})  # 4 tokens decoded: 3 steps
    assert any(line.endswith("best 3 steps in a row") for line in words.head(short))
    long = dataclasses.replace(short, config=dataclasses.replace(short.config, decode_tokens=64))
    assert any(line.endswith("best 16 steps in a row") for line in words.head(long))


def test_a_negligible_difference_is_none_however_exact():
    same = paired_ratio({r: [100_010.0] for r in range(3)}, {r: [100_000.0] for r in range(3)})
    assert not same.differs and words.phrase("peak_memory_bytes", same) == "the same within noise [+0.0, +0.0] %"
    more = paired_ratio({r: [101_000.0] for r in range(3)}, {r: [100_000.0] for r in range(3)})
    assert more.differs and words.phrase("peak_memory_bytes", more) == "1.0 % more [1.0, 1.0]"


# -- sentences ----------------------------------------------------------------------------------------


def test_sentences_claim_only_what_was_seen():
    claims = words.sentences(synthetic({"base": 100.0, "slow": 92.0, "same": 100.0}))
    slow = next(line for line in claims if line.startswith("slow against base, decode"))
    assert "slower [" in slow and 7.5 < float(slow.partition(": ")[2].split(" %")[0]) < 8.5
    assert any(line.startswith("same against base, decode: the same within noise") for line in claims)


def test_nothing_changes_by_minus_zero():
    assert words.phrase("decode_tps", Ratio(0.9999, 0.9997, 1.0001, 5)) == "the same within noise [+0.0, +0.0] %"


def test_wide_intervals_are_not_called_equality():
    noisy = synthetic({"base": 100.0, "other": 100.0}, noise=1.0, count=3, seed=1)
    assert words.sentences(noisy)[0].startswith("other against base, decode: too few or too noisy rounds to tell [-")


def test_what_cannot_be_compared_is_pointed_out():
    for key, value, word in (
        ("vocabulary", 7, "tokenizers"),
        ("tokenizer", "u", "tokenizers"),
        ("model_type", "phi3", "kinds"),
        ("fingerprint", "g", "base models"),
    ):
        report = synthetic({"base": 100.0, "other": 100.0})
        assert not any(word in note for note in words.notes(report))
        for run_ in report.runs:
            run_.result["adapter_bytes"] = 1
        changed = next(r for r in report.runs if r.variant == "other").result
        changed["conditions"] = changed["conditions"] | {key: value}
        assert any(word in note for note in words.notes(dataclasses.replace(report))), key


# -- the system's tools, with recorded output ---------------------------------------------------------

BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=4653155)\t87%; discharging; 5:12 remaining present: true
"""
DISPLAYS = """Graphics/Displays:

    Apple M4 Max:

      Chipset Model: Apple M4 Max
      Type: GPU
      Bus: Built-In
      Total Number of Cores: 40
      Vendor: Apple (0x106b)
      Metal Support: Metal 4
"""


def test_readers_of_macos_tools():
    assert conditions.power_source(BATTERY) == "Battery Power" and conditions.power_source("") is None
    assert conditions.power_source("Now drawing from 'AC Power'\n") == "AC Power"
    assert [conditions.thermal_state(words) for words in "0123"] == ["nominal", "fair", "serious", "critical"]
    assert {conditions.thermal_state(words) for words in ("", "7", "-1", "undefined", "²")} == {"unknown"}
    assert conditions.gpu_name(DISPLAYS) == "Apple M4 Max, 40 GPU cores" and conditions.gpu_name("") is None
    assert conditions.low_power_mode(" lowpowermode         1\n") == "on"
    assert (
        conditions.low_power_mode(" sleep 1\n powermode            0\n") == "off"
        and conditions.low_power_mode("") is None
    )


def test_warnings_name_what_spoils_a_run():
    quiet = {"load_average": 0.1, "power_source": "AC Power", "low_power_mode": "off", "thermal": "nominal"}
    assert conditions.warnings(quiet, quiet, 8) == conditions.warnings(quiet | {"thermal": "unknown"}, quiet, 8) == []
    spoiled = {"power_source": "Battery Power", "low_power_mode": "on", "thermal": "serious"}
    assert len(conditions.warnings(quiet | {"load_average": 6.0}, quiet | spoiled, 8)) == 4


def test_process_memory_is_plausible():
    sizes = conditions.process_memory()
    assert 10**7 < sizes["peak_resident_bytes"] < 10**12


def test_the_peak_is_the_process_own_not_its_parents():
    """A child of a large process is small, whatever Linux's ru_maxrss says."""
    ballast = np.ones(150_000_000, np.uint8)
    code = "from mlx_adapters.system.conditions import peak_resident_bytes as p; print(p())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(child.stdout) < conditions.peak_resident_bytes() - ballast.nbytes / 2


def test_real_report_makes_a_page(measured):
    drawn = page.overview(measured) | page.details(measured)
    assert set(drawn) >= {"Speed and size", "Load time", "Decode speed (8 x 1)", "Memory by part (16 x 1)"}
    memory = page.memory_parts(measured.rows[1], (16, 1))
    assert memory["adapter"] == measured.rows[1].adapter_bytes > 0 and min(memory.values()) >= 0


# -- against an older report --------------------------------------------------------------------------


def test_changes_beyond_noise():
    old = synthetic({"base": 100.0, "sql": 50.0}, seed=1)
    same, slow = synthetic({"base": 100.0, "sql": 50.0}, seed=2), synthetic({"base": 90.0, "sql": 50.0}, seed=2)
    assert not any(change.fails(0.0) for change in changes(same, old))
    failing = [change for change in changes(slow, old) if change.fails(0.05)]
    assert [(c.variant, c.metric) for c in failing] == [("base", "decode_tps")]
    assert "slower" in str(failing[0]) and not any(c.fails(0.2) for c in changes(slow, old))
    assert not any(c.fails(0.0) for c in changes(synthetic({"base": 120.0, "sql": 50.0}, seed=2), old))
    hungry = synthetic({"base": 100.0, "sql": 50.0}, seed=2, memory=120)
    assert {c.metric for c in changes(hungry, old) if c.fails(0.05)} == {"peak_memory_bytes"}


def test_other_conditions_are_named():
    old = synthetic({"base": 100.0})
    new = dataclasses.replace(old, machine=old.machine | {"cores": 4, "versions": {"mlx": "0.33.0"}})
    told = " ".join(other_conditions(new, old))
    assert "cores was '2', now '4'" in told and "mlx was 0.32.4, now 0.33.0" in told
    assert other_conditions(old, old) == []


def test_fail_over_fails_the_command(tmp_path, monkeypatch):
    write_json(tmp_path / "old.json", synthetic({"base": 100.0}).to_json())
    monkeypatch.setattr("mlx_adapters.benchmarking.run.benchmark", lambda *_, **__: synthetic({"base": 80.0}, seed=3))
    arguments = ["benchmark", "base", "--against", str(tmp_path / "old.json")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    failed = CliRunner().invoke(cli, [*arguments, "--fail-over", "5%"])
    assert failed.exit_code == 1 and "slower" in failed.stderr
    assert CliRunner().invoke(cli, [*arguments, "--fail-over", "30%"]).exit_code == 0
    assert CliRunner().invoke(cli, ["benchmark", "base", "--fail-over", "5%"]).exit_code == 2
    few = CliRunner().invoke(cli, [*arguments, "--fail-over", "5%", "--rounds", "2"])
    assert few.exit_code == 2 and "needs --rounds 3" in few.stderr
    (tmp_path / "bad.json").write_text('{"format": 1}')
    assert CliRunner().invoke(cli, ["benchmark", "base", "--against", str(tmp_path / "bad.json")]).exit_code == 1


def test_all_files_are_written(tmp_path, monkeypatch, measured):
    monkeypatch.setattr("mlx_adapters.benchmarking.run.benchmark", lambda *_, **__: measured)
    names = {"--html": "r.html", "--markdown": "r.md", "--plots": "plots", "-o": "r.json"}
    arguments = [part for flag, name in names.items() for part in (flag, str(tmp_path / name))]
    CliRunner().invoke(cli, ["benchmark", "base", *arguments])
    assert (tmp_path / "plots" / "load-time.svg").read_text().startswith("<svg")
    assert (tmp_path / "plots" / "load-time.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_quality_beside_speed(tiny_model, tmp_path, measured_here):
    registered_adapter(tiny_model("llama"))
    (tmp_path / "train.jsonl").write_text('{"prompt": "Say it", "completion": "Paris."}\n' * 2)
    report = benchmark(
        ["base", "sql", "fuse:sql:8"],
        rounds=1,
        trials=1,
        decode_tokens=2,
        prompt_tokens=4,
        cold_load=False,
        quality=tmp_path,
    )
    assert [row.error for row in report.rows] == [None] * 3
    headers, lines = words.table(report)
    assert headers[-3:] == ("LOSS", "KL", "SAME TOP") and {len(line) for line in lines} == {len(headers)}
    by_label = {e["variant"]: e for e in report.quality["evaluations"]}
    assert by_label["sql"]["kl"]["value"] == 0 < by_label["fuse:sql:8"]["kl"]["value"] < by_label["base"]["kl"]["value"]
    assert list(page.overview(report)) == ["Quality and size", "Quality and speed"]
    assert words.verdict(report).startswith("fuse:sql:8 keeps the fine-tune: same token ")


def test_one_length_is_a_tuple_of_it():
    config = BenchmarkConfig(prompt_tokens=64, batch=np.int64(2))
    assert config.shapes == [(64, 2)] and config.prompt_tokens == (64,)
    with pytest.raises(ConfigError, match="prompt_tokens"):
        BenchmarkConfig(prompt_tokens=0)
