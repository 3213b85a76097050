"""`train`, the public function: check all that can be checked, then run the loop in a locked folder."""

import contextlib
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import require
from mlx_adapters.config.training import LoraConfig, Objective, TrainConfig, with_objective
from mlx_adapters.data.datasets import Data, DataSet, hold_out, read_again, read_data
from mlx_adapters.errors import ConfigError, FormatError, TrainingError
from mlx_adapters.events import Note, OnEvent, ignore, log_warnings, noting
from mlx_adapters.models.adapter import Adapter, AdapterLike
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.models.loading import load_model, load_tokenizer_of
from mlx_adapters.optimization import distributed
from mlx_adapters.optimization.distributed import World
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.sources.references import Reference
from mlx_adapters.sources.registry import training_lock
from mlx_adapters.storage import replacing
from mlx_adapters.storage.tensor_names import ADAPTER_OUTPUT
from mlx_adapters.system.interrupt import Interrupt
from mlx_adapters.training import reference_model, setup
from mlx_adapters.training import state as states
from mlx_adapters.training.folder import RunFolder, arithmetic, place_of
from mlx_adapters.training.forecast import memory_of_run
from mlx_adapters.training.loop import Loop
from mlx_adapters.training.recipe import (
    differences,
    make_recipe,
    rate_jump,
    read_recipe,
    require_same,
    settings_in,
    text_record,
)
from mlx_adapters.training.state import Checkpoint, TrainRun
from mlx_adapters.units import count


@dataclass(frozen=True)
class _Watched:
    """How a run is watched and stopped, and with whom it runs."""

    world: World
    interrupt: Interrupt
    on_event: OnEvent
    forecast: bool


@dataclass(frozen=True)
class _Request:
    """What `train` was asked for, resolved."""

    base: Base
    data: DataSet
    lora: LoraConfig
    training: TrainConfig
    adapter: Adapter | None
    reference: Adapter | None
    command: str | None
    watched: _Watched

    @property
    def world(self) -> World:
        """The processes of the run."""
        return self.watched.world

    @property
    def on_event(self) -> OnEvent:
        """Who watches."""
        return self.watched.on_event


def train(
    base: BaseLike | None = None,
    data: Data | None = None,
    *,
    name: str,
    lora: LoraConfig | None = None,
    training: TrainConfig | None = None,
    resume: bool = False,
    init_from: AdapterLike | None = None,
    objective: Objective | str | None = None,
    reference: AdapterLike | None = None,
    overwrite: bool = False,
    command: str | None = None,
    forecast: bool = False,
    on_event: OnEvent = log_warnings,
) -> TrainRun:
    """Train an adapter for `base` on `data` and keep it as `name`. The first Ctrl-C saves and stops.

    Args:
        base: the model to train for: "demo", a folder or a Hub id. Not needed to resume.
        data: a folder with train.jsonl and valid.jsonl, one file, or "hf:user/name"; or rows: a list or generator of
            mappings, a frame, a `datasets.Dataset`, or {"train": rows, "valid": rows}. Not needed to resume.
        name: the adapter's name in the registry, or a folder, if it is a path (./out).
        lora: what is adapted and how strongly.
        training: how long, on how much at a time, at which learning rate.
        resume: go on exactly where the run's newest whole checkpoint stands. What is not given then is taken from the
            run; what is given must be the same, except for more iterations.
        init_from: start a new run from this adapter's weights.
        objective: what is learned, instead of `training.objective`: a name, or settings such as DPO(beta=0.3).
        reference: of DPO and KTO: the base with this adapter is the reference model. None: the base alone.
        overwrite: replace an adapter of this name.
        command: what the user typed, for the record.
        forecast: predict the peak memory before the model is loaded, and warn if it will not fit.
        on_event: called with each report, validation, checkpoint and note. It ends the run by giving back `Stop`, and
            also from another thread's word: `lambda event: ma.Stop if enough.is_set() else None`.

    Raises ConfigError, NotFoundError, ExistsError, FormatError, IncompatibleError, TrainingError or
    StorageError; after saving, KeyboardInterrupt, or whatever `on_event` raises.

    Example:
        >>> settings = ma.TrainConfig(iterations=4, eval_every=2, save_every=2, mask_prompt=True)
        >>> run = ma.train("demo", "data/sql", name="mine", lora=ma.LoraConfig(rank=4), training=settings)
        >>> print(run.final)
        mine@4
        >>> more = ma.TrainConfig(iterations=6, eval_every=2, save_every=2, mask_prompt=True)
        >>> print(ma.train(name="mine", resume=True, training=more).final)
        mine@6
    """
    place, path = place_of(name)
    world, interrupt = distributed.start(), Interrupt()
    on_event, notes = noting(interrupt.heeding(on_event if world.leads else ignore))
    asked = {"name": name, "resume": resume, "overwrite": overwrite, "init_from": init_from is not None}
    with contextlib.ExitStack() as held:
        with world.starting():
            world.require_equal(lambda: {**asked, **arithmetic()}, differences)
            watched = _Watched(world, interrupt, on_event, forecast)
            if resume:
                new = init_from is None and reference is None and not overwrite
                require(new, "A resumed run goes on as it is: no init_from, no reference, no overwrite.")
                old = world.share(lambda: read_recipe(path))
                request = _as_it_was(old, path, base, data, lora, training, objective, watched)
                loop = _resume(request, old, place, path, held)
            else:
                world.share(lambda: replacing.refuse_existing(path, overwrite, ADAPTER_OUTPUT))
                request = _new(base, data, lora, training, objective, init_from, reference, command, watched)
                loop = _begin(request, place, path, overwrite, held)
        return replace(_run(loop), notes=tuple(notes))


def _as_it_was(
    old: dict[str, Any],
    path: Path,
    base: BaseLike | None,
    data: Data | None,
    lora: LoraConfig | None,
    training: TrainConfig | None,
    objective: Objective | str | None,
    watched: _Watched,
) -> _Request:
    """What a resumed run does: as its recipe says, but for what is given."""
    lora, training = lora or settings_in(old)[0], training or settings_in(old)[1]
    rows = read_again(old["data"]["source"], path, read=training) if data is None else read_data(data, read=training)
    base = resolve_base(base or old["base"]["name"])
    return _Request(base, rows, lora, with_objective(training, objective), None, None, old["command"], watched)


def _new(
    base: BaseLike | None,
    data: Data | None,
    lora: LoraConfig | None,
    training: TrainConfig | None,
    objective: Objective | str | None,
    init_from: AdapterLike | None,
    reference: AdapterLike | None,
    command: str | None,
    watched: _Watched,
) -> _Request:
    if base is None or data is None:
        raise ConfigError("A new run needs a base model and data.", "give both, or resume a run.")
    training = with_objective(training or TrainConfig(), objective)
    compares = training.objective.reference
    require(reference is None or compares, f"{training.objective.name} compares with no reference model.")
    adapter = load_adapter(init_from) if init_from is not None else None
    if adapter and compares and reference is None:
        text = f"The reference is the base alone; reference='{adapter.name}' would be what training starts from."
        watched.on_event(Note(text))
    lora = lora or (setup.lora_of(adapter) if adapter else LoraConfig())
    training = setup.with_template_of(training, adapter)
    rows, judge = read_data(data, read=training), load_adapter(reference) if reference is not None else None
    return _Request(resolve_base(base), rows, lora, training, adapter, judge, command, watched)


def _begin(request: _Request, reference: Reference, path: Path, overwrite: bool, held: contextlib.ExitStack) -> Loop:
    folder = RunFolder(reference, path, {}, held, writes=request.world.leads, overwrite=overwrite)

    def claim() -> None:  # before the model loads: of two runs of one new name the later one ends here
        held.enter_context(training_lock(path))
        folder.require_place()
        if path.is_dir():
            folder.hold()

    request.world.share(claim)
    return _prepare(request, folder, None)


def _resume(
    request: _Request, old: dict[str, Any], reference: Reference, path: Path, held: contextlib.ExitStack
) -> Loop:
    world = request.world
    folder = RunFolder(reference, path, old, held, writes=world.leads, begun=True)
    checkpoints: list[Checkpoint] = []

    def look() -> dict[str, Any]:
        held.enter_context(training_lock(path))
        folder.hold()
        if read_recipe(path) != old:
            raise TrainingError(f"'{reference}' has just been replaced by another run.", "look at it and try again.")
        checkpoints.append(_newest(folder, request))
        return asdict(checkpoints[0].state)

    state = states.state_from(world.share(look))
    state.require_unfinished(request.training, settings_in(old)[1], reference)
    if jump := rate_jump(settings_in(old)[1], request.training, state.iteration):
        request.on_event(Note(jump, "warning"))
    if old["world_size"] != world.size:
        before, now = count(old["world_size"], "process"), count(world.size, "process")
        text = f"The run goes on with {now} instead of {before}: on the same batches, summed in another order."
        request.on_event(Note(text))
    mine = checkpoints[0] if checkpoints else Checkpoint(state, {}, {})
    checkpoint = Checkpoint(state, world.share_arrays(mine.weights), world.share_arrays(mine.optimizer))
    return _prepare(request, folder, checkpoint)


def _newest(folder: RunFolder, request: _Request) -> Checkpoint:
    """The newest whole checkpoint; later ones are damaged and removed. Raises FormatError if there is none."""
    if states.drop_half_written(folder.path):
        request.on_event(Note("A half-written checkpoint was removed: the run ended while saving.", "warning"))
    checkpoint, problems = states.newest(folder.path)
    if checkpoint is None and not problems:
        raise FormatError(f"'{folder.reference}' cannot be resumed: it has no checkpoint.", "start it anew.")
    if checkpoint is None:
        raise FormatError(
            f"No checkpoint of '{folder.reference}' is whole: {' '.join(problems)}",
            f"begin a new run with its weights: --init-from {folder.reference}.",
        )
    for problem in problems:
        request.on_event(Note(f"{problem} Taking the checkpoint before it.", "warning"))
    if others := folder.other_versions():
        text = f"The run goes on with other versions ({', '.join(others)}), so not to the bit as it would have."
        request.on_event(Note(text, "warning"))
    states.drop_after(folder.path, checkpoint.state.iteration)
    folder.refresh(checkpoint.state)  # a crash may have come between a save and its links
    return checkpoint


def _run(loop: Loop) -> TrainRun:
    with loop.interrupt.watching():
        state = loop.run()
    folder = loop.folder
    folder.refresh(state)
    if (chosen := folder.chosen()) is not None:
        loop.on_event(Note(f"'{folder.reference}' still means its checkpoint {chosen}, which 'use' chose."))
    return TrainRun(
        folder.path,
        folder.best(state),
        folder.final(state),
        state.best_loss,
        tuple(state.train_losses),
        tuple(state.validation_losses),
        state.trained_tokens,
        state.seconds,
        state.stopped_early,
        loop.train_step.world.rank,
        stopped=loop.unfinished,
    )


def _now() -> str:
    return datetime.now().astimezone().isoformat()


def _prepare(request: _Request, folder: RunFolder, checkpoint: Checkpoint | None) -> Loop:
    """Load the model, tokenize the rows, add the layers, and compare a resumed run with what it was."""
    lora, training = request.lora, request.training
    resumed = checkpoint is not None
    started_from = request.adapter.fingerprint if request.adapter is not None else None
    folder.data = data = request.data
    for note in data.notes:
        request.on_event(Note(note))
    if training.valid_fraction is not None:
        data = hold_out(data, training.valid_fraction, training.seed)
    recipe = make_recipe(
        request.base,
        data,
        lora,
        training,
        folder.recipe.get("init_from") if resumed else started_from,
        folder.recipe.get("reference") if resumed else reference_model.record_of(request.reference),
        request.world.size,
        request.command,
        folder.recipe.get("started") or request.world.share(_now),
    )
    request.world.require_equal(lambda: {"recipe": recipe}, differences)
    if resumed:
        require_same(folder.recipe, recipe, str(folder.reference))
    tokenizer = load_tokenizer_of(request.base, training.template)
    with setup.template_date(datetime.fromisoformat(recipe["started"])):
        rows, held_out = (
            setup.tokenize_split(data, s, tokenizer, training, request.on_event) for s in ("train", "valid")
        )
    recipe["text"] = text_record(tokenizer, {"train": rows, "valid": held_out})
    request.world.require_equal(lambda: {"recipe": recipe}, differences)
    if resumed:
        require_same(folder.recipe, recipe, str(folder.reference))
    setup.require_validation(held_out, training, request.on_event)
    setup.require_readable((*rows, *held_out), request.base)
    told, say = request.watched.forecast, request.on_event
    memory = memory_of_run(request.base, rows, lora, training, folder.recipe, told, request.world, say)
    model = load_model(request.base, dtype=training.dtype, gradients=True)
    feeds = setup.make_feeds(rows, held_out, training, request.world)
    kept = folder.path if folder.begun else None
    reference = reference_model.of_run(model, feeds, training, recipe, kept, request.reference, request.on_event)
    config = setup.add_layers(model, lora, training.seed)
    adapted = setup.adapted_layers(model.module, config)
    if request.adapter is not None:
        setup.initialize_from(model, config, request.adapter, lora.init)
    elif not resumed:
        setup.start(model, lora, config, rows, training, request.world, request.on_event)
    prepared = setup.prepare(model, training, rows, held_out, adapted, request.world, reference, memory)
    folder.adapter = config
    train_step = prepared.train_step
    request.world.share(lambda: folder.update_recipe(recipe | {"memory": asdict(replace(memory, near=None))}))
    request.world.share(lambda: folder.keep_reference(reference))
    request.world.share(lambda: folder.require_space(train_step.weights, train_step.optimizer.arrays()))
    validation = prepared.validation.fixed(training.eval_batches) if prepared.validation else None
    watched = request.watched
    loop = Loop(train_step, prepared.feed, validation, training, folder, watched.on_event, watched.interrupt)
    if checkpoint is not None:
        loop.restore(checkpoint)
    return loop
