"""Preparing a run: rows, adapter layers and the training step, with all that can be refused before the first step."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, tzinfo
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from mlx_adapters.config.mapping import require
from mlx_adapters.config.training import LoraConfig, TrainConfig, passes
from mlx_adapters.data.batches import make_batch
from mlx_adapters.data.datasets import DataSet
from mlx_adapters.data.preferences import tokenize_for
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import ConfigError, FormatError, IncompatibleError, ModelError, refusals
from mlx_adapters.events import Note, OnEvent
from mlx_adapters.models.adapter import Adapter, template_of
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import quantization_of
from mlx_adapters.models.layers import (
    adaptable_layers,
    add_adapter_layers,
    loads_in_mlx_lm,
    resolve_target_modules,
)
from mlx_adapters.models.loading import load_module
from mlx_adapters.models.metadata import FULL, AdapterConfig
from mlx_adapters.models.model import Model
from mlx_adapters.optimization.distributed import World
from mlx_adapters.optimization.feed import Feed, make_feed
from mlx_adapters.optimization.log_probabilities import plan_loss
from mlx_adapters.optimization.probe import (
    computes_as_generated,
    packing_is_exact,
    probe_of,
    settle_recomputing,
    short_rows,
)
from mlx_adapters.optimization.step import MemoryPlan, TrainStep
from mlx_adapters.optimization.through_rounding import plan_rounding
from mlx_adapters.starts.begin import begin
from mlx_adapters.starts.factors import start_from_principal
from mlx_adapters.starts.ranks import module_ranks, stored_rank
from mlx_adapters.storage.tensor_names import LORA_A, MAGNITUDE, split
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.gpu_kernels import compiled_folder
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.units import count, number

ALONE = World()


def adapter_config(module: nn.Module, lora: LoraConfig) -> AdapterConfig:
    """The adapter that `lora` describes on this model (see `starts.ranks`).

    Raises ConfigError for names that match nothing.
    """
    keys = resolve_target_modules(module, lora)
    layers = -1 if lora.num_layers == "all" else lora.num_layers
    return AdapterConfig(stored_rank(keys, lora), lora.scale, keys, lora.type, lora.dropout, layers)


def add_layers(model: Model, lora: LoraConfig, seed: int) -> AdapterConfig:
    """Freeze the base and put fresh adapter layers on it.

    mlx-lm knows one rank per adapter. Smaller ranks are stored as zeros in lora_a beyond the module's own rank;
    lora_b starts at zero, so both parts have a gradient of exactly zero there and stay zero.
    """
    config = adapter_config(model.module, lora)
    require_loadable(load_module(model.base)[0], config)
    mx.random.seed(seed)
    model.module.freeze()
    add_adapter_layers(model.module, config)
    _require_norms(model.module)
    ranks = module_ranks(config.keys, lora)
    for name, weight in tree_flatten(model.module.trainable_parameters()):
        path, leaf = split(name)
        if leaf == LORA_A and ranks[path] < config.rank:
            inside = mx.arange(config.rank) < ranks[path]
            inside = inside[:, None] if weight.ndim == 3 else inside
            model.module.load_weights([(name, mx.where(inside, weight, 0.0))], strict=False)
    if lora.init == "pissa":
        start_from_principal(adapted_layers(model.module, config), ranks, config.scale)
    mx.eval(model.module.trainable_parameters())
    return config


def start(
    model: Model,
    lora: LoraConfig,
    config: AdapterConfig,
    rows: Sequence[Row],
    training: TrainConfig,
    world: World,
    on_event: OnEvent,
) -> None:
    """Let fresh adapter layers start as `lora.init` says, where that takes more than the base (see `starts.begin`)."""
    ranks, adapted = module_ranks(config.keys, lora), adapted_layers(model.module, config)
    model.module.eval()  # dropout would use up random numbers, in one of several processes alone
    world.share(lambda: begin(adapted, lora, ranks, model.module, rows, training, on_event))
    if lora.init in ("loftq", "eva"):
        weights = world.share_arrays(dict(tree_flatten(model.module.trainable_parameters())))
        model.module.load_weights(list(weights.items()), strict=False)


def adapted_layers(module: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """What is trained of a module, by path: adapter layers, or its own."""
    layers = dict(module.named_modules())
    return {key: layers[key] for key in config.keys}


def require_loadable(module: nn.Module, config: AdapterConfig) -> None:
    """Raise ConfigError for layers on which plain mlx-lm could not load the adapter. `module` is as its folder holds
    it; on a CPU it is trained unquantized, and would not tell."""
    layers = adaptable_layers(module)
    full = config.type == FULL
    bad = [] if full else [key for key in config.keys if not loads_in_mlx_lm(layers[key], config)]
    if bad:
        quantization = quantization_of(layers[bad[0]])
        bits = f" in {quantization.bits} bits" if quantization else ""
        refused, names = ({split(key)[1] for key in keys} for keys in (bad, config.keys))
        hint = "train LoRA" + (", take the unquantized base" if quantization else "")
        hint += f", or --target-modules {','.join(sorted(names - refused))}" if names - refused else ""
        raise ConfigError(
            f"mlx-lm could not load a DoRA adapter on '{bad[0]}'{bits} ({count(len(bad), 'layer')} of this kind).",
            f"{hint}.",
        )


def _require_norms(module: nn.Module) -> None:
    """Raise ConfigError for rows of zeros under a DoRA adapter, which divides by each row's norm."""
    norms = {name: m for name, m in tree_flatten(module.trainable_parameters()) if split(name)[1] == MAGNITUDE}
    zeros = {split(name)[0]: (m == 0).sum() for name, m in norms.items()}
    mx.eval(zeros)
    for path, of_layer in zeros.items():
        if of_layer.item():
            raise ConfigError(
                f"{count(of_layer.item(), 'row')} of '{path}' hold only zeros, and DoRA divides by their norm.",
                "train LoRA, or leave the layer out of --target-modules.",
            )


def require_together(lora: LoraConfig, training: TrainConfig, adapter: Adapter | None = None) -> None:
    """Raise ConfigError for settings of which each is for another way to train."""
    if lora.type == FULL:
        plain = LoraConfig(num_layers=lora.num_layers, target_modules=lora.target_modules, type=lora.type)
        require(lora == plain, "A full fine-tune has no rank, scale, dropout or other start.", "leave them out.")
        require(training.fuse_aware is None, "A full fine-tune is not trained through a rounding.", "fuse it later.")
        require(training.lora_plus_ratio == 1, "A full fine-tune has no lora_b, so no lora_plus_ratio.")
        require(adapter is None, "A full fine-tune starts from a model, not from an adapter.", "fuse it in first.")


def initialize_from(model: Model, config: AdapterConfig, adapter: Adapter, init: str) -> None:
    """Take over the weights of `adapter`. Raises ConfigError where `init` names another start, IncompatibleError unless
    it has the same layers and rank."""
    require(init == "zero", "A run that starts from an adapter has no other start.", "leave --init or --init-from out.")
    own = {name: w.shape for name, w in tree_flatten(model.module.trainable_parameters())}
    theirs = {name: tuple(w.shape) for name, w in adapter.weights.items()}
    if own != theirs or adapter.config.scale != config.scale:
        wanted = f"{config.type}, rank {config.rank}, scale {config.scale:g}, {count(len(config.keys), 'layer')}"
        raise IncompatibleError(
            f"The run cannot start from {adapter!r}: it needs {wanted}.",
            "leave rank, scale and target modules out to take the adapter's own.",
        )
    model.module.load_weights(list(adapter.weights.items()), strict=False)


def lora_of(adapter: Adapter) -> LoraConfig:
    """The settings that make an adapter like this one."""
    c = adapter.config
    return LoraConfig(rank=c.rank, scale=c.scale, dropout=c.dropout, target_modules=c.keys, type=c.type)  # type: ignore[arg-type]


def with_template_of(training: TrainConfig, adapter: Adapter | None, base: Base) -> TrainConfig:
    """Settings to train on from an adapter, or from a base that was trained: conversations look as they did to it,
    unless others are asked for."""
    before = base.template if adapter is None else template_of(adapter)
    return replace(training, **vars(training.template.over(before)))


@contextlib.contextmanager
def template_date(moment: datetime) -> Iterator[None]:
    """Within the block chat templates that print the date (`strftime_now`) print that of `moment`.

    transformers takes it from the `datetime` of its own module, and hands no function of ours to a template.
    """
    from transformers.utils import chat_template_utils as templates

    class Then(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return moment

    real = getattr(templates, "datetime", None)
    if real is None:  # a version that does it otherwise: a resume still compares the tokens
        yield
        return
    templates.datetime = Then
    try:
        yield
    finally:
        templates.datetime = real


def tokenize_split(
    data: DataSet, split_name: str, tokenizer: Any, config: TrainConfig, on_event: OnEvent
) -> tuple[Row, ...]:
    """The rows of one split that have something to train; truncated and left out rows are reported."""
    done = tokenize_for(data.rows(split_name), tokenizer, config)
    limit = f"max_seq_length {config.max_seq_length}"
    for remark in done.remarks(f"{split_name} row", limit):
        on_event(Note(remark, "warning"))
    if split_name == "train" and done.rows and not any(row.stops for row in done.rows):
        why = "the model will not learn to stop"
        on_event(Note(f"No trained row holds a token that stops a generation: {why}.", "warning"))
    if split_name == "train" and not done.rows:
        if done.unusable and not done.dropped:
            raise FormatError("No training row says which answer is better.", f"{done.unusable[0]}.")
        hint = "raise --max-seq-length, or see what is left of a row: mlx-adapters data check DATA."
        raise FormatError(f"No training row has anything to train within {limit}.", hint)
    labels = {row.desirable for row in done.rows}
    if split_name == "train" and config.objective.rows == "labeled" and len(labels) == 1:
        kind, other = ("good", "bad") if labels == {True} else ("bad", "good")
        on_event(Note(f"All answers are {kind} ones: nothing tells the model what a {other} one is.", "warning"))
    return done.rows


def told_passes(training: TrainConfig, rows: int, lines: int) -> str:
    """How long a run is, in passes over its rows, which fill so many lines of batches."""
    often = passes(training, lines)
    packed = f" in {count(lines, 'packed sequence')}" if training.packing else ""
    through = f"{number(often)} {'pass' if often == 1 else 'passes'} over {count(rows, 'row')}{packed}"
    return f"{count(training.course.iterations, 'iteration')} = {through}."


def require_validation(rows: tuple[Row, ...], config: TrainConfig, on_event: OnEvent) -> None:
    """Say what follows if there are no validation rows. Raises ConfigError if they are to stop the run."""
    if rows:
        return
    if config.early_stop is not None:
        hint = "add valid.jsonl ('mlx-adapters data split' makes one), or leave --early-stop out."
        raise ConfigError("early_stop needs validation rows, and there are none.", hint)
    on_event(Note("There are no validation rows: the last checkpoint will count as the best."))


def require_readable(rows: Sequence[Row], base: Base) -> None:
    """Raise ModelError for rows with a token that the base has no row for, ConfigError for rows longer than a model
    that learned each of its positions (GPT-2) can read."""
    for row in rows:
        for part in row.sequences:
            base.check_tokens(part.tokens, part.where)
    longest, positions = max((row.length for row in rows), default=0), base.positions
    if positions is not None and longest - 1 > positions:
        raise ConfigError(
            f"A row has {longest} tokens, more than the model's {positions} positions.",
            f"use --max-seq-length {positions + 1} or less.",
        )


@dataclass(frozen=True)
class Prepared:
    """What a loop needs."""

    train_step: TrainStep
    feed: Feed
    validation: Feed | None


def make_feeds(train: Sequence[Row], valid: Sequence[Row], config: TrainConfig, world: World) -> dict[str, Feed]:
    """What brings the rows of each split that has some, by "train" and "valid"."""
    feeds = {"train": make_feed(train, config, gpu=on_gpu(), world=world)}
    if valid:
        plain = replace(config, packing=False, batch_size=min(config.batch_size, len(valid)))
        feeds["valid"] = make_feed(valid, plain, gpu=on_gpu(), world=world)
    return feeds


def prepare(
    model: Model,
    config: TrainConfig,
    train: tuple[Row, ...],
    valid: tuple[Row, ...],
    adapted: dict[str, nn.Module],
    world: World = ALONE,
    reference: Mapping[str, np.ndarray] | None = None,
    memory: MemoryPlan | None = None,
) -> Prepared:
    """Feeds and TrainStep; settles how the loss is computed and refuses packing where it is not exact."""
    memory = memory or MemoryPlan("blocks" if config.grad_checkpoint else "nothing")
    feeds = {
        split: replace(feed, reference=(reference or {}).get(split), most=memory.positions)
        for split, feed in make_feeds(train, valid, config, world).items()
    }
    probe = probe_of(train)
    rounding = None
    if config.fuse_aware is not None:
        rounding = plan_rounding(load_module(model.base)[0], tuple(adapted), config.fuse_aware)
    with refusals(cannot_train):
        if not computes_as_generated(model.module, probe):
            raise ModelError(
                "mlx-lm's code for this model computes one function of a whole text, and another when it generates: "
                "what would be trained is not what answers."
            )
        if config.packing and not packing_is_exact(model.module, probe, make_batch([short_rows(train)], packed=True)):
            raise ConfigError("Rows cannot be packed exactly with this architecture.", "train without --packing.")
        plan = plan_loss(model.module, config, int(model.config.get("vocab_size", 1 << 16)), probe)
        train_step = TrainStep(model.module, adapted, config, plan, world, rounding, memory)
        if not settle_recomputing(train_step, probe):
            raise ConfigError(
                "This architecture's gradients change when its blocks are computed again.",
                f"train {'without --grad-checkpoint, ' if config.grad_checkpoint else ''}with --memory mlp.",
            )
    return Prepared(train_step, feeds["train"], feeds.get("valid"))


def cannot_train(why: str) -> ModelError:
    """What a model's own code raises in its first step."""
    if "vjp" in why.lower():  # a kernel without gradient, indices that MLX would have to differentiate
        return ModelError(f"mlx-lm's code for this model cannot be trained: it has no gradient on this device ({why}).")
    if "failed to load compiled" in why.lower():  # MLX's cache on CUDA: written in place
        return ModelError(
            f"MLX read a kernel that another process was just writing ({why}).",
            f"run it again; if it ends so each time, that process was killed meanwhile: remove '{compiled_folder()}'.",
        )
    return ModelError(
        f"mlx-lm's code for this model cannot be trained so: {why}.",
        "choose other --target-modules, such as q_proj,v_proj.",
    )
