"""Everything that can go wrong in a way the user can mend, as one tree.

```text
AdapterError(message, hint=None)   exit 1
├─ ConfigError                     a setting is wrong                        exit 2
├─ NotFoundError                   no such adapter, checkpoint, folder or file
├─ ExistsError                     would overwrite (hint: --overwrite)
├─ FormatError                     files unreadable, tensor names or shapes wrong, NaN or Inf
├─ IncompatibleError               adapter does not fit this base, or these adapters each other
├─ FidelityError                   the fused model strays further from the adapter model than allowed
├─ TrainingError                   the run cannot go on (NaN loss, lost rank, locked run)
├─ ModelError                      mlx-lm could not load or save the model
├─ StorageError                    the disk refused: full, read-only, no permission
└─ HubError                        upload, download, authentication
```

Any other exception that leaves this package is a bug and keeps its traceback.
"""

import contextlib
import difflib
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator

from mlx_adapters.threads import overlapping, printing_to

LACKING = re.compile(r"^\w+\.__init__\(\) missing \d+ required \S+ arguments?: ")  # of a setting, in Python's words
VALIDATED = re.compile(r"^(Class v|V)alidation error for \w+ '\w+': \w+: ")  # before a reason of transformers
# What an option is called in Python, where that is not its name with underscores.
PYTHON_NAMES = {
    "bits": "quantization",
    "for": "program",
    "weight": "weights",
    "chat-template-arg": "chat_template_args",
    "fuse-aware-group-size": "fuse_aware",
    "max-size": "max_bytes",
    "prompt-cache": "cache",
}
PYTHON_CALLS = {  # of options that switch something on
    **{name: f"{name.replace('-', '_')}=True" for name in ("any-base", "force", "mask-prompt", "overwrite", "packing")},
    **{
        name: f"{name.replace('-', '_')}=True"
        for name in ("grad-checkpoint", "last-turn-only", "resize", "resume", "text-only", "tie")
    },
    "continue": "resume=True",
    "create-pr": "create_pr=True",
    "no-check": "check=False",
    "public": "private=False",
    "quick": "thorough=False",
    "thorough": "thorough=True",
    "home": "MLX_ADAPTERS_HOME",
    "trust-remote-code": "ma.trusting_remote_code()",
}
PYTHON_COMMANDS = {
    "mlx-adapters list": "ma.list_adapters()",
    "mlx-adapters add": "ma.add",
    "mlx-adapters extract": "ma.extract",
    "mlx-adapters import-peft": "ma.import_peft",
    "mlx-adapters fuse --from-peft": "ma.fuse_peft",
    "mlx-adapters data split": "ma.split_data",
}
# A command line, which stays as it is; or an option, with the value that it may be given.
_COMMAND = r"(?P<line>'(?:mlx-adapters|train|merge|import-peft|data|pip|lm-eval) [^']*'|mlx-adapters [a-z-]+ .*$)"
_VALUE = (
    r"(?: +(?P<value>-?\d+(?:\.\d+)?\b|[A-Z]{2,}\b(?!s)|bfloat16|float16|float32|calibrated|hf\b"
    r"|[\w.-]+[/:](?:[\w./:-]*\w)?|'[^']+'))?"
)
_WORDS = re.compile(rf"{_COMMAND}|(?<![\w-])--(?P<option>[a-z][a-z0-9-]*){_VALUE}")


class AdapterError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        message: one sentence that says what is wrong.
        hint: what to do next, in the words of the command line; in Python's it ends the traceback.

    Example:
        >>> try:
        ...     ma.load_adapter("sqk")
        ... except ma.AdapterError as error:
        ...     print(type(error).__name__, error.message, error.hint, sep="; ")
        NotFoundError; No adapter named 'sqk'.; did you mean 'sql'? 'mlx-adapters list' shows all.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"Hint: {in_python(hint)}")

    @property
    def with_hint(self) -> str:
        """Message and hint in one line, for a row of a report."""
        return f"{self.message} Hint: {self.hint}" if self.hint else self.message


class ConfigError(AdapterError):
    """A setting has a wrong name, type or value."""

    exit_code = 2


class NotFoundError(AdapterError):
    """No such adapter, checkpoint, folder or file."""


class ExistsError(AdapterError):
    """The target is already there and would be overwritten."""


class FormatError(AdapterError):
    """A file cannot be read, or its tensors have wrong names, shapes or values."""


class IncompatibleError(AdapterError):
    """The adapter does not fit this base, or these adapters do not fit each other."""


class FidelityError(AdapterError):
    """The fused model strays further from the adapter model than allowed."""


class TrainingError(AdapterError):
    """The run cannot go on."""


class ModelError(AdapterError):
    """mlx-lm could not load, run or save the model."""


class StorageError(AdapterError):
    """The disk refused: full, read-only or no permission."""


class OutputLostError(StorageError):
    """Standard output cannot be written: whatever is still to say, nobody hears it."""


class HubError(AdapterError):
    """Upload, download or authentication failed."""


def in_python(hint: str) -> str:
    """A hint in Python's words: `overwrite=True` for --overwrite, `max_kl` for --max-kl.

    Example:
        >>> from mlx_adapters.errors import in_python
        >>> in_python("choose another name, or pass --overwrite to replace it.")
        'choose another name, or pass overwrite=True to replace it.'
    """
    return _WORDS.sub(_in_python, hint)


def _in_python(match: re.Match[str]) -> str:
    option, value, line = match["option"], match["value"], match["line"]
    if option is None:
        resumed = re.fullmatch(r"mlx-adapters train --resume (\S+?)(\.?)", line)
        return f"ma.train(name='{resumed[1]}', resume=True){resumed[2]}" if resumed else _command(line)
    if option in PYTHON_CALLS:
        return PYTHON_CALLS[option] + (f" {value}" if value else "")
    name = PYTHON_NAMES.get(option, option.replace("-", "_"))
    if value is None:
        return name
    return f"{name}={value}" if re.fullmatch(r"-?\d+(\.\d+)?|'.*'", value) else f"{name}='{value}'"


def _command(line: str) -> str:
    return PYTHON_COMMANDS.get(line.strip("'"), line)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str | None:
    """A hint that names up to three of `known` that look like `name`, else `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?" + (f" {otherwise}" if otherwise else "")
    return otherwise or None


@overlapping
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def refusals(refused: Callable[[str], AdapterError]) -> Iterator[None]:
    """Turn whatever reading somebody's model raises in the libraries into `refused(why)`.

    They check little and raise what they like: transformers its own classes, tokenizers bare exceptions and Rust's
    panics, a module of mlx-lm SystemExit. What they print meanwhile does not belong on stdout; it is the reason of
    an exit.
    """
    printed = io.StringIO()
    try:
        with printing_to(printed), _without_warnings():
            yield
    except (AdapterError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        said = printed.getvalue() if isinstance(error, SystemExit) else str(error)
        said = f"it has no {said}" if isinstance(error, KeyError) and len(error.args) == 1 else said
        said = VALIDATED.sub("", LACKING.sub("it has no ", " ".join(said.split())))
        why = said[:300].rstrip(".") or type(error).__name__
        raise not_compiled(error) or refused(why) from error


def not_compiled(error: BaseException) -> ModelError | None:
    """What to tell where MLX could not compile what a CPU computes, None for any other error."""
    if not any(words in str(error) for words in ("Failed to compile function", "temp_directory_path")):
        return None
    why = str(error).strip().partition("\n")[0].rpartition(": ")[2]
    return ModelError(
        f"MLX could not compile what the CPU computes: {why}.",
        "it does so in the temporary folder ($TMPDIR, else /tmp): is that there, with room, and may you write in it?",
    )
