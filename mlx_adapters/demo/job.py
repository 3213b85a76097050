"""The whole way on the embedded data: train, fuse to 8 and 4 bits, ask, score and measure.

Beside the two fuses stands one that rounds to nearest, as `mlx_lm.fuse` does, so that one sees what it costs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mlx_adapters.benchmarking.page import html
from mlx_adapters.benchmarking.reports import Report
from mlx_adapters.benchmarking.run import benchmark
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.datasets import spread
from mlx_adapters.demo.catalog import DATABASE_FILE, SCHEMA_PROMPT, demo_questions, write_demo_data
from mlx_adapters.errors import AdapterError
from mlx_adapters.evaluation.figures import Evaluation
from mlx_adapters.evaluation.scores import greedy_answers
from mlx_adapters.evaluation.sqlite import Database, is_correct
from mlx_adapters.evaluation.statistics import Mean, mean
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.fusion.result import FuseResult
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.model import Model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.demo_base import DEMO_BASE, demo_base_folder
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.sources.registry import adapter_folder, read_entry
from mlx_adapters.storage import files, paths
from mlx_adapters.system.conditions import system_state, warnings
from mlx_adapters.training.recipe import read_recipe, settings_in
from mlx_adapters.training.runs import train
from mlx_adapters.units import count

Result = TypeVar("Result")


@dataclass(frozen=True)
class DemoPlan:
    """How much of everything."""

    name: str
    training: TrainConfig
    questions: int
    prompt_tokens: int
    decode_tokens: int
    rounds: int
    fusing: FuseOptions


LORA = LoraConfig(rank=8, scale=20.0)
REPORT_FILE = "benchmark.html"
NEAREST = FuseOptions(method="nearest")
AT_ONCE = 40  # prompts answered together; more cost memory and save little
MAX_TOKENS = 48  # the longest gold query has 27
# A high rate that falls to zero: few iterations have to do.
FULL = DemoPlan(
    name="demo-sql",
    training=TrainConfig(
        iterations=120,
        batch_size=4,
        learning_rate=6e-4,
        schedule="linear",
        warmup=5,
        mask_prompt=True,
        max_seq_length=256,
        eval_every=40,
        eval_batches=6,
        save_every=40,
    ),
    questions=40,
    prompt_tokens=64,
    decode_tokens=24,
    rounds=3,
    # Fewer rows and one-sided rounding: a third of the time of a thorough fuse.
    fusing=FuseOptions(thorough=False, calibration_rows=48, check_rows=32),
)
QUICK = DemoPlan(
    name="demo-quick",
    training=TrainConfig(iterations=2, batch_size=2, mask_prompt=True, eval_every=2, eval_batches=1, save_every=2),
    questions=3,
    prompt_tokens=8,
    decode_tokens=2,
    rounds=1,
    fusing=FuseOptions(method="nearest", check_rows=16),
)


@dataclass(frozen=True)
class DemoVariant:
    """How one variant did: its answer to the question shown, and how many of all questions it got right."""

    label: str
    reference: str
    answer: str
    right: int
    questions: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Execution accuracy, 0 to 1."""
        return self.right / self.questions


@dataclass(frozen=True)
class DemoResult:
    """What the main job made and measured. `seconds` holds the time of each step."""

    base_folder: Path
    data_folder: Path
    adapter_folder: Path
    adapter: str
    fused: dict[str, FuseResult]
    question: str
    gold: str
    variants: tuple[DemoVariant, ...]
    report: Report
    report_file: Path
    seconds: dict[str, float]


class _Clock:
    """Runs the steps, says which one begins and remembers how long each took."""

    def __init__(self, on_event: OnEvent) -> None:
        self.seconds: dict[str, float] = {}
        self._on_event = on_event

    def step(self, name: str, text: str, work: Callable[[], Result]) -> Result:
        self._on_event(Note(text))
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        return result


def run_demo(quick: bool = False, retrain: bool = False, on_event: OnEvent = log_warnings) -> DemoResult:
    """Fine-tune the embedded model on the embedded data, fuse it, and measure what came out.

    An adapter that an earlier run trained with these settings is taken again, and an interrupted training goes
    on, unless `retrain`. Everything lies in the home folder. Raises HubError if the model cannot be fetched.
    """
    plan, clock, before = QUICK if quick else FULL, _Clock(on_event), system_state()
    folder = paths.home() / "demo"
    base = clock.step("model", "1/6 The model: SmolLM2-135M-Instruct", lambda: demo_base_folder(on_event))
    data = clock.step("data", "2/6 The data: questions about a course catalog", lambda: _data(folder / "catalog"))
    clock.step("train", f"3/6 Training the adapter '{plan.name}'", lambda: _train(plan, data, retrain, on_event))
    fused = clock.step(
        "fuse", "4/6 Fusing to 8 and to 4 bits, and to 4 by rounding to nearest", lambda: _fuse(plan, folder, on_event)
    )
    variants = clock.step(
        "score",
        f"5/6 Answering {count(plan.questions, 'test question')} with each variant",
        lambda: _score(plan, data, fused, on_event),
    )
    report = clock.step("benchmark", "6/6 Measuring speed and memory", lambda: _measure(plan, variants, on_event))
    report = report.renamed({v.reference: v.label for v in variants})
    # What the steps before it did to the machine's load is no other program's doing.
    told = tuple(warnings(before, system_state(), report.machine["cores"]))
    report = replace(report, warnings=told, quality=_quality(plan, variants, fused))
    files.write_text(folder / REPORT_FILE, html(report))
    shown = demo_questions()["test"][0]
    return DemoResult(
        base,
        data,
        adapter_folder(plan.name),
        plan.name,
        fused,
        shown.text,
        shown.sql,
        variants,
        report,
        folder / REPORT_FILE,
        clock.seconds,
    )


def _data(folder: Path) -> Path:
    return write_demo_data(folder, overwrite=True)


def _train(plan: DemoPlan, data: Path, retrain: bool, on_event: OnEvent) -> None:
    folder = adapter_folder(plan.name)
    if not retrain and folder.is_dir():
        try:
            if settings_in(read_recipe(folder)) == (LORA, plan.training):
                if read_entry(folder).metadata.get("status") == "finished":
                    on_event(Note(f"'{plan.name}' is trained already; --retrain trains it anew."))
                else:
                    train(DEMO_BASE, data, name=plan.name, resume=True, on_event=on_event)
                return
        except AdapterError as error:
            on_event(Note(f"{error.message} Training anew."))
    command = "mlx-adapters demo"
    train(
        DEMO_BASE,
        data,
        name=plan.name,
        lora=LORA,
        training=plan.training,
        overwrite=True,
        command=command,
        on_event=on_event,
    )


def _fuse(plan: DemoPlan, folder: Path, on_event: OnEvent) -> dict[str, FuseResult]:
    def one(bits: int, options: FuseOptions, ending: str = "") -> FuseResult:
        out = folder / f"{plan.name}-{bits}bit{ending}"
        return fuse(DEMO_BASE, plan.name, out, quantization=bits, options=options, overwrite=True, on_event=on_event)

    nearest = replace(NEAREST, check_rows=plan.fusing.check_rows)
    return {
        "8 bits": one(8, plan.fusing),
        "4 bits": one(4, plan.fusing),
        "4 bits, nearest": one(4, nearest, "-nearest"),
    }


def _score(plan: DemoPlan, data: Path, fused: dict[str, FuseResult], on_event: OnEvent) -> tuple[DemoVariant, ...]:
    """Every variant on the same questions. The base, which has not learned the schema, is told it."""
    asked = spread(demo_questions()["test"], plan.questions)
    database = Database(data / DATABASE_FILE)

    def score(label: str, reference: str, model: Model, *told: dict[str, str]) -> DemoVariant:
        start = time.perf_counter()
        prompts = [model.encode_chat([*told, {"role": "user", "content": question.text}]) for question in asked]
        answers = greedy_answers(model, prompts, max_tokens=MAX_TOKENS, batch_size=AT_ONCE, on_event=on_event)
        right = sum(is_correct(answer, q.sql, database) for answer, q in zip(answers, asked, strict=True))
        return DemoVariant(label, reference, answers[0].strip(), right, len(asked), time.perf_counter() - start)

    model = load_model(resolve_base(DEMO_BASE))
    scores = [score("base, told the schema", "base", model, {"role": "system", "content": SCHEMA_PROMPT})]
    model.attach(load_adapter(plan.name))
    scores.append(score("adapter", plan.name, model))
    for label, result in fused.items():
        scores.append(score(label, str(result.folder), load_model(resolve_base(result.folder))))
    return tuple(scores)


def _measure(plan: DemoPlan, variants: tuple[DemoVariant, ...], on_event: OnEvent) -> Report:
    return benchmark(
        [v.reference for v in variants],
        DEMO_BASE,
        prompt_tokens=plan.prompt_tokens,
        decode_tokens=plan.decode_tokens,
        rounds=plan.rounds,
        trials=1,
        cold_load=False,
        on_event=on_event,
    )


def _quality(plan: DemoPlan, variants: tuple[DemoVariant, ...], fused: dict[str, FuseResult]) -> dict[str, Any]:
    """What the steps before found, as a benchmark's report has it: right answers, and the distances of the checks."""
    found = {label: result.fidelity for label, result in fused.items()}
    one = next(fidelity for fidelity in found.values() if fidelity)
    figures = {
        variants[0].label: (one.loss_base, one.base_kl, one.base_same_top),
        variants[1].label: (one.loss_adapter, 0.0, 1.0),
    } | {label: (f.loss_fused, f.kl_mean, f.same_top) for label, f in found.items() if f}
    said = (
        f"right answers: of {count(plan.questions, 'test question')}, by running the query; loss, KL and same top "
        f"token against the adapter: on {count(one.rows, 'row')} kept aside, the base without the schema"
    )
    judged = []
    for v in variants:
        loss, kl, same = (None if x is None else Mean(x, None, one.rows) for x in figures[v.label])
        score = mean([1.0] * v.right + [0.0] * (v.questions - v.right))
        judged.append(Evaluation(v.label, v.questions, one.tokens, loss, kl, same, score).to_json())
    return {"data": {"said": said}, "score": "sqlite", "reference": variants[1].label, "evaluations": judged}
