"""Torture: kills, full disks, two processes on one name, mutated inputs, signals, as many as the time allows.

    scripts/torture [--seconds N] [--seed S] [--only SECTION[:WORDS][=COUNT]...] [--share K/N]

Sections are kill, disk, pairs, inputs and signals; `--only kill:prune=3` takes three trials of each thing of a section
whose name has the words. Every failure names its trial, which the same seed and `--only` repeat. Exit status 1 if
anything failed.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
ONLY = re.compile("([a-z]+)(?::([^=]*))?(?:=([0-9]+))?")
MOST = 100_000
SECTIONS = ("kill", "disk", "pairs", "inputs", "signals")
HUB = """
import sys, pathlib
sys.path.insert(0, {here!r})
from helpers.hub_server import HubServer
folder = pathlib.Path({folder!r})
with HubServer() as hub:
    hub.add("user/base", {{"config.json": b'{{"model_type": "llama"}}', "README.md": b"---\\nlicense: mit\\n---\\n"}})
    print(hub.url, flush=True)
    for line in sys.stdin:
        hub.add("user/there", {{p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}})
        print("there", flush=True)
"""
Trial = tuple[str, str, Callable[[], str | None]]  # what is tried, which trial of it, and the trial


class Torture:
    """The sections' trials in an order of the seed, and what came of them."""

    def __init__(self, asked: argparse.Namespace, root: Path) -> None:
        from helpers.torture_place import Place

        self.asked, self.place = asked, Place(root)
        self.tried, self.failed, self.spent = Counter(), Counter(), Counter()
        self.whole = {}  # of each command that writes: what whole runs of it do, for kills and for refusals of the disk
        self.only = [ONLY.fullmatch(word).groups() for word in asked.only or SECTIONS]
        self.dealt = {}  # number of each name, as they come: a kill and a full disk of one command go to one part

    def times(self, section: str, name: str) -> int:
        """How often it is to be tried."""
        part, _, parts = self.asked.share.partition("/")
        if self.dealt.setdefault(name, len(self.dealt)) % int(parts) != int(part) - 1:
            return 0
        return max(
            (int(c or MOST) for kind, words, c in self.only if kind == section and (words or "") in name), default=0
        )

    def disk_trials(self, section: str) -> Iterator[Trial]:
        """So many of every command, or all, in rounds: none has a second one before each has had its first."""
        from helpers.torture_disk import Tried, scenarios

        numbered = []
        for name, scenario in scenarios(self.place).items():
            if not (times := self.times(section, name)):
                continue
            try:
                tried = self.whole[name] = self.whole.get(name) or Tried(self.place, name, scenario)
            except AssertionError as error:
                yield name, "whole", lambda error=error: str(error)
                continue
            points = [trap for trap in tried.points() if (trap.fault == "kill") == (section == "kill")]
            rng = random.Random(f"{self.asked.seed} {section} {name}")
            fair = max(2, int(20 / tried.seconds))  # of what takes long, fewer
            chosen = rng.sample(points, min(len(points), fair, times))
            trials = [(name, f"{trap.fault} at {trap.at}", lambda t=tried, p=trap: t.trial(p)) for trap in chosen]
            numbered += [(number, rng.random(), trial) for number, trial in enumerate(trials)]
        yield from (trial for *_, trial in sorted(numbered, key=lambda entry: entry[:2]))

    def trials(self, section: str) -> Iterator[Trial]:
        if section in ("kill", "disk"):
            return self.disk_trials(section)
        if section == "pairs":
            from helpers.torture_pairs import trials
        elif section == "signals":
            from helpers.torture_signals import trials
        else:
            from helpers.torture_inputs import trials
        return trials(self.place, self.asked.seed, lambda name: self.times(section, name))

    def section(self, section: str, seconds: float) -> None:
        end = None
        for name, which, trial in self.trials(section):
            end = end or time.monotonic() + seconds  # whole runs come before the first trial, and may take longer
            if time.monotonic() > end:
                print(f"{section}: the time is over before all trials were made", flush=True)
                break
            if self.asked.trial not in (None, which):
                continue
            began = time.monotonic()
            wrong = trial()
            key = (section, name)
            self.tried[key] += 1
            self.spent[key] += time.monotonic() - began
            if wrong is not None:
                self.failed[key] += 1
                print(f"FAILED {section}:{name} | {which} | {wrong}", flush=True)

    def table(self) -> None:
        width = max([len(name) for _, name in self.tried] or [4])
        print(f"{'section':8} {'what':{width}} {'trials':>7} {'failed':>7} {'s':>7}")
        for section, name in sorted(self.tried):
            key = (section, name)
            print(f"{section:8} {name:{width}} {self.tried[key]:7,} {self.failed[key]:7,} {self.spent[key]:7.0f}")
        print(f"{'all':8} {'':{width}} {self.tried.total():7,} {self.failed.total():7,} {self.spent.total():7.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800, help="for all sections together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="SECTION[:WORDS][=COUNT]", metavar="SECTION")
    parser.add_argument("--share", default="1/1", help="K/N: of what --only leaves, the K-th of N parts")
    parser.add_argument("--trial", help="only this one, as a failure names it")
    asked = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    root = Path(tempfile.mkdtemp(prefix="torture-")).resolve()
    surroundings = {
        "HF_HOME": root / "place/hf",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_" + "w" * 34,  # the loopback Hub's own
        "OPENBLAS_NUM_THREADS": "1",
        "HOME": root,
        "TMPDIR": root / "tmp",
        "HOSTILE_RAN": root / "ran",
    }
    kernels = Path(tempfile.gettempdir()) / "mlx"  # what MLX has compiled already
    tempfile.tempdir = None  # read anew
    os.environ.update({name: str(value) for name, value in surroundings.items()})
    os.environ.pop("HF_HUB_OFFLINE", None)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    sys.dont_write_bytecode = True
    (root / "tmp").mkdir()
    kernels.mkdir(exist_ok=True)
    (root / "tmp" / "mlx").symlink_to(kernels)
    code = HUB.format(here=str(TESTS), folder=str(root / "template/home/adapters/a"))
    hub = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        os.environ["HF_ENDPOINT"] = hub.stdout.readline().strip()
        from helpers.forked import preload

        preload()
        print(f"seed {asked.seed}, {asked.seconds:g} s, in {root}", flush=True)
        torture = Torture(asked, root)
        torture.place.build()
        hub.stdin.write("add\n")
        hub.stdin.flush()
        hub.stdout.readline()
        wanted = [section for section in SECTIONS if any(kind == section for kind, *_ in torture.only)]
        for number, section in enumerate(wanted):
            left = asked.seconds - torture.spent.total()
            torture.section(section, left / (len(wanted) - number))
        torture.table()
    finally:
        hub.kill()
        hub.wait()
        shutil.rmtree(root, ignore_errors=True)
    return int(torture.failed.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
