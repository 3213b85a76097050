"""The command line: parse, call one library function, print its result.

Commands load on first use, so `--help` is instant. The one door for errors is `main`.
"""

import importlib
import os
import signal
import sys
import warnings
from typing import Any

import click

import mlx_adapters
from mlx_adapters.cli import _output
from mlx_adapters.errors import AdapterError

# Command -> (module in this folder, one line for the overview).
COMMANDS = {
    "train": ("train", "Train an adapter, or go on with a run that was stopped."),
    "data": ("data", "Look at training data before training, and split it."),
    "list": ("adapters", "Show all adapters."),
    "show": ("adapters", "Show one adapter."),
    "compare": ("adapters", "Compare two adapters."),
    "verify": ("adapters", "Check that an adapter is sound and fits its base."),
    "rename": ("keeping", "Give an adapter another name."),
    "tag": ("keeping", "Add and remove tags."),
    "use": ("keeping", "Choose the checkpoint that a name means."),
    "remove": ("keeping", "Remove adapters or checkpoints."),
    "prune": ("keeping", "Remove checkpoints that are neither best nor last."),
    "pack": ("packing", "Write an adapter or a model into one file."),
    "add": ("packing", "Take in an adapter from a folder, a file or the Hub."),
    "init": ("packing", "Start a project of adapters."),
    "generate": ("generate", "Ask a base model, with or without an adapter."),
    "chat": ("chat", "Talk to a base model, switching adapters."),
    "ab": ("chat", "Answer a file of prompts with two adapters, side by side."),
    "serve": ("serve", "Serve a base and adapters as OpenAI's API."),
    "fuse": ("fuse", "Write base and adapter as one model, at any precision."),
    "merge": ("merge", "Merge adapters into one."),
    "subtract": ("merge", "Take one adapter's update from another's."),
    "scale": ("merge", "Make an adapter stronger or weaker."),
    "interpolate": ("merge", "Go from one adapter to another in steps."),
    "extract": ("merge", "Make an adapter out of a full fine-tune."),
    "benchmark": ("benchmark", "Measure load time, speed and memory of variants side by side."),
    "publish": ("publish", "Upload an adapter or a fused model to the Hugging Face Hub."),
    "download": ("publish", "Take an adapter or a model from the Hub."),
    "card": ("publish", "Print or write the model card."),
    "completion": ("completion", "Print the completion script of a shell."),
    "import-peft": ("peft", "Take in a PEFT adapter from a folder or the Hub."),
    "export-peft": ("peft", "Write an adapter as a folder that PEFT loads."),
    "advise": ("advise", "Say which to use, adapter or fused, from measured figures."),
    "estimate": ("estimate", "Forecast memory, and the time of a training, beforehand."),
    "eval": ("eval", "Judge variants on data: loss, distance, task score."),
    "demo": ("demo", "The whole way on an embedded model and data."),
    "doctor": ("doctor", "Compare the machines of a run beforehand: versions, base, data."),
    "env": ("env", "Show versions, device, BLAS and the home folder."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"mlx_adapters.cli.{COMMANDS[name][0]}")
        return getattr(module, name.replace("-", "_") + "_command")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            if any(error.option_name in option.opts for option in self.get_params(ctx)):
                where = f"mlx-adapters {error.option_name} {ctx.invoked_subcommand} ..."
                raise click.UsageError(f"{error.option_name} goes before the command: {where}", error.ctx) from None
            raise

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from mlx_adapters.errors import did_you_mean

            hint = did_you_mean(args[0], COMMANDS) if args else None
            raise click.UsageError(error.message + (f" {hint[0].upper()}{hint[1:]}" if hint else ""), ctx) from None


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


def main() -> None:
    """Run the program; every error of ours becomes `Error: …`, `Hint: …` and an exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    _output.open_streams()
    sys.unraisablehook = lambda what: _output.debugging() and sys.__unraisablehook__(what)  # at a library's clearing up
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
    except (AdapterError, OSError, UnicodeError, MemoryError) as error:
        if _output.debugging():
            raise
        _output.error(*_said(error))
        code = getattr(error, "exit_code", 1)
    _output.discard()
    sys.exit(code if isinstance(code, int | str) else 0)


def _said(error: Exception) -> tuple[str, str | None]:
    """Message and hint of what ends the program: our errors, and what the machine refused."""
    if isinstance(error, AdapterError):
        return error.message, error.hint
    if isinstance(error, MemoryError):
        return "There is not enough memory.", "'mlx-adapters estimate' forecasts what a model takes."
    if isinstance(error, UnicodeError):
        return f"A text is not valid Unicode: {error}.", "is its file UTF-8?"
    why, file = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
    return (f"'{file}': {why}." if file else f"The system refused: {why}."), None


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
