"""Several machines before they train together: does each have the same versions, base and data?

A run compares its processes itself before the first step. This looks beforehand, over ssh, with nothing started: each
host says by `mlx-adapters doctor --json` what it has, and the answers are held against the first one's.
"""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mlx_adapters.config.mapping import require
from mlx_adapters.data.datasets import read_data
from mlx_adapters.errors import FormatError, NotFoundError
from mlx_adapters.models.base import Named
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system.machine import versions
from mlx_adapters.training.folder import arithmetic

LOCAL = ("127.0.0.1", "localhost")
SECONDS = 120  # that a host has to answer
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


@dataclass(frozen=True)
class HostFacts:
    """What one machine has; `error` says why it could not be asked."""

    host: str
    name: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Doctor:
    """The machines of a run, in its order, and in words what differs from the first."""

    hosts: tuple[HostFacts, ...]
    differences: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether all could be asked and have the same."""
        return not self.differences


def local_facts(base: str | Path | Named | None = None, data: str | Path | None = None) -> dict[str, str]:
    """What this machine has: versions, and fingerprints of a base and of data. Nothing is downloaded.

    Raises NotFoundError or FormatError for a base or data that are not here.
    """
    facts = {"python": versions()["python"], **arithmetic()}
    if base is not None:
        facts["base"] = resolve_base(base, download=False).fingerprint[:16]
    for split, described in read_data(data).describe()["splits"].items() if data is not None else ():
        facts[f"data, {split}"] = f"{described['rows']} rows {described['sha256'][:16]}"
    return facts


def read_hosts(hosts: str | None, hostfile: str | Path | None) -> list[str]:
    """The names to reach them by: `a,b`, or those in a host file of mlx.launch. Raises NotFoundError, FormatError."""
    if hostfile is None:
        names = [name.strip() for name in (hosts or "").split(",")]
        require(all(names), "A host's name is empty.", "write --hosts mac-a,mac-b")
        return names
    try:
        content = json.loads(Path(hostfile).expanduser().read_text(encoding="utf-8"))
        entries = content["hosts"] if isinstance(content, dict) else content
        return [str(entry["ssh"]) for entry in entries]
    except OSError as error:
        raise NotFoundError(f"The host file '{hostfile}' cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        hint = 'it is a list of {"ssh": NAME, "ips": [ADDRESS]}; \'mlx.distributed_config\' makes one.'
        raise FormatError(f"'{hostfile}' is no host file of mlx.launch.", hint) from None


def ask_hosts(hosts: Sequence[str], arguments: Sequence[str], python: str | None = None) -> Doctor:
    """Ask each host for its facts, all at once, and compare them.

    Args:
        hosts: names for ssh; 127.0.0.1 is this machine.
        arguments: of `mlx-adapters doctor` there, such as --base.
        python: the interpreter there; None: the path of this one.
    """
    command = [python or sys.executable, "-m", "mlx_adapters", "doctor", "--json", *arguments]
    unique = list(dict.fromkeys(hosts))
    with ThreadPoolExecutor(max(len(unique), 1)) as pool:
        answers = tuple(pool.map(lambda host: _ask(host, command), unique))
    return Doctor(answers, tuple(_differences(answers)))


def _ask(host: str, command: Sequence[str]) -> HostFacts:
    there = f"cd {shlex.quote(str(Path.cwd()))} 2>/dev/null; {shlex.join(command)}"  # as mlx.launch goes there
    line = ["bash", "-c", there] if host in LOCAL else [*SSH, host, there]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            answer = json.loads(done.stdout[done.stdout.index("{") :])
            return HostFacts(host, answer["hosts"][0]["name"], answer["hosts"][0]["facts"])
        said = [text for text in done.stderr.splitlines() if text.strip()] or [f"status {done.returncode}"]
        return HostFacts(host, error=next((text for text in said if text.startswith("Error: ")), said[-1]).strip())
    except (OSError, ValueError, KeyError, IndexError, subprocess.TimeoutExpired) as error:
        return HostFacts(host, error=f"no answer ({type(error).__name__})")


def ask_here(base: str | None, data: str | None) -> Doctor:
    """The facts of this machine alone. Raises what `local_facts` raises."""
    name = socket.gethostname()
    return Doctor((HostFacts(name, name, local_facts(base, data)),), ())


def _differences(answers: Sequence[HostFacts]) -> list[str]:
    first, told = next((one for one in answers if one.error is None), None), []
    for one in answers:
        if one.error is not None or first is None:
            told.append(f"'{one.host}' cannot be asked: {one.error}")
            continue
        names = dict.fromkeys([*first.facts, *one.facts])
        told += [
            f"'{one.host}' differs from '{first.host}': {name} ({first.facts.get(name)} -> {one.facts.get(name)})"
            for name in names
            if first.facts.get(name) != one.facts.get(name)
        ]
    return told
