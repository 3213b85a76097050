"""The suite on a machine with GPUs: workers spread over them, the longest tests first, each result kept at once.

    GPUS=4 SEEN=seen.tsv timeout -s INT 500 python -m pytest -p helpers.gpus -n 40 --dist load --maxschedchunk 1

SEEN gets a line for each test that ends: outcome, seconds, id; what fails stands in SEEN.failures. A test that passed
there before has its turn no more, so that a run that was cut off goes on; one that is new counts as a second long.
"""

import os
from pathlib import Path

import pytest

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and "GPUS" in os.environ:  # read once by CUDA
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(worker.removeprefix("gw")) % int(os.environ["GPUS"]))
OUTCOMES = ("passed", "skipped", "failed")  # of its parts the last here is the test's
seen_file = Path(os.environ["SEEN"])
so_far: dict[str, tuple[str, float]] = {}  # id: outcome and seconds of its parts that have ended


def seen() -> dict[str, tuple[str, float]]:
    """{id: (outcome, seconds)} of SEEN, the last line of each test."""
    lines = seen_file.read_text().splitlines() if seen_file.exists() else []
    return {name: (outcome, float(seconds)) for outcome, seconds, name in (line.split("\t") for line in lines)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that have not passed, the longest first."""
    before = seen()
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
        with Path(f"{seen_file}.failures").open("a") as file:
            file.write(f"=== {report.nodeid} ({report.when})\n{report.longreprtext}\n{report.capstderr}\n")
    if report.when not in ("setup", "call"):
        with seen_file.open("a") as file:
            file.write("{}\t{:.2f}\t{}\n".format(*so_far.pop(report.nodeid), report.nodeid))
