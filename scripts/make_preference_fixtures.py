"""Make tests/fixtures/preferences.safetensors: losses and gradients as TRL computes them, for tests without torch.

    pip install torch trl==1.16.0 peft==0.21.2 'mlx[cpu]' mlx-lm && python scripts/make_preference_fixtures.py

A tiny Llama of the tests (random weights) with a LoRA adapter on q_proj and v_proj, both factors random; the
reference is the model with the adapter off. TRL's own trainers compute the losses; here they are only given batches.

Tensors: `adapter/NAME` (mlx-lm's names and orientation), `tokens/SIDE/ROW` and `answers/SIDE/ROW` (which tokens are
the answer's) for SIDE chosen, rejected and mismatched, and `gradient/CASE/NAME`. The file's metadata holds, as JSON,
each case's objective, its settings, the loss and TRL's metrics.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TESTS = Path(__file__).parents[1] / "tests"
TARGET = TESTS / "fixtures" / "preferences.safetensors"
# (prompt, chosen, rejected) in tokens: answers of one token, a short and a long one, like lengths.
LENGTHS = [(5, 7, 3), (3, 1, 1), (9, 2, 12), (4, 6, 6)]
LABELS = [True, False, True, True]
PAIR = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
ROW = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
Rows = list[tuple[np.ndarray, np.ndarray]]  # tokens, and which of them are the answer's


def make_rows() -> dict[str, Rows]:
    """Each side's rows. The third row's chosen answer is the beginning of its rejected one."""
    random = np.random.default_rng(0)
    draw = lambda count: random.integers(3, 500, count)  # noqa: E731
    rows: dict[str, Rows] = {"chosen": [], "rejected": [], "mismatched": []}
    prompts = []
    for prompt, chosen, rejected in LENGTHS:
        prompts.append(draw(prompt))
        answers = {"chosen": draw(chosen), "rejected": draw(rejected)}
        answers["rejected"][:chosen] = answers["chosen"] if (prompt, chosen) == (9, 2) else answers["rejected"][:chosen]
        for side, answer in answers.items():
            rows[side].append(joined(prompts[-1], answer))
    answers = [tokens[mask] for tokens, mask in rows["chosen"]]
    rows["mismatched"] = [joined(p, a) for p, a in zip(prompts, [answers[-1], *answers[:-1]], strict=True)]
    return rows


def joined(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.concatenate([prompt, answer])
    return tokens, np.arange(len(tokens)) >= len(prompt)


def padded(rows: Rows, value: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, attention mask, answer mask), each (rows, width) int64."""
    shape = (len(rows), max(len(tokens) for tokens, _ in rows))
    tokens, real, answer = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    tokens += value
    for i, (row, mask) in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        real[i, : len(row)] = 1
        answer[i, : len(row)] = torch.tensor(mask)
    return tokens, real, answer


def dpo_inputs(rows: dict[str, Rows]) -> dict[str, torch.Tensor]:
    tokens, real, answer = padded(rows["chosen"] + rows["rejected"])
    return {"input_ids": tokens, "attention_mask": real, "completion_mask": answer}


def kto_inputs(rows: dict[str, Rows], labels: list[bool]) -> dict[str, Any]:
    tokens, real, answer = padded(rows["chosen"])
    others, others_real, others_answer = padded(rows["mismatched"])
    return {
        "input_ids": tokens,
        "attention_mask": real,
        "completion_mask": answer,
        "KL_input_ids": others,
        "KL_attention_mask": others_real,
        "KL_completion_mask": others_answer,
        "label": torch.tensor(labels),
    }


def cpo_inputs(rows: dict[str, Rows]) -> dict[str, torch.Tensor]:
    inputs = {}
    for side in ("chosen", "rejected"):
        tokens, real, answer = padded(rows[side])
        labels = torch.where(answer == 1, tokens, -100)
        inputs |= {f"{side}_input_ids": tokens, f"{side}_attention_mask": real, f"{side}_labels": labels}
    return inputs


class Maker:
    """The model, and each case's loss and gradients."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, tempfile.mkdtemp()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rows = make_rows()

    def new_model(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return get_peft_model(model, config)

    def adapter(self) -> dict[str, torch.Tensor]:
        model = with_factors(self.new_model())
        return {mlx_name(n): p.data.T.contiguous() for n, p in model.named_parameters() if ".default." in n}

    def trainer(self, kind: Callable, config: Callable, data: list[dict], settings: dict[str, Any]) -> Any:
        set_seed(0)
        args = config(
            output_dir=self.work, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=2, **settings
        )
        made = kind(
            model=self.new_model(), args=args, train_dataset=Dataset.from_list(data), processing_class=self.tokenizer
        )
        with_factors(made.model)  # only now: a copy of the untrained adapter, which does nothing, is the reference
        return made

    def by_loss(self, trainer: Any, inputs: dict[str, Any]) -> tuple[float, dict, dict]:
        return self._taken(trainer, lambda model: trainer.compute_loss(model, inputs), trainer._metrics["train"])

    def by_metrics(self, trainer: Any, inputs: dict[str, Any]) -> tuple[float, dict, dict]:
        metrics: dict[str, float] = {}

        def loss(model: Any) -> torch.Tensor:
            value, figures = trainer.get_batch_loss_metrics(model, inputs)
            metrics.update(figures)
            return value

        return self._taken(trainer, loss, metrics)

    def _taken(self, trainer: Any, loss: Callable, metrics: dict) -> tuple[float, dict, dict]:
        model = trainer.model
        model.train()
        model.zero_grad()
        value = loss(model)
        value.backward()
        gradients = {mlx_name(n): p.grad.T.contiguous() for n, p in model.named_parameters() if p.requires_grad}
        figures = {k: (v[-1] if isinstance(v, list) else v) for k, v in metrics.items()}
        wanted = ("rewards", "logps", "kl")
        return value.item(), gradients, {k: float(v) for k, v in figures.items() if k.startswith(wanted)}

    def dpo(self, loss: str, inputs: dict | None = None, **settings: Any) -> tuple[float, dict, dict]:
        trainer = self.trainer(DPOTrainer, DPOConfig, PAIR, {"loss_type": [loss], **settings})
        return self.by_loss(trainer, inputs or dpo_inputs(self.rows))

    def smoothed_dpo(self, **settings: Any) -> tuple[float, dict, dict]:
        """Of a single pair 'aot' is the smoothed sigmoid loss, which the 'sigmoid' of this TRL leaves out."""
        cases = []
        for i in range(len(LENGTHS)):
            one = {side: rows[i : i + 1] for side, rows in self.rows.items()}
            cases.append(self.dpo("aot", dpo_inputs(one), **settings))
        return combined([(1 / len(cases), case) for case in cases])

    def kto(self, labels: list[bool] = LABELS, rows: dict | None = None, **settings: Any) -> tuple[float, dict, dict]:
        trainer = self.trainer(KTOTrainer, KTOConfig, ROW, settings)
        return self.by_loss(trainer, kto_inputs(rows or self.rows, labels))

    def orpo(self, **settings: Any) -> tuple[float, dict, dict]:
        trainer = self.trainer(ORPOTrainer, ORPOConfig, PAIR, settings)
        return self.by_metrics(trainer, cpo_inputs(self.rows))

    def simpo(self, **settings: Any) -> tuple[float, dict, dict]:
        settings = {"loss_type": "simpo", "cpo_alpha": 0.0, **settings}
        return self.by_metrics(self.trainer(CPOTrainer, CPOConfig, PAIR, settings), cpo_inputs(self.rows))

    def masked_orpo(self, beta: float) -> tuple[float, dict, dict]:
        """ORPO's likelihood over the answer alone: CPO's, in the place of the one over the whole row."""
        whole, odds = self.orpo(beta=0.0), self.orpo(beta=beta)
        with_likelihood, without = (self.simpo(cpo_alpha=alpha) for alpha in (1.0, 0.0))
        return combined([(1, odds), (-1, whole), (1, with_likelihood), (-1, without)])


def with_factors(model: Any) -> Any:
    """The same model with random factors in the adapter that is trained."""
    random = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if ".default." in name:
            value.data = torch.randn(value.shape, generator=random) * 0.3
    return model


def combined(parts: list[tuple[float, tuple[float, dict, dict]]]) -> tuple[float, dict, dict]:
    names = parts[0][1][1]
    gradients = {name: sum(share * case[1][name] for share, case in parts) for name in names}
    return sum(share * case[0] for share, case in parts), gradients, {}


def mlx_name(name: str) -> str:
    path = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
    return path.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def reversed_rows(rows: dict[str, Rows]) -> dict[str, Rows]:
    """Matched and mismatched answers change places: the KL of the one or the other is below 0."""
    return {"chosen": rows["mismatched"], "mismatched": rows["chosen"], "rejected": rows["rejected"]}


def main() -> None:
    disable_progress_bar()
    disable_progress_bars()
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    from helpers.tiny_models import build_model

    with tempfile.TemporaryDirectory() as work:
        maker = Maker(build_model(Path(work) / "llama", "llama"))
        other = reversed_rows(maker.rows)
        cases: dict[str, tuple[str, dict[str, Any], tuple[float, dict, dict]]] = {
            "dpo": ("dpo", {}, maker.dpo("sigmoid", beta=0.1)),
            "dpo, beta": ("dpo", {"beta": 0.7}, maker.dpo("sigmoid", beta=0.7)),
            "dpo, hinge": ("dpo", {"loss": "hinge", "beta": 0.3}, maker.dpo("hinge", beta=0.3)),
            "dpo, ipo": ("dpo", {"loss": "ipo", "beta": 0.2}, maker.dpo("ipo", beta=0.2)),
            "dpo, per token": (
                "dpo",
                {"length_normalization": True, "beta": 2.0},
                maker.dpo("sigmoid_norm", beta=2.0),
            ),
            "dpo, smoothed": (
                "dpo",
                {"label_smoothing": 0.2, "beta": 0.3},
                maker.smoothed_dpo(label_smoothing=0.2, beta=0.3),
            ),
            "orpo": ("orpo", {}, maker.orpo(beta=0.1)),
            "orpo, beta": ("orpo", {"beta": 1.5}, maker.orpo(beta=1.5)),
            "orpo, masked": ("orpo", {"beta": 0.4, "mask_prompt": True}, maker.masked_orpo(0.4)),
            "simpo": ("simpo", {}, maker.simpo(beta=2.0, simpo_gamma=1.0)),
            "simpo, smoothed": (
                "simpo",
                {"beta": 3.0, "gamma": 0.5, "label_smoothing": 0.1},
                maker.simpo(beta=3.0, simpo_gamma=0.5, label_smoothing=0.1),
            ),
            "kto": ("kto", {}, maker.kto()),
            "kto, weights": (
                "kto",
                {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 2.4},
                maker.kto(beta=0.3, desirable_weight=0.8, undesirable_weight=2.4),
            ),
            "kto, the other way": ("kto", {"beta": 0.3}, maker.kto(rows=other, beta=0.3)),
            "kto, all desirable": ("kto", {}, maker.kto([True] * 4)),
            "kto, none desirable": ("kto", {}, maker.kto([False] * 4)),
        }
        tensors = {f"adapter/{name}": value for name, value in maker.adapter().items()}
        for side, rows in maker.rows.items():
            for i, (tokens, mask) in enumerate(rows):
                tensors[f"tokens/{side}/{i}"] = torch.tensor(tokens, dtype=torch.int32)
                tensors[f"answers/{side}/{i}"] = torch.tensor(mask)
    about = {}
    for name, (objective, settings, (loss, gradients, metrics)) in cases.items():
        about[name] = {"objective": objective, "settings": settings, "loss": loss, "metrics": metrics}
        if objective == "kto":
            about[name]["labels"] = {"kto, all desirable": [True] * 4, "kto, none desirable": [False] * 4}.get(
                name, LABELS
            )
        tensors |= {f"gradient/{name}/{tensor}": value for tensor, value in gradients.items()}
        print(f"{name:22} {loss:.6f} {metrics}")
    save_file(tensors, TARGET, metadata={"cases": json.dumps(about)})
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
