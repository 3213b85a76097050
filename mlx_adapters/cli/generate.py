"""`generate`: ask a model."""

from typing import Any

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
    sampling_options,
    system_option,
    template_options,
    text_or_stdin,
    trust_option,
)
from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.sampling import Drafting


@click.command("generate", cls=LongCommand)
@click.argument("prompt")
@adapter_option
@base_option
@any_base_option
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@system_option
@sampling_options
@drafting_options
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
    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.bases import recorded_base
    from mlx_adapters.sources.lookup import load_adapter

    text = text_or_stdin(prompt)
    told: Any = conversation(text, system) if system else text
    loaded = load_adapter(adapter) if adapter else None
    recorded = loaded.base_name if loaded else None
    if base is None and recorded is None:
        raise click.UsageError("Give --adapter or --base (the embedded model is 'demo').")
    model = load_model(
        base or recorded_base(str(recorded)),
        loaded,
        dtype=dtype,
        any_base=any_base,
        template=template,
        drafting=drafting,
    )
    if as_json:
        _output.emit_json(model.generate(told, **options))
        return
    reason = None
    for response in model.stream(told, **options):
        _output.out(response.text, newline=False)
        reason = response.finish_reason
    _output.out()
    if reason == "context":
        _output.warn(f"The answer stopped where the model's context of {model.base.context} tokens ends.")
