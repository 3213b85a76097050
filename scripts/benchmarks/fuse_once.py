"""KL of a fuse at the base's own size and with more bits, before and after its scales are tuned, from one rounding.

    python scripts/benchmarks/fuse_once.py ADAPTER [--data FOLDER] [--check-rows 100]

`fuse.py` fuses anew for every row of its table, in a process of its own, so that it can tell seconds and memory; this
tells KL alone, in a fraction of the time. The first line is rounded to nearest, as `mlx_lm.fuse` does; RATIO is its
KL divided by the line's.
"""

import argparse
import tempfile
import time
from pathlib import Path

from fuse import Judge
from fuse_ways import dense_base

import mlx_adapters  # noqa: F401  (before MLX)
from mlx_adapters.assembly.formats import make_writer
from mlx_adapters.assembly.spool import Spool
from mlx_adapters.assembly.tensors import open_assembly
from mlx_adapters.assembly.weights import Updates
from mlx_adapters.calibration.blockwise import BlockwiseModel, with_rounded
from mlx_adapters.calibration.polish import RATE, TUNING_PASSES, polished
from mlx_adapters.calibration.strategy import Strategy
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.quantization import Precision
from mlx_adapters.rounding.packed import dequantize, to_nearest
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter


class Once:
    """One rounding to several precisions, and what comes of it."""

    def __init__(self, arguments, work):
        self.work, self.started, self.ratio_to = work, time.perf_counter(), None
        adapter = load_adapter(arguments.adapter)
        dense_base(str(resolve_base(arguments.base or adapter.base_name).folder), str(work / "base"), 4)
        self.base, self.updates = resolve_base(work / "base"), Updates(((adapter, 1.0),))
        self.options = FuseOptions(
            calibration=arguments.data,
            calibration_rows=arguments.calibration_rows,
            check_rows=arguments.check_rows,
            budget_bits=8,
            thorough=arguments.thorough or None,
        )
        self.tunings = [(int(passes), float(rate)) for passes, rate in (t.split(":") for t in arguments.tunings)]
        self.strategy = self.fresh()
        self.rows = self.strategy.text.calibration
        self.judge = Judge(work / "base", adapter, self.strategy.text)
        (work / "spool").mkdir()

    def fresh(self):
        """A strategy of an assembly that nothing was changed in."""
        writer = make_writer(self.options, Precision.of("keep"), "auto", self.base)
        return Strategy(open_assembly(self.base, self.updates, writer, True), self.options, lambda event: None)

    def spool(self):
        """What was rounded, without what was tuned."""
        return Spool(self.work / "spool", "once", (self.work / "spool" / "rounded.json").is_file())

    def tell(self, name, model):
        """Judge a model, and say how it did."""
        figures = self.judge.model(model)
        self.ratio_to = self.ratio_to or figures["kl"]
        seconds = time.perf_counter() - self.started
        print(
            f"{name:40} KL {figures['kl']:.5f}  1/{self.ratio_to / figures['kl']:<7.1f} 99 % {figures['kl_p99']:.4f}  "
            f"same top {figures['same_top']:.4f}  loss {figures['loss']:.4f}  ({seconds:.0f} s)",
            flush=True,
        )

    def nearest(self):
        """The model rounded to nearest."""
        assembly, plain = self.strategy.assembly, BlockwiseModel(self.base, self.updates)
        targets, dtype = {plan.path: plan.rounded_to for plan in assembly.plans}, assembly.scale_dtype

        def stored(path):
            target = targets.get(path)
            return target and dequantize(to_nearest(plain.source.fused(path, self.updates), target, dtype))

        return BlockwiseModel(self.base, self.updates, None, stored, plain)

    def fused(self, more):
        """With so many bits more, as it is rounded and tuned."""
        strategy = self.fresh()
        assembly, bits = strategy.assembly, 8 * strategy.assembly.size_bytes() / strategy.assembly.parameters
        strategy.options = FuseOptions(budget_bits=bits + more)
        targets = strategy._rounded(self.spool())
        assembly.retarget(strategy._choose_targets(self.spool()) if more else {})
        targets = strategy._rounded(self.spool())
        name = f"calibrated, {more:g} bits more" if more else "calibrated"
        self.tell(name, with_rounded(assembly, self.spool(), targets, BlockwiseModel(self.base, self.updates)))
        for passes, rate in self.tunings:
            spool = self.spool()
            told = polished(assembly, spool, targets, self.rows, lambda event: None, passes, rate)
            beside = BlockwiseModel(self.base, self.updates)
            self.tell(f"  tuned, {passes} passes at {rate:g}", with_rounded(assembly, spool, targets, beside))
            print(told)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--base", help="[the one that the adapter names, in 4 bits and groups of 64]")
    parser.add_argument("--data", help="folder with train.jsonl and others [the adapter's own]")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--check-rows", type=int, default=100)
    parser.add_argument("--more-bits", nargs="*", type=float, default=[0.1])
    parser.add_argument("--thorough", action="store_true", help="finer precisions as --thorough rounds to them")
    parser.add_argument("--tunings", nargs="*", default=[f"{TUNING_PASSES}:{RATE}"], metavar="PASSES:RATE")
    parser.add_argument("--nearest-alone", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        once = Once(arguments, Path(folder))
        once.tell("nearest", once.nearest())
        if arguments.nearest_alone:
            return
        once.strategy._round_layers(once.spool(), once.rows)
        for more in (0, *arguments.more_bits):
            once.fused(more)


if __name__ == "__main__":
    main()
