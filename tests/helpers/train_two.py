"""One of the processes that `mlx.launch` starts: reads its requests, trains, says how each ended."""

import json
import os
import sys
from pathlib import Path

from mlx_adapters.config.mapping import from_mapping
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.errors import AdapterError
from mlx_adapters.training import loop, runs


def main() -> None:
    for said, request in json.loads(Path(sys.argv[1]).read_text()).items():
        lora = from_mapping(LoraConfig, request.pop("lora"))
        training = from_mapping(TrainConfig, request.pop("training"))
        die_at = request.pop("die_at")
        if die_at is not None and os.environ["MLX_RANK"] == "1":
            loop.Loop._iterate = mortal(die_at)
        try:
            run = runs.train(**request, lora=lora, training=training)
            sys.stdout.write(f"{said}: rank {run.rank} finished\n")
        except AdapterError as error:
            sys.stdout.write(f"{said}: {error.message}\n")


def mortal(die_at):
    iterate = loop.Loop._iterate

    def until_it_dies(self):
        if self.state.iteration == die_at:
            os._exit(9)
        iterate(self)

    return until_it_dies


main()
