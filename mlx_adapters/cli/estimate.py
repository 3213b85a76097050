"""`estimate`: how much memory a model will take, for inference or for training."""

import functools
import math
from dataclasses import replace
from typing import Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import Reads, adapter_option, carried, json_option, refuse_ignored, trust_option
from mlx_adapters.cli._settings import Counts
from mlx_adapters.cli._training_options import SETTINGS, Settings, read_settings, training_options
from mlx_adapters.config.settings import settings_of
from mlx_adapters.config.training import TrainConfig


class GigabytesOrWay(click.ParamType):
    """An amount of memory in GB, or a way to train with less."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        ways = settings_of(TrainConfig)["memory"].choices
        if value in ways:
            return value
        try:
            if 0 < (number := float(value)) < math.inf:
                return number
        except ValueError:
            pass
        self.fail(f"'{value}' is neither a number of GB above 0 nor one of {', '.join(ways)}.", param, ctx)


@click.command("estimate", cls=LongCommand)
@click.argument("base", required=False)
@click.option("--data", metavar="DIR", help="Forecast the training on this data, with the options of train.")
@adapter_option
@click.option("--context", type=Counts(), default="2048,8192", show_default=True, help="Context lengths in tokens.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--bits", type=Counts(), default="4,8,16", show_default=True, help="Precisions to compare.")
@click.option(
    "--memory",
    type=GigabytesOrWay(),
    metavar="GB|WAY",
    help="Memory there is [this machine's]; with --data also what train takes: auto, nothing, mlp or blocks.",
)
@functools.partial(training_options, without="memory")
@trust_option
@json_option
@Reads(
    modes={"data": f"base {SETTINGS} trust_remote_code as_json"},
    needs={setting: "data config" for setting in SETTINGS.split() if setting not in ("config", "memory")},
)
def estimate_command(
    adapter: str | None,
    context: tuple[int, ...],
    batch: int,
    bits: tuple[int, ...],
    memory: float | str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Forecast the memory of BASE, its adapter and KV cache for inference, at each precision; with --data, memory
    and time of a training with the same options (it trains nothing).

    \b
    Example:
      mlx-adapters estimate mlx-community/Qwen3-0.6B-4bit --context 4096,32768
      mlx-adapters estimate demo --data data/sql --batch-size 8
    """
    way = memory if isinstance(memory, str) else None
    settings = read_settings(options | {"memory": way})
    if settings.base is None:
        raise click.UsageError("Give BASE.")
    if settings.data is not None:
        refuse_ignored("adapter context batch bits", "the data of the config file")
        _training(settings, as_json, None if isinstance(memory, str) else memory)
        return
    if settings.lora or settings.training or isinstance(memory, str):
        raise click.UsageError("The options of train need --data.")
    from mlx_adapters.generation.memory import estimate_inference

    estimated = estimate_inference(
        settings.base,
        adapter,
        contexts=context,
        batch=batch,
        bits=bits,
        memory_bytes=None if memory is None else int(memory * 1e9),
    )
    if as_json:
        forecasts = [
            {**_output.plain(f), "peak_bytes": f.peak_bytes, "fits": f.fits(estimated.memory_bytes)}
            for f in estimated.forecasts
        ]
        _output.emit_json({**_output.plain(estimated), "forecasts": forecasts})
        return
    size = _output.size
    lengths = (*(f"KV {n}" for n in context), *(f"PEAK {n}" for n in context))
    headers = ["PRECISION", "DISK", "WEIGHTS", "ADAPTER", *lengths]
    rows = [
        [
            f.precision,
            size(f.disk_bytes),
            size(f.weights_bytes),
            size(f.adapter_bytes),
            *(size(f.kv_cache_bytes[n]) for n in context),
            *(size(f.peak_bytes[n]) + ("" if f.fits(estimated.memory_bytes)[n] else " (too much)") for n in context),
        ]
        for f in estimated.forecasts
    ]
    _output.table(headers, rows, right=range(1, len(headers)))
    fits = [f.precision for f in estimated.forecasts if all(f.fits(estimated.memory_bytes).values())]
    verdict = f"fits: {', '.join(fits)}" if fits else "at these lengths none fits"
    _output.say(f"Batch {batch}; there is {size(estimated.memory_bytes)} of memory; {verdict}.")
    _output.next_steps(f'mlx-adapters generate "..." --base {_output.word(settings.base)}{carried("generate")}')


def _training(settings: Settings, as_json: bool, gigabytes: float | None) -> None:
    from mlx_adapters.training.forecast import estimate

    lora, training = settings.lora_config(), settings.train_config()
    if gigabytes is not None:
        training = replace(training, memory_limit=f"{gigabytes:f}".rstrip("0").rstrip(".") + "GB")
    estimated = estimate(
        settings.base or "", settings.data or "", lora=lora, training=training, on_event=_output.progress()
    )
    if as_json:
        _output.emit_json(estimated)
        return
    size = _output.size
    parts = [(name.removesuffix("_bytes"), size(count)) for name, count in vars(estimated.parts).items() if count]
    _output.table(("PART", "AT THE PEAK"), [*parts, ("all", size(estimated.peak_bytes))], right=(1,))
    rows, tokens = estimated.largest_batch
    _output.say(
        f"{estimated.trainable_parameters:,} trained parameters; largest batch {rows} x {tokens} tokens; full "
        f"fine-tuning in float32 with Adam would need {size(estimated.full_finetune_bytes)} for weights, gradients "
        "and moments"
    )
    if estimated.seconds_per_iteration is not None:
        each, total = estimated.seconds_per_iteration, estimated.seconds_per_iteration * estimated.iterations
        _output.say(
            f"about {_output.number(each)} s per iteration, {_output.duration(total)} for all "
            f"{estimated.iterations:,}, validation apart"
        )
    if len(estimated.ladder) > 1:
        taken = next((rung for rung in estimated.ladder if rung.fits), None)
        steps = [
            (
                str(rung),
                size(rung.peak_bytes),
                rung.cost or "-",
                "taken" if rung is taken else "yes" if rung.fits else "no",
            )
            for rung in estimated.ladder
        ]
        _output.table(("WAY", "PEAK", "COST", "FITS"), steps, right=(1,))
    there = f"there is {size(estimated.usable_bytes)}" + ("" if training.memory_limit else " on this machine")
    if estimated.fits:
        _output.say(f"It fits: {there}.")
        base, data = _output.word(settings.base or ""), _output.word(settings.data or "")
        limit = "" if gigabytes is None else f" --memory-limit {training.memory_limit}"  # here it is --memory GB
        how = carried("train", "data memory memory_limit" if limit else "data")
        _output.next_steps(f"mlx-adapters train {base} --data {data} --name NAME{how}{limit}")
        return
    _output.say(f"It does not fit: {there}. Any one of these would make it fit:")
    for advice in estimated.advice:
        _output.say(f"  {advice}")


@click.command("models")
@json_option
def models_command(as_json: bool) -> None:
    """Bases to begin with, and which of them this machine has the memory to run and to train, roughly: answers with
    4,096 tokens of context, batches of 4 x 512 tokens. Any other that mlx-lm loads will do as well.

    \b
    Example:
      mlx-adapters models
    """
    from mlx_adapters.generation.memory import known_models
    from mlx_adapters.system.machine import usable_memory_bytes

    memory, models = usable_memory_bytes(), known_models()
    if as_json:
        _output.emit_json({"memory_bytes": memory, "models": models})
        return
    size = _output.size
    rows = [
        (m.id, f"{m.parameters / 1e9:.2g} B", size(m.size_bytes), m.license, str(m.year), *fits)
        for m in models
        for fits in [["yes" if need <= memory else "no" for need in (m.running_bytes, m.training_bytes)]]
    ]
    _output.table(("MODEL", "PARAMS", "DISK", "LICENSE", "YEAR", "RUN", "TRAIN"), rows, right=(1, 2), whole=True)
    trained = [m for m in models if m.training_bytes <= memory]
    largest = f"'{trained[-1].id}' is the largest of them that trains in it" if trained else "none of them trains in it"
    _output.say(f"{size(memory)} of memory can be used now; {largest}.")
    base = trained[-1].id if trained else models[0].id
    _output.next_steps(
        f"mlx-adapters estimate {base} --data my-data", f"mlx-adapters train {base} --data my-data --name mine"
    )
