"""`train`, the public function: check all that can be checked, then run the loop in a locked folder."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import require, to_mapping
from mlx_adapters.config.training import LoraConfig, Objective, TrainConfig, passes, settled, with_objective
from mlx_adapters.data.datasets import Data, hold_out, read_again, read_data
from mlx_adapters.errors import ConfigError, TrainingError
from mlx_adapters.events import Note, OnEvent, ignore, log_warnings, noting
from mlx_adapters.models.adapter import AdapterLike
from mlx_adapters.models.base import BaseLike, Named
from mlx_adapters.models.loading import load_model, load_tokenizer_of
from mlx_adapters.optimization import distributed
from mlx_adapters.optimization.feed import bins_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter, place_of_full
from mlx_adapters.sources.references import Reference
from mlx_adapters.sources.registry import training_lock
from mlx_adapters.storage import replacing
from mlx_adapters.storage.tensor_names import ADAPTER_OUTPUT
from mlx_adapters.system.interrupt import Interrupt
from mlx_adapters.system.limits import one_at_a_time
from mlx_adapters.training import reference_model, setup
from mlx_adapters.training import state as states
from mlx_adapters.training.folder import RunFolder, arithmetic, place_of
from mlx_adapters.training.forecast import Wanted, memory_of_run
from mlx_adapters.training.loop import Loop
from mlx_adapters.training.recipe import (
    Asked,
    Request,
    Watched,
    differences,
    make_recipe,
    rate_jump,
    read_recipe,
    require_same,
    resumed,
    settings_in,
    text_record,
)
from mlx_adapters.training.state import Checkpoint, TrainPlan, TrainRun
from mlx_adapters.units import count


@one_at_a_time
def train(
    base: BaseLike | None = None,
    data: Data | None = None,
    *,
    name: str | Path | Named,
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
        name: the adapter's name in the registry, or a folder, if it is a path (./out); a run that goes on, itself.
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
    on_event, notes = noting(on_event)
    asked = Asked(base, data, lora, training, objective, init_from, reference, command)
    with _opened(name, asked, resume, overwrite, forecast, on_event) as loop:
        return replace(_run(loop), notes=tuple(notes))


@one_at_a_time
def plan_training(
    base: BaseLike | None = None,
    data: Data | None = None,
    *,
    name: str | Path | Named,
    lora: LoraConfig | None = None,
    training: TrainConfig | None = None,
    resume: bool = False,
    init_from: AdapterLike | None = None,
    objective: Objective | str | None = None,
    reference: AdapterLike | None = None,
    overwrite: bool = False,
    forecast: bool = False,
    on_event: OnEvent = log_warnings,
) -> TrainPlan:
    """What `train` would do with the same arguments, after refusing all that it would refuse. Keeps nothing.

    Args:
        base: as for `train`, and so are all others.
        data: the rows.
        name: where the adapter would be kept.
        lora: what is adapted.
        training: how long, and on how much at a time.
        resume: whether a run would go on.
        init_from: what it would start from.
        objective: what is learned.
        reference: of DPO and KTO; what it says of the rows is not computed.
        overwrite: replace an adapter of this name.
        forecast: predict the peak memory.
        on_event: called with notes.

    Raises what `train` raises before its first step.

    Example:
        >>> plan = ma.plan_training("demo", "data/sql", name="planned", training=ma.TrainConfig(epochs=2))
        >>> plan.iteration, plan.passes
        (0, 2.0)
    """
    asked = Asked(base, data, lora, training, objective, init_from, reference, None)
    with _opened(name, asked, resume, overwrite, forecast, on_event, dry=True) as loop:
        return TrainPlan(
            loop.folder.path,
            loop.folder.recipe["base"]["name"],
            len(loop.feed.rows),
            sum(map(len, loop.validation.drawn)) if loop.validation else 0,
            loop.state.iteration,
            loop.config.course.iterations,
            passes(loop.config, len(loop.feed.bins)),
            loop.config.course.eval_every,
            loop.config.course.save_every,
            len(loop.train_step.adapted),
            sum(weight.size for weight in loop.train_step.weights.values()),
        )


@contextlib.contextmanager
def _opened(
    name: str | Path | Named,
    asked: Asked,
    resume: bool,
    overwrite: bool,
    forecast: bool,
    on_event: OnEvent,
    dry: bool = False,
) -> Iterator[Loop]:
    """A run that is ready for its next step, and everything refused that can be; what it locks is free afterwards."""
    place, path = place_of(name)
    world, interrupt = distributed.start(), Interrupt()
    on_event = interrupt.heeding(on_event if world.leads else ignore)
    with contextlib.ExitStack() as held, contextlib.closing(world):
        with world.starting():
            called = str(getattr(name, "reference", name))
            equal = {"name": called, "resume": resume, "overwrite": overwrite, "init_from": asked.init_from is not None}
            world.require_equal(lambda: {**equal, **arithmetic()}, differences)
            watched = Watched(world, interrupt, on_event, forecast, dry)
            if resume:
                new = asked.init_from is None and asked.reference is None and not overwrite
                require(new, "A resumed run goes on as it is: no init_from, no reference, no overwrite.")
                old = world.share(lambda: read_recipe(path))
                loop = _resume(_as_it_was(old, path, asked, watched), old, place, path, held)
            else:
                world.share(lambda: replacing.refuse_existing(path, overwrite, ADAPTER_OUTPUT))
                loop = _begin(_new(asked, watched), place, path, overwrite, held)
        yield loop


def _as_it_was(old: dict[str, Any], path: Path, asked: Asked, watched: Watched) -> Request:
    """What a resumed run does: as its recipe says, but for what is given."""
    lora, training = asked.lora or settings_in(old)[0], asked.training or settings_in(old)[1]
    if asked.data is None:
        rows = read_again(old["data"]["source"], path, read=training)
    else:
        rows = read_data(asked.data, read=training)
    training = resumed(with_objective(training, asked.objective), old)
    return Request(
        resolve_base(asked.base or old["base"]["name"]), rows, lora, training, None, None, old["command"], watched
    )


def _new(asked: Asked, watched: Watched) -> Request:
    if asked.base is None or asked.data is None:
        raise ConfigError("A new run needs a base model and data.", "give both, or resume a run.")
    training = with_objective(asked.training or TrainConfig(), asked.objective)
    compares, judge = training.objective.reference, asked.reference
    require(judge is None or compares, f"{training.objective.name} compares with no reference model.")
    adapter = load_adapter(asked.init_from) if asked.init_from is not None else None
    if adapter and compares and judge is None:
        text = f"The reference is the base alone; reference='{adapter.name}' would be what training starts from."
        watched.on_event(Note(text))
    lora = asked.lora or (setup.lora_of(adapter) if adapter else LoraConfig())
    base = resolve_base(asked.base)
    training = setup.with_template_of(training, adapter, base)
    rows, held_against = read_data(asked.data, read=training), load_adapter(judge) if judge is not None else None
    return Request(base, rows, lora, training, adapter, held_against, asked.command, watched)


def _begin(request: Request, reference: Reference, path: Path, overwrite: bool, held: contextlib.ExitStack) -> Loop:
    folder = RunFolder(reference, path, {}, held, writes=request.writes, overwrite=overwrite)

    own = place_of_full(request.base.name)
    require(own is None or own[0] != path, f"'{reference}' is what the run would start from.", "give it another name.")

    def claim() -> None:  # before the model loads: of two runs of one new name the later one ends here
        held.enter_context(training_lock(path))
        folder.require_place()
        if path.is_dir():
            folder.hold()

    request.world.share(claim)
    return _prepare(request, folder, None)


def _resume(
    request: Request, old: dict[str, Any], reference: Reference, path: Path, held: contextlib.ExitStack
) -> Loop:
    world = request.world
    folder = RunFolder(reference, path, old, held, writes=request.writes, begun=True)
    checkpoints: list[Checkpoint] = []

    def look() -> dict[str, Any]:
        held.enter_context(training_lock(path))
        folder.hold()
        if read_recipe(path) != old:
            raise TrainingError(f"'{reference}' has just been replaced by another run.", "look at it and try again.")
        checkpoints.append(folder.newest(request.on_event))
        return asdict(checkpoints[0].state)

    state = states.state_from(world.share(look))
    state.require_unfinished(request.training, settings_in(old)[1], reference)
    if old["world_size"] != world.size:
        before, now = count(old["world_size"], "process"), count(world.size, "process")
        text = f"The run goes on with {now} instead of {before}: on the same batches, summed in another order."
        request.on_event(Note(text))
    mine = checkpoints[0] if checkpoints else Checkpoint(state, {}, {})
    checkpoint = Checkpoint(state, world.share_arrays(mine.weights), world.share_arrays(mine.optimizer))
    loop = _prepare(request, folder, checkpoint)
    if jump := rate_jump(settings_in(old)[1], request.training, state.iteration):  # and the rate itself is no other
        request.on_event(Note(jump, "warning"))
    return loop


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


def _prepare(request: Request, folder: RunFolder, checkpoint: Checkpoint | None) -> Loop:
    """Load the model, tokenize the rows, add the layers, and compare a resumed run with what it was."""
    lora, training = request.lora, request.training
    setup.require_together(lora, training, request.adapter)
    goes_on = checkpoint is not None
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
        folder.recipe.get("init_from") if goes_on else started_from,
        folder.recipe.get("reference") if goes_on else reference_model.record_of(request.reference),
        request.world.size,
        request.command,
        folder.recipe.get("started") or request.world.share(_now),
    )
    request.world.require_equal(lambda: {"recipe": recipe}, differences)
    if goes_on:
        require_same(folder.recipe, recipe, str(folder.reference))
    tokenizer = load_tokenizer_of(request.base, training.template)
    with setup.template_date(datetime.fromisoformat(recipe["started"])):
        rows, held_out = (
            setup.tokenize_split(data, s, tokenizer, training, request.on_event) for s in ("train", "valid")
        )
    lines = len(bins_of(rows, training))
    training = settled(training, lines)
    recipe |= {"training": to_mapping(training), "lines": lines}
    recipe["text"] = text_record(tokenizer, {"train": rows, "valid": held_out})
    request.world.require_equal(lambda: {"recipe": recipe}, differences)
    if goes_on:
        require_same(folder.recipe, recipe, str(folder.reference))
    request.on_event(Note(setup.told_passes(training, len(rows), lines)))
    setup.require_validation(held_out, training, request.on_event)
    setup.require_readable((*rows, *held_out), request.base)
    told, say = request.watched.forecast, request.on_event
    memory = memory_of_run(Wanted(request.base, rows, lora, training), folder.recipe, told, request.world, say)
    model = load_model(request.base, dtype=training.dtype, gradients=True)
    feeds = setup.make_feeds(rows, held_out, training, request.world)
    kept = folder.path if folder.begun else None
    judge, dry = request.reference, request.watched.dry
    reference = {} if dry else reference_model.of_run(model, feeds, training, recipe, kept, judge, request.on_event)
    config = setup.add_layers(model, lora, training.seed)
    adapted = setup.adapted_layers(model.module, config)
    if request.adapter is not None:
        setup.initialize_from(model, config, request.adapter, lora.init)
    elif not goes_on:
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
