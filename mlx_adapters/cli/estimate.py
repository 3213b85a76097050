"""`estimate`: how much memory a model will take."""

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import adapter_option, json_option
from mlx_adapters.cli.benchmark import Counts


@click.command("estimate")
@click.argument("base")
@adapter_option
@click.option("--context", type=Counts(), default="2048,8192", show_default=True, help="Context lengths in tokens.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--bits", type=Counts(), default="4,8,16", show_default=True, help="Precisions to compare.")
@click.option(
    "--memory", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Memory there is [this machine's]."
)
@json_option
def estimate_command(
    base: str, adapter: str | None, context: tuple[int, ...], batch: int, bits: tuple[int, ...], memory: float | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Forecast the memory of BASE, its adapter and KV cache for inference, at each precision.

    \b
    Example:
      mlx-adapters estimate mlx-community/Qwen3-0.6B-4bit --context 4096,32768
    """
    from mlx_adapters.benchmarking.forecast import estimate_inference

    found = estimate_inference(
        base, adapter, contexts=context, batch=batch, bits=bits,
        memory_bytes=None if memory is None else int(memory * 1e9),
    )  # fmt: skip
    if as_json:
        forecasts = [
            {**_output.plain(f), "peak_bytes": f.peak_bytes, "fits": f.fits(found.memory_bytes)}
            for f in found.forecasts
        ]
        _output.emit_json({**_output.plain(found), "forecasts": forecasts})
        return
    size = _output.size
    headers = [
        "PRECISION",
        "DISK",
        "WEIGHTS",
        "ADAPTER",
        *(f"KV {n}" for n in context),
        *(f"PEAK {n}" for n in context),
    ]
    rows = [
        [f.precision, size(f.disk_bytes), size(f.weights_bytes), size(f.adapter_bytes),
         *(size(f.kv_cache_bytes[n]) for n in context),
         *(size(f.peak_bytes[n]) + ("" if f.fits(found.memory_bytes)[n] else " (too much)") for n in context)]
        for f in found.forecasts
    ]  # fmt: skip
    _output.table(headers, rows, right=range(1, len(headers)))
    _output.out(f"Batch {batch}; there is {size(found.memory_bytes)} of memory.")
