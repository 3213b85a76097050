"""What the reference model says of the answers: computed once, before training, and kept with the run.

The reference is the base without the adapter that is trained, or with another adapter, so it needs no second copy: it
is the model before the layers that are trained are put on. A row's values are those of the batch in which the first
epoch brings it: they do not depend on how long the run is, a longer one computes more of the same batches, and no row
is computed that no update will see. Done anew in each step it would cost a forward pass of every epoch, and the model
would have to be called in two ways at once.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import epoch_batches
from mlx_adapters.errors import AdapterError, IncompatibleError
from mlx_adapters.events import OnEvent, Progress
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.model import Model
from mlx_adapters.optimization.feed import Feed
from mlx_adapters.optimization.log_probabilities import Arrays, LossPlan, device_batch, plan_loss
from mlx_adapters.optimization.optimizers import compiled
from mlx_adapters.optimization.probe import probe_of
from mlx_adapters.optimization.step import answer_log_probabilities
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage import tensor_files
from mlx_adapters.storage.tensor_names import REFERENCE_FILE
from mlx_adapters.system.door import mx, nn
from mlx_adapters.training.recipe import FREE

Values = dict[str, np.ndarray]  # split -> (rows, 2) float32, NaN where nothing was computed
OnBatch = Callable[[int, int], None]


def drawn_by(feeds: Mapping[str, Feed], config: TrainConfig) -> dict[str, list[np.ndarray]]:
    """The batches whose values a run of `config` needs: those of training as far as they are of the first epoch, and
    those of a validation."""
    batches = {"train": config.course.iterations * config.grad_accumulation, "valid": config.eval_batches}
    seeds = {"train": config.seed, "valid": 0}
    return {
        split: epoch_batches(feed.lengths, feed.config.batch_size, seeds[split], 0)[: batches[split]]
        for split, feed in feeds.items()
    }


def missing(feed: Feed, drawn: Sequence[np.ndarray], known: np.ndarray | None) -> list[np.ndarray]:
    """Those of the batches that `known` has no values of."""
    return [indexes for indexes in drawn if known is None or np.isnan(known[_rows(feed, indexes), 0]).any()]


def compute(
    feed: Feed,
    drawn: Sequence[np.ndarray],
    module: nn.Module,
    plan: LossPlan,
    known: np.ndarray | None = None,
    on_batch: OnBatch = lambda done, total: None,
) -> np.ndarray:
    """(rows, 2) float32: log-probabilities of each row's answer, and of its rejected answer or its row aside.

    Args:
        feed: the rows.
        drawn: the lines of each batch to compute.
        module: the reference, as it is now.
        plan: how log-probabilities are computed.
        known: what an earlier call gave; the rest of it is kept.
        on_batch: called with the batches that are done, and how many there are.
    """
    values = np.full((len(feed.rows), 2), np.nan, np.float32) if known is None else known.copy()
    module.eval()
    sums = compiled(lambda arrays: answer_log_probabilities(module, plan, Arrays(**arrays), {}))
    for done, indexes in enumerate(drawn, 1):
        rows, mine = _rows(feed, indexes), _rows(feed, feed.mine(indexes))
        of_batch = np.zeros((len(feed.rows), 2), np.float32)
        for aside in ((False, True) if feed.aside else (False,)) if mine else ():
            lines = np.array(sums(device_batch(feed.batch(indexes, aside))))
            sides = lines.reshape(len(feed.rows[rows[0]].sequences), -1)  # (sides, lines of each)
            for side, of_side in enumerate(sides, int(aside)):
                of_batch[mine, side] = of_side[: len(mine)]
        feed.world.gather(lambda: None)  # all have come so far
        values[rows] = np.array(feed.world.sum(mx.array(of_batch[rows])))
        on_batch(done, len(drawn))
    return values


def of_run(
    model: Model,
    feeds: Mapping[str, Feed],
    config: TrainConfig,
    recipe: Mapping[str, Any],
    folder: Path | None,
    adapter: Adapter | None,
    on_event: OnEvent,
) -> Values:
    """The values that a run needs of each split; {} if its objective compares with no reference.

    Args:
        model: the base, without the layers that are trained.
        feeds: the splits.
        config: the run's settings.
        recipe: the run's.
        folder: where the run keeps what it computed before.
        adapter: the one that belongs to the reference; of a resumed run the recipe tells it, and it is only loaded if
            values are missing.
        on_event: called with progress.

    Raises IncompatibleError for an adapter of another base, or one that has changed, and what loading it raises.
    """
    if not config.objective.reference:
        return {}
    world = feeds["train"].world
    kept = read_values(folder, bound_to(recipe)) if folder is not None and world.leads else {}
    shared = world.share_arrays({split: mx.array(array) for split, array in kept.items()})
    values = {split: np.array(array) for split, array in shared.items()}
    drawn = drawn_by(feeds, config)
    left = {split: missing(feed, drawn[split], values.get(split)) for split, feed in feeds.items()}
    total, before = sum(map(len, left.values())), 0
    if total and (adapter := adapter or _recorded(recipe["reference"])) is not None:
        model.attach(adapter)
    plan = plan_loss(model.module, config, model.vocabulary, probe_of(feeds["train"].rows))
    for split, batches in left.items():

        def report(done: int, _: int, before: int = before) -> None:
            on_event(Progress("reference", before + done, total, "batch"))

        values[split] = compute(feeds[split], batches, model.module, plan, values.get(split), report)
        before += len(batches)
    model.detach()
    mx.clear_cache()
    return values


def record_of(adapter: Adapter | None) -> dict[str, str] | None:
    """What a recipe keeps of the adapter that belongs to the reference."""
    if adapter is None:
        return None
    named = adapter.folder is None or adapter.folder == adapter_folder(adapter.folder.name)
    return {"name": adapter.name if named else str(adapter.folder), "fingerprint": adapter.fingerprint}


def _recorded(record: Mapping[str, str] | None) -> Adapter | None:
    if record is None:
        return None
    adapter = load_adapter(record["name"])
    if adapter.fingerprint != record["fingerprint"]:
        raise IncompatibleError(
            f"'{record['name']}', the reference of this run, is not what it was.", "put it back, or start anew."
        )
    return adapter


def _rows(feed: Feed, indexes: np.ndarray) -> list[int]:
    return [feed.bins[line][0] for line in indexes]


def bound_to(recipe: Mapping[str, Any]) -> str:
    """A hash of all that the values depend on: base, tokens, reference, and how rows are put together."""
    settings = {name: value for name, value in recipe["training"].items() if name not in FREE}
    parts = [recipe["base"]["fingerprint"], recipe["base_config"], recipe["text"], recipe["reference"], settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write(folder: Path, values: Values, bound: str) -> None:
    """Keep the values in the run's folder."""
    arrays = {split: mx.array(array) for split, array in values.items()}
    about = {"bound_to": bound, "sha256": _digest(values)}
    tensor_files.write_safetensors(folder / REFERENCE_FILE, arrays, about)


def read_values(folder: Path, bound: str) -> Values:
    """The values that a run kept; none if there are none, or they are of another run or damaged."""
    path = folder / REFERENCE_FILE
    if not path.is_file():
        return {}
    try:
        about = tensor_files.read_safetensors_header(path)[1]
        values = {split: np.array(array) for split, array in tensor_files.read_safetensors(path).items()}
    except AdapterError:
        return {}
    whole = about.get("bound_to") == bound and about.get("sha256") == _digest(values)
    return values if whole else {}


def _digest(values: Values) -> str:
    digest = hashlib.sha256()
    for split in sorted(values):
        digest.update(f"{split} {values[split].shape}".encode() + values[split].tobytes())
    return digest.hexdigest()
