"""Runs that learn preferences: what they leave, how their reference is kept, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.training_tools import cut_after, write_preferences

from mlx_adapters import DPO, KTO, ORPO, LoraConfig, SimPO, TrainConfig, train
from mlx_adapters.data.datasets import read_data
from mlx_adapters.errors import ConfigError, FormatError, IncompatibleError
from mlx_adapters.events import Note, Progress, TrainReport, ValidationReport
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage.files import read_json
from mlx_adapters.storage.tensor_names import REFERENCE_FILE
from mlx_adapters.training import reference_model, setup

LORA = LoraConfig(rank=4, scale=2.0, target_modules=("q_proj", "v_proj"))
BASE = TrainConfig(iterations=8, batch_size=4, learning_rate=0.01, eval_every=4, save_every=4, report_every=2)
OBJECTIVES = [DPO(), DPO(loss="ipo"), ORPO(), SimPO(), KTO()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        "pairs": write_preferences(folder / "pairs"),
        "labeled": write_preferences(folder / "labeled", labeled=True),
    }


@pytest.fixture
def learn(tiny_model, data):
    def run(objective, name="run", training=BASE, rows=None, **more):
        events = []
        where = rows or data[objective.rows]
        made = train(
            tiny_model(),
            where,
            name=name,
            lora=LORA,
            training=replace(training, objective=objective),
            on_event=events.append,
            **more,
        )
        return made, events

    return run


def kept(name="run"):
    recipe = read_json(adapter_folder(name) / "recipe.json")
    return reference_model.read_values(adapter_folder(name), reference_model.bound_to(recipe))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_a_run_learns_what_is_preferred_and_tells_it(objective, learn):
    run, events = learn(objective)
    reports = [e for e in events if isinstance(e, TrainReport | ValidationReport)]
    assert run.validation_losses[-1][1] < run.validation_losses[0][1]
    first, last = reports[0].figures, reports[-1].figures
    assert last["margin"] > first["margin"] and last["accuracy"] >= first["accuracy"]
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    assert ("kl" in last) == (objective.rows == "labeled") and last["chosen_log_probability"] < 0
    record = read_json(run.folder / "adapter_metadata.json")
    assert [i for i, _ in record["validation_figures"]] == [0, 4, 8]
    assert record["validation_figures"][-1][1] == last and record["training"]["objective"]["name"] == objective.name
    assert (run.folder / REFERENCE_FILE).is_file() == objective.reference


def test_at_first_the_model_is_its_reference(learn):
    _, events = learn(DPO(), training=replace(BASE, iterations=1, eval_every=1))
    figures = next(e for e in events if isinstance(e, ValidationReport)).figures
    assert figures["accuracy"] == pytest.approx(0.5) and abs(figures["margin"]) < 1e-4


def test_the_reference_is_the_base_and_only_what_is_needed_is_computed(learn, data, tiny_model):
    learn(DPO(), training=replace(BASE, iterations=2, batch_size=3))
    values = kept()
    assert np.isfinite(values["train"][:, 0]).sum() == 6 and np.isfinite(values["valid"]).all()
    model = load_model(resolve_base(tiny_model()))
    config = replace(BASE, objective=DPO())
    rows = setup.tokenize_split(read_data(data["pairs"]), "train", model.tokenizer, config, lambda _: None)
    for row, pair in zip(rows, values["train"], strict=True):
        if np.isfinite(pair[0]):
            for part, value in zip(row.sequences, pair, strict=True):
                logits = np.array(model.logits(part.tokens.tolist()), np.float64).reshape(len(part.tokens), -1)
                logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                places = np.flatnonzero(part.answer)
                assert value == pytest.approx(logs[places - 1, part.tokens[places]].sum(), abs=1e-3)


def test_a_longer_run_computes_the_rest_and_ends_as_if_it_had_been_long(learn):
    learn(DPO(), training=replace(BASE, iterations=2))
    before = kept()["train"]
    longer, events = learn(DPO(), training=BASE, resume=True)
    whole, _ = learn(DPO(), name="whole")
    assert load_adapter("run@8").fingerprint == load_adapter("whole@8").fingerprint
    assert np.array_equal(kept()["train"], kept("whole")["train"])
    assert np.isnan(before[:, 0]).any() and np.isfinite(kept()["train"][:, 0]).all()
    assert any(isinstance(e, Progress) and e.stage == "reference" for e in events)
    assert longer.train_losses == whole.train_losses


def test_a_lost_or_foreign_reference_is_computed_anew(learn, data, tiny_model):
    settings = {"lora": LORA, "training": replace(BASE, objective=DPO())}
    with cut_after(5):
        train(tiny_model(), data["pairs"], name="run", **settings)
    path = adapter_folder("run") / REFERENCE_FILE
    true = path.read_bytes()
    for spoiled in (None, true[:-4] + b"abcd", b"x"):
        path.unlink() if spoiled is None else path.write_bytes(spoiled)
        assert kept() == {}
    train(name="run", resume=True)
    assert path.read_bytes() == true
    learn(DPO(), name="whole")
    assert load_adapter("run@8").fingerprint == load_adapter("whole@8").fingerprint


def test_another_adapter_as_reference(learn, tiny_model):
    learn(ORPO(), name="first", training=replace(BASE, iterations=2))
    learn(DPO(), init_from="first", reference="first", training=replace(BASE, iterations=2))
    _, events = learn(DPO(), name="alone", init_from="first", training=replace(BASE, iterations=2))
    assert any("The reference is the base alone" in e.text for e in events if isinstance(e, Note))
    assert not np.array_equal(kept()["train"], kept("alone")["train"])
    figures = dict(read_json(adapter_folder("run") / "adapter_metadata.json")["validation_figures"])
    assert abs(figures[0]["margin"]) < 1e-4  # it starts from its reference
    learn(ORPO(), name="first", training=replace(BASE, iterations=3), overwrite=True)
    with pytest.raises(IncompatibleError, match="'first', the reference of this run, is not what it was"):
        learn(DPO(), training=replace(BASE, iterations=4), resume=True)


def test_what_is_refused(learn, data, tmp_path):
    with pytest.raises(ConfigError, match="orpo compares with no reference model"):
        learn(ORPO(), reference="first")
    with pytest.raises(ConfigError, match="dpo cannot pack rows"):
        replace(BASE, objective=DPO(), packing=True)
    with pytest.raises(ConfigError, match="objective cannot be 'dpo'"):
        TrainConfig(objective="dpo")
    with pytest.raises(ConfigError, match="no label smoothing"):
        DPO(loss="ipo", label_smoothing=0.1)
    with pytest.raises(FormatError, match="no two answers to compare"):
        learn(DPO(), rows=data["labeled"])
    same = tmp_path / "same.jsonl"
    same.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    with pytest.raises(FormatError, match="No training row says which answer is better") as caught:
        learn(DPO(), rows=same)
    assert "line 1: the chosen and the rejected answer are equal" in caught.value.hint


@pytest.mark.parametrize("label", [True, False])
def test_kto_with_one_label_and_one_row_at_a_time(label, learn, tmp_path):
    lines = [{"prompt": f"How many {i}?", "completion": f"SELECT {i};", "label": label} for i in range(5)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run, events = learn(KTO(), rows=tmp_path / "one.jsonl", training=replace(BASE, batch_size=1))
    kind = "good" if label else "bad"
    assert any(f"All answers are {kind} ones" in e.text for e in events if isinstance(e, Note))
    assert all(np.isfinite(loss) for _, loss in run.train_losses)
    (tmp_path / "single.jsonl").write_text(json.dumps(lines[0]))  # no other answer: no KL
    run, events = learn(KTO(), "single", rows=tmp_path / "single.jsonl", training=replace(BASE, batch_size=1))
    assert [e.figures["kl"] for e in events if isinstance(e, TrainReport)] == [0.0] * 4
    assert (run.train_losses[-1][1] < run.train_losses[0][1]) is True


def test_an_objective_by_its_name(tiny_model, data):
    run = train(
        tiny_model(), data["pairs"], name="run", objective="simpo", lora=LORA, training=replace(BASE, iterations=1)
    )
    assert read_json(run.folder / "adapter_metadata.json")["training"]["objective"]["beta"] == 2.0
    with pytest.raises(ConfigError, match="'objective' in the settings cannot be 'dpoo'") as caught:
        train(tiny_model(), data["pairs"], name="other", objective="dpoo")
    assert "dpo" in caught.value.hint
