"""One fresh process: load one variant, warm up, measure, write the result. Run by `run.py`.

    python -m mlx_adapters.benchmarking.worker job.json result.json

Load time reaches from the call to evaluated weights, tokenizer and adapter included, imports not. Before the
warm load the model's files have been read once; before the cold load Linux is told to drop them from its file
cache, and `cold_disk_bytes` says how much then really came from the disk. macOS lets only root do that, so
there is no cold load there. Peak memory is MLX's own, reset before the load and before each shape.
"""

import gc
import sys
import time
import warnings
from collections import Counter
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters.benchmarking import trials
from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.mapping import from_mapping, require
from mlx_adapters.data.datasets import read_as_trained
from mlx_adapters.data.tokenizing import tokenize
from mlx_adapters.errors import AdapterError, FormatError
from mlx_adapters.evaluation.variants import Variant
from mlx_adapters.generation import memory
from mlx_adapters.generation.live import load_model
from mlx_adapters.models.adapter import StrengthWarning, weights_file
from mlx_adapters.models.dense import is_quantized
from mlx_adapters.models.layers import adaptable_layers
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.models.model import Model
from mlx_adapters.models.quantized_check import MiscomputedWarning
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter, locate
from mlx_adapters.storage import files, paths
from mlx_adapters.system.conditions import bytes_read_from_disk, drop_from_file_cache, process_memory
from mlx_adapters.system.door import mx, trusting_remote_code
from mlx_adapters.system.interrupt import end_with_parent
from mlx_adapters.system.machine import on_gpu


def main(job_file: str, result_file: str) -> None:
    """Do the job and write what was measured, or the error."""
    job = files.read_json(Path(job_file))
    settings = (
        from_mapping(Variant, job["variant"]),
        from_mapping(BenchmarkConfig, job["config"]),
        from_mapping(DataConfig, job["data"]),
    )
    with warnings.catch_warnings(record=True) as told:  # of this process nobody reads stderr
        try:
            with trusting_remote_code(job["trust_remote_code"]):
                result = run_job(*settings)
        except AdapterError as error:
            result = {"error": error.with_hint, "hint": error.hint}
    result["warnings"] = [str(w.message) for w in told if w.category in (StrengthWarning, MiscomputedWarning)]
    files.write_json(Path(result_file), result)


def run_job(variant: Variant, config: BenchmarkConfig, own: DataConfig) -> dict[str, Any]:
    """Everything one process measures for one variant; `own` says how rows that make prompts are read and rendered."""
    load_tokenizer_of(resolve_base(str(variant.base)))  # imports what transformers puts off, which is no load time
    model, result = measure_loads(variant, config)
    check_lengths(model, config)
    prompts = {shape: prompts_for(model, config, own, *shape) for shape in config.shapes}
    warm_up(model, config, prompts)
    result["shapes"] = [measure_shape(model, config, shape, prompts[shape]) for shape in config.shapes]
    result |= {"process": process_memory(), "conditions": conditions(model)}
    model.detach()
    result["weights_bytes"] = memory.bytes_of(model.module)
    read = trials.bytes_per_token(model.module, model.config) + result["adapter_bytes"]
    result["bytes_per_token"] = read
    del model
    gc.collect()
    mx.clear_cache()
    start = time.perf_counter()
    result["bandwidth_bytes_per_second"] = trials.bandwidth(read)
    result["bandwidth_seconds"] = time.perf_counter() - start
    return result


def measure_loads(variant: Variant, config: BenchmarkConfig) -> tuple[Model, dict[str, Any]]:
    """Load cold (if asked for and possible) and warm; the model and the load's figures."""
    paths = files_of(variant)
    result: dict[str, Any] = {"size_bytes": sum(path.stat().st_size for path in paths)}
    if config.cold_load and drop_from_file_cache(paths):
        before = bytes_read_from_disk()
        model, result["cold_load_seconds"] = timed_load(variant, config)
        result["cold_disk_bytes"] = bytes_read_from_disk() - before
        del model
        gc.collect()
        mx.clear_cache()
    for path in paths:
        with open(path, "rb") as stream:
            while stream.read(1 << 24):
                pass
    mx.reset_peak_memory()
    model, result["load_seconds"] = timed_load(variant, config)
    result["load_peak_bytes"] = mx.get_peak_memory()
    adapter = load_adapter(variant.adapter) if variant.adapter else None
    result["adapter_bytes"] = sum(w.nbytes for w in adapter.weights.values()) if adapter else 0
    return model, result


def timed_load(variant: Variant, config: BenchmarkConfig) -> tuple[Model, float]:
    """The loaded variant, and the seconds until all weights are evaluated."""
    start = time.perf_counter()
    adapter = load_adapter(variant.adapter) if variant.adapter else None
    model = load_model(str(variant.base), adapter, dtype=config.dtype, any_base=config.any_base)
    mx.eval(model.module.parameters())
    mx.synchronize()
    return model, time.perf_counter() - start


def files_of(variant: Variant) -> list[Path]:
    """The files that loading reads: the model's folder and the adapter's weights and config."""
    folder = resolve_base(str(variant.base)).folder
    model_files = [path for path in paths.visible(folder) if path.is_file()]
    if variant.adapter:
        model_files.append(weights_file(*locate(variant.adapter)))
    return model_files


def check_lengths(model: Model, config: BenchmarkConfig) -> None:
    """Refuse prompts that do not fit into the model's context."""
    longest = max(config.prompt_tokens)
    require(
        model.room(longest, config.decode_tokens) == config.decode_tokens,
        f"{longest + config.decode_tokens} tokens of prompt and answer are longer than the model's context of "
        f"{model.base.context}.",
        "choose fewer --prompt-tokens.",
    )


def prompts_for(model: Model, config: BenchmarkConfig, own: DataConfig, length: int, batch: int) -> mx.array:
    """(batch, length) token ids: from the data's rows, or random ones with a fixed seed."""
    if config.data is None:
        return trials.random_prompts(trials.vocabulary_size(model.module), batch, length, config.seed)
    prompts = real_prompts(config.data, own, load_tokenizer_of(model.base, own.template), batch, length)
    model.base.check_tokens(np.array(prompts), config.data)
    return prompts


def real_prompts(source: str, own: DataConfig, tokenizer: Any, batch: int, length: int) -> mx.array:
    """(batch, length) token ids from the test rows (else valid, else train), each prompt starting elsewhere."""
    data = read_as_trained(source, own, judging=True)
    rows = data.rows(data.judging)
    lines = [row.tokens.tolist() for row in tokenize(rows, tokenizer).rows]
    if not lines:
        raise FormatError(f"The data '{source}' has no row that makes a prompt.", "are all of them empty?")
    prompts = []
    for number in range(batch):
        start = number * len(lines) // batch
        stream = (token for line in cycle(lines[start:] + lines[:start]) for token in line)
        prompts.append(list(islice(stream, length)))
    return mx.array(prompts)


def warm_up(model: Model, config: BenchmarkConfig, prompts: dict[tuple[int, int], mx.array]) -> None:
    """Run each shape once for a few tokens, so that kernels are compiled and memory is in place."""
    for tokens in prompts.values():
        trials.run_trial(model.module, tokens, 1 + config.warmup_tokens)


def measure_shape(model: Model, config: BenchmarkConfig, shape: tuple[int, int], tokens: mx.array) -> dict[str, Any]:
    """All trials of one prompt length and batch size, with the peak memory while they ran."""
    mx.clear_cache()
    mx.reset_peak_memory()
    measured = [trials.run_trial(model.module, tokens, config.decode_tokens) for _ in range(config.trials)]
    peak, first = mx.get_peak_memory(), measured[0]["token_ids"]
    for trial in measured:
        del trial["token_ids"]
    return {
        "prompt_tokens": shape[0],
        "batch": shape[1],
        "trials": measured,
        "peak_memory_bytes": peak,
        "token_ids": first,
    }


def conditions(model: Model) -> dict[str, Any]:
    """What the figures depend on: the arithmetic, and which weights and vocabulary these are."""
    stored = model.config.get("quantization")
    packed = any(is_quantized(layer) for layer in adaptable_layers(model.module).values())
    # Norms keep the type that activations have, whatever is packed.
    types = Counter(str(a.dtype) for _, a in tree_flatten(model.module.parameters()) if a.ndim == 1)
    return {
        "device": "gpu" if on_gpu() else "cpu",
        "base": model.base.name,
        "fingerprint": model.base.fingerprint,
        "model_type": model.config.get("model_type"),
        "stored_quantization": stored,
        "dense": bool(stored) and not packed,
        "dtype": types.most_common(1)[0][0].removeprefix("mlx.core."),
        "vocabulary": trials.vocabulary_size(model.module),
        "tokenizer": tokenizer_fingerprint(model.base.folder),
    }


def tokenizer_fingerprint(folder: Path) -> str | None:
    """SHA-256 of the tokenizer's own file."""
    tokenizer_files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    return files.sha256(tokenizer_files[0]) if tokenizer_files else None


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
