"""`serve`: an OpenAI-compatible server."""

from pathlib import Path
from typing import Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import UserPath, complete_named_references, dtype_option


@click.command("serve")
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
@click.option("--host", default="127.0.0.1", show_default=True, help="Other than loopback needs --api-key-file.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one.")
@click.option("--api-key-file", type=UserPath(path_type=Path), help="Keys that may ask, one a line.")
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="NAME=A:0.5,B:0.5",
    help="A name that sends each user to one of several adapters, always the same (repeatable).",
)
@click.option("--allow-load", is_flag=True, help="Let POST and DELETE /v1/adapters load registered adapters.")
@click.option("--max-adapters", type=click.IntRange(min=1), default=8, show_default=True, help="In memory at once.")
@click.option("--max-adapter-mb", type=click.IntRange(min=1), help="Memory for adapters, in MB [no limit].")
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Rows decoded together.")
@click.option("--max-queue", type=click.IntRange(min=1), default=256, show_default=True, help="Waiting; more get 429.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Longest answer.")
@click.option("--max-seconds", type=click.FloatRange(min=1), default=300, show_default=True, help="For one request.")
@dtype_option
def serve_command(
    base: str,
    adapters: tuple[str, ...],
    api_key_file: Path | None,
    splits: tuple[str, ...],
    name: str | None,
    dtype: str,
    max_adapter_mb: int | None,
    **settings: Any,
) -> None:
    """Serve BASE (or a fused model) and adapters on it over HTTP, as OpenAI's API.

    A request's `model` names the adapter; the base's name means none. Chat with two side by side at /.

    \b
    Example:
      mlx-adapters serve demo --adapter sql --adapter chat=./out/chat --split "test=sql:0.5,demo:0.5"
    """
    from mlx_adapters.serving.settings import ServeSettings, parse_split
    from mlx_adapters.serving.start import bind, make_engine, parse_adapter, read_keys, run_server

    checked = ServeSettings(
        api_keys=read_keys(api_key_file) if api_key_file else (),
        splits=tuple(parse_split(split) for split in splits),
        max_adapter_bytes=max_adapter_mb * 1_000_000 if max_adapter_mb else None,
        **settings,
    )
    listener = bind(checked.host, checked.port)
    engine = make_engine(base, [parse_adapter(text) for text in adapters], checked, dtype=dtype, name=name)
    _output.note(f"Serving {', '.join(engine.names)}.")
    run_server(
        engine,
        lambda address, _: _output.note(f"Listening on {address} (Ctrl-C ends it)."),
        listener,
        _output.leave_interrupted,
    )
