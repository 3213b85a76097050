"""Is what this device computes right? Training, fusing and generating a tiny model, each held against another way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.training import LoraConfig, TrainConfig
from mlx_adapters.data.datasets import read_data
from mlx_adapters.demo.tiny import ROW, make_base, write_data
from mlx_adapters.evaluation.scores import greedy_answers
from mlx_adapters.events import ignore
from mlx_adapters.fusion.fuse import fuse
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.layers import named_layers
from mlx_adapters.models.loading import load_model, load_tokenizer_of
from mlx_adapters.models.model import Model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.storage import tensor_files
from mlx_adapters.storage.tensor_names import BIASES, SCALES, WEIGHT, join
from mlx_adapters.system.door import mx
from mlx_adapters.training import setup
from mlx_adapters.training.runs import train
from mlx_adapters.units import count

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
LORA = LoraConfig(rank=4, scale=8.0)
EVERYWHERE = replace(LORA, target_modules=("embed_tokens", *(f"{name}_proj" for name in LINEAR)))
TRAINING = TrainConfig(iterations=4, batch_size=2, learning_rate=1e-2, save_every=2, eval_every=4, dtype="float32")
NEAREST = FuseOptions(method="nearest", check=False)
GROUP = 64


@dataclass(frozen=True)
class Outcome:
    """Whether a check passed, and what it saw, in a few words."""

    passed: bool
    seen: str


class Numbers:
    """The numerical checks; they share a base and an adapter that are made in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def base(self) -> Path:
        """The tiny base."""
        return make_base(self.folder / "base")

    @cached_property
    def data(self) -> Path:
        """The rows it is trained on."""
        return write_data(self.folder / "data")

    @cached_property
    def adapter(self) -> Adapter:
        """Four iterations, in one run."""
        train(self.base, self.data, name="whole", lora=LORA, training=TRAINING, on_event=ignore)
        return load_adapter("whole@4")

    def gradient(self) -> Outcome:
        """Along the gradient g the loss rises by |g| per unit: against differences of losses."""
        model = load_model(resolve_base(self.base), dtype="float32")
        prepared = self._prepared(model)
        train_step, draw = prepared.train_step, prepared.feed.draw([np.array([0, 1])])
        noise = {
            name: 0.05 * mx.random.normal(w.shape, key=mx.random.key(i))
            for i, (name, w) in enumerate(train_step.weights.items())
        }
        middle = train_step.weights = {name: w + noise[name] for name, w in train_step.weights.items()}
        gradient = train_step.gradient_of(draw.batches[0], "nothing")
        slope = float(np.sqrt(sum(mx.sum(g * g).item() for g in gradient.values())))
        step = 0.05 / slope  # moves the loss by about 0.05 nats

        def loss(sign: int) -> float:
            train_step.weights = {name: w + sign * step / slope * gradient[name] for name, w in middle.items()}
            return train_step.evaluate(draw)[0]

        measured = (loss(1) - loss(-1)) / (2 * step)
        error = abs(measured / slope - 1)
        return Outcome(error < 0.03, f"off by {100 * error:.2g} % from differences of losses")

    def _prepared(self, model: Model) -> setup.Prepared:
        setup.add_layers(model, LORA, seed=0)
        data = read_data(self.data)
        tokenizer = load_tokenizer_of(model.base)
        rows = setup.tokenize_split(data, "train", tokenizer, TRAINING, lambda _: None)
        layers = named_layers(model.module)
        prepared = setup.prepare(model, TRAINING, rows, (), dict(layers))
        return prepared

    def resume(self) -> Outcome:
        """Two iterations and two after a resume, against four in one run, the embedding included, where equal tokens
        are added up: equal to the bit."""
        for name, iterations in (("once", 4), ("parts", 2)):
            training = replace(TRAINING, iterations=iterations)
            train(self.base, self.data, name=name, lora=EVERYWHERE, training=training, on_event=ignore)
        train(name="parts", training=TRAINING, resume=True, on_event=ignore)
        whole, parts = (load_adapter(f"{name}@4").weights for name in ("once", "parts"))
        unlike = [name for name, weight in whole.items() if not mx.array_equal(weight, parts[name]).item()]
        what = f"{len(unlike)} of {count(len(whole), 'tensor')} differ" if unlike else "equal to the bit"
        return Outcome(not unlike, f"4 iterations, resumed after 2: {what}")

    def fused_bits(self) -> Outcome:
        """A fuse to 4 bits against rounding in NumPy."""
        out = self.folder / "fused-4"
        fuse(self.base, self.adapter, out, quantization=4, options=NEAREST, on_event=ignore)
        dense, fused = (tensor_files.read_safetensors(f / "model.safetensors") for f in (self.base, out))
        ours = ideal = 0.0
        for path, a, b, _ in self.adapter.layers():
            weight = np.array(dense[join(path, WEIGHT)]) + LORA.scale * (np.array(a) @ np.array(b)).T
            stored = unpacked(*(np.array(fused[join(path, leaf)]) for leaf in (WEIGHT, SCALES, BIASES)))
            ours += float(((stored - weight) ** 2).sum())
            ideal += float(((rounded(weight) - weight) ** 2).sum())
        ratio = (ours / ideal) ** 0.5
        return Outcome(0.9 < ratio < 1.05, f"rounding error {ratio:.3f} of NumPy's")

    def generation(self) -> Outcome:
        """Logits with the adapter attached against those of the unquantized fused model; both write a text."""
        out = self.folder / "fused"
        fuse(self.base, self.adapter, out, quantization="none", options=NEAREST, on_event=ignore)
        attached, fused = (
            load_model(resolve_base(self.base), self.adapter, dtype="float32"),
            load_model(resolve_base(out), dtype="float32"),
        )
        error = 0.0
        for length in (1, 5, 40):
            ids = list(range(3, 3 + length))
            one, other = attached.logits(ids), fused.logits(ids)
            error = max(error, (mx.max(mx.abs(one - other)) / mx.max(mx.abs(other))).item())
        texts = [
            greedy_answers(model, [model.encode(ROW["prompt"])], max_tokens=16, on_event=ignore)
            for model in (attached, fused)
        ]
        said = "the same text" if texts[0] == texts[1] else "another text, where two tokens are as likely"
        return Outcome(error < 0.01, f"logits off by {100 * error:.2g} %, {said}")


def unpacked(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """The weight that 4-bit codes stand for: eight in each uint32, the lowest bits first; (rows, columns) float32."""
    values = (codes[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15  # (rows, words, 8)
    groups = values.reshape(codes.shape[0], -1, GROUP).astype(np.float32)  # (rows, groups, 64)
    return (groups * scales[..., None] + biases[..., None]).reshape(codes.shape[0], -1)


def rounded(weight: np.ndarray) -> np.ndarray:
    """The weight rounded to 16 steps between each group's least and largest value; (rows, columns) float32."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    step = np.maximum((high - low) / 15, 1e-7)
    return (low + step * np.round((groups - low) / step)).reshape(weight.shape)


CHECKS: Sequence[tuple[str, str]] = (
    ("gradient", "gradient"),
    ("exact resume", "resume"),
    ("fuse to 4 bits", "fused_bits"),
    ("generate", "generation"),
)
