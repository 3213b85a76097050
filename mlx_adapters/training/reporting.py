"""Losses to TensorBoard, Weights & Biases or trackio; each is imported only when it is asked for.

A service may refuse the login, lose the network or fail in any other way: watching a run never stops it.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.events import Event, Note, OnEvent, TrainReport, ValidationReport

SERVICES = ("tensorboard", "wandb", "trackio")
Log = Callable[[int, dict[str, float]], None]


ANYTHING = (Exception, SystemExit)  # what a service's package may raise


class Reporter:
    """An `on_event` that sends the losses of the run `name` to `service`; `close` ends the report.

    The service's package is looked for at once, and the report begins with the first loss, so a run that is refused
    leaves none. `folder` takes TensorBoard's files. The first failure after that ends the report with one warning to
    `on_event`. Raises ConfigError if there is no such service or package.
    """

    def __init__(self, service: str, name: str, config: dict[str, Any], folder: Path, on_event: OnEvent) -> None:
        if service not in SERVICES:
            raise ConfigError(f"There is no service '{service}' to report to.", f"there are: {', '.join(SERVICES)}.")
        if service == "tensorboard":
            writer = _load("tensorboardX", "torch.utils.tensorboard").SummaryWriter
            self._open = lambda: _tensorboard(writer(str(folder)))
        else:
            module = _load(service)
            self._open = lambda: _web(module, name, config)
        self._service, self._on_event = service, on_event
        self._log: Log | None = None
        self._close: Callable[[], Any] | None = None
        self._failed = False

    def __call__(self, event: Event) -> None:
        """Send the event's figures, if it has any."""
        if isinstance(event, TrainReport):
            self._send(
                event.iteration,
                {
                    "train_loss": event.train_loss,
                    "learning_rate": event.learning_rate,
                    "trained_tokens_per_second": event.trained_tokens_per_second,
                    **{f"train_{name}": value for name, value in event.figures.items()},
                },
            )
        elif isinstance(event, ValidationReport):
            figures = {f"validation_{name}": value for name, value in event.figures.items()}
            self._send(event.iteration, {"validation_loss": event.validation_loss, **figures})

    def _send(self, iteration: int, values: dict[str, float]) -> None:
        if self._failed:
            return
        try:
            if self._log is None:
                self._log, self._close = self._open()
            self._log(iteration, values)
        except ANYTHING as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failed = True
        why = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        self._on_event(Note(f"The report to {self._service} failed ({why}); the run goes on without it.", "warning"))

    def close(self) -> None:
        """End the report; what was sent is kept."""
        close, self._close = self._close, None
        if close is None:
            return
        try:
            close()
        except ANYTHING as error:
            if not self._failed:
                self._fail(error)


def _tensorboard(writer: Any) -> tuple[Log, Callable[[], Any]]:
    def log(iteration: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, iteration)

    return log, writer.close


def _web(module: Any, name: str, config: dict[str, Any]) -> tuple[Log, Callable[[], Any]]:
    module.init(project="mlx_adapters", name=name, config=config)
    return lambda iteration, values: module.log(values, step=iteration), module.finish


def _load(package: str, *others: str) -> Any:
    for name in (package, *others):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
        except ANYTHING as error:
            why = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            raise ConfigError(
                f"The package '{name}' cannot be imported: {why}.", "mend it, or report elsewhere."
            ) from None
    raise ConfigError(f"Reporting needs the package '{package}'.", f"pip install {package}.")
