"""What fusing costs: our ways and mlx-lm's, same base, adapter, text and machine, judged alike.

    python scripts/benchmarks/fuse.py quality                 # on the demo's adapter; first run `mlx-adapters demo`
    python scripts/benchmarks/fuse.py detours --adapter sql --data data/sql
    python scripts/benchmarks/fuse.py all --tiny              # every part on a random model, in a minute or two

Parts:
  quality      KL, same top token, loss and the task's score at the same size, with 0.1 and 0.3 more bits per
               weight, at 8 bits and unquantized
  detours      `mlx_lm.fuse --dequantize`, then mlx_lm.convert, gptq, awq or dwq, against our fuse at the same size
  light        the adapter scaled until its update is under 1 % of every weight
  unquantized  an unquantized base to 4 bits, against mlx_lm.fuse and then mlx_lm.convert
  speed        seconds, CPU seconds and memory, one after the other, several times; the fastest counts
  memory       time and memory of random models as layers are added

The base is brought to 4 bits in groups of 64 first (by mlx-lm's own quantizer), unless it has that already. KL is
KL(adapter model || fused model) in nats per judged token, on rows that no method saw; every model is judged in
dense float32, whatever it was made with. Each method runs in a process of its own: seconds are of its work
without Python's imports (CPU seconds beside them, for a busy machine), memory is MLX's peak and the process's
largest resident size. RATIO is the KL of the part's first row divided by the row's; in brackets stand seconds and
memory as shares of mlx_lm.fuse's.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from fuse_ways import WayFailed, in_process

PARTS = ("quality", "detours", "light", "unquantized", "speed", "memory")


class Judge:
    """Judges fused folders by the adapter model, whose predictions are computed once."""

    def __init__(self, base, adapter, text):
        from mlx_adapters.assembly.weights import Updates
        from mlx_adapters.calibration.blockwise import BlockwiseModel
        from mlx_adapters.calibration.texts import batches_of
        from mlx_adapters.sources.bases import resolve_base

        its_base, updates = resolve_base(base), Updates(((adapter, 1.0),))
        self.batches = batches_of(text.check, its_base)
        self.reference = self._logs(BlockwiseModel(its_base, updates))
        self.adapter, self.base = self._figures(self.reference), self._figures(self._logs(BlockwiseModel(its_base)))

    def folder(self, folder):
        """Figures of one fused model."""
        from mlx_adapters.calibration.blockwise import BlockwiseModel
        from mlx_adapters.sources.bases import resolve_base

        return self.model(BlockwiseModel(resolve_base(folder), None, lambda _: True))

    def model(self, model):
        """The same of one that goes through its blocks."""
        return self._figures(self._logs(model))

    def _logs(self, variant):
        import mlx.core as mx

        from mlx_adapters.calibration.fidelity import hidden_states

        logs = []
        for batch, hidden in zip(self.batches, hidden_states([variant], self.batches)[0], strict=True):
            logits = variant.blocks.finish(hidden, batch.judged).astype(mx.float32)
            logs.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            mx.eval(logs[-1])
        return logs

    def _figures(self, logs):
        import mlx.core as mx
        import numpy as np

        kl, same, loss = [], [], []
        for reference, log, batch in zip(self.reference, logs, self.batches, strict=True):
            kl.append(np.array((mx.exp(reference) * (reference - log)).sum(axis=-1)))
            same.append(np.array(reference.argmax(axis=-1) == log.argmax(axis=-1)))
            loss.append(-np.array(mx.take_along_axis(log, batch.targets[:, None], axis=-1)))
        kl = np.maximum(np.concatenate(kl), 0)
        figures = {
            "kl": kl.mean(),
            "kl_p99": np.quantile(kl, 0.99),
            "same_top": np.concatenate(same).mean(),
            "loss": np.concatenate(loss).mean(),
        }
        return {name: float(value) for name, value in figures.items()}


def bits_per_weight(folder, base):
    """All tensors' bits over the numbers they stand for."""
    from mlx_adapters.assembly.formats import MlxWriter
    from mlx_adapters.assembly.tensors import open_assembly
    from mlx_adapters.assembly.weights import Updates
    from mlx_adapters.config.quantization import KEEP
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.storage import tensor_files

    paths = sorted(Path(folder).glob("model*.safetensors"))
    headers = [tensor_files.read_safetensors_header(path)[0] for path in paths]
    total = sum(e["data_offsets"][1] - e["data_offsets"][0] for header in headers for e in header.values())
    resolved = resolve_base(base)
    return 8 * total / open_assembly(resolved, Updates(), MlxWriter(KEEP, None, resolved)).parameters


class Bench:
    """One part's rows. They are printed, and written to --json, as they come."""

    def __init__(self, part, arguments, work, everything):
        self.part, self.arguments, self.work, self.everything = part, arguments, Path(work), everything
        self.rows = everything.setdefault(part, [])

    def prepare(self, base_of=None):
        """Adapter, base and judge; `base_of` makes the base from the one given (default: 4 bits)."""
        from mlx_adapters.calibration.texts import GENERAL, choose_text
        from mlx_adapters.models.adapter import write_adapter
        from mlx_adapters.models.loading import load_tokenizer_of
        from mlx_adapters.sources.bases import resolve_base
        from mlx_adapters.sources.lookup import load_adapter

        a = self.arguments
        loaded = load_adapter(a.adapter)
        self.adapter = str(write_adapter(loaded, self.work / "adapter"))
        given = str(resolve_base(a.base or loaded.base_name).folder)
        self.base = (base_of or self._four_bits)(given)
        tokenizer = load_tokenizer_of(resolve_base(self.base))
        text = choose_text(a.data, [loaded], tokenizer, a.calibration_rows, a.check_rows)
        self.text = {"calibration": a.data or (text.source if text.source != GENERAL else None)}
        self.calibrated = {**self.text, "calibration_rows": a.calibration_rows}
        self.judged_by(load_adapter(self.adapter), text)
        self.same_bits = bits_per_weight(self.base, self.base)
        print(
            f"## {self.part}: calibrated on {len(text.calibration)} rows, judged on {len(text.check)} of {text.source}"
        )

    def judged_by(self, adapter, text):
        """Judge by base + adapter."""
        self.chosen, self.judge = text, Judge(self.base, adapter, text)
        for name, figures in (("adapter", self.judge.adapter), ("base", self.judge.base)):
            self.show(f"{name}: KL {figures['kl']:.4g}, loss {figures['loss']:.4f}, same top {figures['same_top']:.4f}")

    def _four_bits(self, given):
        from mlx_adapters.sources.bases import resolve_base

        wanted = {"bits": 4, "group_size": self.arguments.group_size}
        settings = resolve_base(given).config.get("quantization") or {}
        if {key: settings.get(key) for key in wanted} == wanted and not any("." in key for key in settings):
            return given
        in_process("dense_base", base=given, out=str(self.work / "base"), **wanted)
        return str(self.work / "base")

    def unquantized(self, given):
        """The base without quantization."""
        in_process("dense_base", base=given, out=str(self.work / "dense-base"))
        return str(self.work / "dense-base")

    def show(self, text):
        print(text, file=sys.stderr, flush=True)

    def add(self, row):
        """Keep and show a row."""
        self.rows.append(row | {"load_average": os.getloadavg()[0]})
        self.show(json.dumps(self.rows[-1]))
        if self.arguments.json:
            Path(self.arguments.json).write_text(json.dumps(self.everything, indent=2))

    def way(self, name, *steps, scored=False):
        """Run (function, options) steps one after the other, judge what the last one wrote, add a row."""
        out, total = self.work / "out", {"seconds": 0.0, "cpu_seconds": 0.0, "mlx_peak": 0, "process_peak": 0}
        try:
            for number, (function, options) in enumerate(steps, 1):
                target = out if number == len(steps) else self.work / f"step-{number}"
                made = in_process(function, self.arguments.limit, out=str(target), **options)
                total = {k: max(v, made[k]) if "peak" in k else v + made[k] for k, v in total.items()}
            row = {"name": name, **self.judge.folder(out), "bits_per_weight": bits_per_weight(out, self.base), **total}
            first = self.rows[0].get("kl") if self.rows else row["kl"]
            row["ratio"] = first / row["kl"] if first and row["kl"] else None
            self.add(row | self.score(scored, model=str(out)))
        except WayFailed as failure:
            self.add({"name": name, "failed": str(failure)})
        finally:
            for folder in (out, *self.work.glob("step-*")):
                shutil.rmtree(folder, ignore_errors=True)

    def score(self, wanted, **options):
        """{"right", "questions"} on the data's test rows, if it has any."""
        data, count = self.text["calibration"], self.arguments.questions
        if not wanted or not count or not data or not (Path(data) / "test.jsonl").is_file():
            return {}
        right, questions = in_process("score", data=data, questions=count, **options)["value"]
        return {"right": right, "questions": questions}

    def our(self, **options):
        """One of our ways."""
        return "ours", {"base": self.base, "adapter": self.adapter, **options}

    def theirs(self, **options):
        """mlx_lm.fuse."""
        return "mlx_lm_fuse", {"base": self.base, "adapter": self.adapter, **options}

    def our_sizes(self, precision="keep", scored=False):
        """Calibrated at the size of the first row, and with more bits; then with scales tuned, if that is asked for."""
        for tuned in (False, True) if self.arguments.thorough else (False,):
            options = {"precision": precision, **self.calibrated, **({"thorough": True} if tuned else {})}
            name = ", --thorough" * tuned
            self.way(f"ours, calibrated{name}", self.our(method="calibrated", **options), scored=scored)
            for more in self.arguments.more_bits:
                step = self.our(budget_bits=self.same_bits + more, **options)
                self.way(f"ours, at most {more:g} bits more{name}", step, scored=scored)

    def eight_bits(self, scored=False):
        """Both methods at 8 bits."""
        precision = [8, self.arguments.group_size]
        self.way("ours, 8 bits, nearest", self.our(method="nearest", precision=precision), scored=scored)
        self.way(
            "ours, 8 bits, calibrated",
            self.our(method="calibrated", precision=precision, **self.calibrated),
            scored=scored,
        )


def quality(bench):
    """Every way of ours against mlx_lm.fuse."""
    bench.prepare()
    score = bench.score(True, model=bench.base, adapter=bench.adapter)
    bench.way("mlx_lm.fuse", bench.theirs(), scored=True)
    if score:
        bench.show(f"the adapter's score: {score}")
        bench.rows[0] |= {"adapter_right": score["right"]}
    bench.way("ours, nearest", bench.our(method="nearest"))
    bench.our_sizes(scored=True)
    bench.eight_bits(scored=True)
    bench.way("ours, bfloat16", bench.our(precision="none", dtype="bfloat16"))
    bench.way("ours, float32", bench.our(precision="none", dtype="float32"))


def detours(bench):
    """What a knowing user does today: fuse unquantized, then quantize again."""
    bench.prepare()
    a = bench.arguments
    bench.way("mlx_lm.fuse", bench.theirs())
    bench.way("ours, calibrated", bench.our(method="calibrated", **bench.calibrated))
    bench.way("ours, calibrated, --quick", bench.our(method="calibrated", thorough=False, **bench.calibrated))
    half = bench.calibrated | {"calibration_rows": a.calibration_rows // 2}
    bench.way("ours, calibrated, half the rows", bench.our(method="calibrated", **half))
    for name in a.detours:
        options = {"model": str(bench.work / "step-1"), "group_size": a.group_size}
        if name != "convert":
            options |= {**bench.text, "rows": a.awq_rows if name == "awq" else a.calibration_rows}
        if name == "dwq":
            options["rate"] = a.dwq_rate
        bench.way(f"mlx_lm.fuse --dequantize, {name}", bench.theirs(dequantize=True), (name, options))


def light(bench):
    """An adapter whose update is under 1 % of the weights."""
    bench.prepare()
    from mlx_adapters.sources.lookup import load_adapter

    out = str(bench.work / "light")
    factor = in_process("light_adapter", base=bench.base, adapter=bench.adapter, out=out, most=0.0099)["value"]
    bench.adapter = out
    bench.show(f"the adapter's scale times {factor:.4f}")
    bench.judged_by(load_adapter(out), bench.chosen)
    bench.way("mlx_lm.fuse", bench.theirs())
    bench.our_sizes()
    bench.eight_bits()
    bench.way("ours, float32", bench.our(precision="none", dtype="float32"))


def unquantized(bench):
    """An unquantized base to 4 bits."""
    bench.prepare(bench.unquantized)
    size = bench.arguments.group_size
    then = ("convert", {"model": str(bench.work / "step-1"), "group_size": size})
    bench.way("mlx_lm.fuse, mlx_lm.convert", bench.theirs(), then)
    bench.same_bits = bench.rows[0].get("bits_per_weight", 4.5)
    bench.way("ours, nearest", bench.our(method="nearest", precision=[4, size]))
    bench.our_sizes(precision=[4, size])


SPEED_WAYS = (
    ("mlx_lm.fuse", "mlx_lm_fuse", {}),
    ("ours, nearest", "ours", {"method": "nearest"}),
    ("mlx_lm.fuse --dequantize", "mlx_lm_fuse", {"dequantize": True}),
    ("ours, unquantized", "ours", {"precision": "none"}),
)


def timed(bench, base, adapter, **extra):
    """Every way in turn, `--trials` times; the fastest of each, and its ratios to mlx_lm.fuse."""
    runs = {name: [] for name, _, _ in SPEED_WAYS}
    for _ in range(bench.arguments.trials):
        for name, function, options in SPEED_WAYS:
            runs[name].append(in_process(function, base=base, adapter=adapter, out=str(bench.work / "out"), **options))
            shutil.rmtree(bench.work / "out")
    for number, (name, _, _) in enumerate(SPEED_WAYS):
        best = {key: min(run[key] for run in runs[name]) for key in MEASURED}
        if number % 2 == 0:
            theirs = best
        ratios = {f"{key}_ratio": best[key] / theirs[key] for key in MEASURED}
        bench.add({"name": name, **extra, **best, **ratios})


MEASURED = ("seconds", "cpu_seconds", "mlx_peak", "process_peak")


def speed(bench):
    """Seconds and memory on the adapter given."""
    bench.prepare()
    timed(bench, bench.base, bench.adapter)
    made = in_process(
        "ours",
        out=str(bench.work / "out"),
        check=True,
        method="calibrated",
        base=bench.base,
        adapter=bench.adapter,
        **bench.calibrated,
    )
    bench.add({"name": "ours, calibrated and checked", **{key: made[key] for key in MEASURED}})


def memory(bench):
    """Time and memory as layers are added."""
    for layers in bench.arguments.layers:
        out = bench.work / f"layers-{layers}"
        tiny = TINY if bench.arguments.tiny else {}
        in_process("random_model", out=str(out), bits=4, **tiny | {"num_hidden_layers": layers})
        timed(bench, str(out / "base"), str(out / "adapter"), layers=layers)
        shutil.rmtree(out)


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def cells(row):
    """One row as text."""
    from mlx_adapters.units import size

    if "failed" in row:
        return [row["name"], "failed"]
    figures = [
        ("bits_per_weight", ".3f"),
        ("kl", ".3g"),
        ("ratio", ".1f"),
        ("kl_p99", ".3f"),
        ("same_top", ".4f"),
        ("loss", ".4f"),
    ]
    quality = ["-" if row[name] is None else format(row[name], form) for name, form in figures if "kl" in row]
    score = [f"{row['right']}/{row['questions']}" if "right" in row else "-"] if quality else []
    layers = [str(row["layers"])] if "layers" in row else []
    ratios = [f"({row[k + '_ratio']:.2f})" if k + "_ratio" in row else "" for k in MEASURED]
    shown = [f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", size(row["mlx_peak"]), size(row["process_peak"])]
    return [row["name"], *layers, *quality, *score, *(f"{s} {r}".strip() for s, r in zip(shown, ratios, strict=True))]


def table(rows):
    """Print a part's rows under headers."""
    from mlx_adapters.cli import _output

    judged = any("kl" in row for row in rows)
    quality = ["BITS/WEIGHT", "KL", "RATIO", "99 %", "SAME TOP", "LOSS", "SCORE"] if judged else []
    layers = ["LAYERS"] if "layers" in rows[0] else []
    headers = ["METHOD", *layers, *quality, "SECONDS", "CPU S", "MLX PEAK", "PROCESS"]
    lines = [cells(row) for row in rows]
    _output.table(headers, [line + [""] * (len(headers) - len(line)) for line in lines], right=range(1, len(headers)))


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--adapter", default="demo-sql", help="the adapter to fuse; a name or a folder [demo-sql]")
    parser.add_argument("--base", help="its base [the one that the adapter names]")
    parser.add_argument("--data", help="folder with train.jsonl and valid.jsonl [the adapter's own]")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--check-rows", type=int, default=64)
    parser.add_argument("--questions", type=int, default=40, help="test questions to score; 0: none")
    parser.add_argument("--more-bits", nargs="*", type=float, default=[0.1, 0.3])
    parser.add_argument("--thorough", action="store_true", help="also with scales tuned: minutes each on a CPU")
    parser.add_argument("--detours", nargs="*", default=["convert", "gptq", "dwq", "awq"])
    parser.add_argument("--awq-rows", type=int, default=32, help="awq's search takes hours on all rows on a CPU")
    parser.add_argument("--limit", type=float, help="stop a way after so many seconds [never]")
    parser.add_argument("--dwq-rate", type=float, default=1e-5, help="learning rate; its 1e-6 is for 2,048 rows")
    parser.add_argument("--layers", nargs="*", type=int, default=[12, 24, 48], help="of the memory part")
    parser.add_argument("--trials", type=int, default=3, help="of the speed and memory parts")
    parser.add_argument("--tiny", action="store_true", help="a random model of two blocks, to try the script")
    parser.add_argument("--json", help="also write the figures here, row by row")
    return parser.parse_args()


def main():
    arguments = parse()
    from mlx_adapters.system.machine import environment

    machine = environment()
    print(f"# {machine.device_name}, {machine.cores} cores, {machine.system}, {machine.blas}; {machine.versions}")
    everything = {"machine": machine.to_json(), "settings": vars(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            in_process("random_model", out=f"{folder}/tiny", bits=4, num_hidden_layers=2, **TINY)
            arguments.adapter, arguments.base = f"{folder}/tiny/adapter", f"{folder}/tiny/base"
            arguments.layers, arguments.trials = [2, 4], 1
            arguments.calibration_rows = arguments.check_rows = arguments.awq_rows = 16
        for part in PARTS if "all" in arguments.parts else arguments.parts:
            work = Path(folder) / part
            work.mkdir()
            bench = Bench(part, arguments, work, everything)
            globals()[part](bench)
            table(bench.rows)
            for row in bench.rows:
                if "failed" in row:
                    print(f"{row['name']}: {row['failed']}")
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
