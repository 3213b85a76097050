"""What `race.py` measures: each discipline, for this package ("ours") and for plain mlx-lm, in a process of its own.

race_legs.py SIDE DISCIPLINES JOB ANSWER     e.g. race_legs.py ours load,decode,swap job.json answer.json
"""

import contextlib
import importlib
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx_adapters  # (before MLX: it loads the fast BLAS on Linux)
from mlx_adapters.system.conditions import process_memory


def cli(side, job):
    """Seconds of `--help` in a process of its own."""
    module = ["mlx_adapters"] if side == "ours" else ["mlx_lm", "generate"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *module, "--help"], stdout=subprocess.DEVNULL, check=True)
    return {"seconds": time.perf_counter() - start}


def loaded(side, job, adapter):
    """(model of ours or None, module) with an adapter on, evaluated."""
    import mlx.core as mx

    if side == "ours":
        model = mlx_adapters.load_model(job["dense"])
        model.attach(mlx_adapters.read_adapter(Path(adapter)), any_base=True)
        module = model.module
    else:
        import mlx_lm

        model, (module, _) = None, mlx_lm.load(job["dense"], adapter_path=adapter)
    mx.eval(module.parameters())
    return model, module


def load(side, job):
    """Seconds from the call to evaluated weights, from files that were read before; imports are no load time."""
    from mlx_adapters.models.loading import load_tokenizer_of
    from mlx_adapters.sources.bases import resolve_base

    for module in ("mlx_lm", "mlx_adapters.generation.live"):
        importlib.import_module(module)
    load_tokenizer_of(resolve_base(job["dense"]))
    for path in Path(job["dense"]).glob("model*.safetensors"):
        path.read_bytes()
    start = time.perf_counter()
    loaded(side, job, job["adapter"])
    return {"seconds": time.perf_counter() - start}


def decode(side, job):
    """Seconds per token, with the adapter beside the base."""
    from mlx_adapters.benchmarking.trials import random_prompts, run_trial

    _, module = loaded(side, job, job["adapter"])
    prompt = random_prompts(1000, 1, 64, seed=0)
    run_trial(module, prompt, 4)
    trials = [run_trial(module, prompt, job["decode_tokens"]) for _ in range(2)]
    return {"seconds_per_token": statistics.median(1 / t["decode_tps"] for t in trials)}


def swap(side, job):
    """Seconds from one adapter to another and its first tokens; mlx-lm's server loads the model anew for that."""
    from mlx_adapters.benchmarking.trials import random_prompts, run_trial

    model, module = loaded(side, job, job["adapter"])
    prompt = random_prompts(1000, 1, 8, seed=0)
    run_trial(module, prompt, 2)
    start = time.perf_counter()
    if side == "ours":
        model.attach(mlx_adapters.read_adapter(Path(job["other"])), any_base=True)
    else:
        _, module = loaded(side, job, job["other"])
    run_trial(module, prompt, 2)
    return {"seconds": time.perf_counter() - start}


def train(side, job):
    """Seconds per 1,000 trained tokens (the median report, without the first), and the peak memory."""
    iterations, every = str(job["iterations"]), str(max(job["iterations"] // 4, 1))
    out = Path(tempfile.mkdtemp(dir=job["place"]))
    if side == "ours":
        from mlx_adapters.config.training import LoraConfig, TrainConfig
        from mlx_adapters.events import TrainReport

        reports = []
        training = TrainConfig(
            iterations=int(iterations),
            batch_size=4,
            max_seq_length=512,
            learning_rate=1e-4,
            eval_every=int(iterations),
            eval_batches=1,
            report_every=int(every),
        )
        mlx_adapters.train(
            job["dense"],
            job["data"],
            name=f"{out}/run",
            lora=LoraConfig(rank=8, scale=20.0),
            training=training,
            on_event=reports.append,
        )
        reports_of_training = [r for r in reports if isinstance(r, TrainReport)]
        speeds = [r.trained_tokens_per_second for r in reports_of_training]
        peak = max(r.peak_memory_bytes for r in reports_of_training)
    else:
        reports = record_reports()
        run_mlx_lm(
            "lora",
            "--train",
            "--model",
            job["dense"],
            "--data",
            job["data"],
            "--iters",
            iterations,
            "--batch-size",
            "4",
            "--max-seq-length",
            "512",
            "--num-layers",
            "-1",
            "--learning-rate",
            "1e-4",
            "--val-batches",
            "1",
            "--steps-per-report",
            every,
            "--steps-per-eval",
            iterations,
            "--adapter-path",
            str(out),
        )
        speeds = [r["tokens_per_second"] for r in reports]
        peak = max(r["peak_memory"] for r in reports) * 1e9
    shutil.rmtree(out)
    seconds = 1000 / statistics.median(speeds[1:] or speeds)
    return {"seconds": seconds, "peak_memory_bytes": peak, **resident()}


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
    """Seconds and peak memory of a fuse at the base's own precision, rounded to nearest and unchecked on both sides."""
    import mlx.core as mx

    out = Path(job["place"]) / f"fused-{side}"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    if side == "ours":
        options = mlx_adapters.FuseOptions(method="nearest", check=False)
        mlx_adapters.fuse(job["base"], job["adapter"], out, any_base=True, options=options)
    else:
        run_mlx_lm("fuse", "--model", job["base"], "--adapter-path", job["adapter"], "--save-path", str(out))
    return {"seconds": time.perf_counter() - start, "peak_memory_bytes": mx.get_peak_memory(), **resident()}


def publish(side, job):
    """Seconds of a dry run."""
    start = time.perf_counter()
    mlx_adapters.publish(job["adapter"], "user/race", dry_run=True, base_model="user/base")
    return {"seconds": time.perf_counter() - start}


def resident():
    return {"peak_resident_bytes": process_memory()["peak_resident_bytes"]}


def run_mlx_lm(command, *arguments):
    """A command of mlx-lm in this process (so that its peak memory is ours to read)."""
    sys.argv = [f"mlx_lm.{command}", *arguments]
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(f"mlx_lm.{command}").main()


DISCIPLINES = {f.__name__: f for f in (cli, load, decode, swap, train, fuse, publish)}


if __name__ == "__main__":
    _, side, names, job_file, answer = sys.argv
    job = json.loads(Path(job_file).read_text())
    figures = {name: DISCIPLINES[name](side, job) for name in names.split(",")}
    Path(answer).write_text(json.dumps(figures))
