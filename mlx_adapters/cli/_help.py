"""What the program says of itself: commands by what one wants, other names for them, and help in two lengths."""

import click

from mlx_adapters.cli import _output

TYPED = "mlx_adapters.typed"  # in a context's meta: what stands after the command

# What one wants -> command -> (module in this folder, one line for the overview).
GROUPS = {
    "Start": {
        "demo": ("demo", "The whole way on an embedded model and data."),
        "models": ("estimate", "Bases to begin with, and which of them fit this machine."),
        "data": ("data", "Look at training data before training, and split it."),
        "estimate": ("estimate", "Forecast memory, and the time of a training, beforehand."),
        "init": ("packing", "Start a project of adapters."),
    },
    "Train and keep": {
        "train": ("train", "Train an adapter, or go on with a run that was stopped."),
        "list": ("adapters", "Show all adapters."),
        "show": ("adapters", "Show one adapter."),
        "compare": ("adapters", "Compare two adapters."),
        "verify": ("adapters", "Check that an adapter is sound and fits its base."),
        "use": ("keeping", "Choose the checkpoint that a name means."),
        "tag": ("keeping", "Add and remove tags."),
        "rename": ("keeping", "Give an adapter another name."),
        "remove": ("keeping", "Remove adapters or checkpoints."),
        "prune": ("keeping", "Remove checkpoints that are neither best nor last."),
        "add": ("packing", "Take in an adapter from a folder, a file or the Hub."),
        "pack": ("packing", "Write an adapter or a model into one file."),
    },
    "Ask": {
        "generate": ("generate", "Ask a base model, with or without an adapter."),
        "chat": ("chat", "Talk to a base model, switching adapters."),
        "ab": ("chat", "Answer a file of prompts with two adapters, side by side."),
        "serve": ("serve", "Serve a base and adapters as OpenAI's API."),
    },
    "Fuse and measure": {
        "fuse": ("fuse", "Write base and adapter as one model, at any precision."),
        "benchmark": ("benchmark", "Measure load time, speed and memory of variants side by side."),
        "eval": ("eval", "Judge variants on data: loss, distance, task score."),
        "advise": ("advise", "Say which to use, adapter or fused, from measured figures."),
    },
    "Combine": {
        "merge": ("merge", "Merge adapters into one."),
        "scale": ("merge", "Make an adapter stronger or weaker."),
        "subtract": ("merge", "Take one adapter's update from another's."),
        "interpolate": ("merge", "Go from one adapter to another in steps."),
        "extract": ("merge", "Make an adapter out of a full fine-tune."),
    },
    "Share": {
        "card": ("publish", "Print or write the model card."),
        "publish": ("publish", "Upload an adapter or a fused model to the Hugging Face Hub."),
        "download": ("publish", "Take an adapter or a model from the Hub."),
        "import-peft": ("peft", "Take in a PEFT adapter from a folder or the Hub."),
        "export-peft": ("peft", "Write an adapter as a folder that PEFT loads."),
    },
    "Set up": {
        "env": ("env", "Show versions, device, BLAS and the home folder."),
        "doctor": ("doctor", "Compare the machines of a run beforehand: versions, base, data."),
        "completion": ("completion", "Print the completion script of a shell."),
    },
}
COMMANDS = {name: told for commands in GROUPS.values() for name, told in commands.items()}
ALIASES = {"ls": "list", "rm": "remove"}

# What the short help of a long command shows.
_ASKING = "base system max_tokens temperature seed"
COMMON = {
    "train": "data name resume init_from config rank num_layers type objective iterations batch_size learning_rate "
    "max_seq_length mask_prompt memory_limit eval_every save_every early_stop valid_fraction overwrite as_json",
    "estimate": "data adapter context batch bits memory rank num_layers iterations batch_size max_seq_length as_json",
    "generate": f"adapter {_ASKING} as_json",
    "chat": f"adapters {_ASKING}",
    "ab": f"{_ASKING} as_json",
    "serve": "adapters name host port api_keys splits allow_load max_adapters max_batch max_tokens",
    "fuse": "bits method calibration max_kl format program weights check_only base overwrite as_json",
    "benchmark": "base rounds prompt_tokens decode_tokens batch quality score output html as_json",
    "eval": "data tasks score max_rows max_tokens base output as_json",
}
_HELPS = {"--help-all", "--help"}
_ALL = "mlx_adapters.help_all"  # in a context's meta: every option is told


class LongCommand(click.Command):
    """A command of many options: `--help` tells those of COMMON, `--help-all` every one."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *params, own = super().get_params(ctx)
        return [*params, _help_all, own]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        common = None if ctx.meta.get(_ALL) else COMMON[str(self.name)].split()
        shown = [p for p in self.get_params(ctx) if common is None or p.name in common or _HELPS & {*p.opts}]
        records = [record for option in shown if (record := option.get_help_record(ctx)) is not None]
        with formatter.section("Options" if common is None else "Common options"):
            formatter.write_dl(records)


def tell_all(context: click.Context) -> str:
    """The whole help of a command, in either length."""
    context.meta[_ALL] = True
    try:
        return context.command.get_help(context)
    finally:
        del context.meta[_ALL]


def _tell_all(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        _output.out(tell_all(context))
        context.exit()


_help_all = click.Option(
    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_tell_all, help="Show every option."
)
