"""The command line: parse, call one library function, print its result.

Commands load on first use, so `--help` is instant. The one door for errors is `main`.
"""

import importlib
import os
import sys
import warnings
from collections import Counter
from typing import Any

import click

import mlx_adapters
from mlx_adapters.cli import _output
from mlx_adapters.cli._help import ALIASES, COMMANDS, GROUPS, TYPED
from mlx_adapters.cli._notify import notifying
from mlx_adapters.errors import AdapterError, NotFoundError, not_compiled
from mlx_adapters.system.interrupt import raise_again, raising


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"mlx_adapters.cli.{COMMANDS[name][0]}")
        return getattr(module, name.replace("-", "_") + "_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), summary) for name, (_, summary) in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with notifying(lambda: ctx.invoked_subcommand):
                return super().invoke(ctx)
        except click.NoSuchOption as error:
            if any(error.option_name in option.opts for option in self.get_params(ctx)):
                where = f"mlx-adapters {error.option_name} {ctx.invoked_subcommand} ..."
                raise click.UsageError(f"{error.option_name} goes before the command: {where}", error.ctx) from None
            from mlx_adapters.cli._habits import HABITS, in_our_words

            command = str(error.ctx.info_name) if error.ctx else ""
            theirs = error.option_name in HABITS.get(command, {})  # another one is a slip, and told as such
            line = in_our_words(command, ctx.meta[TYPED]) if theirs else None
            said = click.UsageError(f"{error.option_name} is mlx-lm's. Here: {line}", error.ctx) if line else error
            raise said from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        ctx.meta[TYPED] = args[1:]
        command = args[0] if args else ""
        ctx.with_resource(_output.never_silent(command))
        try:
            resolved = super().resolve_command(ctx, args)
        except click.UsageError as error:
            from mlx_adapters.cli._habits import PROGRAMS
            from mlx_adapters.errors import did_you_mean

            known = PROGRAMS.get(args[0].removeprefix("mlx_lm.")) if args else None
            hint = f"did you mean '{known}'?" if known else did_you_mean(args[0], COMMANDS) if args else None
            raise click.UsageError(error.message + (f" {hint[0].upper()}{hint[1:]}" if hint else ""), ctx) from None
        if resolved[1] is not None and not ctx.resilient_parsing:
            _tell_dropped(resolved[1], ctx, resolved[2])
        return resolved


def _tell_dropped(command: click.Command, parent: click.Context, args: list[str]) -> None:
    """Warn of options that name something, data or an adapter, and are given twice: click takes the last. That numbers,
    choices and flags are said again is usual."""
    context = click.Context(command, parent=parent, info_name=command.name)
    try:
        _, rest, order = command.make_parser(context).parse_args(list(args))
    except click.UsageError:  # it is told when it is parsed for good
        return
    for option, times in Counter(p for p in order if isinstance(p, click.Option)).items():
        again = option.multiple or option.is_flag or option.type.name.startswith(("integer", "float", "choice"))
        if times > 1 and not again:
            _output.warn(f"{option.opts[0]} is given {times} times, and takes one: the last.")
    if isinstance(command, click.Group) and rest and (inner := command.get_command(context, rest[0])):
        _tell_dropped(inner, context, rest[1:])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(mlx_adapters.__version__, prog_name="mlx-adapters")
@click.option(
    "--home",
    type=click.Path(file_okay=False),
    envvar="MLX_ADAPTERS_HOME",
    help="Where adapters are kept [~/.mlx_adapters].",
)
@click.option("--debug", is_flag=True, help="Show the traceback of errors.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and notes on stderr.")
def cli(home: str | None, debug: bool, quiet: bool) -> None:
    """Train, own, fuse, measure, serve and publish LoRA adapters on MLX.

    \b
    Example:
      mlx-adapters train demo --data data/sql --name sql
      mlx-adapters fuse sql out/sql-4bit --bits 4
      mlx-adapters benchmark base sql out/sql-4bit
    """
    if home:
        os.environ["MLX_ADAPTERS_HOME"] = os.path.abspath(os.path.expanduser(home))
    _output.configure(quiet=quiet, debug=debug)
    try:
        os.getcwd()
    except OSError:
        raise NotFoundError("The folder that you are in is gone.", "go to another one: cd.") from None


def main() -> None:
    """Run the program; every error of ours becomes `Error: …`, `Hint: …` and an exit status."""
    _output.open_streams()  # before other files get their numbers
    raising()
    sys.unraisablehook = _at_clearing_up
    warnings.showwarning = lambda message, *_, **__: _output.warn(str(message))
    if "_MLX_ADAPTERS_COMPLETE" in os.environ:
        importlib.import_module("mlx_adapters.cli.completion")  # registers the shells
    try:
        code = cli.main(standalone_mode=False)
        _output.flush()
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as error:
        _output.usage(error)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _output.leave_interrupted()
    except (BrokenPipeError, SystemExit) as error:
        # click leaves by SystemExit when the reader of a pipe is gone, its own wrapper around stdout
        gone = isinstance(error, BrokenPipeError) or type(sys.stdout).__name__.endswith("PacifyFlushWrapper")
        code = 0 if gone else error.code  # type: ignore[union-attr]
    except (AdapterError, OSError, UnicodeError, MemoryError, RuntimeError) as error:
        told = not_compiled(error) or error
        if _output.debugging() or not _expected(told):
            raise
        _output.error(*_said(told))
        code = getattr(told, "exit_code", 1)
    _output.discard()
    sys.exit(code if isinstance(code, int | str) else 0)


def _expected(error: Exception) -> bool:
    """Whether this is no fault of ours; of MLX's errors, that there is no room for an array."""
    from mlx_adapters.system.limits import out_of_memory

    return not isinstance(error, RuntimeError) or out_of_memory(error)


def _said(error: Exception) -> tuple[str, str | None]:
    """Message and hint of what ends the program: our errors, and what the machine refused."""
    if isinstance(error, AdapterError):
        return error.message, error.hint
    if isinstance(error, MemoryError | RuntimeError):
        return "There is not enough memory.", "'mlx-adapters estimate' forecasts what a model takes."
    if isinstance(error, UnicodeError):
        return f"A text is not valid Unicode: {error}.", "is its file UTF-8?"
    why, file = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
    return (f"'{file}': {why}." if file else f"The system refused: {why}."), None


def _at_clearing_up(what: Any) -> None:
    """What was raised where it leads nowhere, as when an object is let go: a Ctrl-C comes once more, later."""
    if isinstance(what.exc_value, KeyboardInterrupt):
        raise_again(what.exc_value)
    elif _output.debugging():
        sys.__unraisablehook__(what)
