"""This package against plain mlx-lm: one run, one machine, the same model, adapter, data and settings.

Every discipline runs in fresh processes, both sides in each round, in shuffled order; a ratio is ours over theirs
with its 95 % interval, and below 1 means that we take less. On a CPU both sides get OpenBLAS and, except for
fusing, a float32 copy of the base, since mlx-lm's packed arithmetic would take hours there.

- cli: seconds of `--help`                          - load: seconds to evaluated weights, base and adapter
- decode: seconds per token with the adapter on     - swap: seconds from one adapter to another and a first token
- train: seconds per 1,000 trained tokens, peak     - fuse: seconds and peak memory at the base's own precision, both
- publish: seconds of a dry run (mlx-lm has none)     rounded to nearest; then KL(adapter model ‖ fused) on unseen rows

    ./scripts/race                       # all: writes benchmarks/race_cpu.json (or _cuda, _metal) and docs/measured.md
    ./scripts/race load swap --rounds 10 # these anew; the file keeps its other disciplines
    python scripts/benchmarks/race.py --base mlx-community/Qwen3-0.6B-4bit load decode
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import race_legs

import mlx_adapters  # (before MLX: it loads the fast BLAS on Linux)
from mlx_adapters.benchmarking.schedule import schedule
from mlx_adapters.evaluation.statistics import paired_ratio, summarize
from mlx_adapters.storage import files
from mlx_adapters.system.conditions import system_state, warnings
from mlx_adapters.system.machine import environment, on_gpu
from mlx_adapters.units import duration, format_table, number, size

SIDES = ("ours", "mlx-lm")
UNITS = {"seconds": "s", "seconds_per_token": "s", "peak_memory_bytes": "B", "peak_resident_bytes": "B", "kl": "nats"}
NAMES = {
    ("train", "seconds"): "seconds per 1,000 tokens",
    ("swap", "seconds"): "seconds to the first token",
    ("cli", "seconds"): "seconds of --help",
    ("publish", "seconds"): "seconds of a dry run",
    ("fuse", "kl"): "KL, rounded to nearest",
}
NO_RIVAL = {"publish": "mlx-lm has no dry run, and its upload fails with huggingface_hub 2"}
TOGETHER = ("load", "decode", "swap")  # one process does them one after the other: starting costs more than they do
HEADERS = ("DISCIPLINE", "METRIC", "OURS", "MLX-LM", "OURS / MLX-LM")
START, END = "<!-- race -->", "<!-- /race -->"
REPOSITORY = Path(__file__).resolve().parents[2]


def prepare(place, options):
    """Base, its dense copy for a CPU, two adapters and data, in `place`."""
    from mlx_adapters.demo.catalog import write_demo_data
    from mlx_adapters.sources.bases import resolve_base

    base = resolve_base(options.base)
    job = {
        "base": str(base.folder),
        "dense": str(base.folder),
        "place": str(place),
        "iterations": options.iterations,
        "decode_tokens": options.decode_tokens,
    }
    if not on_gpu():
        job["dense"] = str(dense_copy(base, place / "dense"))
    job["data"] = options.data or str(write_demo_data(place / "data"))
    job["adapter"] = str(find_adapter(options, job, place / "adapter"))
    return job | {"other": str(shutil.copytree(job["adapter"], place / "other"))}


def dense_copy(base, folder):
    """The base in float32, as mlx-lm loads it."""
    from mlx_lm.utils import save_model

    from mlx_adapters.models.loading import load_model
    from mlx_adapters.sources.bases import resolve_base

    save_model(folder, load_model(resolve_base(base)).module)
    for path in base.folder.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and "index" not in path.name:
            shutil.copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in config.items() if not k.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


def find_adapter(options, job, folder):
    """The adapter that was asked for, a copy of the demo's, or one trained here for a few iterations."""
    from mlx_adapters.config.training import LoraConfig, TrainConfig

    if options.adapter:
        return options.adapter
    if options.base == "demo":
        try:
            adapter = mlx_adapters.load_adapter("demo-sql")
            mlx_adapters.write_adapter(adapter, folder)
            return folder
        except mlx_adapters.AdapterError:
            pass
    count = options.adapter_iterations
    training = TrainConfig(
        iterations=count, batch_size=4, max_seq_length=512, learning_rate=5e-4, eval_every=count, eval_batches=1
    )
    lora = LoraConfig(rank=8, scale=20.0)
    mlx_adapters.train(job["base"], job["data"], name=str(folder), lora=lora, training=training)
    return folder


def parts_of(names):
    """The disciplines as they share a process: [("cli",), ("load", "decode", "swap"), ...]."""
    together = tuple(name for name in TOGETHER if name in names)
    return (
        [(name,) for name in names if name == "cli"]
        + ([together] if together else [])
        + [(name,) for name in names if name not in ("cli", *TOGETHER)]
    )


def run_part(names, job, rounds):
    """{discipline: {metric: {side: {round: [value]}}}} and the errors of one part."""
    sides = [side for side in SIDES if not (side == "mlx-lm" and names[0] in NO_RIVAL)]
    values, errors = {}, {}
    for number_, index in schedule(len(sides), rounds, seed=0):
        figures = run_leg(names, sides[index], job)
        print(f"round {number_ + 1}: {sides[index]}: {figures}", file=sys.stderr, flush=True)
        if "error" in figures:
            errors[f"{', '.join(names)}, {sides[index]}"] = figures["error"]
            continue
        for name, metrics in figures.items():
            for metric, value in metrics.items():
                values.setdefault(name, {}).setdefault(metric, {}).setdefault(sides[index], {})[number_] = [value]
    if "fuse" in values:
        values["fuse"]["kl"] = {side: {0: [kl]} for side, kl in kl_of_fused(job).items()}
    return values, errors


def run_leg(names, side, job):
    """One fresh process; {discipline: metrics}, or {"error": ...}."""
    question, answer = Path(job["place"]) / "leg.json", Path(job["place"]) / "answer.json"
    answer.unlink(missing_ok=True)
    question.write_text(json.dumps(job))
    paths = os.pathsep.join(p for p in (str(REPOSITORY), os.environ.get("PYTHONPATH")) if p)
    environment_ = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, race_legs.__file__, side, ",".join(names), str(question), str(answer)]
    done = subprocess.run(command, env=environment_, capture_output=True, text=True)
    if answer.is_file():
        return json.loads(answer.read_text())
    return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}


def kl_of_fused(job):
    """KL of both fused models from the adapter model, on the test rows. Rounding is no matter of chance: once."""
    from mlx_adapters.evaluation.evaluate import EvaluationConfig, evaluate_ready
    from mlx_adapters.evaluation.variants import Variant

    fused = {side: Path(job["place"]) / f"fused-{side}" for side in SIDES}
    variants = [Variant("adapter", job["base"], job["adapter"])]
    variants += [Variant(side, str(folder)) for side, folder in fused.items() if folder.is_dir()]
    config = EvaluationConfig(max_rows=16, reference="adapter", any_base=True)
    report = evaluate_ready(variants, job["data"], config, lambda _: None)
    return {e.variant: e.kl.value for e in report.evaluations if e.kl is not None and e.variant != "adapter"}


def rows_of(values):
    """One row for each metric: both medians and the ratio."""
    rows = []
    for name, metrics in values.items():
        for metric, sides in sorted(metrics.items(), key=lambda item: list(UNITS).index(item[0])):
            ratio = paired_ratio(sides.get("ours", {}), sides.get("mlx-lm", {}))
            middles = {s: summarize([v for b in blocks.values() for v in b]).median for s, blocks in sides.items()}
            rows.append(
                {
                    "discipline": name,
                    "metric": metric,
                    "unit": UNITS[metric],
                    "medians": middles,
                    "ratio": ratio and {"value": ratio.value, "low": ratio.low, "high": ratio.high},
                    "runs": sides,
                }
            )
    return rows


def line_of(row):
    """The table's cells."""
    r = row["ratio"]
    interval = f" [{r['low']:.3g}, {r['high']:.3g}]" if r and r["low"] is not None else ""
    metric = NAMES.get((row["discipline"], row["metric"]), row["metric"].replace("_", " ").replace(" bytes", ""))
    shown = [_show(row["medians"].get(side), row["unit"]) for side in SIDES]
    return (row["discipline"], metric, *shown, "-" if r is None else f"{r['value']:.3g}{interval}")


def _show(value, unit):
    return "-" if value is None else size(value) if unit == "B" else f"{number(value)} {unit}"


def markdown(saved):
    """The table with its conditions."""
    machine, rows = saved["machine"], [row for part in saved["parts"].values() for row in part["rows"]]
    cells = [HEADERS, ("---", "---", "---:", "---:", "---:"), *map(line_of, rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    bases = sorted({f"base {p['settings']['base']}, {p['settings']['rounds']} rounds" for p in saved["parts"].values()})
    versions = machine["versions"]
    notes = dict.fromkeys(note for part in saved["parts"].values() for note in part["notes"])
    return (
        f"{machine['device_name']}, {machine['cores']} cores, {machine['system']}; mlx {versions.get('mlx')}, mlx-lm "
        f"{versions.get('mlx-lm')}; {'; '.join(bases)}; in brackets 95 % intervals\n\n{table}\n\n"
        + "\n".join(f"- {note}" for note in notes)
    ).rstrip() + "\n"


def save(saved, options):
    """Write the JSON, and the table into a page between its markers."""
    if options.json:
        files.write_text(options.json, json.dumps(saved, indent=2) + "\n")
    if options.readme and START in (text := options.readme.read_text()):
        table = f"{START}\n{markdown(saved)}{END}"
        files.write_text(options.readme, re.sub(f"{START}.*?{END}", lambda _: table, text, flags=re.S))


def earlier(path, machine):
    """The parts of an earlier run on the same machine with the same versions, so that one can be run anew."""
    if path is None or not path.is_file():
        return {}
    old = json.loads(path.read_text())
    return old["parts"] if old["machine"] == machine else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "disciplines", nargs="*", metavar="DISCIPLINE", help=f"{', '.join(race_legs.DISCIPLINES)} [all]"
    )
    parser.add_argument("--base", default="demo")
    parser.add_argument("--adapter", help="an mlx-lm adapter folder for the base [the demo's, else trained here]")
    parser.add_argument("--data", help="[the embedded text-to-SQL data]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=8, help="of each training leg")
    parser.add_argument("--adapter-iterations", type=int, default=20, help="of the adapter that is trained here")
    parser.add_argument("--decode-tokens", type=int, default=24)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--readme", type=Path, help=f"put the table between {START} and {END}")
    options = parser.parse_args()
    if unknown := set(options.disciplines) - set(race_legs.DISCIPLINES):
        parser.error(f"there is no discipline {', '.join(sorted(unknown))}")
    start, machine, at_start = time.time(), environment(), system_state()
    saved = {"machine": machine.to_json(), "parts": {}}
    saved["parts"] = earlier(options.json, saved["machine"])
    with tempfile.TemporaryDirectory() as name:
        job = prepare(Path(name), options)
        for names in parts_of(options.disciplines or list(race_legs.DISCIPLINES)):
            before, begun = system_state(), time.time()
            values, errors = run_part(names, job, options.rounds)
            notes = [f"{what}: {why}" for what, why in errors.items()]
            notes += [f"{name}: {NO_RIVAL[name]}" for name in names if name in NO_RIVAL]
            notes += warnings(at_start, system_state(), machine.cores)  # the load of earlier parts is our own
            settings = {k: os.path.basename(str(v)) for k, v in vars(options).items() if k not in ("json", "readme")}
            common = {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "state": before,
                "notes": notes,
                "settings": settings,
                "seconds": time.time() - begun,
            }
            for discipline in names:
                one_part = {discipline: values[discipline]} if discipline in values else {}
                saved["parts"][discipline] = common | {"rows": rows_of(one_part)}
            saved["parts"] = {n: saved["parts"][n] for n in race_legs.DISCIPLINES if n in saved["parts"]}
            save(saved, options)
    rows = [row for part in saved["parts"].values() for row in part["rows"]]
    print(format_table(HEADERS, map(line_of, rows), right=(2, 3, 4)))
    print("\n".join(dict.fromkeys(note for part in saved["parts"].values() for note in part["notes"])))
    print(f"{duration(time.time() - start)} in all", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Interrupted: finished disciplines are saved.")
