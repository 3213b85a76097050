"""`import-peft` and `export-peft`: adapters from and to Hugging Face's peft."""

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import (
    REFERENCE,
    UserPath,
    json_option,
    name_template_option,
    new_name,
    overwrite_option,
    resize_option,
    subfolder_option,
    text_only_option,
    trust_option,
)
from mlx_adapters.units import count


@click.command("import-peft")
@click.argument("source", metavar="SRC")
@click.option("--base", metavar="BASE", required=True, help="The MLX base model: demo, a folder or a Hub id.")
@click.option("--name", metavar="NAME", required=True, help="Name in the registry.")
@name_template_option
@click.option("--tie", is_flag=True, help="Take an update of one end of a tied embedding at both ends.")
@resize_option
@text_only_option
@subfolder_option
@overwrite_option
@trust_option
@json_option
def import_peft_command(
    source: str,
    base: str,
    name: str,
    name_template: str | None,
    tie: bool,
    resize: bool,
    text_only: bool,
    subfolder: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Take in a PEFT LoRA or DoRA adapter: SRC is a folder or a Hub repository.

    The converted adapter computes what PEFT computes; what MLX cannot express is refused with the reason.

    \b
    Example:
      mlx-adapters import-peft user/llama-sql-lora --base mlx-community/Llama-3.2-1B-Instruct-4bit --name sql
    """
    from mlx_adapters.adapters.peft_import import import_peft

    name = new_name(name, name_template, base=base)
    adapter = import_peft(
        source,
        base=base,
        name=name,
        tie=tie,
        resize=resize,
        text_only=text_only,
        subfolder=subfolder,
        overwrite=overwrite,
        on_event=_output.progress(),
    )
    if as_json:
        _output.emit_json(
            {
                "name": adapter.name,
                "folder": adapter.folder,
                "config": adapter.config,
                "parameters": adapter.parameters,
                "base": adapter.base_name,
            }
        )
        return
    config = adapter.config
    base_name = _output.place(str(adapter.base_name))
    _output.out(
        f"Imported '{adapter.name}': {config.type}, rank {config.rank}, scale {_output.number(config.scale, 6)}, "
        f"{count(len(config.keys), 'layer')}, {adapter.parameters:,} parameters, for {base_name}"
    )
    _output.next_steps(
        f'mlx-adapters generate "..." --adapter {_output.word(adapter.name)}',
        f"mlx-adapters fuse {_output.word(adapter.name)} out/{adapter.name}-4bit --bits 4",
    )


@click.command("export-peft")
@click.argument("ref", type=REFERENCE, metavar="REF")
@click.argument("out", type=UserPath(file_okay=False))
@click.option("--base-model", metavar="NAME", help="transformers model to name in it [the one it was trained on].")
@click.option("--base", metavar="BASE", help="The MLX base model, of which PEFT's names are read [the adapter's].")
@overwrite_option
@trust_option
@json_option
def export_peft_command(
    ref: str, out: str, base_model: str | None, base: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write the adapter REF as a folder OUT that PeftModel.from_pretrained loads.

    What PEFT has no module for, or would take and not heed, is refused with the reason.

    \b
    Example:
      mlx-adapters export-peft sql out/sql-peft --base-model Qwen/Qwen3-0.6B
    """
    from mlx_adapters.adapters.peft_export import export_peft

    result = export_peft(ref, out, base_model=base_model, base=base, overwrite=overwrite, on_event=_output.progress())
    if as_json:
        _output.emit_json(result)
        return
    folder = _output.place(result.folder)
    _output.say(f"{folder}: {result.tensors} tensors, {_output.size(result.size_bytes)}, for {result.base_model}")
    _output.note(f"Next, in Python: PeftModel.from_pretrained(model, {folder!r})")
