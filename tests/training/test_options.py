"""Every setting does what it says: an option that changes nothing is a failure."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.training_tools import write_data

from mlx_adapters import LoraConfig, Quantization, TrainConfig, train
from mlx_adapters.config.data import DataConfig
from mlx_adapters.errors import ConfigError, FormatError, IncompatibleError, TrainingError
from mlx_adapters.events import CheckpointSaved, Note, TrainReport, ValidationReport
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.storage.files import read_json
from mlx_adapters.storage.tensor_files import read_safetensors

LORA = LoraConfig(rank=4, scale=2.0, target_modules=("q_proj", "v_proj"))
BASE = TrainConfig(iterations=4, batch_size=4, learning_rate=0.01, eval_every=2, save_every=2, report_every=2)
FUSE = Quantization(4, 32)


@dataclasses.dataclass
class Seen:
    """What a run showed and left."""

    run: object
    events: list

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def weights(self) -> dict:
        last = f"{self.run.final.iteration:07d}_adapters.safetensors"
        return read_safetensors(self.run.folder / last)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("rows") / "data", rows=17, valid=6)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    turns = [("user", "List all"), ("assistant", "SELECT title"), ("user", "How many?"), ("assistant", "COUNT(*)")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return folder


@pytest.fixture
def observe(tiny_model, data):
    def observe(training=BASE, lora=LORA, where=None, base=None, **options) -> Seen:
        events = []
        run = train(
            base or tiny_model(),
            where or data,
            name=options.pop("name", "run"),
            lora=lora,
            training=training,
            overwrite=True,
            on_event=events.append,
            **options,
        )
        return Seen(run, events)

    return observe


def differ(a: dict, b: dict) -> bool:
    return any(a[n].shape != b[n].shape or not mx.array_equal(a[n], b[n]) for n in a.keys() & b.keys())


# Setting -> (what is set, besides BASE; what it is compared with).
CHANGES_WEIGHTS = {
    "batch_size": ({"batch_size": 3}, {}),
    "learning_rate": ({"learning_rate": 0.02}, {}),
    "schedule": ({"schedule": "cosine"}, {}),
    "warmup": ({"warmup": 2}, {}),
    "optimizer": ({"optimizer": "adafactor"}, {}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "lora_plus_ratio": ({"lora_plus_ratio": 4.0}, {}),
    "max_grad_norm": ({"max_grad_norm": 0.01, "optimizer": "sgd"}, {"optimizer": "sgd"}),
    "grad_accumulation": ({"grad_accumulation": 2}, {}),
    "max_seq_length": ({"max_seq_length": 24}, {}),
    "mask_prompt": ({"mask_prompt": True}, {}),
    "packing": ({"packing": True, "max_seq_length": 128, "batch_size": 2}, {"batch_size": 2, "max_seq_length": 128}),
    "fuse_aware": ({"fuse_aware": FUSE}, {}),
    "fuse_aware_from": ({"fuse_aware": FUSE, "fuse_aware_from": 2}, {"fuse_aware": FUSE}),
    "seed": ({"seed": 1}, {}),
    "dtype": ({"dtype": "bfloat16"}, {}),
}


@pytest.fixture(scope="module")
def weights_of() -> Callable[..., dict]:
    """The weights that plain settings give: most others are compared with the same."""
    known = {}

    def weights_of(observe, plain=BASE):
        key = repr(plain)
        if key not in known:
            known[key] = observe(plain, name="other").weights
            mx.eval(known[key])
        return known[key]

    return weights_of


@pytest.mark.parametrize("setting", CHANGES_WEIGHTS)
def test_setting_changes_the_weights(setting, observe, weights_of):
    changed, plain = (replace(BASE, **changes) for changes in CHANGES_WEIGHTS[setting])
    assert setting in CHANGES_WEIGHTS[setting][0]
    assert differ(observe(changed).weights, weights_of(observe, plain))


def test_iterations_and_reports_and_saves(observe):
    seen = observe(replace(BASE, iterations=6, report_every=3, eval_every=5, save_every=4))
    assert [e.iteration for e in seen.of(TrainReport)] == [3, 6]
    assert [e.iteration for e in seen.of(ValidationReport)] == [0, 5, 6]
    assert {4, 6} <= {e.iteration for e in seen.of(CheckpointSaved)} <= {4, 5, 6}


def test_eval_batches(observe):
    few, all_ = observe(replace(BASE, eval_batches=1)), observe(name="other")
    assert few.run.validation_losses != all_.run.validation_losses
    assert not differ(few.weights, all_.weights)


def test_save_every_minutes(observe):
    seen = observe(replace(BASE, iterations=5, save_every=5, eval_every=5, save_every_minutes=1e-9))
    assert [e.iteration for e in seen.of(CheckpointSaved)] == [1, 2, 3, 4, 5]
    assert list((seen.run.folder / "checkpoints").iterdir()) == [seen.run.folder / "checkpoints" / "0000005"]


def test_keep(observe):
    kept = observe(replace(BASE, iterations=8, keep=1, early_stop=None)).run.folder / "checkpoints"
    assert 1 <= len(list(kept.iterdir())) <= 2


def test_early_stop_and_best(observe):
    seen = observe(replace(BASE, iterations=30, learning_rate=3.0, optimizer="sgd", early_stop=2, max_grad_norm=5.0))
    assert seen.run.stopped_early and seen.run.final.iteration < 30
    losses = dict(seen.run.validation_losses)
    best = min(i for i in losses if i and losses[i] == min(v for k, v in losses.items() if k))
    assert seen.run.best.iteration == best and seen.run.final.iteration == best + 4
    assert load_adapter("run").metadata["iteration"] == best


def test_the_best_is_one_that_was_judged_with_the_rounding(observe, monkeypatch):
    from mlx_adapters.optimization.step import TrainStep

    losses = iter([9.0, 1.0, 3.0, 2.0, 4.0])  # at 0, 2, 4, 6 and 8
    monkeypatch.setattr(TrainStep, "evaluate", lambda *a: (next(losses), {}))
    seen = observe(replace(BASE, iterations=8, fuse_aware=FUSE, fuse_aware_from=2))
    assert seen.run.best.iteration == 6 and seen.run.best_validation_loss == 2.0


def test_early_stop_without_validation_is_refused(observe, tmp_path):
    none = write_data(tmp_path / "none", rows=9, valid=0)
    (none / "valid.jsonl").write_text("")
    with pytest.raises(ConfigError, match="needs validation rows, and there are none") as caught:
        observe(replace(BASE, early_stop=2), where=none)
    assert "leave --early-stop out" in caught.value.hint
    assert any("no validation rows" in note.text for note in observe(where=none).of(Note))
    with pytest.raises(ConfigError, match="an evaluation before the end"):
        replace(BASE, early_stop=2, eval_every=4)


def test_last_turn_only_trains_fewer_tokens(observe, chats):
    plain = replace(BASE, mask_prompt=True)
    every, last = observe(plain, where=chats), observe(replace(plain, last_turn_only=True), where=chats, name="other")
    assert last.run.trained_tokens < every.run.trained_tokens
    assert differ(every.weights, last.weights)


def close(a: Seen, b: Seen) -> bool:
    return all(mx.allclose(a.weights[n], b.weights[n], rtol=1e-3, atol=1e-5) for n in a.weights)


def test_grad_checkpoint_gives_the_same_weights_with_a_second_forward(observe, monkeypatch):
    from mlx_lm.models import llama

    calls, forward = [0], llama.TransformerBlock.__call__

    def counted(self, *args, **kwargs):
        calls[0] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", counted)
    sgd = replace(BASE, optimizer="sgd")
    plain, once = observe(sgd), calls[0]
    saving = observe(replace(sgd, grad_checkpoint=True), name="other")
    assert calls[0] - once > once and close(plain, saving)


def test_chunked_loss_off_computes_the_plain_loss(observe, monkeypatch):
    from mlx_adapters.optimization import log_probabilities

    calls, plain = [0], log_probabilities.plain
    monkeypatch.setattr(log_probabilities, "plain", lambda *a: (calls.__setitem__(0, calls[0] + 1), plain(*a))[1])
    sgd = replace(BASE, optimizer="sgd")
    on = observe(replace(sgd, chunked_loss="on"))
    probes = calls[0]
    off = observe(replace(sgd, chunked_loss="off"), name="other")
    assert probes <= 1 and calls[0] - probes > 4 and close(on, off)


LORA_CHANGES = {
    "rank": {"rank": 2},
    "scale": {"scale": 4.0},
    "dropout": {"dropout": 0.5},
    "type": {"type": "dora"},
    "ranks": {"ranks": {"v_proj": 2}},
}


@pytest.mark.parametrize("setting", LORA_CHANGES)
def test_lora_setting_changes_the_weights(setting, observe, weights_of):
    assert differ(observe(lora=replace(LORA, **LORA_CHANGES[setting])).weights, weights_of(observe))


def test_target_modules_and_num_layers_choose_the_keys(observe):
    keys = lambda seen: load_adapter(seen.run.folder).config.keys  # noqa: E731
    assert all(key.endswith(("q_proj", "v_proj")) for key in keys(observe()))
    up = keys(observe(lora=replace(LORA, target_modules=("mlp.up_proj",), num_layers=1), name="other"))
    assert up == ("model.layers.1.mlp.up_proj",)
    assert len(keys(observe(lora=replace(LORA, target_modules="all"), name="all"))) == 14


def test_no_setting_is_forgotten_here():
    elsewhere = {
        "iterations",
        "epochs",
        "report_every",
        "eval_every",
        "save_every",
        "eval_batches",
        "save_every_minutes",
        "keep",
        "early_stop",
        "last_turn_only",
        "objective",
        "grad_checkpoint",
        "chunked_loss",
        "memory",  # as the next: test_memory_plan.py
        "memory_limit",
        "schedule_iterations",  # test_schedules.py
        "valid_fraction",  # this and these: tests/rows and tests/templates
        *(field.name for field in dataclasses.fields(DataConfig)),
    }
    assert {f.name for f in dataclasses.fields(TrainConfig)} == elsewhere | CHANGES_WEIGHTS.keys()
    assert {f.name for f in dataclasses.fields(LoraConfig)} == {
        *LORA_CHANGES,
        "target_modules",
        "num_layers",
        "init",
        "original",
    }


def test_rank_patterns_are_stored_as_zeros_that_stay_zero(observe):
    for optimizer in ("adamw", "adafactor", "muon", "sgd", "adam"):
        decay = 0.0 if optimizer == "adam" else 0.1
        training = replace(BASE, optimizer=optimizer, weight_decay=decay)
        weights = observe(training, lora=replace(LORA, ranks={"v_proj": 1})).weights
        for name, weight in weights.items():
            inner = weight if name.endswith("lora_a") else weight.T
            assert inner.shape[1] == 4
            empty = inner[:, 1:] if "v_proj" in name else inner[:, :0]
            assert mx.all(empty == 0).item() and mx.any(inner[:, :1] != 0).item()


def test_init_from_starts_at_the_adapters_loss(observe):
    first = observe()
    second = observe(lora=None, init_from="run", name="second")
    assert second.run.validation_losses[0][1] == pytest.approx(first.run.validation_losses[-1][1], rel=1e-5)
    assert read_json(second.run.folder / "recipe.json")["init_from"] == load_adapter("run").fingerprint
    with pytest.raises(IncompatibleError, match="cannot start from"):
        observe(lora=replace(LORA, rank=2), init_from="run", name="third")


def test_adapters_of_every_kind_load_in_plain_mlx_lm(observe, tiny_model):
    from mlx_lm import load

    from mlx_adapters import load_model

    cases = [("llama", "lora", ("q_proj", "embed_tokens")), ("qwen3", "dora", "all"), ("mixtral", "lora", "all")]
    for architecture, kind, targets in cases:
        folder = tiny_model(architecture)
        run = observe(replace(BASE, iterations=2), replace(LORA, type=kind, target_modules=targets), base=folder).run
        theirs, _ = load(str(folder), adapter_path=str(run.folder))
        ours = load_model(folder, load_adapter(run.folder))
        tokens = mx.array([[5, 6, 7, 8, 9]])
        bare = load_model(folder).module(tokens)
        assert mx.allclose(theirs(tokens), ours.module(tokens), atol=1e-4)
        assert mx.abs(ours.module(tokens) - bare).max() > 1e-3


def test_bad_input(observe, tiny_model, data, tmp_path):
    with pytest.raises(ConfigError, match="'q_prj' matches nothing") as caught:
        observe(lora=replace(LORA, target_modules=("q_prj",)))
    assert "q_proj" in caught.value.hint
    with pytest.raises(ConfigError, match="The rank of 'o_proj'"):
        observe(lora=replace(LORA, ranks={"o_proj": 2}))
    with pytest.raises(ConfigError, match="batch_size 99 is larger than the 17 rows") as caught:
        observe(replace(BASE, batch_size=99))
    assert "--batch-size 17" in caught.value.hint
    one = write_data(tmp_path / "one", rows=1, valid=0)
    with pytest.raises(ConfigError, match="larger than the 1 row of"):
        observe(where=one)
    assert observe(replace(BASE, batch_size=1), where=one, name="one").run.final.iteration == 4
    with pytest.raises(FormatError, match="No training row has anything to train"):
        observe(replace(BASE, max_seq_length=3, mask_prompt=True))
    with pytest.raises(ConfigError, match="packed exactly"):
        observe(replace(BASE, packing=True, batch_size=1), replace(LORA, target_modules="all"), base=tiny_model("gpt2"))
    long = tmp_path / "long"
    long.mkdir()
    (long / "train.jsonl").write_text(json.dumps({"text": "SELECT title FROM courses " * 200}) + "\n")
    gpt2 = {"base": tiny_model("gpt2"), "where": long, "lora": replace(LORA, target_modules="all")}
    with pytest.raises(ConfigError, match="more than the model's 512 positions") as caught:
        observe(replace(BASE, batch_size=1), **gpt2)
    assert "--max-seq-length 513" in caught.value.hint
    assert not (tmp_path / "home" / "adapters" / "run").exists()
    assert observe(replace(BASE, batch_size=1, max_seq_length=513), name="cut", **gpt2).run.final.iteration == 4


def test_nan_stops_at_the_last_checkpoint_and_names_the_rows(observe, tmp_path):
    from mlx_adapters.sources.registry import adapter_folder

    with pytest.raises(TrainingError, match=r"iteration \d+; rows in the batch: .*train.jsonl, line") as caught:
        observe(replace(BASE, iterations=40, learning_rate=1e19, optimizer="sgd", save_every=1, eval_every=50))
    assert "--resume run" in caught.value.hint and "float32" not in caught.value.hint
    assert "try a lower learning rate or --max-grad-norm 1." in caught.value.hint
    saved = list(adapter_folder("run").glob("*_adapters.safetensors"))
    assert saved
    for path in saved:
        assert all(mx.isfinite(w).all().item() for w in read_safetensors(path).values())


def test_a_run_that_fails_before_it_saved_anything_leaves_nothing(observe, tmp_path):
    with pytest.raises(TrainingError, match="NaN") as caught:
        observe(replace(BASE, iterations=40, learning_rate=1e38, optimizer="sgd", save_every=100, eval_every=50))
    assert "Nothing was saved" in caught.value.hint and "--resume" not in caught.value.hint
    assert not (tmp_path / "home" / "adapters" / "run").exists()
    assert observe().run.final.iteration == BASE.iterations  # the name is free


def test_nan_before_anything_is_trained_blames_no_learning_rate(observe):
    with pytest.raises(TrainingError, match="The gradient became NaN or infinite at iteration 1") as caught:
        observe(lora=replace(LORA, scale=1e38))
    assert caught.value.hint == "nothing is trained yet: try a smaller --scale, and look at the base and these rows."
    with pytest.raises(TrainingError, match="NaN") as caught:
        observe(replace(BASE, dtype="float16"), lora=replace(LORA, scale=1e38))
    assert "try --dtype float32 or a smaller --scale" in caught.value.hint


def test_truncated_and_dropped_rows_are_told(observe):
    notes = [n.text for n in observe(replace(BASE, max_seq_length=30, mask_prompt=True)).of(Note)]
    assert any("rows cut at max_seq_length 30" in note for note in notes)
    assert any("nothing to train within max_seq_length 30" in note for note in notes)
