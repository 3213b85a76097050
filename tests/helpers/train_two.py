"""One of the processes that `mlx.launch` starts: reads its request, trains, says how it ended."""

import json
import os
import sys
from pathlib import Path

from mlx_adapters.config.mapping import from_mapping
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.errors import AdapterError
from mlx_adapters.training import loop, runs


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    lora, training = from_mapping(LoraConfig, request.pop("lora")), from_mapping(TrainConfig, request.pop("training"))
    die_at = request.pop("die_at")
    if die_at is not None and os.environ["MLX_RANK"] == "1":
        iterate = loop.Loop._iterate

        def mortal(self):
            if self.state.iteration == die_at:
                os._exit(9)
            iterate(self)

        loop.Loop._iterate = mortal
    try:
        run = runs.train(**request, lora=lora, training=training)
        sys.stdout.write(f"rank {run.rank} finished\n")
    except AdapterError as error:
        sys.stdout.write(f"{error.message}\n")


main()
