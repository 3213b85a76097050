"""`pack`, `add`, `init`: adapters in and out as files."""

from pathlib import Path

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._options import (
    UserPath,
    complete_references,
    json_option,
    overwrite_option,
    subfolder_option,
    text_only_option,
)
from mlx_adapters.units import count


class Size(click.ParamType):
    """Bytes: 500000, 200MB, 1.5GB (powers of 1000)."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower().removesuffix("b")
        factor = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}.get(text[-1:], 1)
        try:
            count = float(text.rstrip("kmgt")) * factor
            if 0 < count < 1e18:
                return int(count)
        except ValueError:
            pass
        return self.fail(f"'{value}' is no size; for example 200MB or 1.5GB.", param, ctx)


@click.command("pack")
@click.argument("source", metavar="REF|MODEL", shell_complete=complete_references)
@click.argument("target", metavar="FILE.tar.gz", type=UserPath(dir_okay=False, path_type=Path))
@click.option("--checkpoints", is_flag=True, help="Take the adapter's checkpoints along.")
@overwrite_option
@json_option
def pack_command(source: str, target: Path, checkpoints: bool, overwrite: bool, as_json: bool) -> None:
    """Write an adapter, or a model folder (a path), into one file. Equal contents give equal bytes.

    \b
    Example:
      mlx-adapters pack sql sql.tar.gz
    """
    from mlx_adapters.adapters.packing import MODEL_CONFIG, pack

    done = pack(source, target, checkpoints=checkpoints, overwrite=overwrite, on_event=_output.progress())
    if as_json:
        _output.emit_json(done)
        return
    path = _output.place(done.path)
    _output.say(f"{path}: {count(len(done.files), 'file')}, {_output.size(done.size_bytes)}, sha256 {done.sha256}")
    into = "--out FOLDER" if MODEL_CONFIG in done.files else "--name NAME"
    _output.next_steps(f"mlx-adapters add {_output.word(done.path)} {into}")


@click.command("add")
@click.argument("source", metavar="PATH|FILE.tar.gz|user/repo[@rev]")
@click.option("--name", metavar="NAME", help="Its name in the registry [the file's, folder's or repository's].")
@click.option("--out", type=UserPath(file_okay=False), help="Put it into this folder instead (models need one).")
@click.option("--base", metavar="BASE", help="The base to hold it against [its own, if it is here].")
@subfolder_option
@text_only_option
@click.option("--max-size", type=Size(), default=None, metavar="SIZE", help="Largest unpacked size, e.g. 5GB.")
@overwrite_option
@json_option
def add_command(
    source: str,
    name: str | None,
    out: str | None,
    base: str | None,
    subfolder: str | None,
    text_only: bool,
    max_size: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Take in an adapter from a folder, a packed file or the Hub, checked, as a copy.

    Of mlx-lm, mlx-vlm, mlx-tune, unsloth or optiq, it comes out in mlx-lm's form. PEFT adapters: 'import-peft'.

    \b
    Example:
      mlx-adapters add ./adapters --name sql
    """
    from mlx_adapters.adapters.adding import add
    from mlx_adapters.storage.unpacking import MAX_BYTES

    on_event = _output.progress()
    limit = max_size or MAX_BYTES
    done = add(
        source,
        name=name,
        out=out,
        base=base,
        subfolder=subfolder,
        text_only=text_only,
        max_bytes=limit,
        overwrite=overwrite,
        on_event=on_event,
    )
    if as_json:
        _output.emit_json(done)
        return
    where = f"as '{done.name}'" if done.name else f"in {_output.place(done.folder)}"
    checkpoints = f" with {count(len(done.iterations), 'checkpoint')}" if done.iterations else ""
    _output.say(f"Added the {done.kind}{checkpoints} {where}.")
    how = "--adapter" if done.kind == "adapter" else "--base"
    _output.next_steps(f'mlx-adapters generate "..." {how} {_output.word(done.name or done.folder)}')


@click.command("init")
@click.argument("folder", type=UserPath(file_okay=False, path_type=Path), default=".")
@overwrite_option
@json_option
def init_command(folder: Path, overwrite: bool, as_json: bool) -> None:
    """Start a project of adapters: a .gitattributes for weights, a .gitignore and a sample config.

    \b
    Example:
      mlx-adapters init my-adapters
    """
    from mlx_adapters.adapters.project import start_project

    written = start_project(folder, overwrite=overwrite)
    if as_json:
        _output.emit_json({"folder": folder, "files": written})
        return
    _output.say(f"Wrote {', '.join(written)} in '{folder}'.")
    _output.say(f"It trains on the rows in {_output.place(folder / 'data')}.")
    _output.next_steps(f"mlx-adapters train --config {_output.word(folder / 'train.yaml')}")
