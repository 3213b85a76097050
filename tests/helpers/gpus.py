"""The suite on a machine with GPUs: workers spread over them, the longest tests first, each result kept at once.

    export GPUS=4 SEEN=seen.tsv KERNELS=kernels
    timeout -s INT 500 python -m pytest -p helpers.gpus -n 40 --dist load --maxschedchunk 1
    python tests/helpers/gpus.py seen.tsv

SEEN gets a line for each test that ends: outcome, seconds, id; what fails stands in SEEN.failures. A test that passed
there before has its turn no more, so that a run that was cut off goes on; one that is new counts as a second long.
BEFORE (paths, with ":" between them) names what earlier runs gave, the newest last: SEEN itself need not be carried on.
The last command says how things stand: how many passed, which failed, how long those that are left took before.

KERNELS gets what MLX compiles: a tiny training takes 29 kernels, a second or more each, and 0.6 s of the host besides.
Every worker has a folder of its own, from which what is new and whole is handed on after each test, so that none reads
what another is just writing. Kept for the next machine (20 kB each), it begins warm:

    XZ_OPT=-T0 tar cJf kernels.tar.xz --exclude='.gw*' kernels

Needs pytest-xdist. What needs something that is not installed (NEEDS) is named and left out.
"""

import contextlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and "GPUS" in os.environ:  # read once by CUDA
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(worker.removeprefix("gw")) % int(os.environ["GPUS"]))
shared = Path(os.environ["KERNELS"]).absolute() if "KERNELS" in os.environ else None
own = [shared / f".{worker}{rank}" for rank in ("", "-1")] if shared and worker else []  # as of a training's ranks
for folder in own:
    folder.mkdir(parents=True, exist_ok=True)
if own:  # read once by MLX
    os.environ["MLX_PTX_CACHE_DIR"] = str(own[0])
NEEDS = {"test_types.py": "mypy", "test_package.py": "hatchling"}
OUTCOMES = ("passed", "skipped", "failed")  # of its parts the last here is the test's
so_far: dict[str, tuple[str, float]] = {}  # id: outcome and seconds of its parts that have ended


def seen(paths: Iterable[str | Path]) -> dict[str, tuple[str, float]]:
    """{id: (outcome, seconds)} of these files, the last line of each test."""
    lines = [line for path in map(Path, paths) if path.is_file() for line in path.read_text().splitlines()]
    return {name: (outcome, float(seconds)) for outcome, seconds, name in (line.split("\t") for line in lines)}


def hand_on(one: Path, other: Path, whole: str) -> None:
    """Link into `other` the kernels that only `one` has: .txt and .ptx, for which MLX looks first. `whole`: the ending
    of what was written last of each."""
    there = {path.name for path in other.iterdir()}
    for path in (path for path in one.glob(f"*{whole}") if path.with_suffix(".ptx").name not in there):
        for ending in (".txt", ".ptx"):
            with contextlib.suppress(FileExistsError):  # another worker was sooner
                os.link(path.with_suffix(ending), other / path.with_suffix(ending).name)


def pytest_runtest_logstart() -> None:
    """What others have compiled."""
    for folder in own:
        hand_on(shared, folder, ".ptx")


def pytest_runtest_logfinish() -> None:
    """What was compiled here; nothing of the test is writing any more. What a killed process wrote half goes."""
    for folder in own:
        hand_on(folder, shared, ".cu")
        for path in folder.glob("*.ptx"):
            if not (shared / path.name).exists():
                path.unlink()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out, in words, what needs something that is not installed here."""
    needed = NEEDS.get(collection_path.name)
    if needed is None or importlib.util.find_spec(needed):
        return None
    if not worker:
        print(f"tests/{collection_path.name} is left out: {needed} is not installed here.", file=sys.stderr)
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that have not passed, the longest first."""
    before = seen([*os.environ.get("BEFORE", "").split(os.pathsep), os.environ["SEEN"]])
    done = [item for item in items if before.get(item.nodeid, ("", 0))[0] in ("passed", "skipped")]
    config.hook.pytest_deselected(items=done)
    left = [item for item in items if item not in set(done)]
    items[:] = sorted(left, key=lambda item: -before.get(item.nodeid, ("", 1.0))[1])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep it, where the workers' reports come together."""
    if worker:
        return
    outcome, seconds = so_far.get(report.nodeid, ("passed", 0.0))
    outcome = max(outcome, report.outcome, key=OUTCOMES.index)
    so_far[report.nodeid] = outcome, seconds + report.duration
    if report.failed:
        with Path(f"{os.environ['SEEN']}.failures").open("a") as file:
            file.write(f"=== {report.nodeid} ({report.when})\n{report.longreprtext}\n{report.capstderr}\n")
    if report.when not in ("setup", "call"):
        with Path(os.environ["SEEN"]).open("a") as file:
            file.write("{}\t{:.2f}\t{}\n".format(*so_far.pop(report.nodeid), report.nodeid))


def main(paths: list[str]) -> None:
    """Print how things stand."""
    tests = seen(paths)
    left = {name: seconds for name, (outcome, seconds) in tests.items() if outcome not in OUTCOMES}
    print(", ".join(f"{number} {outcome}" for outcome, number in Counter(o for o, _ in tests.values()).most_common()))
    print(f"{sum(left.values()):.0f} s for the {len(left)} that had no turn, by what they took elsewhere")
    print("\n".join(f"failed: {name}" for name, (outcome, _) in tests.items() if outcome == "failed"))


if __name__ == "__main__":
    main(sys.argv[1:])
