"""Losses to TensorBoard, Weights & Biases or trackio; each is imported only when it is asked for."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.events import Event, TrainReport, ValidationReport

SERVICES = ("tensorboard", "wandb", "trackio")
Log = Callable[[int, dict[str, float]], None]


class Reporter:
    """An `on_event` that sends the losses of the run `name` to `service`; `close` ends the report.

    The service's package is looked for at once, and the report begins with the first loss, so a run that is refused
    leaves none. `folder` takes TensorBoard's files. Raises ConfigError if there is no such service or package.
    """

    def __init__(self, service: str, name: str, config: dict[str, Any], folder: Path) -> None:
        if service not in SERVICES:
            raise ConfigError(f"There is no service '{service}' to report to.", f"there are: {', '.join(SERVICES)}.")
        if service == "tensorboard":
            writer = _load("tensorboardX", "torch.utils.tensorboard").SummaryWriter
            self._open = lambda: _tensorboard(writer(str(folder)))
        else:
            module = _load(service)
            self._open = lambda: _web(module, name, config)
        self._log: Log | None = None
        self._close: Callable[[], Any] = lambda: None

    def __call__(self, event: Event) -> None:
        """Send the event's figures, if it has any."""
        if isinstance(event, TrainReport):
            self._send(event.iteration, {"train_loss": event.train_loss, "learning_rate": event.learning_rate,
                                         "trained_tokens_per_second": event.trained_tokens_per_second})  # fmt: skip
        elif isinstance(event, ValidationReport):
            self._send(event.iteration, {"validation_loss": event.validation_loss})

    def _send(self, iteration: int, values: dict[str, float]) -> None:
        if self._log is None:
            self._log, self._close = self._open()
        self._log(iteration, values)

    def close(self) -> None:
        """End the report; what was sent is kept."""
        self._close()


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
    raise ConfigError(f"Reporting needs the package '{package}'.", f"pip install {package}.")
