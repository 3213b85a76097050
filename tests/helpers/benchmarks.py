"""Reports as if they had been measured, and adapters to measure."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import make_adapter
from helpers.forked import instead_of_processes

from mlx_adapters.benchmarking import run as benchmarking
from mlx_adapters.benchmarking import trials, worker
from mlx_adapters.benchmarking.measurements import Run
from mlx_adapters.benchmarking.reports import Report
from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.evaluation.variants import Variant
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.sources.registry import register

MB = 10**6
SIZES = {"base": 350 * MB, "sql": 356 * MB, "f8": 600 * MB, "f4": 350 * MB}


def measure_here(patch: pytest.MonkeyPatch) -> None:
    """Within the patch what a benchmark's processes measure is measured in this one, once for all rounds, and says
    nothing of speed. `benchmarking/test_benchmarking.py` starts real ones."""
    known: dict[bytes, bytes] = {}

    def measure(job: Path, result: Path) -> None:
        asked = job.read_bytes()
        if asked not in known:
            worker.main(str(job), str(result))
            known[asked] = result.read_bytes()
        result.write_bytes(known[asked])

    patch.setattr(benchmarking, "subprocess", instead_of_processes(measure))
    patch.setattr(trials.bandwidth, "__defaults__", (0.01,))


def registered_adapter(folder: Path, name: str = "sql") -> Adapter:
    """A random rank-2 adapter on two layers of a tiny llama, registered."""
    keys = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    return register(make_adapter(folder, keys, rank=2), name)


def synthetic(
    speeds: dict[str, float], noise: float = 0.002, count: int = 5, seed: int = 0, memory: int = 100
) -> Report:
    """A report as if variants of these decode speeds had been measured."""
    random = np.random.default_rng(seed)
    config = BenchmarkConfig(prompt_tokens=(8,), decode_tokens=4, rounds=count, trials=2)
    runs = []
    for number in range(count):
        for label, speed in speeds.items():
            trials = [
                {
                    "ttft_seconds": 0.1,
                    "prefill_tps": 80.0,
                    "tpot_seconds": 1 / speed,
                    "kv_cache_bytes": 10,
                    "decode_tps": (tps := float(speed * np.exp(random.normal(0, noise)))),
                    "stretch_tps": tps,
                }
                for _ in range(2)
            ]
            shape = {"prompt_tokens": 8, "batch": 1, "trials": trials, "peak_memory_bytes": memory, "token_ids": [1]}
            conditions = {
                "device": "gpu",
                "base": "m",
                "fingerprint": "f",
                "model_type": "llama",
                "dense": False,
                "stored_quantization": None,
                "dtype": "float32",
                "vocabulary": 512,
                "tokenizer": "t",
            }
            runs.append(
                Run(
                    label,
                    number,
                    {
                        "size_bytes": 1000,
                        "load_seconds": 0.5,
                        "load_peak_bytes": 90,
                        "shapes": [shape],
                        "bytes_per_token": 80,
                        "weights_bytes": 80,
                        "process": {"peak_resident_bytes": 200, "footprint_bytes": None},
                        "adapter_bytes": 0,
                        "conditions": conditions,
                        "bandwidth_bytes_per_second": 1e5,
                    },
                )
            )
    machine = {"versions": {"mlx": "0.32.4"}, "device_name": "test", "cores": 2, "memory_bytes": 10**9, "system": "x"}
    variants = tuple(Variant(label, "m") for label in speeds)
    return Report("2026-01-01", "mlx-adapters benchmark", machine, {}, config, variants, tuple(runs))


def fused_report(speeds, kl=(2.0, 0.0, 0.002, 0.2), scores=None, noise=0.002):
    """base, sql (an adapter of 6 MB), f8 and f4 with these decode speeds and KL against sql."""
    measured = synthetic(dict(zip(SIZES, speeds, strict=True)), noise)
    runs = []
    for run in measured.runs:
        label, result = run.variant, dict(run.result)
        result["size_bytes"], result["adapter_bytes"] = SIZES[label], 6 * MB if label == "sql" else 0
        result["conditions"] = result["conditions"] | {"fingerprint": label if label[0] == "f" else "base"}
        result["shapes"] = [s | {"peak_memory_bytes": SIZES[label] + 50 * MB} for s in result["shapes"]]
        runs.append(Run(label, run.round, result))
    evaluations = [
        {
            "variant": label,
            "error": None,
            "kl": {"value": value, "error": 0.0},
            "score": {"value": scores[i], "error": 0.0} if scores else None,
        }
        for i, (label, value) in enumerate(zip(SIZES, kl, strict=True))
    ]
    quality = {
        "evaluations": evaluations,
        "reference": "sql",
        "score": None,
        "data": {"source": "data", "split": "test", "rows": 3},
    }
    return dataclasses.replace(measured, runs=tuple(runs), quality=quality)
