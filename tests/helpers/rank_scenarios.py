"""One process of those that `mlx.launch` starts: one `train` for each scenario, and how each ended."""

import json
import os
import sys
from pathlib import Path

import mlx_adapters as ma
from mlx_adapters.config.mapping import from_mapping
from mlx_adapters.events import TrainReport

RANK = int(os.environ["MLX_RANK"])


def ended(name, asked, stop_at=None, fail_at=None, damage=False):
    reports = []

    def on_event(event):
        if isinstance(event, TrainReport):
            reports.append([event.processes, event.iteration])
        if getattr(event, "iteration", None) == stop_at is not None:
            return ma.Stop
        if getattr(event, "iteration", None) == fail_at is not None:
            raise ValueError("mine")

    lora, training = asked.pop("lora", None), asked.pop("training", None)
    if damage:  # what nobody foresees
        ma.training.runs.load_tokenizer_of = lambda *_: 1 / 0
    try:
        run = ma.train(
            name=name,
            lora=lora and from_mapping(ma.LoraConfig, lora),
            training=training and from_mapping(ma.TrainConfig, training),
            on_event=on_event,
            **asked,
        )
        return {"final": run.final.iteration, "stopped": run.stopped, "reports": reports}
    except (ma.AdapterError, KeyboardInterrupt, ValueError, ZeroDivisionError) as error:
        return {"error": type(error).__name__, "message": str(error), "hint": getattr(error, "hint", None)}


def main():
    import mlx_adapters.training.runs  # for `damage`

    work = Path(sys.argv[1])
    for scenario in json.loads((work / "scenarios.json").read_text()):
        mine = scenario["asked"] | (scenario.get("rank1", {}) if RANK == 1 else {})
        how = {key: value for key, value in mine.items() if key in ("stop_at", "fail_at", "damage")}
        asked = {key: value for key, value in mine.items() if key not in how}
        load = mlx_adapters.training.runs.load_tokenizer_of
        said = ended(scenario["name"], asked, **how)
        mlx_adapters.training.runs.load_tokenizer_of = load
        with open(work / f"rank{RANK}.jsonl", "a") as stream:
            stream.write(json.dumps(said) + "\n")


main()
