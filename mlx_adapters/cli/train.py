"""`train`: make an adapter."""

import contextlib
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import LongCommand
from mlx_adapters.cli._options import (
    OUTPUT_FILE,
    REFERENCE,
    Reads,
    complete_references,
    json_option,
    name_template_option,
    new_name,
    overwrite_option,
    refuse_ignored,
    refuse_outputs_that_are_read,
    trust_option,
)
from mlx_adapters.cli._training_options import SETTINGS, Settings, read_settings, training_options
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.config.settings import commented
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.errors import AdapterError
from mlx_adapters.events import Event, Note, Progress, TrainReport, ValidationReport
from mlx_adapters.training.reporting import SERVICES
from mlx_adapters.units import count, listed

if TYPE_CHECKING:
    from mlx_adapters.training.reporting import Reporter
    from mlx_adapters.training.state import TrainPlan

ROOMY = 80  # columns of a terminal whose live line has room for the losses


@click.command("train", cls=LongCommand)
@click.argument("base", required=False)
@click.option("--data", metavar="DIR", help="Folder with train.jsonl, valid.jsonl; a file; or hf:user/name.")
@click.option("--name", metavar="NAME", help="Name of the adapter, or a folder such as ./out.")
@name_template_option
@click.option(
    "--resume",
    metavar="NAME",
    shell_complete=complete_references,
    help="Go on with a run that was stopped, exactly where it stood.",
)
@click.option("--init-from", type=REFERENCE, metavar="REF", help="Start from this adapter's weights.")
@click.option("--reference", type=REFERENCE, metavar="REF", help="Of dpo and kto: the base with this adapter [alone].")
@training_options
@click.option("--print-config", is_flag=True, help="Show the settings as a config file and stop.")
@click.option("--dry-run", is_flag=True, help="Refuse what would be refused, say what would run, and keep nothing.")
@click.option("--log", type=OUTPUT_FILE, help="Append every event to this JSONL file.")
@click.option("--report-to", type=click.Choice(SERVICES), help="Send the losses there too.")
@overwrite_option
@trust_option
@json_option
@Reads(
    modes={
        "resume": f"base data {SETTINGS} dry_run log report_to trust_remote_code as_json",
        "print_config": f"base data name {SETTINGS}",
    }
)
def train_command(
    name_template: str | None,
    resume: str | None,
    init_from: str | None,
    reference: str | None,
    print_config: bool,
    dry_run: bool,
    log: str | None,
    report_to: str | None,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a LoRA or DoRA adapter for the model BASE (demo, a folder or a Hub id).

    \b
    Example:
      mlx-adapters train demo --data data/sql --name sql --mask-prompt
      mlx-adapters train demo --data data/preferences --name kind --objective dpo --init-from sql --reference sql
      mlx-adapters train --resume sql
    """
    settings = read_settings(options)
    if print_config:
        _print_config(settings)
        return
    from mlx_adapters.models.metadata import FULL, read_config
    from mlx_adapters.sources.lookup import load_adapter
    from mlx_adapters.system.machine import typed_command
    from mlx_adapters.training.runs import plan_training, train

    refuse_outputs_that_are_read()
    name = resume or settings.name
    there = {"BASE": settings.base, "--data": settings.data, "--name": settings.name}
    missing = [what for what, value in there.items() if value is None and not resume]
    if name is None or missing:
        raise click.UsageError(f"Give {listed(missing)} (or --resume NAME).")
    lora: LoraConfig | None
    if resume is not None:
        lora, training = _settings_of_run(settings, resume)
        new: dict[str, Any] = {"resume": True}
    else:
        lora = settings.lora_config() if settings.lora or init_from is None else None
        training = settings.train_config()
        if name_template is not None:
            rank = lora.rank if lora else load_adapter(str(init_from)).config.rank
            name = new_name(name, name_template, base=settings.base, rank=rank)
        new = {"init_from": init_from, "reference": reference, "overwrite": overwrite}
    asked = {"name": name, "lora": lora, "training": training, "forecast": True, **new}
    if dry_run:
        refuse_ignored("log report_to", "--dry-run")
        _plan(plan_training(settings.base, settings.data, on_event=_output.progress(), **asked), as_json)
        return
    watch = Watch(log)
    if report_to is not None:
        watch.report_to(report_to, name, (to_mapping(lora) if lora else {}) | to_mapping(training))
    with contextlib.closing(watch):
        command = None if resume else typed_command() or None
        run = train(settings.base, settings.data, command=command, on_event=watch, **asked)
    if run.rank != 0:
        return
    if as_json:
        _output.emit_json(run)
        return
    best = run.best_validation_loss
    loss = "" if best is None else f", validation loss {_output.number(best, 4)}"
    took, where = _output.duration(run.duration_seconds), _output.place(run.folder)
    _output.say(f"{run.best}{loss}; trained {took}, kept in {where}")
    mine, full = _output.word(run.reference), read_config(run.folder)["fine_tune_type"] == FULL
    _output.next_steps(
        f'mlx-adapters generate "..." {"--base" if full else "--adapter"} {mine}',
        f"mlx-adapters show {mine}",
        f"mlx-adapters fuse {mine} out/{run.folder.name}-4bit --bits 4",
    )


def _plan(plan: "TrainPlan", as_json: bool) -> None:
    if as_json:
        _output.emit_json(plan)
        return
    first = f"from iteration {plan.iteration:,} on, " if plan.iteration else ""
    judged = f"{count(plan.validation_rows, 'row')} every {plan.eval_every:,}" if plan.validation_rows else "none"
    lines = [
        ("base", _output.place(plan.base)),
        ("adapter", f"{count(plan.adapted_layers, 'layer')}, {plan.trained_parameters:,} trained parameters"),
        (
            "training",
            f"{first}{count(plan.iterations, 'iteration')}, {_output.number(plan.passes)} x {count(plan.rows, 'row')}",
        ),
        ("validation", judged),
        ("checkpoints", f"every {plan.save_every:,}"),
        ("kept in", _output.place(plan.folder)),
    ]
    _output.table(("WHAT", "WOULD BE"), lines)
    _output.note("Nothing was trained or kept. Next: the same line without --dry-run")


def _settings_of_run(settings: Settings, name: str) -> tuple[LoraConfig, TrainConfig]:
    from mlx_adapters.training.folder import place_of
    from mlx_adapters.training.recipe import read_recipe, settings_in

    lora, training = settings_in(read_recipe(place_of(name)[1]))
    return settings.lora_config(lora), settings.train_config(training)


def _print_config(settings: Settings) -> None:
    import yaml

    places = {"base": settings.base, "data": settings.data, "name": settings.name}
    given = {key: value for key, value in places.items() if value is not None}
    lines = yaml.safe_dump(given, sort_keys=False) if given else ""
    for group, config in (("lora", settings.lora_config()), ("training", settings.train_config())):
        lines += f"{group}:\n" + textwrap.indent(commented(config), "  ")
    _output.out(lines, newline=False)


def _watched(figures: Mapping[str, float]) -> str:
    """What is watched of preferences, the answers' own figures apart: these are in the log."""
    return "".join(f", {name} {figures[name]:.3g}" for name in ("margin", "accuracy", "kl") if name in figures)


def _over(processes: int) -> str:
    return "" if processes == 1 else f" over all {processes} processes"


class Watch:
    """Prints reports as lines on stderr, the rest as a live line, and keeps the log."""

    def __init__(self, log: str | None) -> None:
        from mlx_adapters.storage import files

        if log is not None:
            files.require_writable(Path(log))
        self._log, self._live, self._losses = log, _output.progress(self._beside), list[float]()
        self._reporter: Reporter | None = None

    def report_to(self, service: str, name: str, config: dict[str, Any]) -> None:
        """Send the losses to a service as well."""
        from mlx_adapters.storage.paths import home
        from mlx_adapters.training.folder import place_of
        from mlx_adapters.training.reporting import Reporter

        name = place_of(name)[1].name
        self._reporter = Reporter(service, name, config, home() / "runs" / name, self)

    def close(self) -> None:
        """End what was reported, however the run ended."""
        if self._reporter is not None:
            self._reporter.close()

    def __call__(self, event: Event) -> None:
        if self._reporter is not None:
            self._reporter(event)
        if self._log is not None and not isinstance(event, Progress):
            self._append(event)
        if isinstance(event, TrainReport):
            self._losses.append(event.train_loss)
            watched = _watched(event.figures)
            trained, real = map(_output.number, (event.trained_tokens_per_second, event.tokens_per_second))
            _output.note(
                f"iteration {event.iteration}/{event.iterations}: loss {event.train_loss:.4f}{watched}, rate "
                f"{event.learning_rate:.3g}, {trained} of {real} tok/s{_over(event.processes)}, "
                f"{_output.size(event.peak_memory_bytes)}"
            )
        elif isinstance(event, ValidationReport):
            more = _watched(event.figures) + (" (best checkpoint so far)" if event.best else "")
            _output.note(f"iteration {event.iteration}: validation loss {event.validation_loss:.4f}{more}")
        elif isinstance(event, Progress | Note):
            self._live(event)

    def _beside(self, stage: str) -> str:
        """The last losses, in a terminal that has room for them."""
        from mlx_adapters.display.notebook import sparkline

        room = stage == "train" and _output.columns() >= ROOMY
        return f"{self._losses[-1]:.3f} {sparkline(self._losses, 8)}" if room and self._losses else ""

    def _append(self, event: Event) -> None:
        import json

        from mlx_adapters.storage import files

        line = {"event": type(event).__name__} | _output.plain(event)
        try:
            files.append_line(Path(str(self._log)), json.dumps(line))
        except (AdapterError, OSError) as error:  # watching a run never stops it
            log, self._log = self._log, None
            _output.warn(f"The log '{log}' cannot be written ({error}); the run goes on without it.")
