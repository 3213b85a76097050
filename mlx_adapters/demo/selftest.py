"""All self-tests, one after the other; one that fails, however it does, stops no other."""

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_adapters.demo import surroundings
from mlx_adapters.demo.arithmetic import CHECKS, Numbers, Outcome
from mlx_adapters.demo.products import Products
from mlx_adapters.errors import AdapterError
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.storage import files, paths, temporaries
from mlx_adapters.system.conditions import system_state
from mlx_adapters.system.machine import Environment, environment

SECONDS = 40  # after which what could not be tried is left out: with the start, all ends within a minute


@dataclass(frozen=True)
class Check:
    """One self-test: what it saw, or the error that it ended in."""

    name: str
    passed: bool
    seen: str
    seconds: float


@dataclass(frozen=True)
class SelfTest:
    """What `mlx-adapters env --check` found. `conditions` is the machine's state, as `benchmark` reports it."""

    environment: Environment
    conditions: dict[str, str | float | None]
    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)


def self_test(on_event: OnEvent = log_warnings) -> SelfTest:
    """Check this device, this system and this installation, in less than a minute, without network or model.

    Everything is made in a temporary folder beside the home folder's adapters, so that their disk is tested.
    Raises StorageError if the home folder cannot be written.
    """
    began = time.perf_counter()
    with _scratch() as folder, contextlib.closing(Products()) as products:
        numbers = Numbers(folder)
        tests: list[tuple[str, Callable[[], Outcome]]] = [(name, getattr(numbers, method)) for name, method in CHECKS]
        tests += [
            ("flushed writes", lambda: surroundings.flushed_writes(folder)),
            ("locks", surroundings.home_locks),
            ("open files", surroundings.open_files),
            ("wired memory", surroundings.wired_memory),
            ("quantized layers", lambda: products.outcome(began + SECONDS)),
        ]
        checks = []
        for done, (name, test) in enumerate(tests):
            on_event(Progress("check", done, len(tests), "test"))
            checks.append(_run(name, test))
        on_event(Progress("check", len(tests), len(tests), "test"))
        return SelfTest(environment(), system_state(), tuple(checks), time.perf_counter() - began)


def _run(name: str, test: Callable[[], Outcome]) -> Check:
    began = time.perf_counter()
    try:
        outcome = test()
    except Exception as error:  # whatever it is: it is what the report is for
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = error.with_hint if isinstance(error, AdapterError) else f"{type(error).__name__}: {error}"
        text = " ".join(text.split()).replace(str(Path.home()), "~")  # the block is for others to read
        outcome = Outcome(False, f"{text[:300]} ({Path(where.filename).name}:{where.lineno})")
    return Check(name, outcome.passed, outcome.seen, time.perf_counter() - began)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder in the home folder, which is the home folder meanwhile."""
    home, before = paths.home(), os.environ.get(paths.HOME_VARIABLE)
    files.require_writable(home / "adapters")
    with temporaries.draft(home) as folder:
        os.environ[paths.HOME_VARIABLE] = str(folder / "home")
        try:
            yield folder
        finally:
            if before is None:
                del os.environ[paths.HOME_VARIABLE]
            else:
                os.environ[paths.HOME_VARIABLE] = before
