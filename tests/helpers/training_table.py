"""Ways to train, and every setting among them: what an exact resume is tried with.

A setting that joins LoraConfig or TrainConfig must join a row here (`test_every_setting_is_in_the_table`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_adapters import LoraConfig, Quantization, TrainConfig
from mlx_adapters.config.training import DPO, KTO, ORPO, SimPO

LORA = {"rank": 4, "scale": 2.0, "dropout": 0.1}
TRAINING = {
    "iterations": 10,
    "batch_size": 3,
    "learning_rate": 0.01,
    "eval_every": 4,
    "save_every": 3,
    "report_every": 2,
    "seed": 7,
}


@dataclass(frozen=True)
class Way:
    """One way to train: settings besides LORA and TRAINING, the base, whether it starts from an adapter, whether the
    data has validation rows, and whether an adapter is the reference."""

    lora: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    init_from: bool = False
    validated: bool = True
    reference: bool = False

    def data_in(self, folders: Mapping[str, Path]) -> Path:
        """What it is trained on, of what `write_rows_of_each_kind` wrote."""
        folder = folders[self.settings[1].objective.rows]
        return folder if self.validated else folder / "train.jsonl"

    def made(self, tiny_model: Callable[..., Path]) -> tuple[Path, LoraConfig, TrainConfig]:
        """Its base, and its settings with the model that the base was made of, if they ask for one."""
        lora, training = self.settings
        named = {"architecture": "llama"} | self.base
        if lora.original:
            lora = replace(lora, original=str(tiny_model(architecture=named["architecture"])))
        return tiny_model(**named), lora, training

    @property
    def settings(self) -> tuple[LoraConfig, TrainConfig]:
        return LoraConfig(**LORA | self.lora), TrainConfig(**TRAINING | self.training)


FULL = {"type": "full", "rank": LoraConfig.rank, "scale": LoraConfig.scale, "dropout": 0.0}
CLIPPED = {"max_grad_norm": 0.05}  # so low that every step is clipped
QUARTER = Quantization(4, 32)
TEMPLATE = "{%- for m in messages %}{{ style }} {{ m.role }}: {{ m.content }}{{ eos_token }}{%- endfor %}"
WAYS = {
    "adam": Way({}, {"optimizer": "adam", **CLIPPED}),
    "adamw": Way({}, {"weight_decay": 0.1, "lora_plus_ratio": 4.0, **CLIPPED}),
    "sgd": Way({}, {"optimizer": "sgd", "schedule": "cosine", "schedule_iterations": 8, "warmup": 2, **CLIPPED}),
    "adafactor": Way({}, {"optimizer": "adafactor", "schedule": "linear", **CLIPPED}),
    "muon": Way({}, {"optimizer": "muon", "grad_accumulation": 2, **CLIPPED}),
    "muon, experts": Way({}, {"optimizer": "muon", **CLIPPED}, {"architecture": "qwen3_moe"}),
    "without dropout": Way({"dropout": 0.0}, {"text_column": "completion", "iterations": None, "epochs": 2, **CLIPPED}),
    "some modules": Way(
        {"target_modules": ("q_proj", "v_proj"), "num_layers": 1, "ranks": {"v_proj": 2}},
        {"prompt_column": "completion", "completion_column": "prompt"},
    ),
    "embeddings": Way({"target_modules": ("embed_tokens", "v_proj")}, CLIPPED),
    "pissa": Way(
        {"init": "pissa", "dropout": 0.0, "target_modules": ("q_proj", "down_proj"), "ranks": {"down_proj": 2}},
        {"weight_decay": 0.1, **CLIPPED},
    ),
    "eva": Way({"init": "eva"}, CLIPPED),
    "loftq": Way({"init": "loftq", "original": "the base, unquantized"}, CLIPPED, {"bits": 4, "group_size": 32}),
    "dora": Way({"type": "dora"}, {"mask_prompt": True, **CLIPPED}),
    "full": Way({**FULL, "num_layers": 1}, {"memory": "mlp", **CLIPPED}, {"bits": 4, "group_size": 32}),
    "full, named": Way(
        {**FULL, "target_modules": ("input_layernorm", "v_proj", "embed_tokens", "switch_mlp.up_proj")},
        CLIPPED,
        {"architecture": "qwen3_moe"},
    ),
    "packing": Way({}, {"packing": True, "max_seq_length": 96, "batch_size": 2, "grad_accumulation": 3, **CLIPPED}),
    "less memory, chunks of a gated delta rule": Way(
        {},
        {"grad_checkpoint": True, "chunked_loss": "on", "packing": True, "max_seq_length": 72, "batch_size": 1}
        | {"iterations": 6, **CLIPPED},
        {"architecture": "qwen3_5"},
    ),
    "MLPs computed again": Way({}, {"memory": "mlp", **CLIPPED}),
    "hardly any memory": Way({}, {"memory_limit": "1MB", **CLIPPED}),
    "plain loss": Way(
        {},
        {
            "memory": "nothing",
            "chunked_loss": "off",
            "mask_prompt": True,
            "last_turn_only": True,
            "messages_column": "talk",
            "chat_template": TEMPLATE,
            "chat_template_args": {"style": "brief"},
        },
    ),
    "bfloat16": Way({}, {"dtype": "bfloat16", **CLIPPED}),
    "float16": Way({}, {"dtype": "float16", "learning_rate": 0.001, **CLIPPED}),
    "float32": Way({}, {"dtype": "float32"}, {"bits": 4, "group_size": 32}),
    "fuse-aware": Way({}, {"fuse_aware": QUARTER, "fuse_aware_from": 4, **CLIPPED}),
    "fuse-aware, its base": Way({}, {"fuse_aware": QUARTER, **CLIPPED}, {"bits": 4, "group_size": 32}),
    "early stop": Way(
        {},
        {
            "learning_rate": 3.0,
            "optimizer": "sgd",
            "early_stop": 2,
            "eval_every": 1,
            "eval_batches": 1,
            "iterations": 30,
            "max_grad_norm": 5.0,
        },
    ),
    "few kept": Way(
        {},
        {"keep": 1, "save_every": 2, "eval_every": 2, "save_every_minutes": 1e9, "valid_fraction": 0.3, **CLIPPED},
        validated=False,
    ),
    "from an adapter": Way({}, CLIPPED, init_from=True),
    "dpo": Way({}, {"objective": DPO(beta=0.3), "grad_accumulation": 2, **CLIPPED}),
    "dpo, smoothed": Way({}, {"objective": DPO(label_smoothing=0.1, length_normalization=True), "batch_size": 1}),
    "dpo, ipo": Way({}, {"objective": DPO(loss="ipo"), "grad_checkpoint": True, **CLIPPED}, init_from=True),
    "dpo, hinge": Way({"type": "dora"}, {"objective": DPO(loss="hinge"), "chunked_loss": "off"}, reference=True),
    "orpo": Way({}, {"objective": ORPO(beta=0.5), "optimizer": "muon", **CLIPPED}),
    "orpo, answers alone": Way({"dropout": 0.0}, {"objective": ORPO(), "mask_prompt": True, "dtype": "bfloat16"}),
    "simpo": Way({}, {"objective": SimPO(beta=1.5, gamma=0.5, label_smoothing=0.1), "last_turn_only": True}),
    "kto": Way(
        {}, {"objective": KTO(beta=0.2), "batch_size": 2, "grad_accumulation": 2, "memory": "blocks", **CLIPPED}
    ),
    "kto, weights": Way(
        {},
        {"objective": KTO(desirable_weight=0.7, undesirable_weight=1.4), "fuse_aware": QUARTER, "fuse_aware_from": 4},
        {"bits": 4, "group_size": 32},
    ),
}
