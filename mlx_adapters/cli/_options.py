"""Options used by more than one command, defined once, and the types that can fail to parse."""

import functools
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from mlx_adapters.cli import _output
from mlx_adapters.cli._help import TYPED
from mlx_adapters.cli._places import CARRIED
from mlx_adapters.cli._settings import option, options
from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.evaluating import EvaluationConfig
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting, Sampling
from mlx_adapters.config.settings import settings_of
from mlx_adapters.errors import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])


class ReferenceType(click.ParamType):
    """An adapter: NAME, NAME@ITERATION, a path, or user/repo[@revision]; names and checkpoints are completed."""

    name = "ref"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from mlx_adapters.sources.lookup import reference_of

        try:
            return str(value) if reference_of(str(value)) else ""
        except ConfigError as error:
            self.fail(error.message + (f" ({error.hint})" if error.hint else ""), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names that begin so, after `NAME@` its checkpoints; if there are none, files."""
        from mlx_adapters.sources.registry import list_adapters, names

        name, at, _ = incomplete.partition("@")
        references = [f"{name}@{n}" for e in list_adapters() if e.name == name for n in e.iterations] if at else names()
        items = [CompletionItem(text) for text in references if text.startswith(incomplete)]
        return items or [CompletionItem(incomplete, type="file")]


REFERENCE = ReferenceType()
complete_references = REFERENCE.shell_complete  # for arguments that may also be something else


def complete_named_references(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Completion of REF and of NAME=REF."""
    name, equals, reference = incomplete.partition("=")
    items = complete_references(ctx, param, reference if equals else incomplete)
    return [CompletionItem(f"{name}={item.value}" if equals else item.value, type=item.type) for item in items]


class UserPath(click.Path):
    """A path in which `~` is the user's home even where the shell left it (`--out=~/x`)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        home = os.path.expanduser(value)
        if str(home).startswith("~"):
            self.fail(f"'{value}' is in the home of a user that is not known.", param, ctx)
        return super().convert(home, param, ctx)


class OutputPath(UserPath):
    """What is written besides what the command is for: a report, a log, a folder of pictures."""


OUTPUT_FILE = OutputPath(dir_okay=False, path_type=Path)
OUTPUT_FOLDER = OutputPath(file_okay=False, path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
resize_option = click.option(
    "--resize", is_flag=True, help="Take a PEFT adapter of a vocabulary that was resized (see docs/interchange.md)."
)
text_only_option = click.option(
    "--text-only", is_flag=True, help="Leave out what the adapter changes besides the text model."
)
subfolder_option = click.option(
    "--subfolder", metavar="FOLDER", help="Which adapter of a folder or repository, as in USER/REPO/FOLDER."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is there.")
name_template_option = click.option(
    "--name-template",
    metavar="TEMPLATE",
    help='Make the name of fields, e.g. "{task}_{version}_{date}"; --name is the task.',
)
adapter_option = click.option("--adapter", type=REFERENCE, metavar="REF", help="The adapter to use.")
base_option = click.option("--base", metavar="BASE", help="Base model: demo, a folder or a Hub id [the adapter's own].")
any_base_option = option(EvaluationConfig, "any_base")
dtype_option = option(EvaluationConfig, "dtype")
system_option = click.option("--system", help="The system message.")


def sampling_options(command: Command) -> Command:
    """The options of `Sampling`; what does not go together is refused before anything is loaded."""

    @functools.wraps(command)
    def checked(*args: Any, **kwargs: Any) -> Any:
        Sampling().changed({name: kwargs[name] for name in vars(Sampling()) if name in kwargs})
        return command(*args, **kwargs)

    return options(Sampling)(checked)  # type: ignore[return-value]


def _trust(context: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from mlx_adapters.system.door import trusting_remote_code

        context.meta[CARRIED] = param.opts[0]
        context.with_resource(trusting_remote_code())


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_trust,
    help="Run code that the base's folder brings along. It can do whatever you can.",
)


def template_options(command: Command) -> Command:
    """--chat-template and --chat-template-arg, which the command takes as `template`."""

    @functools.wraps(command)
    def with_template(*args: Any, chat_template: str | None, chat_template_args: dict[str, Any], **kwargs: Any) -> Any:
        template = TemplateConfig(chat_template=chat_template, chat_template_args=chat_template_args)
        return command(*args, template=template, **kwargs)

    return options(TemplateConfig)(with_template)  # type: ignore[return-value]


prompt_cache_option = click.option(
    "--prompt-cache",
    type=UserPath(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep what was read and written in this file, and do not read again what it holds.",
)


def kv_options(command: Command) -> Command:
    """The options of `CacheQuantization`, which the command takes as `kv`."""

    @functools.wraps(command)
    def with_kv(*args: Any, **kwargs: Any) -> Any:
        return command(
            *args, kv=CacheQuantization(**{n: kwargs.pop(n) for n in settings_of(CacheQuantization)}), **kwargs
        )

    return options(CacheQuantization)(with_kv)  # type: ignore[return-value]


def drafting_options(command: Command) -> Command:
    """The options of `Drafting`, which the command takes as `drafting`."""

    @functools.wraps(command)
    def with_drafting(*args: Any, **kwargs: Any) -> Any:
        drafting = Drafting(**{name: kwargs.pop(name) for name in settings_of(Drafting)})
        return command(*args, drafting=drafting, **kwargs)

    return options(Drafting)(with_drafting)  # type: ignore[return-value]


def confirm(question: str, yes: bool) -> None:
    """Ask unless --yes was given. Ends the command after a no, and where nobody can answer."""
    if yes:
        return
    try:
        agreed = click.confirm(_output.printable(question, line=True), err=True)
    except click.Abort:
        if sys.stdin.isatty():  # Ctrl-C
            raise
        _output.note_inline("\n")
        raise click.UsageError("This asks first, and nobody can answer here: pass --yes.") from None
    if not agreed:
        _output.note("Nothing was removed.")
        raise click.exceptions.Exit(1)


def new_name(name: str, template: str | None, **known: str | int | None) -> str:
    """The name that --name and --name-template make; `known` are fields beside task, version, date and time."""
    from mlx_adapters.adapters.keeping import fill_template

    return name if template is None else fill_template(template, name, **known)


def text_or_stdin(text: str) -> str:
    """`text`, or for "-" what standard input holds."""
    if text != "-":
        return text
    try:
        piped = sys.stdin.read()
    except (OSError, UnicodeError) as error:
        raise click.UsageError(f"Standard input cannot be read: {error}.") from None
    if not piped:
        raise click.UsageError("There is nothing on standard input.")
    return piped


class Reads:
    """Decorates a command whose parameters are not all read at all times; what would be ignored is refused.

    `modes`: where the parameter was given, these are read, and nothing else. `needs`: the parameter is read only
    where one of these was given, too. So a new option of a command with modes is refused in each until it is named.
    """

    def __init__(self, modes: Mapping[str, str] | None = None, needs: Mapping[str, str] | None = None) -> None:
        self.modes = {mode: {mode, *names.split()} for mode, names in (modes or {}).items()}
        self.needs = {name: set(others.split()) for name, others in (needs or {}).items()}

    def __call__(self, command: Command) -> Command:
        @functools.wraps(command)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check(click.get_current_context())
            return command(*args, **kwargs)

        checked.reads = self  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    def check(self, context: click.Context) -> None:
        """Raise a usage error for the first parameter on the command line that would be ignored."""
        given = _given(context)
        for mode in (mode for mode in self.modes if mode in given):
            for name in given:
                if name not in self.modes[mode]:
                    raise click.UsageError(f"{_spelled(context, name)} does not go with {_spelled(context, mode)}.")
        for name, others in self.needs.items():
            if name in given and not others & set(given):
                wanted = " or ".join(_spelled(context, other) for other in sorted(others))
                raise click.UsageError(f"{_spelled(context, name)} needs {wanted}.")


def _given(context: click.Context) -> list[str]:
    """The parameters that stand on the command line, in the order of the help."""
    names = [str(parameter.name) for parameter in context.command.get_params(context)]
    return [name for name in names if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]


def _spelled(context: click.Context, name: str) -> str:
    (param,) = (parameter for parameter in context.command.get_params(context) if parameter.name == name)
    if not isinstance(param, click.Option):
        return param.make_metavar(context)
    no = context.params.get(name) is False and param.secondary_opts  # --quick of --thorough/--quick
    return max(no or param.opts, key=len)


def refuse_ignored(names: str, why: str) -> None:
    """Raise a usage error if one of these parameters was given on the command line, where it would be ignored."""
    context = click.get_current_context()
    for name in _given(context):
        if name in names.split():
            raise click.UsageError(f"{_spelled(context, name)} does not go with {why}.")


def carried(command: str, without: str = "") -> str:
    """The options that were typed and that `command`, which is told as the next step, has too, as a shell takes them.

    Not those named in `without`, nor those of files to write: the next step would replace what was just written.
    """
    here = click.get_current_context()
    root = here.find_root()
    assert isinstance(root.command, click.Group)
    following = root.command.get_command(root, command)
    flags = {flag for param in following.params for flag in param.opts} if following else set()
    names = len(here.command_path.split()) - len(root.command_path.split()) - 1  # `check` of `data check`
    typed, *_ = here.command.make_parser(here).parse_args(list(here.meta[TYPED][names:]))
    known = {param.name: param for param in here.command.get_params(here) if isinstance(param, click.Option)}
    words = list[str]()
    for name, given in typed.items():
        param = known.get(name)
        if param is None or name in without.split() or isinstance(param.type, OutputPath) or not flags & {*param.opts}:
            continue
        flag = _spelled(here, name)
        for value in given if isinstance(given, list) else [given]:
            words += [flag] if param.is_flag else [flag, str(value)]
    return "".join(f" {shlex.quote(word)}" for word in words)


def refuse_outputs_that_are_read() -> None:
    """Raise ExistsError if what is to be written belongs to something that another parameter names."""
    from mlx_adapters.sources.references import NAME
    from mlx_adapters.sources.registry import adapter_folder
    from mlx_adapters.storage.replacing import refuse_writing_into

    outputs, others = _named()
    reads = {part for one in others for part in (one, *one.split(":"))} - {""}  # sqlite:FILE, fuse:ADAPTER:8
    names = {part.partition("@")[0] for part in reads} if outputs else ()
    reads |= {str(adapter_folder(name)) for name in names if NAME.fullmatch(name)}
    for output in outputs:
        refuse_writing_into(output, sorted(reads))


def tell_outputs() -> None:
    """Say what was written besides what the command is for."""
    if outputs := _named()[0]:
        _output.note(f"Written: {', '.join(map(_output.place, outputs))}.")


def _named() -> tuple[list[Path], list[str]]:
    """(the outputs that were named, what else was named) on the command line."""
    context = click.get_current_context()
    outputs, others = list[Path](), list[str]()
    for param in context.command.params:
        value = context.params.get(param.name or "")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(param.type, OutputPath) and one is not None:
                outputs.append(one)
            elif isinstance(one, str | Path):
                others.append(str(one))
    return outputs, others
