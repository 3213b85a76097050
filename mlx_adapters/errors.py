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

import difflib
from collections.abc import Iterable


class AdapterError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        message: one sentence that says what is wrong.
        hint: what to do next.

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


class HubError(AdapterError):
    """Upload, download or authentication failed."""


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str | None:
    """A hint that names up to three of `known` that look like `name`, else `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?" + (f" {otherwise}" if otherwise else "")
    return otherwise or None
