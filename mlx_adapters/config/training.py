"""The settings of an adapter and of its training, as frozen dataclasses that check themselves. Imports no MLX."""

import dataclasses
import math
from typing import Literal

from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import DTYPES, Quantization

ADAPTER_TYPES = ("lora", "dora")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how strongly: y = W x + scale · B A x (LoRA, arXiv 2106.09685).

    Args:
        rank: width of the update.
        scale: the factor on B·A; PEFT's alpha / rank.
        dropout: share of the adapter's inputs that training drops, from 0 to below 1.
        target_modules: names (`q_proj`) or paths (`model.layers.3.mlp.up_proj`) of linear layers; "all": every one of
            the adapted blocks.
        num_layers: how many of the last blocks are adapted, or "all".
        type: "dora" adds a trained magnitude for each output (arXiv 2402.09353).
        ranks: module name -> another rank.

    Raises ConfigError for a value out of range.

    Example:
        >>> ma.LoraConfig(rank=16, target_modules=("q_proj", "v_proj"), ranks={"v_proj": 32}).rank
        16
    """

    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all"] = "all"
    num_layers: int | Literal["all"] = "all"
    type: Literal["lora", "dora"] = "lora"
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, rank in self.ranks.items():
            require(rank >= 1, f"the rank of '{name}' must be at least 1, not {rank}.")
        require(self.rank >= 1, f"rank must be at least 1, not {self.rank}.")
        require(
            math.isfinite(self.scale) and self.scale != 0, f"scale must be a number other than 0, not {self.scale}."
        )
        require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}.")
        require(self.type in ADAPTER_TYPES, f"type must be 'lora' or 'dora', not '{self.type}'.")
        require(self.target_modules == "all" or len(self.target_modules) > 0, "target_modules is empty.")
        require(
            self.num_layers == "all" or self.num_layers >= 1, f"num_layers must be at least 1, not {self.num_layers}."
        )


OPTIMIZERS = ("adam", "adamw", "sgd", "adafactor", "muon")
SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained. One iteration is one update, of `batch_size` · `grad_accumulation` rows.

    Args:
        iterations: updates of the whole run.
        batch_size: rows (or packed sequences) of one forward pass.
        learning_rate: step size, after the warm-up.
        schedule: how the learning rate goes on: "cosine" and "linear" lower it to 0 at the last iteration.
        warmup: iterations in which it first rises linearly from 0.
        optimizer: the update rule.
        weight_decay: of the optimizer; "adam" has none.
        lora_plus_ratio: learning rate of lora_b over that of lora_a (LoRA+, arXiv 2402.12354).
        max_grad_norm: clip the gradient's global norm; None: no clipping.
        grad_accumulation: batches whose gradients make one update.
        max_seq_length: tokens; longer rows lose their end.
        mask_prompt: the loss counts the assistant's turns (or completions) alone.
        last_turn_only: with `mask_prompt`: the last turn alone.
        packing: put several rows in one sequence, kept apart exactly.
        grad_checkpoint: recompute activations: less memory, more time, the same gradients.
        chunked_loss: never hold all logits; "auto": where that is exact.
        fuse_aware: train through the rounding of a later fuse to this precision.
        fuse_aware_from: the iteration after which that begins.
        eval_every: iterations between validations.
        eval_batches: batches of a validation; None: all.
        report_every: iterations between reports.
        save_every: iterations between checkpoints.
        save_every_minutes: also save after so many minutes.
        keep: checkpoints to keep besides the best; None: all.
        early_stop: stop after so many validations without a better loss; None: never.
        seed: of initialization, order and dropout.
        dtype: to compute in; "auto": float32 on a CPU, the model's own on a GPU.

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

    iterations: int = 600
    batch_size: int = 4
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    optimizer: Literal["adam", "adamw", "sgd", "adafactor", "muon"] = "adamw"
    weight_decay: float = 0.0
    lora_plus_ratio: float = 1.0
    max_grad_norm: float | None = None
    grad_accumulation: int = 1
    max_seq_length: int = 2048
    mask_prompt: bool = False
    last_turn_only: bool = False
    packing: bool = False
    grad_checkpoint: bool = False
    chunked_loss: Literal["auto", "on", "off"] = "auto"
    fuse_aware: Quantization | None = None
    fuse_aware_from: int = 0
    eval_every: int = 100
    eval_batches: int | None = None
    report_every: int = 10
    save_every: int = 100
    save_every_minutes: float | None = None
    keep: int | None = None
    early_stop: int | None = None
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        positive = (
            "iterations",
            "batch_size",
            "grad_accumulation",
            "eval_every",
            "eval_batches",
            "report_every",
            "save_every",
            "keep",
            "early_stop",
        )
        for name in positive:
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}.")
        for name in ("learning_rate", "lora_plus_ratio", "max_grad_norm", "save_every_minutes"):
            value = getattr(self, name)
            good = value is None or (math.isfinite(value) and value > 0)
            require(good, f"{name} must be a number above 0, not {value}.")
        for name in ("weight_decay", "warmup", "fuse_aware_from", "seed"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} must be at least 0, not {value}.")
        require(self.seed < 1 << 64, f"seed must be below 2**64, not {self.seed}.")
        require(self.max_seq_length >= 2, f"max_seq_length must be at least 2, not {self.max_seq_length}.")
        self._check_choices()

    def _check_choices(self) -> None:
        choices = (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("dtype", DTYPES),
            ("chunked_loss", ("auto", "on", "off")),
        )
        for name, known in choices:
            value = getattr(self, name)
            require(value in known, f"There is no {name} '{value}'.", f"there are: {', '.join(known)}.")
        require(self.warmup < self.iterations, "warmup must be shorter than the training itself.")
        require(self.optimizer != "adam" or self.weight_decay == 0, "adam has no weight decay.", "use adamw.")
        require(self.mask_prompt or not self.last_turn_only, "last_turn_only needs mask_prompt.")
        in_time = self.early_stop is None or self.eval_every < self.iterations
        require(in_time, "early_stop needs an evaluation before the end.", f"use --eval-every below {self.iterations}.")
        require(self.fuse_aware is not None or self.fuse_aware_from == 0, "fuse_aware_from needs fuse_aware.")
