"""`serve`: an OpenAI-compatible server."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import (
    UserPath,
    complete_named_references,
    drafting_options,
    dtype_option,
    template_options,
    trust_option,
)
from mlx_adapters.cli._settings import option, options
from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting
from mlx_adapters.serving.settings import ServeSettings, parse_split


@click.command("serve", cls=LongCommand)
@click.argument("base")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=REF",
    shell_complete=complete_named_references,
    help="Serve this adapter (repeatable).",
)
@click.option("--name", help="What requests call the base [as given; a folder by its last part].")
@options(ServeSettings, "host port")
@option(ServeSettings, "api_keys", flag="--api-key-file", type=UserPath(path_type=Path), default=None)
@option(ServeSettings, "splits", flag="--split", type=str, multiple=True, metavar="NAME=A:0.5,B:0.5")
@options(ServeSettings, "allow_load max_adapters")
@click.option("--max-adapter-mb", type=click.IntRange(min=1), help="Memory for adapters, in MB [no limit].")
@click.option(
    "--prompt-cache-mb",
    type=click.IntRange(min=0),
    help="Memory for prompts and answers that need not be read again, in MB; 0: none [a tenth of the memory].",
)
@options(
    ServeSettings, "max_batch max_queue max_tokens max_seconds max_connections drain_seconds key_rate key_requests"
)
@option(ServeSettings, "allowed_hosts", flag="--allow-host")
@option(ServeSettings, "cors_origins", flag="--cors-origin")
@option(ServeSettings, "access_log", type=UserPath(path_type=Path))
@options(ServeSettings, "access_log_json lenient")
@options(CacheQuantization, "kv_bits kv_group_size")
@drafting_options
@template_options
@dtype_option
@trust_option
def serve_command(
    base: str,
    adapters: tuple[str, ...],
    api_keys: Path | None,
    splits: tuple[str, ...],
    name: str | None,
    dtype: str,
    max_adapter_mb: int | None,
    prompt_cache_mb: int | None,
    kv_bits: Any,
    kv_group_size: Any,
    drafting: Drafting,
    template: TemplateConfig,
    **settings: Any,
) -> None:
    """Serve BASE (or a fused model) and adapters on it over HTTP, as OpenAI's API.

    A request's `model` names the adapter; the base's name means none. Chat with several side by side at /.

    \b
    Example:
      mlx-adapters serve demo --adapter sql --adapter chat=./out/chat --split "test=sql:0.5,demo:0.5"
    """
    from mlx_adapters.serving.start import bind, check_extra, make_engine, parse_adapter, read_keys, run_server

    check_extra()
    checked = ServeSettings(
        api_keys=read_keys(api_keys) if api_keys else (),
        splits=tuple(parse_split(split) for split in splits),
        max_adapter_bytes=max_adapter_mb * 1_000_000 if max_adapter_mb else None,
        prompt_cache_bytes=None if prompt_cache_mb is None else prompt_cache_mb * 1_000_000,
        **settings,
    )
    listener = bind(checked.host, checked.port)
    served = [parse_adapter(text) for text in adapters]
    kv = CacheQuantization(kv_bits, kv_group_size, quantized_kv_start=0)
    engine = make_engine(base, served, checked, dtype=dtype, name=name, template=template, kv=kv, drafting=drafting)
    _output.note(f"Serving {', '.join(engine.catalog.names)}.")
    if engine.in_turn:
        why = "has no batches of caches in few bits" if kv_bits else "does not take those for this model together"
        _output.note(f"Requests are decoded one after another: mlx-lm's code {why}.")
    run_server(
        engine,
        lambda address, _: _tell_address(address, engine.catalog.names[-1]),
        listener,
        _output.leave_interrupted,
        _tell_leaving,
    )


def _tell_address(address: str, model: str) -> None:
    _output.note(f"Listening on {address} (Ctrl-C ends it): open it to chat, or ask from a shell:")
    asked = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    _output.note(f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(asked)}")


def _tell_leaving(seconds: float) -> None:
    what = f"Answering on for {seconds:g} s" if seconds else "Finishing what is under way"
    _output.note(f"{what}; Ctrl-C {'ends that' if seconds else 'drops it'}.")
