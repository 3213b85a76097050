"""Calibrated fusing: moments, fidelity, mixed precision, recipe, text."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.fusing import some_rows, visible_adapter
from mlx.utils import tree_flatten

from mlx_adapters import TrainConfig, errors, load_adapter, train
from mlx_adapters.assembly.plan import LayerPlan
from mlx_adapters.assembly.spool import Spool
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.calibration import fidelity, mixed, texts
from mlx_adapters.calibration.blockwise import BlockwiseModel
from mlx_adapters.calibration.collecting import Collector, States, fisher_probe
from mlx_adapters.calibration.fidelity import measure_fidelity
from mlx_adapters.calibration.moments import ExpertMoments
from mlx_adapters.calibration.texts import GENERAL, choose_text
from mlx_adapters.cli import cli
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.data import datasets
from mlx_adapters.data.batches import make_batches
from mlx_adapters.errors import ConfigError, FidelityError, FormatError, IncompatibleError, NotFoundError
from mlx_adapters.events import Note
from mlx_adapters.fusion.check import check_fused
from mlx_adapters.fusion.fuse import fuse, fuse_again
from mlx_adapters.models.adapter import write_adapter
from mlx_adapters.models.dense import quantization_of
from mlx_adapters.models.loading import load_model, load_module
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import files, paths
from mlx_adapters.surgery.blocks import Blocks
from mlx_adapters.system import origin
from mlx_adapters.system.machine import on_gpu

ALL = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2"]
FEW = {"calibration_rows": 12, "check_rows": 12}


@pytest.fixture
def data(tmp_path):
    """A folder of prompt-completion rows: 40 to train on, 12 kept aside."""
    folder = tmp_path / "data"
    folder.mkdir()
    words = ["course", "title", "credits", "teacher", "department", "seats", "building", "budget", "room", "student"]
    rng = np.random.default_rng(0)

    def row():
        a, b, c = rng.choice(words, 3, replace=False)
        return {"prompt": f"List the {a} of all with {b} over {c}.", "completion": f"SELECT {a} FROM {b} WHERE {c} > 3"}

    rows = list({json.dumps(row()): None for _ in range(80)})
    for name, part in (("train", rows[:40]), ("valid", rows[40:52])):
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in part))
    return folder


def trained_on(adapter, data):
    """Let the adapter's record say that it was trained here, on `data`."""
    adapter.metadata.update({"data": {"source": str(data)}, "signature": origin.signature(str(data))})


def log_softmax(x):
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("architecture", ALL)
def test_fidelity_is_the_kl_of_whole_models(tiny_model, tmp_path, architecture):
    folder = tiny_model(architecture, bits=4)
    adapter = visible_adapter(folder)
    nearest = FuseOptions(method="nearest", check=False)
    fuse(folder, adapter, tmp_path / "out", quantization="keep", options=nearest)
    rows, base = some_rows(), resolve_base(folder)
    updates = Updates(((adapter, 1.0),))
    fused = BlockwiseModel(resolve_base(tmp_path / "out"), None, updates.paths().__contains__)
    fidelity = measure_fidelity(BlockwiseModel(base, updates), fused, BlockwiseModel(base), make_batches(rows, 48))
    models = [
        load_model(resolve_base(folder), adapter),
        load_model(resolve_base(tmp_path / "out")),
        load_model(resolve_base(folder)),
    ]
    kls, same, losses = [[], []], [], [[], [], []]
    for tokens, judged in rows:
        logs = [log_softmax(model.logits(mx.array(tokens))) for model in models]
        places = np.flatnonzero(judged[1:])
        for i in (1, 2):
            kls[i - 1] += (mx.exp(logs[0]) * (logs[0] - logs[i])).sum(-1)[mx.array(places)].tolist()
        same += (logs[0].argmax(-1) == logs[1].argmax(-1))[mx.array(places)].tolist()
        for i in range(3):
            losses[i] += [-logs[i][p, tokens[p + 1]].item() for p in places.tolist()]
    assert len(Blocks(load_module(base)[0])) == 2
    assert fidelity.tokens == len(same) == 45
    assert fidelity.kl_mean == pytest.approx(np.mean(kls[0]), rel=1e-4)
    assert fidelity.kl_p99 == pytest.approx(np.quantile(kls[0], 0.99), rel=1e-4)
    assert fidelity.base_kl == pytest.approx(np.mean(kls[1]), rel=1e-4)
    assert fidelity.same_top == pytest.approx(np.mean(same))
    assert [fidelity.loss_adapter, fidelity.loss_fused, fidelity.loss_base] == pytest.approx(
        [np.mean(x) for x in losses], rel=1e-4
    )


@pytest.mark.parametrize("architecture", ALL)
def test_moments_block_by_block_are_those_of_the_whole_model(tiny_model, architecture, tmp_path):
    folder = tiny_model(architecture, bits=4)
    base, updates = resolve_base(folder), Updates(((visible_adapter(folder), 1.0),))
    batches, collected = make_batches(some_rows(), 48), []
    for whole in (False, True):
        pair = BlockwiseModel(base, updates), BlockwiseModel(base, updates)
        if whole:
            for variant in pair:
                variant.blocks.paths = ()
        moments = {}
        inside = {path for path in updates.paths() if "layers" in path or ".h." in path}
        for _, block in Collector(*pair, inside, batches, tmp_path).run():
            moments |= block
        assert not list(tmp_path.iterdir())
        experts = {p: m.of(0, m.experts) for p, m in moments.items() if isinstance(m, ExpertMoments)}
        collected.append(moments | experts)
    split, whole = collected
    assert set(split) == set(whole) and len(split) >= 8
    for path in split:
        np.testing.assert_array_equal(split[path].tokens, whole[path].tokens)
        for name in ("plain", "fisher"):
            a, b = (np.array(getattr(m[path], name)) for m in (split, whole))
            np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max(), err_msg=path)


def test_calibration_holds_the_activations_of_one_block(tiny_model, tmp_path):
    folder = tiny_model("llama", num_hidden_layers=12)
    base = resolve_base(folder)
    rows = [(np.full(200, i, np.int32), np.ones(200, bool)) for i in range(1, 60)]
    variants = BlockwiseModel(base), BlockwiseModel(base)
    paths = set(variants[0].layer_paths(0))
    collector = Collector(*variants, paths, make_batches(rows), tmp_path)
    mx.synchronize()
    before = mx.get_active_memory()
    last = collector.run_forward(lambda event: None)
    kept = sum(array.nbytes for state in last for array in state)
    mx.synchronize()
    assert mx.get_active_memory() - before < 3 * kept
    assert len(list(tmp_path.iterdir())) == 12
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 12 * kept


def test_a_released_part_of_a_model_holds_nothing(tiny_model):
    """Not the packed weights either: a model of many blocks would be in memory twice."""
    model = BlockwiseModel(resolve_base(tiny_model("llama", bits=4)))
    parts = range(len(model.blocks) + 1)

    def held(index):
        layers = [model.source.layers[path] for path in model.layer_paths(index)]
        return sum(value.nbytes for layer in layers for _, value in tree_flatten(layer.parameters()))

    for index in parts:
        model.prepare(index)
    before = [held(index) for index in parts]
    model.release(1)
    assert [held(index) for index in parts] == [before[0], 0, *before[2:]] and before[1] > 0
    model.release(len(model.blocks))
    assert held(len(model.blocks)) == 0 < before[-1]


def test_what_is_outside_the_blocks_is_dense_only_while_it_is_used(tiny_model):
    model = BlockwiseModel(resolve_base(tiny_model("qwen3", bits=4)))
    count = len(model.blocks)
    model.prepare(count)
    mx.eval(model.blocks.finish([mx.ones((1, 1, 64))], mx.array([0])))
    mx.synchronize()
    before = mx.get_active_memory()
    model.prepare(count)
    mx.synchronize()
    assert before - mx.get_active_memory() > 0.9 * model.weight("lm_head").nbytes


def test_calibration_asks_for_room_on_the_disk_before_it_works(tiny_model, tmp_path, monkeypatch):
    base = resolve_base(tiny_model("llama"))
    collector = Collector(
        BlockwiseModel(base), BlockwiseModel(base), {"model.layers.0.mlp.up_proj"}, make_batches(some_rows()), tmp_path
    )
    monkeypatch.setattr(paths.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(errors.StorageError, match="the disk has 1 kB free"):
        collector.run_forward(lambda event: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["llama", "gemma4_text"])
@pytest.mark.parametrize("wanted", ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
def test_room_is_asked_for_all_that_goes_from_block_to_block(architecture, wanted, tiny_model, tmp_path, monkeypatch):
    """Shared keys and values too, before anything is computed: what is then written."""
    base, asked, put = resolve_base(tiny_model(architecture, bits=4)), [], []
    batches = make_batches(some_rows(), 30)
    collector = Collector(BlockwiseModel(base), BlockwiseModel(base), {wanted}, batches, tmp_path)
    assert len(batches) > 2 and collector.first == int(wanted.split(".")[2])
    monkeypatch.setattr(paths, "require_free_space", lambda path, needed: asked.append((path, needed, len(put))))
    monkeypatch.setattr(collector._entries, "put", put.append)
    collector.run_forward(lambda event: None)
    sizes = [sum(array.nbytes for state in states for array in state) for states in put]
    assert asked == [(tmp_path, sum(sizes), 0)]
    assert (len(set(sizes)) > 1) == (architecture == "gemma4_text")


@pytest.mark.parametrize("mixed", [False, True])
def test_a_disk_too_small_is_known_before_calibration(tiny_model, tmp_path, home, data, monkeypatch, mixed):
    """Room is asked for what the model takes and for the rounded layers that calibration keeps beside it."""
    folder, asked, events = tiny_model("llama", bits=4), [], []
    monkeypatch.setattr(paths, "require_free_space", lambda path, needed: asked.append((path, needed)))
    monkeypatch.setattr(Spool, "remove", lambda spool: None)
    options = FuseOptions(calibration=str(data), calibration_rows=4, check=False, budget_bits=7.0 if mixed else None)
    out = fuse(folder, visible_adapter(folder), tmp_path / "out", options=options).folder
    first, before = asked[0]
    kept, written = paths.size_on_disk(out / "parts"), paths.size_on_disk(out, without=[out / "parts"])
    assert first == tmp_path / "out" and kept + written < before < kept + written + (18 << 20)

    def full(path, needed):
        raise errors.StorageError("full")

    monkeypatch.setattr(paths, "require_free_space", full)
    with pytest.raises(errors.StorageError, match="full"):
        fuse(folder, visible_adapter(folder), tmp_path / "again", options=options, on_event=events.append)
    assert not any("alibrat" in str(event) for event in events) and not (tmp_path / "again").exists()


def test_states_come_back_from_last_to_first(tmp_path):
    states = States(tmp_path)
    lists = [[[mx.random.normal((i + 1, n)) for n in range(1, 2 + i % 3)] for i in range(k + 1)] for k in range(12)]
    for each in lists:
        states.put(each)
    for each in reversed(lists):
        assert [[a.tolist() for a in state] for state in states.take()] == [
            [a.tolist() for a in state] for state in each
        ]
    assert not list(tmp_path.iterdir())


def test_the_probe_has_the_covariance_of_the_fisher_information():
    logits = mx.array([[2.0, 0.5, -1.0, 0.0]])
    p = np.array(mx.softmax(logits, axis=-1))[0]
    probes = np.array(fisher_probe(mx.broadcast_to(logits, (200_000, 4)), mx.random.key(0)))
    np.testing.assert_allclose(probes.mean(0), 0, atol=5e-3)
    np.testing.assert_allclose(probes.T @ probes / len(probes), np.diag(p) - np.outer(p, p), atol=5e-3)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "lora"), ("qwen3", "dora"), ("phi3", "lora"), ("mixtral", "lora"), ("gpt2", "lora")],
)
def test_calibrated_beats_nearest_at_the_same_size(tiny_model, tmp_path, data, architecture, kind):
    folder = tiny_model(architecture, bits=4)
    adapter = visible_adapter(folder, kind, strength=0.05)
    results = {}
    for method in ("nearest", "calibrated"):
        options = FuseOptions(method=method, calibration=str(data), **FEW)
        results[method] = fuse(folder, adapter, tmp_path / method, options=options)
    ours, theirs = results["calibrated"], results["nearest"]
    assert ours.size_bytes == theirs.size_bytes and ours.quantization == theirs.quantization
    assert ours.fidelity.kl_mean < 0.6 * theirs.fidelity.kl_mean
    assert ours.text["source"] == str(data)
    report = json.loads((tmp_path / "calibrated/fuse_report.json").read_text())
    assert report["fidelity"]["kl_mean"] == ours.fidelity.kl_mean
    assert not (tmp_path / "calibrated/parts").exists()


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_calibrated_from_an_unquantized_base(tiny_model, tmp_path, data, bits):
    folder = tiny_model("llama", tied=bits != 3)
    adapter = visible_adapter(folder, strength=0.05)
    kl = {}
    for method in ("nearest", "calibrated"):
        options = FuseOptions(method=method, calibration=str(data), **FEW)
        result = fuse(folder, adapter, tmp_path / method, quantization=Quantization(bits, 32), options=options)
        kl[method] = result.fidelity.kl_mean
    assert kl["calibrated"] < 0.75 * kl["nearest"]


@pytest.mark.parametrize("quantization", [Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4")], ids=str)
def test_calibrated_float_modes(tiny_model, tmp_path, data, quantization):
    folder = tiny_model("llama")
    adapter = visible_adapter(folder, seed=1)
    kl = [
        fuse(
            folder,
            adapter,
            tmp_path / method,
            quantization=quantization,
            options=FuseOptions(method=method, calibration=str(data), **FEW),
        ).fidelity.kl_mean
        for method in ("nearest", "calibrated")
    ]
    assert kl[1] < 0.7 * kl[0]


@pytest.mark.parametrize("asked", ["max_kl", "budget_bits"])
def test_8_bits_grow_too_where_they_are_to(tiny_model, tmp_path, data, home, asked):
    folder = tiny_model("llama")
    adapter = visible_adapter(folder, strength=0.05)
    write_adapter(adapter, home / "adapters" / "tiny")
    plain = fuse(folder, adapter, tmp_path / "plain", quantization=8, options=FuseOptions(calibration=str(data), **FEW))
    limit = plain.fidelity.kl_mean / 2 if asked == "max_kl" else plain.bits_per_weight + 6
    few = ["--calibration", str(data), "--calibration-rows", "12", "--check-rows", "12", "--quick"]
    more = ["--bits", "8", f"--{asked.replace('_', '-')}", str(limit), *few]
    run = CliRunner().invoke(cli, ["fuse", "tiny", str(tmp_path / "more"), *more, "--json"])
    assert run.exit_code == 0, run.output
    made = json.loads(run.stdout)
    assert made["bits_per_weight"] > plain.bits_per_weight + 1
    assert made["fidelity"]["kl_mean"] <= limit if asked == "max_kl" else made["bits_per_weight"] <= limit


def test_a_promise_is_kept_with_bits_of_their_own_for_some_layers(tiny_model, tmp_path, data):
    from mlx_lm.utils import load

    folder = tiny_model("llama", bits=4)
    adapter = visible_adapter(folder, strength=0.05)
    free = fuse(folder, adapter, tmp_path / "free", options=FuseOptions(calibration=str(data), **FEW))
    limit = free.fidelity.kl_mean / 4
    options = FuseOptions(calibration=str(data), max_kl=limit, **FEW)
    held = fuse(folder, adapter, tmp_path / "held", options=options)
    assert held.fidelity.kl_mean <= limit
    assert free.size_bytes < held.size_bytes < 2.5 * free.size_bytes
    module, _ = load(str(tmp_path / "held"))
    precisions = {quantization_of(layer) for _, layer in module.named_modules() if quantization_of(layer)}
    assert len(precisions) > 1
    budget = (free.bits_per_weight + held.bits_per_weight) / 2
    options = FuseOptions(calibration=str(data), budget_bits=budget, **FEW)
    middle = fuse(folder, adapter, tmp_path / "middle", options=options)
    assert free.bits_per_weight < middle.bits_per_weight <= budget
    assert held.fidelity.kl_mean < middle.fidelity.kl_mean < free.fidelity.kl_mean
    options = FuseOptions(calibration=str(data), budget_bits=3.0, **FEW)
    for bits in ("keep", "none"):
        with pytest.raises(ConfigError, match="bits per weight already"):
            fuse(folder, adapter, tmp_path / "small", quantization=bits, options=options)


def test_greedy_steps_follow_gain_per_byte():
    four, eight = Quantization(4, 64), Quantization(8, 64)
    plans = [LayerPlan(path, (64, 64), four, four, True, False) for path in "ab"]
    losses = {("a", four): 8.0, ("a", eight): 1.0, ("b", four): 2.0, ("b", eight): 0.1}
    steps = mixed.order_of_steps(plans, losses, "bfloat16")
    assert [(s.path, s.target) for s in steps] == [("a", eight), ("b", eight), ("a", None), ("b", None)]
    assert steps[0].extra_bytes == 64 * 64 // 2
    assert mixed.within_budget(steps, 64 * 64 // 2) == steps[:1]
    tall = mixed.Step("c", eight, 10_000, 1e6)
    assert mixed.within_budget([tall, *steps, mixed.Step("c", None, 1, 0.1)], 64 * 64) == steps[:2]
    measured = []

    def measure(targets):
        measured.append(targets)
        return 10.0 - sum(
            {("a", eight): 7, ("b", eight): 1.9, ("a", None): 8, ("b", None): 2}[x] for x in targets.items()
        )

    assert mixed.until_promise(steps, 10.0, 1.2, measure, lambda event: None) == 2
    assert mixed.until_promise(steps, 10.0, 11.0, measure, lambda event: None) == 0
    assert len(measured) <= 6


def test_over_the_limit_means_no_folder_unless_forced(tiny_model, tmp_path, data, monkeypatch):
    folder = tiny_model("llama", bits=4)
    adapter = visible_adapter(folder)
    monkeypatch.setattr("mlx_adapters.calibration.strategy.until_promise", lambda *_: 0)
    options = {"calibration": str(data), "max_kl": 1e-7, **FEW}
    with pytest.raises(FidelityError, match="above the 1e-07 allowed"):
        fuse(folder, adapter, tmp_path / "out", options=FuseOptions(**options))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".mlx-adapters-tmp-*"))
    assert fuse(folder, adapter, tmp_path / "out", options=FuseOptions(**options, force=True)).fidelity.kl_mean > 1e-7


def test_a_recipe_makes_the_same_bytes_again(tiny_model, tmp_path, data):
    folder = tiny_model("mixtral", bits=4)
    write_adapter(visible_adapter(folder, strength=0.05), tmp_path / "adapter")
    options = FuseOptions(calibration=str(data), budget_bits=6.5, **FEW)
    first = fuse(None, tmp_path / "adapter", tmp_path / "out", weights=[0.8], options=options)
    events = []
    again = fuse_again(tmp_path / "out", tmp_path / "again", on_event=events.append)
    assert again.fidelity == first.fidelity and again.identical
    assert "byte for byte" in events[-1].text
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        if name != "fuse_report.json":
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    other = files.read_json(tmp_path / "out/fuse_recipe.json")
    other["weights_sha256"] = {"model.safetensors": "0" * 64}
    files.write_json(tmp_path / "other.json", other)
    unlike = fuse_again(tmp_path / "other.json", tmp_path / "unlike", on_event=events.append)
    assert unlike.identical is False and events[-1].level == "warning"
    assert "differ from the recipe's in model.safetensors: another processor" in events[-1].text
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines[5:]))
    with pytest.raises(IncompatibleError, match="text"):
        fuse_again(tmp_path / "out", tmp_path / "third")
    write_adapter(visible_adapter(folder, seed=9), tmp_path / "adapter", overwrite=True)
    with pytest.raises(IncompatibleError, match="not the one of the recipe"):
        fuse_again(tmp_path / "out", tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_check_rows_are_never_calibrated_on(tiny_model, data):
    tokenizer = load_model(resolve_base(tiny_model("llama"))).tokenizer
    lines = (data / "train.jsonl").read_text()
    (data / "valid.jsonl").write_text("".join(lines.splitlines(keepends=True)[:5]) + (data / "valid.jsonl").read_text())
    text = choose_text(data, [], tokenizer, 1000, 1000)
    calibration = {tuple(tokens.tolist()) for tokens, _ in text.calibration}
    assert len(text.check) == 12 and not calibration & {tuple(tokens.tolist()) for tokens, _ in text.check}
    (data / "valid.jsonl").write_text(lines)  # nothing but training rows: some are set aside
    text = choose_text(data, [], tokenizer, 1000, 1000)
    calibration = {tuple(tokens.tolist()) for tokens, _ in text.calibration}
    check = {tuple(tokens.tolist()) for tokens, _ in text.check}
    assert len(check) == 8 and len(calibration) == 32 and not calibration & check


@pytest.mark.parametrize("count", [1, 3, 5])
def test_own_data_that_is_too_short_gives_way_to_the_general_text(tiny_model, data, home, count):
    folder = tiny_model("llama")
    tokenizer, adapter = load_model(resolve_base(folder)).tokenizer, visible_adapter(folder)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)[:count]
    (data / "train.jsonl").write_text("".join(lines))
    (data / "valid.jsonl").unlink()
    trained_on(adapter, data)
    text = choose_text(None, [adapter], tokenizer, 16, 8)
    assert text.source == GENERAL and f"'{data}' is too short" in text.why and text.describe()["why"] == text.why
    with pytest.raises(FormatError, match="too short"):
        choose_text(data, [adapter], tokenizer, 16, 8)


def test_few_rows_asked_for_are_still_of_the_own_data(tiny_model, data, home):
    folder = tiny_model("llama")
    adapter = visible_adapter(folder)
    trained_on(adapter, data)
    text = choose_text(None, [adapter], load_model(resolve_base(folder)).tokenizer, 1, 1)
    for rows in (text.calibration, text.check):
        assert sum(len(tokens) for tokens, _ in rows) >= 256 and len(rows) > 1
    assert text.source == str(data) and text.why is None


def test_rows_that_only_look_different_are_not_in_both_parts(tiny_model, data):
    tokenizer = load_model(resolve_base(tiny_model("llama"))).tokenizer
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    renamed = [json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(rows[:12])]
    (data / "valid.jsonl").write_text("".join(renamed))
    text = choose_text(data, [], tokenizer, 1000, 1000)
    check = {tuple(tokens.tolist()) for tokens, _ in text.check}
    assert len(check) == 12 and len(text.calibration) == 28
    assert not check & {tuple(tokens.tolist()) for tokens, _ in text.calibration}


def test_a_check_that_is_too_short_takes_training_rows(tiny_model, data):
    tokenizer = load_model(resolve_base(tiny_model("llama"))).tokenizer
    lines = (data / "valid.jsonl").read_text().splitlines(keepends=True)
    (data / "valid.jsonl").write_text(lines[0])
    text = choose_text(data, [], tokenizer, 1000, 1000)
    assert len(text.check) == 9 and len(text.calibration) == 32


def test_a_recipe_on_the_general_text_stays_with_it(tiny_model, tmp_path, data):
    folder = tiny_model("llama", bits=4)
    adapter = visible_adapter(folder)
    trained_on(adapter, tmp_path / "later")
    write_adapter(adapter, tmp_path / "adapter")
    options = FuseOptions(calibration_rows=4, check_rows=4)
    first = fuse(folder, tmp_path / "adapter", tmp_path / "out", options=options)
    assert first.text["source"] == GENERAL and "no data folder" in first.text["why"]
    assert json.loads((tmp_path / "out/fuse_report.json").read_text())["text"]["why"] == first.text["why"]
    data.rename(tmp_path / "later")
    assert fuse_again(tmp_path / "out", tmp_path / "again").identical


def test_where_the_text_comes_from(tiny_model, tmp_path, data):
    folder = tiny_model("llama")
    tokenizer, adapter = load_model(resolve_base(folder)).tokenizer, visible_adapter(folder)
    assert choose_text(None, [adapter], tokenizer, 16, 8).source == GENERAL
    trained_on(adapter, data)
    assert choose_text(None, [adapter], tokenizer, 16, 8).source == str(data)
    trained_on(adapter, tmp_path / "gone")
    assert choose_text(None, [adapter], tokenizer, 16, 8).source == GENERAL
    (tmp_path / "book.txt").write_text(
        "\n\n".join(f"Chapter {i}. " + "The rain fell on the roof. " * 9 for i in range(20))
    )
    text = choose_text(tmp_path / "book.txt", [], tokenizer, 100, 100)
    assert len(text.calibration) == 16 and len(text.check) == 4
    assert all(judged[1:].all() for _, judged in text.calibration)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", FormatError, "no text"),
        ("One line.", FormatError, "too short"),
        ("a\n\nb\n\nc", FormatError, "too short"),
        (None, NotFoundError, "no text"),
    ],
)
def test_bad_text(tiny_model, tmp_path, content, error, message):
    folder = tiny_model("llama", bits=4)
    if content is not None:
        (tmp_path / "book.txt").write_text(content)
    with pytest.raises(error, match=message):
        fuse(
            folder,
            visible_adapter(folder),
            tmp_path / "out",
            options=FuseOptions(calibration=str(tmp_path / "book.txt")),
        )
    assert not (tmp_path / "out").exists()


def test_bad_options():
    for settings, message in (
        ({"method": "gptq"}, "method cannot be"),
        ({"max_kl": 0.0}, "above 0"),
        ({"max_kl": 0.1, "budget_bits": 5.0}, "not both"),
        ({"max_kl": 0.1, "check": False}, "checked"),
        ({"budget_bits": 5.0, "method": "nearest"}, "calibrated"),
        ({"format": "onnx"}, "format cannot be"),
    ):
        with pytest.raises(ConfigError, match=message):
            FuseOptions(**settings)


def test_check_only_judges_what_others_fused(tiny_model, tmp_path, data, home):
    folder = tiny_model("qwen3", bits=4)
    adapter = visible_adapter(folder, strength=0.05)
    write_adapter(adapter, home / "adapters" / "tiny")
    options, events = FuseOptions(method="nearest", calibration=str(data), **FEW), []
    fused = fuse(folder, adapter, tmp_path / "out", options=options, on_event=events.append)
    assert fused.fidelity.kl_mean > 0.001 and any("--method calibrated" in str(event) for event in events)
    checked = check_fused(tmp_path / "out", adapter, options=options)
    assert checked.fidelity.kl_mean == pytest.approx(fused.fidelity.kl_mean, rel=1e-3)
    assert checked.update_survival == pytest.approx(fused.update_survival, rel=1e-3)
    arguments = [
        "fuse",
        "--check-only",
        str(tmp_path / "out"),
        "--adapter",
        "tiny",
        "--calibration",
        str(data),
        "--json",
    ]
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["fidelity"]["rows"] == 12
    for most, status in (("0.9", 0), ("0.0001", 1)):
        run = CliRunner().invoke(cli, [*arguments, "--max-kl", most])
        assert run.exit_code == status and json.loads(run.stdout)["fidelity"]["rows"] == 12
        assert (run.exception is None) == (status == 0)
    assert "above the 0.0001 allowed" in str(run.exception)
    with pytest.raises(IncompatibleError, match="not a fused version"):
        check_fused(tiny_model("llama"), adapter, options=options)


def test_check_only_refuses_another_architecture_of_the_same_shapes(tiny_model, tmp_path, data):
    """Granite has llama's layers and scales what goes through them."""
    folder, other = tiny_model("llama"), tmp_path / "granite"
    shutil.copytree(folder, other)
    scaled = {"logits_scaling": 2.0, "attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 1}
    settings = files.read_json(folder / "config.json") | {"model_type": "granite", **scaled}
    files.write_json(other / "config.json", settings | {"attention_bias": False, "mlp_bias": False})
    options = FuseOptions(method="nearest", calibration=str(data), **FEW)
    with pytest.raises(IncompatibleError, match="granite, the base a llama"):
        check_fused(other, visible_adapter(folder, strength=0.05), options=options)


def test_what_a_promise_was_measured_on_is_what_is_written(tiny_model, tmp_path, data, monkeypatch):
    """However few rows there are: rounding to nearest, at the precisions that calibration chose, was not measured."""
    folder, events = tiny_model("llama", bits=4), []
    monkeypatch.setattr("mlx_adapters.calibration.strategy.Strategy._nearest_is_better", lambda *_: True)
    options = FuseOptions(calibration=str(data), max_kl=0.002, **FEW)
    made = fuse(
        folder, visible_adapter(folder, strength=0.05), tmp_path / "out", options=options, on_event=events.append
    )
    told = [re.search(r"KL (\S+), promised", event.text) for event in events if isinstance(event, Note)]
    measured = [float(found[1]) for found in told if found]
    assert made.method == "calibrated"
    assert min(abs(kl - made.fidelity.kl_mean) for kl in measured if kl <= 0.002) < 1e-5


def test_layers_of_another_precision_that_stay_are_told(tiny_model, tmp_path):
    folder, events = tiny_model("llama"), []
    options = FuseOptions(method="nearest", check=False)
    with_recipe = replace(options, recipe="mixed_4_6")
    base = fuse(folder, visible_adapter(folder), tmp_path / "base", options=with_recipe).folder
    made = fuse(base, visible_adapter(base), tmp_path / "out", quantization=4, options=options, on_event=events.append)
    (note,) = [note for note in made.notes if "stay" in note]
    assert f"{made.bits_per_weight:.2f} bits per weight" in note and "6 bits" in note
    assert any(note in event.text for event in events if isinstance(event, Note))
    module, _ = load_module(resolve_base(made.folder))
    kinds = [quantization_of(layer).bits for _, layer in module.named_modules() if quantization_of(layer)]
    assert note.startswith(f"{kinds.count(6)} layers of {len(kinds)} ")
    kept = fuse(base, visible_adapter(base), tmp_path / "kept", options=options)
    assert not any("stay" in note for note in kept.notes)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from mlx_adapters.cli import main
sys.argv = ["mlx-adapters", *sys.argv[1:]]
main()
"""


def program(code, *arguments):
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_a_full_disk_leaves_nothing(tiny_model, tmp_path, home):
    folder = tiny_model("llama")
    write_adapter(visible_adapter(folder), home / "adapters" / "tiny")
    out = tmp_path / "fused" / "out"
    run = subprocess.run(program(LIMITED, "fuse", "tiny", out, "--no-check"), capture_output=True, text=True)
    assert run.returncode == 1
    assert "Error: Cannot write" in run.stderr and "Hint:" in run.stderr and "Traceback" not in run.stderr
    assert list((tmp_path / "fused").iterdir()) == []


def test_a_kill_leaves_no_half_folder(tiny_model, tmp_path, home):
    folder = tiny_model("llama", bits=4)
    write_adapter(visible_adapter(folder), home / "adapters" / "tiny")
    parent = tmp_path / "fused"
    code = "import sys\nfrom mlx_adapters.cli import main\nsys.argv = ['x', *sys.argv[1:]]\nmain()"
    process = subprocess.Popen(program(code, "fuse", "tiny", parent / "out"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(parent.glob(".mlx-adapters-tmp-*/*/*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (parent / "out").exists()
    for leftover in parent.glob(".mlx-adapters-tmp-*"):
        os.utime(leftover, (0, 0))
    run = CliRunner().invoke(cli, ["fuse", "tiny", str(parent / "out"), "--no-check"])
    assert run.exit_code == 0, run.output
    assert [path.name for path in parent.iterdir()] == ["out"]


def test_the_command_ends_in_a_verdict(tiny_model, tmp_path, home, data):
    folder = tiny_model("llama", bits=4)
    write_adapter(visible_adapter(folder), home / "adapters" / "tiny")
    arguments = ["fuse", "tiny", str(tmp_path / "out"), "--calibration", str(data), "--calibration-rows", "12"]
    run = CliRunner().invoke(cli, arguments)
    assert run.exit_code == 0, run.output
    assert "calibrated rounding" in run.stdout and run.stdout.startswith("Answers ") and "Next: " in run.stderr
    recipe = files.read_json(Path(tmp_path / "out/fuse_recipe.json"))
    assert recipe["method"] == "calibrated" and recipe["adapters"][0]["reference"] == "tiny"
    assert f"rows kept aside of {data}." in run.stdout
    again = CliRunner().invoke(cli, ["fuse", "--again", str(tmp_path / "out"), str(tmp_path / "again")])
    assert again.exit_code == 0 and "byte for byte" in again.output, again.output
    wrong = CliRunner().invoke(cli, ["fuse", "tiny"])
    assert wrong.exit_code == 2 and "folder" in wrong.output


@pytest.mark.parametrize(
    ("change", "method"),
    [
        ({}, "nearest"),
        ({"fuse_aware": {"bits": 3, "group_size": 64, "mode": "affine"}}, "calibrated"),
        ({"fuse_aware": None}, "calibrated"),
        ({"fuse_aware_from": 5}, "calibrated"),
    ],
)
def test_an_adapter_that_was_trained_through_the_rounding_is_rounded_the_same_way(tiny_model, tmp_path, change, method):
    base = tiny_model("llama", bits=4, group_size=64)
    adapter = replace(visible_adapter(base), iteration=5)
    planned = {"fuse_aware": {"bits": 4, "group_size": 64, "mode": "affine"}, "fuse_aware_from": 4}
    adapter.metadata["training"] = planned | change
    notes = []
    result = fuse(base, adapter, tmp_path / "out", options=FuseOptions(**FEW), on_event=notes.append)
    assert result.method == method
    assert any("trained through" in str(note) for note in notes) == (method == "nearest")
    assert not any("lost part" in str(note) for note in notes)


@pytest.mark.parametrize("gpu", [True, False])
def test_no_row_reaches_past_the_positions_that_a_model_learned(gpu, tiny_model, tmp_path, monkeypatch):
    """Past them lies foreign memory. Rows are longer than the positions, and on a GPU padded to more."""
    base = resolve_base(tiny_model("gpt2", n_positions=40, n_ctx=40))
    monkeypatch.setattr(texts, "on_gpu", lambda: gpu)
    text = choose_text(GENERAL, [], load_model(resolve_base(base)).tokenizer, 8, 8, base)
    batches = texts.batches_of(text.calibration, base) + texts.batches_of(text.check, base)
    assert max(batch.tokens.shape[1] for batch in batches) == 40
    assert all(batch.judged.max().item() < batch.tokens.size for batch in batches)


@pytest.mark.parametrize(
    ("architecture", "bits", "quantization", "strength", "told"),
    [
        ("llama", None, Quantization(8, 32, "mxfp8"), 0.3, ["rounded to nearest"]),
        ("gemma3_text", None, Quantization(4, 32, "mxfp4"), 0.5, []),
        ("llama", 4, Quantization(4, 16, "nvfp4"), 0.02, ["rounding to nearest"]),
    ],
)
def test_calibration_is_never_worse_than_rounding_to_nearest_on_its_own_rows(
    architecture, bits, quantization, strength, told, tiny_model, data, tmp_path
):
    shape = {"group_size": quantization.group_size, "mode": quantization.mode} if bits else {}
    base = tiny_model(architecture, bits=bits, **shape)
    adapter, its_base, results = visible_adapter(base, strength=strength), resolve_base(base), {}
    text = choose_text(data, [], load_model(resolve_base(base)).tokenizer, 8, 8)
    batches = texts.batches_of(text.calibration, its_base)
    for method in ("nearest", "calibrated"):
        options = FuseOptions(method=method, calibration=str(data), calibration_rows=8, check=False)
        result = fuse(base, adapter, tmp_path / method, quantization=quantization, options=options)
        fused = BlockwiseModel(resolve_base(tmp_path / method), None, lambda _: True)
        updates = Updates(((adapter, 1.0),))
        results[method] = measure_fidelity(BlockwiseModel(its_base, updates), fused, None, batches).kl_mean, result
    assert results["calibrated"][0] <= results["nearest"][0] * (1 + 1e-6)
    notes = [note.split(":")[0].split(" was")[0] for note in results["calibrated"][1].notes]
    assert notes == told or on_gpu()  # which is better there, and by how little, its order of sums decides


def test_mixed_precision_is_held_against_rounding_to_nearest_too(tiny_model, data, tmp_path, monkeypatch):
    """At the precisions that were chosen for it."""
    base = tiny_model("llama", bits=4)
    asked = {"calibration": str(data), "budget_bits": 6.5, **FEW}
    calibrated = fuse(base, visible_adapter(base), tmp_path / "one", options=FuseOptions(**asked))
    judged = []

    def judge(exact, fused, plain, batches, *rest):
        fidelity = measure_fidelity(exact, fused, plain, batches, *rest)
        judged.append(fidelity)
        return replace(fidelity, base_kl=0.0) if len(judged) == 1 else fidelity  # as if nearest were better

    monkeypatch.setattr(fidelity, "measure_fidelity", judge)
    nearest = fuse(base, visible_adapter(base), tmp_path / "other", options=FuseOptions(**asked))
    assert (calibrated.method, nearest.method) == ("calibrated", "nearest")
    assert 0 < judged[0].kl_mean < judged[0].base_kl
    assert nearest.size_bytes == calibrated.size_bytes and any("rounded to nearest" in n for n in nearest.notes)
    one, other = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("one", "other"))
    assert {n: (w.shape, w.dtype) for n, w in one.items()} == {n: (w.shape, w.dtype) for n, w in other.items()}
    assert any(not mx.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("signed", [None, "", "0" * 64, 7, ["x"], "é", "of another path", "of another machine"])
def test_data_that_a_stranger_names_is_not_opened(signed, tiny_model, data, home, monkeypatch):
    """Neither a path nor a data set of the Hub; it is named, and used if it is asked for."""
    folder, opened = tiny_model("llama"), []
    adapter, tokenizer = visible_adapter(folder), load_model(resolve_base(folder)).tokenizer
    for reader in ("read_as_trained", "read_again"):
        read = getattr(datasets, reader)
        monkeypatch.setattr(
            f"mlx_adapters.calibration.texts.{reader}",
            lambda *a, read=read, **k: opened.append(a) or read(*a, **k),
        )
    if signed == "of another path":
        signed = origin.signature(str(data.parent))
    if signed == "of another machine":
        signed = origin.signature(str(data))
        (home / "machine.key").unlink()
    for source in (str(data), "hf:someone/secrets", "data"):
        adapter.metadata.update({"data": {"source": source}, "signature": signed})
        text = choose_text(None, [adapter], tokenizer, 8, 8)
        assert text.source == GENERAL and f"'{source}'" in text.why and not opened
    adapter.metadata.update({"data": None, "dataset": str(data)})
    assert choose_text(None, [adapter], tokenizer, 8, 8).source == GENERAL and not opened
    assert choose_text(str(data), [adapter], tokenizer, 8, 8).source == str(data)


def test_the_secret_is_nobody_elses(home):
    first = origin.signature("data/sql")
    assert (home / "machine.key").stat().st_mode & 0o077 == 0
    assert origin.made_here("data/sql", first) and origin.signature("data/sql") == first
    assert not origin.made_here("data/sq", first)


def test_an_adapter_that_was_trained_here_is_calibrated_on_its_data(tiny_model, data, home, monkeypatch):
    train(tiny_model("llama"), data, name="sql", training=TrainConfig(iterations=1, batch_size=2))
    adapter, tokenizer = load_adapter("sql"), load_model(resolve_base(tiny_model("llama"))).tokenizer
    assert choose_text(None, [adapter], tokenizer, 8, 8).source == str(data)
    monkeypatch.setenv("MLX_ADAPTERS_HOME", str(home.parent / "another machine"))
    text = choose_text(None, [adapter], tokenizer, 8, 8)
    assert text.source == GENERAL and "not trained on this machine" in text.why


def test_the_grouping_of_calibration_rows_stays_as_it_is():
    """The bytes of a calibrated fuse hang on it: sums are in the order of the batches and of their rows."""
    rows = []
    for i, n in enumerate((9, 3, 20, 12, 3, 9)):
        rows.append((np.arange(100 * i, 100 * i + n, dtype=np.int32), np.arange(n) % 4 == 2))
    batches = make_batches(rows, 27)
    assert [batch.tokens.shape for batch in batches] == [(3, 9), (2, 12), (1, 20)]
    assert [batch.tokens[:, 0].tolist() for batch in batches] == [[100, 400, 0], [500, 300], [200]]
    assert batches[0].tokens[1].tolist() == [400, 401, 402, 0, 0, 0, 0, 0, 0]
    assert [batch.judged.tolist() for batch in batches] == [[1, 10, 19, 23], [1, 5, 13, 17, 21], [1, 5, 9, 13, 17]]
    assert [batch.targets.tolist() for batch in batches] == [
        [102, 402, 2, 6],
        [502, 506, 302, 306, 310],
        [202, 206, 210, 214, 218],
    ]
    assert [batch.real.tolist() for batch in batches] == [
        [0, 1, 9, 10, *range(18, 26)],
        [*range(8), *range(12, 23)],
        [*range(19)],
    ]


@pytest.mark.parametrize(
    ("pad_to", "most", "shapes"),
    [
        (1, None, [(4, 9), (2, 20)]),
        (8, None, [(3, 16), (2, 16), (1, 24)]),
        (8, 21, [(3, 16), (2, 16), (1, 21)]),
        (64, 10, [(4, 10), (2, 20)]),
    ],
)
def test_calibration_rows_are_padded_to_few_widths(pad_to, most, shapes):
    rows = [(np.zeros(n, np.int32), np.ones(n, bool)) for n in (9, 3, 20, 12, 3, 9)]
    assert [batch.tokens.shape for batch in make_batches(rows, 48, pad_to, most)] == shapes
