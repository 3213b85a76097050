"""`generate`: ask a model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import (
    Reads,
    adapter_option,
    any_base_option,
    base_option,
    drafting_options,
    dtype_option,
    json_option,
    kv_options,
    prompt_cache_option,
    sampling_options,
    system_option,
    template_options,
    text_or_stdin,
    trust_option,
)
from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting

if TYPE_CHECKING:
    from mlx_adapters.generation.live import LiveModel


@click.command("generate", cls=LongCommand)
@click.argument("prompt")
@adapter_option
@base_option
@any_base_option
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@system_option
@sampling_options
@drafting_options
@prompt_cache_option
@kv_options
@template_options
@dtype_option
@trust_option
@json_option
@Reads(needs={"any_base": "adapter"})
def generate_command(
    prompt: str,
    adapter: str | None,
    base: str | None,
    any_base: bool,
    system: str | None,
    drafting: Drafting,
    prompt_cache: Path | None,
    kv: CacheQuantization,
    template: TemplateConfig,
    dtype: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Write an answer to PROMPT ("-" reads it from stdin), streamed as it is made.

    \b
    Example:
      mlx-adapters generate "List all departments." --adapter sql
    """
    from mlx_adapters.generation.chat import conversation
    from mlx_adapters.generation.decoding import ids_of
    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.bases import recorded_base
    from mlx_adapters.sources.lookup import load_adapter
    from mlx_adapters.storage.files import require_writable

    text = text_or_stdin(prompt)
    if prompt_cache is not None:
        require_writable(prompt_cache)
    told: Any = conversation(text, system) if system else text
    loaded = load_adapter(adapter) if adapter else None
    if base is None and loaded is None:
        raise click.UsageError("Give --adapter or --base (the embedded model is 'demo').")
    model = load_model(
        base or recorded_base(filter(None, [loaded])),
        loaded,
        dtype=dtype,
        any_base=any_base,
        template=template,
        drafting=drafting,
        kv=kv,
    )
    cache = None
    if prompt_cache is not None:
        ids = list(ids_of(model, told, options["raw"]))
        cache, told = model.going_on(model.load_cache(prompt_cache) if prompt_cache.exists() else None, ids)
        options["cache"] = cache
    if as_json:
        answer = model.generate(told, **options)
        _output.emit_json(answer if cache is None else replace(answer, prompt_tokens=len(ids)))
    else:
        _write(model, told, options)
    if cache is not None and prompt_cache is not None:
        model.save_cache(cache, prompt_cache)


def _write(model: "LiveModel", told: Any, options: dict[str, Any]) -> None:
    reason = None
    for response in model.stream(told, **options):
        _output.out(response.text, newline=False)
        reason = response.finish_reason
    _output.out()
    if reason == "context":
        _output.warn(f"The answer stopped where the model's context of {model.base.context} tokens ends.")
