"""The settings of an adapter and of its training, as frozen dataclasses that check themselves. Imports no MLX.

Beside its settings an objective says what it takes, for the rooms that prepare it: `rows` ("texts", "pairs" of a
chosen and a rejected answer, or "labeled" answers), whether it compares with a `reference` model, and whether it learns
the `likelihood` of the (chosen) text, as plain fine-tuning does. How its loss is computed: `optimization.objectives`.
"""

import dataclasses
import math
from typing import ClassVar, Literal, NamedTuple, get_args

from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.mapping import from_mapping, require, shown, to_mapping
from mlx_adapters.config.quantization import Dtype, Quantization, computing_dtype
from mlx_adapters.config.settings import check, setting, settings
from mlx_adapters.units import is_size

MOST_RANK = 1 << 16  # wider than the matrices themselves


@settings
@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how strongly: y = W x + scale · B A x (LoRA, arXiv 2106.09685).

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.LoraConfig(rank=16, target_modules=("q_proj", "v_proj"), ranks={"v_proj": 32}).rank
        16
    """

    rank: int = setting(8, "Rank, or one module's rank", at_least=1, at_most=MOST_RANK, metavar="N|NAME=N")
    scale: float = setting(20.0, "Factor on the update B·A", more="PEFT's alpha / rank.")
    dropout: float = setting(0.0, "Dropout on the adapter's input", at_least=0, below=1)
    target_modules: tuple[str, ...] | Literal["all"] = setting(
        "all",
        "Modules to adapt, comma-separated",
        more="Linear layers, by name (q_proj) or path (model.layers.3.mlp.up_proj); all: those of the adapted blocks.",
        metavar="NAMES|all",
    )
    num_layers: int | Literal["all"] = setting(
        "all", "How many of the last blocks to adapt", at_least=1, metavar="N|all"
    )
    type: Literal["lora", "dora", "full"] = setting(
        "lora",
        "Kind of adapter",
        more="dora: a trained magnitude for each output, too (arXiv 2402.09353); full: the model's own weights.",
    )
    ranks: dict[str, int] = setting(dict, "Other ranks, by module name")
    init: Literal["zero", "pissa", "loftq", "eva"] = setting(
        "zero",
        "What the update starts as",
        more="The base stays, so all of the start is in the adapter. pissa: the weight's principal part is trained "
        "(arXiv 2404.02948), the adapter is the difference and has twice the rank. loftq: what the base's quantization "
        "lost of `original` (arXiv 2310.08659). eva: A is where a layer's inputs vary most, and ranks go where they "
        "explain most, up to twice the rank in a layer (arXiv 2410.07170).",
    )
    original: str | None = setting(None, "The model that a quantized base was made of, for loftq", metavar="BASE")

    def __post_init__(self) -> None:
        check(self)
        if self.init == "pissa":
            require(self.dropout == 0, "PiSSA takes no dropout: it would act on the base's own weight.")
            require(self.scale > 0, f"PiSSA needs a scale above 0, not {self.scale}.")
            require(self.type == "lora", "PiSSA is for LoRA here, not for DoRA.")
        if self.init == "loftq":
            require(self.scale > 0, f"LoftQ needs a scale above 0, not {self.scale}.")
            named = self.original is not None
            require(named, "LoftQ needs the model that the base was made of.", "name it: --original.")
        require(self.original is None or self.init == "loftq", "Only LoftQ asks for an original model.")
        for name, rank in self.ranks.items():
            require(rank >= 1, f"the rank of '{name}' must be at least 1, not {shown(rank)}.")
            require(rank <= MOST_RANK, f"the rank of '{name}' must be at most {MOST_RANK:,}, not {shown(rank)}.")
        require(self.scale != 0, f"scale must be a number other than 0, not {self.scale}.")
        require(len(self.target_modules) > 0, "target_modules is empty.")


Rows = Literal["texts", "pairs", "labeled"]


def _beta(default: float, more: str) -> float:
    return setting(default, "How much a difference between answers counts", more=more, above=0)


def _label_smoothing() -> float:
    help = "Share of pairs taken to be the wrong way round"
    return setting(0.0, help, more="Conservative DPO.", at_least=0, below=0.5)


@dataclasses.dataclass(frozen=True)
class _Objective:
    """What an objective takes (see above), unless it says otherwise; its settings are checked."""

    rows: ClassVar[Rows] = "pairs"
    reference: ClassVar[bool] = False
    likelihood: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)


@settings
@dataclasses.dataclass(frozen=True)
class SFT(_Objective):
    """Supervised fine-tuning: the cross entropy of the trained tokens.

    Raises ConfigError for another name.

    Example:
        >>> ma.TrainConfig(iterations=100).objective
        SFT(name='sft')
    """

    name: Literal["sft"] = setting("sft", "The objective's name")

    rows: ClassVar[Rows] = "texts"
    likelihood: ClassVar[bool] = True


@settings
@dataclasses.dataclass(frozen=True)
class DPO(_Objective):
    """Direct preference optimization (arXiv 2305.18290): the chosen answer gains on the reference, the rejected loses.

    Raises ConfigError for a value out of range, or one that the loss does not use.

    Example:
        >>> ma.DPO(loss="ipo").beta
        0.1
    """

    beta: float = _beta(0.1, "How closely the model is held to the reference; of ipo the regularization τ.")
    loss: Literal["sigmoid", "ipo", "hinge"] = setting(
        "sigmoid", "Of the answers' difference", more="ipo: arXiv 2310.12036, per token; hinge: SLiC, arXiv 2305.10425."
    )
    label_smoothing: float = _label_smoothing()
    length_normalization: bool = setting(False, "Compare means per token, not sums", more="Of ipo it is always so.")
    name: Literal["dpo"] = setting("dpo", "The objective's name")

    reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        sigmoid = self.loss == "sigmoid" or self.label_smoothing == 0
        require(sigmoid, f"The loss '{self.loss}' has no label smoothing.", "use the loss 'sigmoid'.")


@settings
@dataclasses.dataclass(frozen=True)
class ORPO(_Objective):
    """Odds ratio preference optimization (arXiv 2403.07691): plain fine-tuning on the chosen answer, and the odds of
    it against the rejected one. Needs no reference.

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.ORPO().beta
        0.1
    """

    beta: float = _beta(0.1, "Weight of the odds ratio, λ in the paper.")
    name: Literal["orpo"] = setting("orpo", "The objective's name")

    likelihood: ClassVar[bool] = True


@settings
@dataclasses.dataclass(frozen=True)
class SimPO(_Objective):
    """Simple preference optimization (arXiv 2405.14734): DPO on means per token, with a margin and no reference.

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.SimPO().beta
        2.0
    """

    beta: float = _beta(2.0, "Factor on the difference of the means.")
    gamma: float = setting(1.0, "Margin that the chosen answer should have", at_least=0)
    label_smoothing: float = _label_smoothing()
    name: Literal["simpo"] = setting("simpo", "The objective's name")


@settings
@dataclasses.dataclass(frozen=True)
class KTO(_Objective):
    """Kahneman-Tversky optimization (arXiv 2402.01306): answers that are good or bad, each by itself. What an answer
    gains on the reference counts from the mean gain of answers that belong to other prompts (the KL term).

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.KTO(undesirable_weight=1.5).beta
        0.1
    """

    beta: float = _beta(0.1, "How closely the model is held to the reference.")
    desirable_weight: float = setting(1.0, "Weight of good answers", above=0)
    undesirable_weight: float = setting(1.0, "Weight of bad answers", above=0)
    name: Literal["kto"] = setting("kto", "The objective's name")

    rows: ClassVar[Rows] = "labeled"
    reference: ClassVar[bool] = True


Objective = SFT | DPO | ORPO | SimPO | KTO
OBJECTIVES: dict[str, type[Objective]] = {kind().name: kind for kind in get_args(Objective)}

MOST_BY_DEFAULT, LEAST_BY_DEFAULT, PASSES = 600, 100, 10  # iterations, and passes over the rows
EVERY = 100  # iterations between two validations, or two checkpoints
_EVERY = f"{EVERY}, or a tenth of a run that the rows make shorter"


class Course(NamedTuple):
    """The iterations of a run, and how many lie between two validations and two checkpoints."""

    iterations: int
    eval_every: int
    save_every: int


@settings
@dataclasses.dataclass(frozen=True)
class TrainConfig(DataConfig):
    """How an adapter is trained. One iteration is one update, of `batch_size` · `grad_accumulation` rows.

    Raises ConfigError for a value out of range, or one that another setting rules out.

    Example:
        >>> ma.TrainConfig(iterations=1000, schedule="cosine", warmup=50).batch_size
        4
        >>> try:
        ...     ma.TrainConfig(optimizer="adam", weight_decay=0.1)
        ... except ma.ConfigError as error:
        ...     print(error, error.hint)
        adam has no weight decay. use adamw.
    """

    objective: SFT | DPO | ORPO | SimPO | KTO = setting(
        SFT, "What is learned", means="sft: the rows as they are", more="dpo, orpo, simpo and kto learn preferences."
    )
    iterations: int | None = setting(
        None,
        "Optimizer updates",
        means=f"{MOST_BY_DEFAULT}, or {PASSES} passes over fewer rows",
        more=f"By default at least {LEAST_BY_DEFAULT}; a run records the number.",
        at_least=1,
    )
    epochs: float | None = setting(None, "Passes over the training rows, instead of `iterations`", above=0)
    batch_size: int = setting(4, "Rows per batch", more="With `packing`: packed sequences.", at_least=1)
    learning_rate: float = setting(1e-4, "Step size", means="1e-4", above=0)
    schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant",
        "How the learning rate falls",
        more="cosine and linear lower it to 0 at the last iteration, or that of `schedule_iterations`.",
    )
    schedule_iterations: int | None = setting(
        None,
        "Iteration at which `schedule` ends",
        means="the last one",
        more="A longer resume keeps its rate with the old number; a run in parts begins with that of the whole.",
        at_least=1,
    )
    warmup: int = setting(0, "Iterations of linear warm-up", at_least=0)
    optimizer: Literal["adam", "adamw", "sgd", "adafactor", "muon"] = setting("adamw", "Update rule")
    weight_decay: float = setting(0.0, "Weight decay", more="adam has none.", at_least=0)
    lora_plus_ratio: float = setting(
        1.0, "Learning rate of lora_b over that of lora_a (LoRA+)", more="arXiv 2402.12354.", above=0
    )
    max_grad_norm: float | None = setting(
        None, "Clip the gradient's norm", more="The global one.", means="no clipping", above=0
    )
    grad_accumulation: int = setting(1, "Batches per update", at_least=1, at_most=1_000_000)
    max_seq_length: int = setting(2048, "Longer rows lose their end", more="In tokens.", at_least=2)
    mask_prompt: bool = setting(False, "Train on the assistant's turns (or completions) only")
    last_turn_only: bool = setting(False, "With `mask_prompt`: on the last turn only")
    packing: bool = setting(False, "Put several rows in one sequence, kept apart exactly")
    grad_checkpoint: bool = setting(False, "Recompute activations: less memory, more time", more="The same gradients.")
    memory: Literal["auto", "nothing", "mlp", "blocks"] = setting(
        "auto",
        "What is computed again to save memory",
        means="auto: as little as fits",
        more="The MLPs, or whole blocks. A batch that does not fit even so is taken in parts: the same update.",
    )
    memory_limit: str | None = setting(None, "Most memory to use, such as 12GB", means="this machine's", metavar="SIZE")
    chunked_loss: Literal["auto", "on", "off"] = setting(
        "auto", "Never hold all logits", means="auto: where it is exact"
    )
    fuse_aware: Quantization | None = setting(None, "Train through the rounding of a fuse to BITS", metavar="BITS")
    fuse_aware_from: int = setting(0, "Iteration after which the rounding is trained through", at_least=0)
    eval_every: int | None = setting(
        None, "Iterations between validations", means=_EVERY, more="Without `iterations` the rows decide.", at_least=1
    )
    eval_batches: int | None = setting(None, "Validation batches", means="all", at_least=1)
    report_every: int = setting(10, "Iterations between reports", at_least=1)
    save_every: int | None = setting(
        None, "Iterations between checkpoints", means=_EVERY, more="Without `iterations` the rows decide.", at_least=1
    )
    save_every_minutes: float | None = setting(None, "Also save after so many minutes", above=0)
    keep: int | None = setting(None, "Checkpoints to keep besides the best", means="all", at_least=1)
    early_stop: int | None = setting(None, "Stop after so many validations without a better loss", at_least=1)
    seed: int = setting(0, "Seed of initialization, order and dropout", at_least=0, below=1 << 64)
    dtype: Dtype = computing_dtype()
    valid_fraction: float | None = setting(
        None,
        "Share of the training rows to validate by, where there are no validation rows",
        more="Equal rows stay together.",
        above=0,
        below=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.iterations is None or self.epochs is None, "iterations and epochs say the same.", "give one.")
        long = self.iterations is None or self.warmup < self.iterations
        require(long, "warmup must be shorter than the training itself.")
        falls = self.schedule_iterations is None or self.schedule != "constant"
        require(falls, "schedule_iterations needs a schedule that ends.", "use --schedule cosine or linear.")
        both = not self.grad_checkpoint or self.memory in ("auto", "blocks")
        require(both, f"grad_checkpoint computes blocks again, not {self.memory}.", "leave one of both out.")
        with_unit = self.memory_limit is None or is_size(self.memory_limit)
        require(with_unit, f"memory_limit cannot be {shown(self.memory_limit)}.", "write 12GB or 800MB.")
        end = self.schedule_iterations or self.iterations
        require(end is None or self.warmup < end, "warmup must be shorter than the schedule.")
        require(self.optimizer != "adam" or self.weight_decay == 0, "adam has no weight decay.", "use adamw.")
        texts = self.objective.rows == "texts"
        require(self.mask_prompt or not (texts and self.last_turn_only), "last_turn_only needs mask_prompt.")
        require(
            texts or not self.packing,
            f"{self.objective.name} cannot pack rows: it compares whole answers.",
            "train without --packing.",
        )
        in_time = self.early_stop is None or self.iterations is None or self.course.eval_every < self.iterations
        require(in_time, "early_stop needs an evaluation before the end.", "evaluate more often, or leave it out.")
        require(self.fuse_aware is not None or self.fuse_aware_from == 0, "fuse_aware_from needs fuse_aware.")

    @property
    def course(self) -> Course:
        """When a run ends, validates and saves; what the rows decide is settled when they are known (`settled`)."""
        return Course(self.iterations or MOST_BY_DEFAULT, self.eval_every or EVERY, self.save_every or EVERY)


def passes(training: TrainConfig, lines: int) -> float:
    """How often a run goes through the rows that fill so many lines of batches: a row each, or a packed sequence."""
    return training.course.iterations * training.grad_accumulation / -(-lines // training.batch_size)


def settled(training: TrainConfig, lines: int) -> TrainConfig:
    """The same settings with what was left to the rows, which fill so many lines of batches. Raises ConfigError where
    a setting does not go with that."""
    iterations, every = training.iterations, EVERY
    if iterations is None:
        updates = -(-lines // training.batch_size) / training.grad_accumulation  # in a pass
        asked = math.ceil((training.epochs or PASSES) * updates - 1e-9)
        iterations = max(asked, 1) if training.epochs else min(max(asked, LEAST_BY_DEFAULT), MOST_BY_DEFAULT)
        every = min(max(iterations // 10, 1), EVERY)
    evaluated, saved = training.eval_every or every, training.save_every or every
    return dataclasses.replace(training, iterations=iterations, epochs=None, eval_every=evaluated, save_every=saved)


def with_objective(training: TrainConfig, objective: Objective | str | None) -> TrainConfig:
    """The same settings with another objective, given by name or as settings. Raises ConfigError for an unknown one."""
    if objective is None:
        return training
    if isinstance(objective, str):
        return from_mapping(TrainConfig, to_mapping(training) | {"objective": objective})
    return dataclasses.replace(training, objective=objective)
