"""Trains in forked processes, one for each line read: importing mlx-lm once instead of thirty times.

Line: JSON keywords of `train`, with settings as mappings, and the home folder. Answers "pid N", and "exit N" when the
process ended (minus the signal's number if it was killed). Nothing is computed before the fork, so each child is as
good as new.
What drives a GPU does not survive a fork; there each line gets a new process.
"""

import json
import os
import sys
import traceback

import mlx_adapters.training.runs as runs
from mlx_adapters.config.mapping import from_mapping
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.errors import TrainingError
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.training.folder import place_of


def run(request: dict) -> None:
    os.environ["MLX_ADAPTERS_HOME"] = request.pop("home")
    lora = from_mapping(LoraConfig, request.pop("lora"))
    training = from_mapping(TrainConfig, request.pop("training"))
    started = (place_of(request["name"])[1] / "recipe.json").exists()
    for given in ("init_from", "reference") if started else ():
        request.pop(given, None)
    try:
        runs.train(**request, lora=lora, training=training, resume=started)
    except TrainingError as error:  # killed after its last save
        assert "has finished" in error.message


def start(line: str) -> int:
    if on_gpu():
        return os.posix_spawn(sys.executable, [sys.executable, __file__, line], os.environ)
    child = os.fork()
    if child == 0:
        try:
            run(json.loads(line))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def main() -> None:
    for line in sys.stdin:
        child = start(line)
        print("pid", child, flush=True)
        _, status = os.waitpid(child, 0)
        print("exit", os.waitstatus_to_exitcode(status), flush=True)


if sys.argv[1:]:
    run(json.loads(sys.argv[1]))
else:
    main()
