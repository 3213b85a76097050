"""This package against plain mlx-lm: one run, one machine, the same model, adapter, data and settings.

Every discipline runs in fresh processes, both sides in each round, in shuffled order; a ratio is ours over theirs
with its 95 % interval, and below 1 means that we take less. On a CPU both sides get OpenBLAS and, except for
fusing, a float32 copy of the base, since mlx-lm's packed arithmetic would take hours there.

- cli: seconds of `--help`                          - load: seconds to evaluated weights, base and adapter
- decode: seconds per token with the adapter on     - swap: seconds from one adapter to another and a first token
- train: seconds per 1,000 trained tokens, peak     - fuse: seconds and peak memory at the base's own precision,
- publish: seconds of a dry run (mlx-lm has none)     and KL(adapter model ‖ fused model) on unseen rows

    ./scripts/race                       # writes benchmarks/race-cpu.json (or -cuda, -metal) and a Markdown table
    python scripts/benchmarks/race.py --base mlx-community/Qwen3-0.6B-4bit --only load decode --rounds 10
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import mlx_adapters  # (before MLX: it loads the fast BLAS on Linux)
from mlx_adapters import files
from mlx_adapters.benchmarking.plan import schedule
from mlx_adapters.benchmarking.statistics import paired_ratio, summarize
from mlx_adapters.benchmarking.system import system_state, warnings
from mlx_adapters.machine import environment, on_gpu
from mlx_adapters.units import format_table, number

SIDES = ("ours", "mlx-lm")
UNITS = {"seconds": "s", "peak_memory_bytes": "B", "kl": "nats", "seconds_per_token": "s"}
NO_RIVAL = {"publish": "mlx-lm has no dry run, and its upload fails with huggingface_hub 2"}
REPOSITORY = Path(__file__).resolve().parents[2]


# -- the disciplines: (side, job) -> {metric: value}, each in a fresh process ------------------------------


def cli(side, job):
    module = ["mlx_adapters"] if side == "ours" else ["mlx_lm", "generate"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *module, "--help"], stdout=subprocess.DEVNULL, check=True)
    return {"seconds": time.perf_counter() - start}


def loaded(side, job, adapter):
    """(module, tokenizer) with an adapter on, evaluated."""
    import mlx.core as mx

    if side == "ours":
        model = mlx_adapters.load_model(job["dense"])
        model.attach(mlx_adapters.read_adapter(Path(adapter)), any_base=True)
        module, tokenizer = model.module, model.tokenizer
    else:
        import mlx_lm

        model = None
        module, tokenizer = mlx_lm.load(job["dense"], adapter_path=adapter)
    mx.eval(module.parameters())
    return model, module, tokenizer


def load(side, job):
    for module in ("mlx_lm", "mlx_adapters.runtime.live"):  # imports are no load time, on either side
        importlib.import_module(module)
    for path in Path(job["dense"]).glob("model*.safetensors"):
        path.read_bytes()
    start = time.perf_counter()
    loaded(side, job, job["adapter"])
    return {"seconds": time.perf_counter() - start}


def decode(side, job):
    from mlx_adapters.benchmarking.measure import random_prompts, run_trial

    _, module, _ = loaded(side, job, job["adapter"])
    prompt = random_prompts(1000, 1, 64, seed=0)
    run_trial(module, prompt, 4)
    trials = [run_trial(module, prompt, job["decode_tokens"]) for _ in range(2)]
    return {"seconds_per_token": statistics.median(1 / t["decode_tps"] for t in trials)}


def swap(side, job):
    from mlx_adapters.benchmarking.measure import random_prompts, run_trial

    model, module, _ = loaded(side, job, job["adapter"])
    prompt = random_prompts(1000, 1, 8, seed=0)
    run_trial(module, prompt, 2)
    start = time.perf_counter()
    if side == "ours":
        model.attach(mlx_adapters.read_adapter(Path(job["other"])), any_base=True)
    else:  # what mlx-lm's server does for a request with another adapter
        _, module, _ = loaded(side, job, job["other"])
    run_trial(module, prompt, 2)
    return {"seconds": time.perf_counter() - start}


def train(side, job):
    settings = {"iters": job["iterations"], "batch": 4, "length": 512}
    every = str(min(5, settings["iters"]))
    out = Path(tempfile.mkdtemp(dir=job["place"]))
    if side == "ours":
        from mlx_adapters.config import LoraConfig, TrainConfig
        from mlx_adapters.events import TrainReport

        reports = []
        training = TrainConfig(iterations=settings["iters"], batch_size=4, max_seq_length=512, learning_rate=1e-4,
                               eval_every=settings["iters"], eval_batches=1, report_every=int(every))  # fmt: skip
        mlx_adapters.train(job["dense"], job["data"], name=f"{out}/run", lora=LoraConfig(rank=8, scale=20.0),
                           training=training, on_event=reports.append)  # fmt: skip
        found = [r for r in reports if isinstance(r, TrainReport)]
        speeds = [r.trained_tokens_per_second for r in found]
        peak = max(r.peak_memory_bytes for r in found)
    else:
        reports = record_reports()
        run_mlx_lm("lora", "--train", "--model", job["dense"], "--data", job["data"], "--iters", str(settings["iters"]),
                   "--batch-size", "4", "--max-seq-length", "512", "--num-layers", "-1", "--learning-rate", "1e-4",
                   "--val-batches", "1", "--steps-per-report", every, "--steps-per-eval", str(settings["iters"]),
                   "--adapter-path", str(out))  # fmt: skip
        speeds = [r["tokens_per_second"] for r in reports]
        peak = max(r["peak_memory"] for r in reports) * 1e9
    shutil.rmtree(out)
    return {"seconds": 1000 / statistics.median(speeds[1:] or speeds), "peak_memory_bytes": peak}


def record_reports():
    """The list that mlx-lm's trainer will put its reports into."""
    import mlx_lm.lora
    from mlx_lm.tuner.callbacks import TrainingCallback

    reports = []

    class Recorder(TrainingCallback):
        def on_train_loss_report(self, train_info):
            reports.append(train_info)

    mlx_lm.lora.get_reporting_callbacks = lambda *_, **__: Recorder()
    return reports


def fuse(side, job):
    import mlx.core as mx

    out = Path(job["place"]) / f"fused-{side}"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    if side == "ours":
        options = {"calibration": job["data"]} if job["calibrate"] else {}
        mlx_adapters.fuse(job["base"], job["adapter"], out, any_base=True, **options)
    else:
        run_mlx_lm("fuse", "--model", job["base"], "--adapter-path", job["adapter"], "--save-path", str(out))
    return {"seconds": time.perf_counter() - start, "peak_memory_bytes": mx.get_peak_memory()}


def publish(side, job):
    start = time.perf_counter()
    mlx_adapters.publish(job["adapter"], "user/race", dry_run=True, base_model="user/base")
    return {"seconds": time.perf_counter() - start}


def run_mlx_lm(command, *arguments):
    """A command of mlx-lm in this process (so that its peak memory is ours to read); what it printed."""
    sys.argv = [f"mlx_lm.{command}", *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(f"mlx_lm.{command}").main()
    return printed.getvalue()


DISCIPLINES = {f.__name__: f for f in (cli, load, decode, swap, train, fuse, publish)}


# -- the run ------------------------------------------------------------------------------------------------


def prepare(place, options):
    """Base, its dense copy for a CPU, two adapters and data, in `place`."""
    from mlx_adapters.model import load_model, resolve_base

    base = resolve_base(options.base)
    job = {"base": str(base.folder), "dense": str(base.folder), "place": str(place), "calibrate": options.calibrate,
           "iterations": options.iterations, "decode_tokens": options.decode_tokens}  # fmt: skip
    if not on_gpu():
        from mlx_lm.utils import save_model

        dense = place / "dense"
        save_model(dense, load_model(base).module)
        for path in base.folder.iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name:
                shutil.copy(path, dense / path.name)
        config = json.loads((dense / "config.json").read_text())
        kept = {k: v for k, v in config.items() if not k.startswith("quantization")}
        (dense / "config.json").write_text(json.dumps(kept))
        job["dense"] = str(dense)
    if options.data:
        job["data"] = options.data
    else:
        from mlx_adapters.demo.catalog import write_demo_data

        job["data"] = str(write_demo_data(place / "data"))
    job["adapter"] = options.adapter or make_adapter(job, place / "adapter", options.adapter_iterations)
    other = place / "other"
    shutil.copytree(job["adapter"], other)
    return job | {"other": str(other)}


def make_adapter(job, folder, iterations):
    from mlx_adapters.config import LoraConfig, TrainConfig

    training = TrainConfig(iterations=iterations, batch_size=4, max_seq_length=512, learning_rate=5e-4,
                           eval_every=iterations, eval_batches=1)  # fmt: skip
    mlx_adapters.train(
        job["base"], job["data"], name=str(folder), lora=LoraConfig(rank=8, scale=20.0), training=training
    )
    return str(folder)


def run_leg(discipline, side, job, place):
    """One fresh process; its metrics, or {"error": ...}."""
    question, answer = place / "leg.json", place / "answer.json"
    answer.unlink(missing_ok=True)
    question.write_text(json.dumps(job))
    environment_ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--leg", discipline, side, str(question), str(answer)]
    done = subprocess.run(command, env=environment_, capture_output=True, text=True)
    if answer.is_file():
        return json.loads(answer.read_text())
    return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}


def kl_of_fused(job):
    """KL and same top token of both fused models against the adapter model, on the test rows."""
    from mlx_adapters.benchmarking.variants import Variant
    from mlx_adapters.evaluation.evaluate import EvaluationConfig, evaluate_ready

    fused = {side: Path(job["place"]) / f"fused-{side}" for side in SIDES}
    variants = [Variant("adapter", job["base"], job["adapter"])]
    variants += [Variant(side, str(folder)) for side, folder in fused.items() if folder.is_dir()]
    config = EvaluationConfig(max_rows=40, reference="adapter", any_base=True)
    found = evaluate_ready(variants, job["data"], config, lambda _: None)
    return {e.variant: e.kl.value for e in found.evaluations if e.kl is not None and e.variant != "adapter"}


def rows_of(values):
    """Discipline and metric -> both medians and the ratio."""
    rows = []
    for (discipline, metric), sides in values.items():
        ratio = paired_ratio(sides.get("ours", {}), sides.get("mlx-lm", {}))
        middles = {s: summarize([v for b in blocks.values() for v in b]).median for s, blocks in sides.items()}
        rows.append({
            "discipline": discipline, "metric": metric, "unit": UNITS[metric], "medians": middles,
            "ratio": ratio and {"value": ratio.value, "low": ratio.low, "high": ratio.high}, "runs": sides,
        })  # fmt: skip
    return rows


def lines_of(rows):
    """The table's cells."""
    lines = []
    for row in rows:
        r = row["ratio"]
        interval = f" [{r['low']:.3g}, {r['high']:.3g}]" if r and r["low"] is not None else ""
        verdict = "-" if r is None else f"{r['value']:.3g}{interval}"
        name = "per 1,000 tokens" if row["discipline"] == "train" and row["metric"] == "seconds" else ""
        metric = row["metric"].replace("_", " ").replace(" bytes", "")
        unit = f"{metric} {name}".strip()
        shown = [_show(row["medians"].get(side), row["unit"]) for side in SIDES]
        lines.append((row["discipline"], unit, *shown, verdict))
    return lines


def _show(value, unit):
    if value is None:
        return "-"
    return f"{number(value / 1e9)} GB" if unit == "B" else f"{number(value)} {unit}"


HEADERS = ("DISCIPLINE", "METRIC", "OURS", "MLX-LM", "OURS / MLX-LM")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--adapter", help="an mlx-lm adapter folder for the base [trained here for a few iterations]")
    parser.add_argument("--data", help="[the embedded text-to-SQL data]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20, help="of each training leg")
    parser.add_argument("--adapter-iterations", type=int, default=60)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--calibrate", action="store_true", help="fuse with calibration on our side")
    parser.add_argument("--only", nargs="+", choices=DISCIPLINES, default=list(DISCIPLINES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    before, start = system_state(), time.time()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        job = prepare(place, options)
        legs = [(d, side) for d in options.only for side in SIDES if not (side == "mlx-lm" and d in NO_RIVAL)]
        values, errors = {}, {}
        for round_, index in schedule(len(legs), options.rounds, seed=0):
            discipline, side = legs[index]
            found = run_leg(discipline, side, job, place)
            print(f"round {round_ + 1}: {discipline}, {side}: {found}", file=sys.stderr, flush=True)
            if "error" in found:
                errors[f"{discipline}, {side}"] = found["error"]
            for metric, value in found.items():
                if metric != "error":
                    values.setdefault((discipline, metric), {}).setdefault(side, {}).setdefault(round_, []).append(
                        value
                    )
        order = [(d, m) for d in options.only for m in UNITS if (d, m) in values]
        rows = rows_of({key: values[key] for key in order})
        if "fuse" in options.only:
            kl = kl_of_fused(job)
            ratio = {"value": kl["ours"] / kl["mlx-lm"], "low": None, "high": None} if len(kl) == 2 else None
            rows.append(
                {"discipline": "fuse", "metric": "kl", "unit": "nats", "medians": kl, "ratio": ratio, "runs": kl}
            )
    machine = environment()
    notes = [f"{what}: {why}" for what, why in (*NO_RIVAL.items(), *errors.items())]
    notes += warnings(before, system_state(), machine.cores)
    result = {"machine": machine.to_json(), "state": before, "settings": {k: str(v) for k, v in vars(options).items()},
              "rows": rows, "notes": notes, "seconds": time.time() - start}  # fmt: skip
    print(format_table(HEADERS, lines_of(rows), right=(2, 3, 4)))
    print("\n".join(notes))
    if options.json:
        files.write_text(options.json, json.dumps(result, indent=2) + "\n")
    if options.markdown:
        cells = [HEADERS, ("---", "---", "---:", "---:", "---:"), *lines_of(rows)]
        head = f"{machine.device_name}, {machine.cores} cores, {machine.system}; mlx {machine.versions.get('mlx')}, " \
               f"mlx-lm {machine.versions.get('mlx-lm')}; base {options.base}, {options.rounds} rounds"  # fmt: skip
        table = "\n".join("| " + " | ".join(line) + " |" for line in cells)
        files.write_text(options.markdown, f"{head}\n\n{table}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--leg"]:
        _, _, discipline, side, question, answer = sys.argv
        found = DISCIPLINES[discipline](side, json.loads(Path(question).read_text()))
        Path(answer).write_text(json.dumps(found))
    else:
        try:
            main()
        except KeyboardInterrupt:
            traceback.print_exc(limit=1)
            sys.exit(130)
