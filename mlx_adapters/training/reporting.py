"""Losses to TensorBoard, Weights & Biases or trackio; each is imported only when it is asked for.

A service may refuse the login, lose the network, never answer or fail in any other way: watching a run never stops it,
so the service is talked to in a thread of its own.
"""

import importlib
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_adapters.errors import ConfigError
from mlx_adapters.events import Event, Note, OnEvent, TrainReport, ValidationReport
from mlx_adapters.threads import printing_to

SERVICES = ("tensorboard", "wandb", "trackio")
SECONDS = 60  # that a service has at the end to take what it has not taken
Log = Callable[[int, dict[str, float]], None]
Figures = tuple[int, dict[str, float]]


class Reporter:
    """An `on_event` that sends the losses of the run `name` to `service`; `close` ends the report.

    The service's package is looked for at once, and the report begins with the first loss, so a run that is refused
    leaves none. `folder` takes TensorBoard's files. The first failure after that ends the report with one warning to
    `on_event`, from the thread that calls. What the service prints goes to stderr. Raises ConfigError if there is no
    such service or package.
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
        self._figures: queue.SimpleQueue[Figures | None] = queue.SimpleQueue()
        self._failure, self._told = "", False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"report to {service}")

    def __call__(self, event: Event) -> None:
        """Send the event's figures, if it has any."""
        if isinstance(event, TrainReport):
            values = {
                "train_loss": event.train_loss,
                "learning_rate": event.learning_rate,
                "trained_tokens_per_second": event.trained_tokens_per_second,
                **{f"train_{name}": value for name, value in event.figures.items()},
            }
            self._send(event.iteration, values)
        elif isinstance(event, ValidationReport):
            figures = {f"validation_{name}": value for name, value in event.figures.items()}
            self._send(event.iteration, {"validation_loss": event.validation_loss, **figures})

    def _send(self, iteration: int, values: dict[str, float]) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._figures.put((iteration, values))
        self._tell()

    def _work(self) -> None:
        """Of the thread: everything that the service does, whatever it raises."""
        try:
            with printing_to(sys.stderr):  # only the data are standard output's
                log, close = self._open()
                try:
                    while (figures := self._figures.get()) is not None:
                        log(*figures)
                finally:
                    close()
        except BaseException as error:  # no Ctrl-C comes here, and an asyncio error may be no Exception
            self._failure = _words(error)

    def _tell(self) -> None:
        """Pass a failure on, once."""
        if self._failure and not self._told:
            self._told = True
            text = f"The report to {self._service} failed ({self._failure}); the run goes on without it."
            self._on_event(Note(text, "warning"))

    def close(self) -> None:
        """End the report; what was sent is kept."""
        if self._thread.ident is None:
            return
        self._figures.put(None)
        self._thread.join(SECONDS)
        if self._thread.is_alive():
            self._failure = self._failure or f"no answer in {SECONDS} s"
        self._tell()


def _words(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    except Exception:  # its __str__ raises
        return type(error).__name__


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
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"The package '{name}' cannot be imported: {_words(error)}.", "mend it, or report elsewhere."
            ) from None
    raise ConfigError(f"Reporting needs the package '{package}'.", f"pip install {package}.")
