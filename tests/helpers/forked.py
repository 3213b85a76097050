"""The program in processes of its own: forks, so that MLX is imported once, with a trap on the way to the disk.

A `Trap` kills the process at its n-th operation on the disk, or lets the system refuse from there on. Operations are
what Python tells its auditors, and every single write and flush: a write that is trapped puts half of its bytes down.
What drives a GPU does not survive a fork; there each command gets a new interpreter. Elsewhere also what a benchmark
starts is a fork. What computes for seconds and touches no disk is left out or cut short.
"""

import builtins
import contextlib
import errno
import importlib
import io
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

from mlx_adapters.system.machine import on_gpu

SECONDS, BYTES = 60, 8 << 30
MAKES = ("open", "write", "sync", "os.mkdir", "os.link", "os.symlink")
CHANGES = (*MAKES, "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime")
FAULTS = {  # what it hits, and whether it stays
    "kill": ((*CHANGES, "exchange"), False),
    "ENOSPC": (MAKES, True),
    "EDQUOT": (MAKES, True),
    "EFBIG": (("write",), True),
    "EROFS": (CHANGES, True),
    "EACCES": (tuple(kind for kind in CHANGES if kind not in ("write", "sync")), False),
    "EIO": (("write", "sync"), False),
}


@dataclass(frozen=True)
class Trap:
    """`fault` (a key of FAULTS) at operation `at`, counted from 1 among those that it hits; 0: only count."""

    fault: str = "kill"
    at: int = 0


@dataclass
class Result:
    """How a command ended. `status` is minus the signal's number if one ended it; `steps` are its operations."""

    status: int
    out: str
    err: str
    seconds: float
    peak_bytes: int
    steps: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        return self.out + self.err


class _Disk:
    """Counts operations and springs the trap."""

    def __init__(self, trap: Trap) -> None:
        self.trap, self.steps, self.sprung, self.on = trap, [], False, True
        self.hits, self.stays = FAULTS[trap.fault]
        sys.addaudithook(self.audit)
        os.register_at_fork(after_in_child=lambda: setattr(self, "on", False))
        plain, sync = builtins.open, os.fsync

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if not set(mode) & set("wax+") or isinstance(file, int) or buffering == 0 or opener is not None:
                return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = _Raw(file, mode.replace("b", "").replace("t", ""))
            raw.disk = self
            stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return stream if "b" in mode else io.TextIOWrapper(stream, encoding, errors, newline)

        def synced(descriptor: int) -> None:
            self.step("sync", f"/dev/fd/{descriptor}")
            sync(descriptor)

        builtins.open = io.open = opened
        os.fsync = synced

    def audit(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            if writes and not isinstance(path, int) and not os.fsdecode(path).startswith(("/dev", "/proc")):
                self.step("open", os.fsdecode(path))
        elif event in CHANGES:
            self.step(event, str(arguments[0]))
        elif event == "ctypes.dlsym" and arguments[1] in ("renameat2", "renamex_np"):
            self.step("exchange", "")

    def trapped(self, kind: str) -> bool:
        """Note an operation; whether it is the one that fails."""
        if not self.on:
            return False
        self.steps.append(kind)
        if kind not in self.hits or not self.trap.at:
            return False
        first = sum(step in self.hits for step in self.steps) == self.trap.at
        self.sprung |= first
        return first or (self.sprung and self.stays)

    def spring(self, path: str) -> None:
        if self.trap.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        number = getattr(errno, self.trap.fault)
        raise OSError(number, os.strerror(number), path)

    def step(self, kind: str, path: str) -> None:
        if self.trapped(kind):
            self.spring(path)


class _Raw(io.FileIO):
    disk: _Disk

    def write(self, data) -> int:
        if self.disk.trapped("write"):
            half = len(memoryview(data).cast("B")) // 2
            if self.disk.trap.fault == "kill":
                super().write(memoryview(data).cast("B")[:half])
            self.disk.spring(str(self.name))
        return super().write(data)


def preload() -> None:
    """Import the whole package once, for all forks."""
    import mlx_adapters

    for module in pkgutil.walk_packages(mlx_adapters.__path__, "mlx_adapters."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    if not on_gpu():
        from mlx_adapters.benchmarking import run, worker

        _cut_short()
        run.subprocess = instead_of_processes(lambda *files: in_a_fork(lambda: worker.main(*map(str, files))))


def _cut_short() -> None:
    """What computes for seconds and touches no disk."""
    from mlx_adapters.benchmarking import trials
    from mlx_adapters.demo import products

    products.PRECISIONS, trials.bandwidth.__defaults__ = (), (0.01,)


def instead_of_processes(measure: Callable[[Path, Path], int | None]) -> SimpleNamespace:
    """In the place of `subprocess` in `benchmarking.run`: no new interpreter, which takes two seconds for each variant
    in each round. `measure` reads the job and writes the result, and gives the exit status, if not 0."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, measure(*map(Path, command[-2:])) or 0, "")

    return SimpleNamespace(run=run, DEVNULL=None, PIPE=None, STDOUT=None)


def in_a_fork(work: Callable[[], object]) -> int:
    """How a fork ends that does this."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Command:
    """A command that runs in `cwd`, with `home` there; `finish` waits for it."""

    def __init__(self, arguments: list[str], cwd: Path, trap: Trap | None = None) -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(4)]  # noqa: SIM115
        self.files[0].write(b"y\n" * 100)
        self.files[0].seek(0)
        request = {"arguments": arguments, "cwd": str(cwd), "trap": trap and asdict(trap), "gpu": on_gpu()}
        sys.stdout.flush()
        sys.stderr.flush()
        self.began = time.monotonic()
        numbers = [file.fileno() for file in self.files]
        if request["gpu"]:
            command = [sys.executable, __file__, json.dumps(request | {"steps": 3})]
            streams = [(os.POSIX_SPAWN_DUP2, number, place) for place, number in enumerate(numbers)]
            # no Popen: one that nobody holds any more is waited for by the next
            self.pid = os.posix_spawn(sys.executable, command, os.environ, file_actions=streams)
            return
        self.pid = os.fork()
        if self.pid == 0:
            code = 98
            try:
                for number, descriptor in enumerate(numbers[:3]):
                    os.dup2(descriptor, number)
                code = _child(request | {"steps": numbers[3]})
            except BaseException:
                os.write(2, traceback.format_exc().encode(errors="replace"))
            os._exit(code)

    def finish(self, seconds: float = SECONDS) -> Result:
        status = used = None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status, used = os.wait4(self.pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.004)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
            _, status, used = os.wait4(self.pid, 0)
        took = time.monotonic() - self.began
        for file in self.files:
            file.seek(0)
        _, out, err, steps = (file.read().decode(errors="replace") for file in self.files)
        for file in self.files:
            file.close()
        peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Result(os.waitstatus_to_exitcode(status), out, err, took, peak, steps.split())

    def left_behind(self, seconds: float = 15) -> bool:
        """Whether a process of this command lives on after it for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not _is_at_work(self.pid):
                return False
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return True


def _is_at_work(group: int) -> bool:
    """Whether a process of this group is; where Linux tells, one that has ended and waits for nobody is not."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    told = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it is gone
            told.append(path.read_text().rpartition(")")[2].split()[:3])  # its state, parent and group
    return not told or any(int(of) == group and state != "Z" for state, _, of in told)


def run(arguments: list[str], cwd: Path, trap: Trap | None = None, seconds: float = SECONDS) -> Result:
    return Command(arguments, cwd, trap).finish(seconds)


def _child(request: dict) -> int:
    with contextlib.suppress(OSError):
        os.setsid()
    os.chdir(request["cwd"])
    os.environ["MLX_ADAPTERS_HOME"] = os.path.join(request["cwd"], "home")
    if not request["gpu"]:  # whose driver takes more addresses than there is memory
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from mlx_adapters import cli

    if request["gpu"] and request["arguments"][0] == "env":  # only where MLX is imported anyway
        _cut_short()
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.argv = ["mlx-adapters", *request["arguments"]]
    disk = _Disk(Trap(**request["trap"])) if request["trap"] else None
    try:
        cli.main()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 98
    if disk:
        disk.on = False
        os.write(request["steps"], " ".join(disk.steps).encode())
    sys.stderr.flush()
    return code


def wrong_end(result: Result) -> str | None:
    """What is wrong with how a command ended, whatever it was given: it may succeed, or refuse in a sentence."""
    said = result.said
    if result.status == -signal.SIGKILL:
        return "hangs"
    if result.status not in (0, 1, 2) or "Traceback (most recent" in said:
        return said.strip().splitlines()[-1][:160] if said.strip() else f"status {result.status}"
    if "\x1b" in said:
        return "writes an escape code"
    if result.status and not any(word in said for word in ("Error: ", "failed", "FAILED")):
        return f"status {result.status} without an error: {said[-100:]!r}"
    return None


if __name__ == "__main__":
    sys.exit(_child(json.loads(sys.argv[1])))
