"""Losses, gradients and figures of each objective against TRL's own trainers (scripts/make_preference_fixtures.py)."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from mlx_adapters.config.mapping import from_mapping
from mlx_adapters.config.training import OBJECTIVES, LoraConfig, TrainConfig
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.models.layers import named_layers
from mlx_adapters.models.loading import load_model
from mlx_adapters.optimization.feed import Draw, make_feed
from mlx_adapters.optimization.log_probabilities import plan_loss
from mlx_adapters.optimization.objectives import means, with_sums
from mlx_adapters.optimization.step import TrainStep
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.interrupt import Interrupt, InterruptedWork
from mlx_adapters.training import reference_model, setup

FIXTURES = Path(__file__).parents[1] / "fixtures" / "preferences.safetensors"
with safe_open(FIXTURES, "numpy") as opened:
    TENSORS = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    CASES = json.loads(opened.metadata()["cases"])
LORA = LoraConfig(rank=4, scale=2.0, target_modules=("q_proj", "v_proj"))
TRL = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
    "chosen_log_probability": "logps/chosen",
    "rejected_log_probability": "logps/rejected",
    "kl": "kl",
}


def side(name: str, number: int, likelihood: bool, **more) -> Row:
    tokens, answer = (TENSORS[f"{kind}/{name}/{number}"] for kind in ("tokens", "answers"))
    trained = np.arange(len(tokens)) > 0 if likelihood else answer
    return Row(tokens, trained, f"{name} {number}", len(tokens), answer=answer, **more)


def rows_of(case: dict, swapped: bool) -> tuple[list[Row], list[Row]]:
    """(rows, rows aside) of a case."""
    chosen, aside = ("mismatched", "chosen") if swapped else ("chosen", "mismatched")
    unmasked = case["objective"] == "orpo" and not case["settings"].get("mask_prompt")
    if case["objective"] != "kto":
        return [side("chosen", i, unmasked, rejected=side("rejected", i, False)) for i in range(4)], []
    labels = case["labels"]
    return [side(chosen, i, False, desirable=labels[i]) for i in range(4)], [side(aside, i, False) for i in range(4)]


def objective_of(case: dict):
    settings = {name: value for name, value in case["settings"].items() if name != "mask_prompt"}
    return from_mapping(OBJECTIVES[case["objective"]], settings)


def prepared(folder, case: dict, config: TrainConfig, swapped: bool = False) -> tuple[TrainStep, Draw]:
    """A step with TRL's adapter, and all rows as one draw in batches of `config.batch_size`."""
    model = load_model(resolve_base(folder))
    rows, aside = rows_of(case, swapped)
    feed = replace(make_feed(rows, config, gpu=False), aside=aside)
    plan = plan_loss(model.module, config, 512, make_batch([[row] for row in rows]))
    if config.objective.reference:
        drawn = reference_model.drawn_by({"train": feed}, config)["train"]
        feed = replace(feed, reference=reference_model.compute(feed, drawn, model.module, plan))
    keys = setup.add_layers(model, LORA, 0).keys
    weights = {name.removeprefix("adapter/"): mx.array(w) for name, w in TENSORS.items() if name.startswith("adapter/")}
    model.module.load_weights(list(weights.items()), strict=False)
    layers = dict(named_layers(model.module))
    step = TrainStep(model.module, {key: layers[key] for key in keys}, config, plan)
    assert step.weights.keys() == weights.keys()
    return step, feed.fixed(None)


def taken(step: TrainStep, draw: Draw) -> tuple[float, dict, dict]:
    """(loss, figures, gradients) of a draw, before the update."""
    shares, gradients, loss, sums = step._shares(draw, False), {}, 0.0, {}
    for batch in draw.batches:
        part, figures, more = step.gradient(batch, shares)
        loss += part.item()
        gradients = {name: gradients.get(name, 0) + np.array(g) for name, g in more.items()}
        sums = with_sums(sums, {name: np.array(pair).tolist() for name, pair in figures.items()})
    return loss, means(sums) | ({"kl": shares.kl.item()} if draw.aside else {}), gradients


def test_a_signal_is_heard_while_other_answers_are_looked_at(on_cpu, tiny_model):
    name = next(name for name, case in CASES.items() if case["objective"] == "kto")
    config = TrainConfig(objective=objective_of(CASES[name]), batch_size=2)
    step, draw = prepared(tiny_model(), CASES[name], config)
    step.heed = Interrupt().heed
    step._shares(draw, False)
    step.heed.__self__.requested = True
    with pytest.raises(InterruptedWork):
        step._shares(draw, False)


@pytest.mark.parametrize("batch_size", [4, 3, 1])
@pytest.mark.parametrize("chunked", ["on", "off"])
@pytest.mark.parametrize("name", CASES)
def test_as_trl_computes_it_however_the_update_is_divided(name, chunked, batch_size, tiny_model):
    case = CASES[name]
    config = TrainConfig(objective=objective_of(case), batch_size=batch_size, chunked_loss=chunked)
    step, draw = prepared(tiny_model(), case, config, swapped=name == "kto, the other way")
    assert draw.examples == 4 and len(draw.batches) == -(-4 // batch_size)
    loss, figures, gradients = taken(step, draw)
    assert loss == pytest.approx(case["loss"], abs=1e-5)
    for tensor, gradient in gradients.items():
        expected = TENSORS[f"gradient/{name}/{tensor}"]
        assert np.abs(gradient - expected).max() <= 1e-5 * max(1, np.abs(expected).max()), tensor
    assert step.evaluate(draw)[0] == pytest.approx(case["loss"], abs=1e-5)
    for ours, theirs in TRL.items():
        if theirs in case["metrics"]:
            assert figures[ours] == pytest.approx(case["metrics"][theirs], abs=2e-4), ours
