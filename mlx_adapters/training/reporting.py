"""Losses to TensorBoard, Weights & Biases or trackio; each is imported only when it is asked for."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.events import Event, OnEvent, TrainReport, ValidationReport

SERVICES = ("tensorboard", "wandb", "trackio")


def reporter(service: str, name: str, config: dict[str, Any], folder: Path) -> tuple[OnEvent, Callable[[], Any]]:
    """(an `on_event` that sends the losses of the run `name`, what to call at the end).

    `folder` takes TensorBoard's files. Raises ConfigError if the service's package is missing.
    """
    log, close = _tensorboard(folder) if service == "tensorboard" else _web(service, name, config)

    def on_event(event: Event) -> None:
        if isinstance(event, TrainReport):
            log(event.iteration, {"train_loss": event.train_loss, "learning_rate": event.learning_rate,
                                  "trained_tokens_per_second": event.trained_tokens_per_second})  # fmt: skip
        elif isinstance(event, ValidationReport):
            log(event.iteration, {"validation_loss": event.validation_loss})

    return on_event, close


Log = Callable[[int, dict[str, float]], None]


def _tensorboard(folder: Path) -> tuple[Log, Callable[[], Any]]:
    try:
        module = importlib.import_module("tensorboardX")
    except ImportError:
        module = _load("torch.utils.tensorboard", "tensorboardX")
    writer = module.SummaryWriter(str(folder))

    def log(iteration: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, iteration)

    return log, writer.close


def _web(service: str, name: str, config: dict[str, Any]) -> tuple[Log, Callable[[], Any]]:
    if service not in SERVICES:
        raise ConfigError(f"There is no service '{service}' to report to.", f"there are: {', '.join(SERVICES)}.")
    module = _load(service, service)
    module.init(project="mlx_adapters", name=name, config=config)

    def log(iteration: int, values: dict[str, float]) -> None:
        module.log(values, step=iteration)

    return log, module.finish


def _load(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"Reporting needs the package '{package}'.", f"pip install {package}.") from None
