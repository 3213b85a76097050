"""Tokens that a model never says (logits of -Inf): a probability of 0 counts as that, wherever models are compared."""

import json
import math
import re
import urllib.request
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers.fusing import visible_adapter
from helpers.matrix import FEW, IDS, LORA, PLAIN, TEXTS
from helpers.matrix import divergence as kl_of_logits
from helpers.serving import running
from helpers.tiny_configs import tiny_base
from mlx_lm.models import llama

import mlx_adapters as ma
from mlx_adapters.calibration.fidelity import Fidelity, quantile
from mlx_adapters.evaluation.figures import Evaluation, TokenFigures, _difference
from mlx_adapters.evaluation.reports import _phrase
from mlx_adapters.evaluation.statistics import weighted_mean
from mlx_adapters.fusion.result import FuseResult, report
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery.taps import divergence, log_probabilities, perplexity

INF, NEVER = math.inf, (7, 200, 511)


def test_a_probability_of_nothing_counts_as_nothing():
    p = mx.log(mx.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    q = mx.log(mx.array([[0.25, 0.75, 0.0], [0.25, 0.25, 0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2), INF, math.log(2)]
    assert divergence(p, q).tolist() == pytest.approx(expected)
    assert divergence(mx.array([0.0, -200.0]), mx.array([0.0, -INF])).item() == 0  # e^-200 is 0 here
    slope = mx.grad(lambda z: divergence(p[:1], log_probabilities(z)).sum())(mx.array([[1.0, 2.0, -INF]]))
    assert slope.tolist()[0] == pytest.approx([1 / (1 + math.e) - 0.5, math.e / (1 + math.e) - 0.5, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "fine"),
    [
        ([1, 2, -INF], True),
        ([-INF, 0, -INF], True),
        ([1, 2, INF], False),
        ([1, math.nan, 3], False),
        ([-INF] * 3, False),
    ],
)
def test_log_probabilities_are_numbers_where_something_is_said(logits, fine):
    told = log_probabilities(mx.array([logits]))
    assert mx.isnan(told).any().item() is not fine
    if fine:
        assert mx.exp(told).sum().item() == pytest.approx(1) and (told == -INF).tolist()[0] == [
            x == -INF for x in logits
        ]


@pytest.fixture
def silent(tiny_model, monkeypatch):
    """A tiny llama that never says the tokens NEVER."""
    plain = llama.Model.__call__
    monkeypatch.setattr(llama.Model, "__call__", lambda *given, **more: hushed(plain(*given, **more)))
    return tiny_model("llama", bits=4)


def hushed(logits):
    logits[..., mx.array(NEVER)] = -INF
    return logits


def test_a_model_that_never_says_some_tokens_is_trained_fused_checked_and_evaluated(silent, tmp_path):
    rows = [{"text": text} for text in TEXTS]
    ma.train(silent, {"train": rows, "valid": rows}, name="a", lora=LORA, training=PLAIN)
    base, adapter = resolve_base(silent), ma.load_adapter("a")
    expected = load_model(base, adapter).logits(IDS)
    assert mx.isinf(expected).sum().item() == IDS.size * len(NEVER)
    made = ma.fuse(silent, adapter, tmp_path / "out", quantization=3, options=replace(FEW, thorough=True))
    assert made.method == "calibrated" and 0 < made.fidelity.kl_p99 < INF
    (tuned,) = [note for note in made.notes if "Scales tuned" in note]
    before, after = map(float, re.findall(r"([\d.e-]+) (?:before|after)", tuned))
    assert 0 < after <= before
    again = ma.check_fused(tmp_path / "out", adapter, base=silent, options=FEW)
    assert again.fidelity.kl_mean == pytest.approx(made.fidelity.kl_mean, rel=1e-4)
    judged = ma.evaluate(["a", str(tmp_path / "out")], rows, config=ma.EvaluationConfig(reference="a"))
    lost = judged.evaluations[1]
    fused = load_model(resolve_base(tmp_path / "out")).logits(IDS)
    assert lost.error is None and 0 < lost.kl.value < INF and 0 < lost.loss.value < INF
    assert kl_of_logits(expected, fused) == pytest.approx(lost.kl.value, rel=1)


def test_phi3small_is_fused_and_checked(tmp_path):
    base = tiny_base(tmp_path / "base", "phi3small")
    options = replace(FEW, method="nearest")
    made = ma.fuse(base, visible_adapter(base, strength=0.02), tmp_path / "out", quantization="keep", options=options)
    assert 0 < made.fidelity.kl_mean < 0.01 and made.fidelity.base_kl > 0


def test_what_a_fused_model_never_says_and_its_adapter_does_is_infinite_and_is_told(tmp_path):
    odd = np.array([0.1, 0.2, INF, INF])
    assert quantile(odd, 0.3) == pytest.approx(0.19) and quantile(odd, 0.6) == quantile(odd, 0.99) == INF
    assert quantile(np.arange(101.0), 0.99) == 99
    value = weighted_mean([1.0, INF], [2, 2])
    assert value.value == INF and value.error is None and not value.differs
    lines = _phrase(value, "higher", "lower"), _phrase(weighted_mean([1.0], [2]), "higher", "lower")
    assert _phrase(weighted_mean([math.nan, 1.0], [2, 2]), "higher", "lower") == "both infinite"
    assert (perplexity(INF), perplexity(800), perplexity(math.log(3))) == (INF, INF, pytest.approx(3))
    assert lines == ("+inf (no interval)", "+0.5 (one row: no interval)")


def test_two_infinite_losses_have_no_difference():
    one, other = (
        Evaluation(name, figures=TokenFigures(np.array([3.0, 3.0]), np.array(loss)))
        for name, loss in (("a", [INF, 2.0]), ("b", [INF, 1.0]))
    )
    with np.errstate(all="raise"):
        apart = _difference(one, other).loss
    assert math.isnan(apart.value) and apart.error is None and not apart.differs


def test_the_report_of_a_fuse_holds_no_number_that_json_has_not(tmp_path):
    fidelity = Fidelity(3, 90, INF, 0.1, INF, 0.9, 0.5, INF, 0.7, 0.2, 0.8)
    made = FuseResult(tmp_path, "nearest", None, 1, 4.0, (), fidelity, None, (), 1.0, ())
    held = json.loads(json.dumps(report(made), allow_nan=False))["fidelity"]
    assert held["kl_mean"] is held["kl_p99"] is held["loss_fused"] is held["perplexity_fused"] is None
    assert (held["kl_median"], held["rows"], held["base_kl"]) == (0.1, 3, 0.2)


def test_a_server_tells_what_is_never_said_in_numbers(tmp_path):
    base = tiny_base(tmp_path / "base", "phi3small")
    with running(base, {}) as (address, _):
        asked = {"model": "base", "prompt": [5, 100300, 7], "echo": True, "logprobs": 2, "max_tokens": 3}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            told = json.loads(answer.read(), parse_constant=pytest.fail)["choices"][0]["logprobs"]
    first, never, *others = told["token_logprobs"]
    assert first is None and never == -9999.0 and len(others) == 4 and all(-30 < one <= 0 for one in others)
