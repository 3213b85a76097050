"""One architecture through everything that is done with a model, on a tiny base in 4 bits.

Each column of the table is a function that raises: an AdapterError is a reason, which the table tells, anything else
a fault of ours. What is compared is computed by plain mlx-lm.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from helpers.tiny_configs import pictures, tiny_base
from mlx_lm.models.cache import make_prompt_cache

import mlx_adapters as ma
from mlx_adapters.generation.batching import Batcher, answer_all
from mlx_adapters.generation.requests import Request
from mlx_adapters.models.loading import load_model
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.sources.bases import resolve_base

YES, NOT_TRIED = "yes", "-"
IDS = mx.array([[5, 300, 17, 44, 120, 9, 77, 201]])
TEXTS = (
    "List the titles of all courses.",
    "How many students are there?",
    "SELECT title FROM courses",
    "Once upon a time there was a model",
)
LORA = ma.LoraConfig(rank=4, scale=4.0)
PLAIN = ma.TrainConfig(iterations=2, batch_size=4, learning_rate=1e-2, eval_every=2, save_every=2, report_every=2)
FEW = ma.FuseOptions(calibration_rows=4, check_rows=2)
PROMPTS = ([5, 300, 17], [44, 120, 9, 77, 201, 33, 8], [9, 10, 11, 12, 13], [44, 1, 2, 77, 201, 33, 8, 9, 10, 11, 12])
ANSWER = 5  # tokens
SAME = 0.02  # of an adapter's numbers, in the mean, by which two ways to compute a training may differ
EXACT_KL, EIGHT_KL, FOUR_KL = 2e-4, 0.05, 2.0  # nats per token that a fuse may lose


def close(actual: mx.array, expected: mx.array, tolerance: float = 1e-3) -> None:
    """Raise AssertionError unless both are finite and near each other, relative to the largest number."""
    actual, expected = (np.array(x.astype(mx.float32)) for x in (actual, expected))
    low = np.isneginf(expected)  # tokens that a model never says
    assert (np.isneginf(actual) == low).all()
    actual, expected = actual[~low], expected[~low]
    assert np.isfinite(actual).all() and np.isfinite(expected).all(), "not finite"
    off = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
    assert off < tolerance, f"off by {off:.2g}"


def divergence(expected: mx.array, actual: mx.array) -> float:
    """KL in nats per token, of logits."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (expected, actual))
    return mx.where(mx.isinf(p), 0.0, mx.exp(p) * (p - q)).sum(axis=-1).mean().item()


@dataclass
class Trial:
    """An architecture under trial in an empty folder, which becomes MLX_ADAPTERS_HOME as well."""

    name: str
    work: Path
    results: dict[str, str] = field(default_factory=dict)

    @cached_property
    def base(self) -> Path:
        """The base's folder."""
        return tiny_base(self.work / "base", self.name)

    @cached_property
    def data(self) -> Path:
        """A few rows of text."""
        folder = self.work / "data"
        folder.mkdir()
        for split, texts in (("train", TEXTS), ("valid", TEXTS[:2])):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return folder

    @cached_property
    def adapter(self) -> ma.Adapter:
        """The adapter that the first column trained."""
        return ma.load_adapter("a")

    @cached_property
    def expected(self) -> mx.array:
        """(1, tokens, vocabulary) logits of the adapter on its base, by plain mlx-lm."""
        return self.plain(self.base, self.work / "home" / "adapters" / "a")

    def plain(self, folder: Path, adapter: Path | None = None) -> mx.array:
        """(1, tokens, vocabulary) logits of what `mlx_lm.load` gives, as it generates. On the CPU: a GPU's quantized
        products may be wrong, and plain mlx-lm does not look."""
        with contextlib.redirect_stdout(io.StringIO()), mx.stream(mx.cpu):
            module = mlx_lm.load(str(folder), adapter_path=None if adapter is None else str(adapter))[0]
            logits = module(IDS, cache=make_prompt_cache(module))
            mx.eval(logits)
        return logits

    def module(self, adapter: ma.Adapter | None = None, folder: Path | None = None) -> Any:
        """Our model of a folder (the base's), with at most one adapter on it."""
        return load_model(resolve_base(folder or self.base), adapter).module

    def told(self, reason: str) -> str:
        """A reason in words that other models' reasons may share: without the model's name, folders and blocks."""
        reason = " ".join(reason.replace(str(self.base), "base").split()).replace(f"'{self.name}'", "'TYPE'")
        reason = re.sub(rf"\b(an?) {re.escape(self.name)}\b", "this model type", reason)
        return re.sub(r"'[\w.]+?\.\d+\.([\w.]+)'", r"'\1'", reason)

    def trained(self, name: str, training: ma.TrainConfig, forecast: bool = False) -> ma.Adapter:
        """An adapter trained with these settings."""
        ma.train(self.base, self.data, name=name, lora=LORA, training=training, forecast=forecast)
        return ma.load_adapter(name)


def train(trial: Trial) -> None:
    """Default targets train, their memory is forecast, and what is trained is the function that generates."""
    trial.trained("a", PLAIN, forecast=True)
    module = trial.module(trial.adapter)
    cache = make_prompt_cache(module)
    parts = [module(IDS[:, :5], cache=cache)] + [module(IDS[:, i : i + 1], cache=cache) for i in (5, 6, 7)]
    close(module(IDS), mx.concatenate(parts, axis=1))


def load(trial: Trial) -> None:
    """`mlx_lm.load` takes the adapter, and so does the pool, with layers on one input made one; the base comes back."""
    close(trial.module(trial.adapter)(IDS), trial.expected)
    module = trial.module()
    before = module(IDS)
    mx.eval(before)
    assert divergence(trial.expected, before) > 1e-7, "the adapter does nothing"
    pool = AdapterPool(module, group=True)
    pool.select(((pool.add("a", trial.adapter), 1.0),))
    close(module(IDS), trial.expected)
    pool.remove("a")
    close(module(IDS), before, 1e-6)


def fuse(quantization: str | int, most: float) -> Callable[[Trial], None]:
    """Plain mlx-lm loads the fused model, which is the adapter's up to `most` nats per token, and whole."""

    def column(trial: Trial) -> None:
        out = trial.work / f"fused-{quantization}"
        ma.fuse(trial.base, trial.adapter, out, quantization=quantization, options=FEW)
        actual = trial.plain(out)
        close(trial.module(folder=out)(IDS), actual)
        lost = divergence(trial.expected, actual)
        assert lost <= most, f"KL {lost:.2g}"
        assert pictures(out) == pictures(trial.base), "the vision tower is not carried over"

    return column


def export(format: str) -> Callable[[Trial], None]:
    """Another program's format is written; what mlx-lm reads of it computes the same."""

    def column(trial: Trial) -> None:
        options = replace(FEW, format=format)
        made = ma.fuse(trial.base, trial.adapter, trial.work / format, quantization="none", options=options)
        assert made.fidelity is None or made.fidelity.kl_mean <= EXACT_KL, f"KL {made.fidelity.kl_mean:.2g}"

    return column


def peft_out(trial: Trial) -> None:
    """PEFT's names are known."""
    ma.export_peft(trial.adapter, trial.work / "peft", base=trial.base)


def peft_in(trial: Trial) -> None:
    """What was exported comes back and computes the same."""
    ma.import_peft(trial.work / "peft", base=trial.base, name="p")
    close(trial.module(ma.load_adapter("p"))(IDS), trial.expected)


def mixed(trial: Trial) -> str:
    """Prompts of several lengths with several adapters get the tokens that each gets alone."""
    rng = np.random.default_rng(0)
    noise = {name: mx.array(0.05 * rng.standard_normal(w.shape), w.dtype) for name, w in trial.adapter.weights.items()}
    adapters = [trial.adapter, replace(trial.adapter, weights=noise), None, trial.adapter]
    module = trial.module()
    pool = AdapterPool(module, group=True)
    entries = [pool.add("a", adapters[0]), pool.add("b", adapters[1])]
    rows = zip(PROMPTS, [*entries, None, entries[0]], strict=True)
    requests = [Request(prompt, entry, max_tokens=ANSWER) for prompt, entry in rows]
    answers = {request.number: tokens for request, tokens in answer_all(module, pool, requests)}
    for request, adapter in zip(requests, adapters, strict=True):
        assert answers[request.number] == _alone(trial.module(adapter), list(request.prompt)), "other tokens"
    batcher = Batcher(module, pool)
    if not batcher.can_batch:
        return "Prompts are decoded one after another: mlx-lm's code for this model does not take them together."
    return YES if batcher.can_mix else "Prompts with other adapters wait for each other."


def _alone(module: Any, prompt: list[int]) -> list[int]:
    cache, answer, tokens = make_prompt_cache(module), [], mx.array([prompt])
    for _ in range(ANSWER):
        tokens = mx.argmax(module(tokens, cache=cache)[:, -1], axis=-1)[None]
        answer.append(tokens.item())
    return answer


def same_training(name: str, **settings: Any) -> Callable[[Trial], None]:
    """Other ways to compute the same training give the same adapter. In the mean of its numbers: AdamW makes as much of
    a gradient that is nothing but noise as of any other."""

    def column(trial: Trial) -> None:
        actual = trial.trained(name, replace(PLAIN, **settings)).weights
        for tensor, expected in trial.adapter.weights.items():
            off = mx.abs(actual[tensor] - expected).mean() / mx.maximum(mx.abs(expected).mean(), 1e-6)
            assert off.item() < SAME, f"'{tensor}' is off by {off.item():.2g}"

    return column


COLUMNS: dict[str, tuple[Callable[[Trial], str | None], str]] = {  # title: what is done, the column that it needs
    "train": (train, ""),
    "load": (load, "train"),
    "fuse 4": (fuse("keep", FOUR_KL), "load"),
    "fuse 8": (fuse(8, EIGHT_KL), "load"),
    "fuse none": (fuse("none", EXACT_KL), "load"),
    "PEFT out": (peft_out, "train"),
    "PEFT in": (peft_in, "PEFT out"),
    "hf": (export("hf"), "train"),
    "GGUF": (export("gguf"), "train"),
    "mixed batches": (mixed, "train"),
    "checkpointing": (same_training("c", grad_checkpoint=True), "train"),
    "packing": (same_training("k", packing=True, batch_size=1), "train"),
}


def row_of(name: str, work: Path) -> dict[str, str]:
    """Column -> "yes", or why not. `work` is an empty folder."""
    os.environ["MLX_ADAPTERS_HOME"] = str(work / "home")
    trial = Trial(name, work)
    for column, (run, needed) in COLUMNS.items():
        if needed and trial.results[needed] != YES:
            trial.results[column] = NOT_TRIED
            continue
        try:
            trial.results[column] = run(trial) or YES
        except ma.AdapterError as error:
            trial.results[column] = trial.told(str(error))
        except Exception as error:
            trial.results[column] = f"FAULT {type(error).__name__}: {error}"
    return trial.results
