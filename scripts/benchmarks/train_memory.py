"""Memory and speed of a training step against mlx-lm's, at the shapes of real models, in one process.

Random weights of a Qwen 3 shape, packed in 4 bits (or the embedded model), rank 8 on all linear layers, a fixed batch
of which the last quarter of each row is trained. Each way takes two steps to warm up, then timed ones; `peak` is
`mx.get_peak_memory()` of these. With `--mixed` rows of 5 to `--length` tokens, spread evenly on a logarithmic scale,
that each program puts into batches its own way; each shape is met once before it counts, and tokens are real ones,
padding apart. Ours run as `train` runs them: one step that is never ahead tells what they need, and from `--near` of
that on a GPU waits (`--ahead`: never). mlx-lm's are its layers, loss and compiled step, as
its trainer has them.

    python scripts/benchmarks/train_memory.py --shape 4b
    python scripts/benchmarks/train_memory.py --shape 4b --mixed 8 --ways mlx-lm ours
    python scripts/benchmarks/train_memory.py --shape demo --length 128 --json train_memory.json
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import mlx_adapters

RANK, SCALE, SEED, WARM_UP = 8, 2.0, 0, 2
QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6}
QWEN3 |= {"vocab_size": 151_936, "max_position_embeddings": 40_960, "rope_theta": 1e6, "tie_word_embeddings": True}
SHAPES = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "narrow": {  # of many layers, which take a device no time
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 36,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "gated-delta": {  # a tiny Qwen 3.5, three of whose four blocks are recurrences
        "model_type": "qwen3_5",
        "text_config": {
            "model_type": "qwen3_5",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "full_attention_interval": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "vocab_size": 512,
            "max_position_embeddings": 4096,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "tie_word_embeddings": True,
            "num_experts": 0,
            "rope_parameters": {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8}
    | {"vocab_size": 4096},
}
OURS = {"ours": "nothing", "ours, MLP recomputed": "mlp", "ours, blocks recomputed": "blocks"}
THEIRS = {  # what of ours they have; the middle two, on the way to ours, for a Qwen 3 with tied embeddings
    "mlx-lm": set(),
    "mlx-lm, head on trained tokens": {"head"},
    "mlx-lm, and layers in the model's type": {"head", "type"},
    "mlx-lm, blocks recomputed": {"blocks"},
}


def model_of(shape: str):
    """The bare module, evaluated."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    if shape == "demo":
        from mlx_adapters.models.loading import load_model
        from mlx_adapters.sources.bases import resolve_base

        return load_model(resolve_base("demo")).module
    from mlx_adapters.system.door import make_module
    from mlx_adapters.system.machine import on_gpu

    mx.random.seed(SEED)
    module = make_module(QWEN3 | SHAPES[shape])
    if on_gpu():  # a CPU trains on dense float32 copies
        module.set_dtype(mx.bfloat16)
        nn.quantize(module, 64, 4)
    for _, array in tree_flatten(module.parameters()):  # one after the other: the unpacked weights go at once
        mx.eval(array)
    return module


def base_folder(shape: str, work: Path) -> Path:
    """A folder with the random model and a small tokenizer, for what takes folders."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_adapters.system.machine import on_gpu

    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
    from helpers.tiny_models import write_tokenizer

    folder = work / shape
    if not folder.exists():
        folder.mkdir(parents=True)
        config = QWEN3 | SHAPES[shape] | ({"quantization": {"group_size": 64, "bits": 4}} if on_gpu() else {})
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model_of(shape).parameters())))
        (folder / "config.json").write_text(json.dumps(config))
        write_tokenizer(folder)
    return folder


def rows_of(options: argparse.Namespace, processes: int = 1) -> list:
    """Rows of one length, a batch of them for each process; or, mixed, of many lengths. The last quarter of each is
    trained."""
    from mlx_adapters.data.tokenizing import Row

    random = np.random.default_rng(SEED)
    spread = (options.length / 5) ** random.random(options.mixed * options.batch)
    lengths = [round(5 * s) for s in spread] if options.mixed else [options.length + 1] * options.batch * processes
    return [
        Row(random.integers(3, 500, n).astype(np.int32), np.arange(n) > (n - 1) * 3 // 4, "here", n) for n in lengths
    ]


def ours(module, options: argparse.Namespace, again: str, world=None) -> list[Callable[[], tuple[float, int]]]:
    """Updates by `TrainStep`; each gives its loss and how many tokens it read."""
    from dataclasses import replace

    from mlx_adapters.config.training import LoraConfig, TrainConfig
    from mlx_adapters.models.layers import add_adapter_layers, named_layers, resolve_target_modules
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.optimization.feed import make_feed
    from mlx_adapters.optimization.log_probabilities import LossPlan, chunk_rows
    from mlx_adapters.optimization.step import MemoryPlan, TrainStep
    from mlx_adapters.surgery.blocks import find_body
    from mlx_adapters.system.door import mx
    from mlx_adapters.system.limits import as_little_memory_as_will_do
    from mlx_adapters.system.machine import on_gpu

    keys = resolve_target_modules(module, LoraConfig())
    add_adapter_layers(module, AdapterConfig(RANK, SCALE, keys))
    layers = dict(named_layers(module))
    vocabulary = module(mx.zeros((1, 1), mx.int32)).shape[-1]
    config = TrainConfig(batch_size=options.batch, optimizer="adam", learning_rate=1e-5)
    plan = LossPlan(find_body(module), chunk_rows(vocabulary))
    made = TrainStep(module, {key: layers[key] for key in keys}, config, plan, memory=MemoryPlan(again))  # type: ignore[arg-type]
    if world is not None:
        made.world = world
    rows = rows_of(options, 1 if world is None else world.size)
    if world is not None:  # its own
        rows = rows[world.rank * options.batch :][: options.batch]
    updates = make_feed(rows, config, gpu=on_gpu()).updates(0)
    draws = [next(updates) for _ in range(options.mixed or 1)]
    if world is not None:
        draws = [replace(draw, tokens=world.size * draw.tokens) for draw in draws]
    mx.eval(made.weights, made.optimizer.arrays())
    if not options.ahead:
        largest = max(draws, key=lambda draw: draw.batches[0].tokens.size)
        made.take(largest, 1e-5)  # compiles
        mx.reset_peak_memory()
        with as_little_memory_as_will_do():
            made.take(largest, 1e-5)
        made.memory = MemoryPlan(again, near=int(mx.get_peak_memory() * options.near))  # type: ignore[arg-type]
    return [lambda draw=draw: (made.take(draw, 1e-5).loss.item(), draw.real_tokens) for draw in draws]


def theirs(module, options: argparse.Namespace, changes: set[str]) -> list[Callable[[], tuple[float, int]]]:
    """Updates as `mlx_lm.tuner.trainer.train` makes them, on the batches that it makes, with `changes` of THEIRS."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner import datasets, lora, trainer, utils

    from mlx_adapters.system.machine import on_gpu

    utils.linear_to_lora_layers(module, len(module.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0})
    if "blocks" in changes:
        trainer.grad_checkpoint(module.layers[0])
    if "type" in changes:
        lora.LoRALinear.__call__ = in_the_models_type
    module.train()
    loss_of = loss_of_trained if "head" in changes else trainer.default_loss
    optimizer, gradient = optim.Adam(1e-5), nn.value_and_grad(module, loss_of)
    state = [module.state, optimizer.state, mx.random.state]
    given = trainer.iterate_batches(datasets.CacheDataset(Texts(rows_of(options))), options.batch, 2048)
    batches = list(given)

    def step(batch: mx.array, where: mx.array) -> mx.array:
        (loss, _), gradients = gradient(module, batch, where)
        optimizer.update(module, gradients)
        return loss

    compiled = partial(mx.compile, inputs=state, outputs=state)(step) if on_gpu() else step

    def update(batch: mx.array, lengths: mx.array) -> tuple[float, int]:
        loss = compiled(batch, trained_places(batch, lengths) if "head" in changes else lengths)
        mx.eval(state, loss)
        return loss.item(), int(lengths[:, 1].sum().item())

    return [partial(update, *batch) for batch in batches]


def trained_places(batch, lengths):
    """Which of all (rows · tokens) predictions count, as `trainer.default_loss` has it."""
    import mlx.core as mx

    steps = np.arange(1, batch.shape[1])
    counts = (steps >= np.array(lengths)[:, :1]) & (steps <= np.array(lengths)[:, 1:])
    return mx.array(np.flatnonzero(counts))


def loss_of_trained(module, batch, places):
    """`trainer.default_loss`, with logits of the trained tokens alone."""
    import mlx.core as mx
    import mlx.nn as nn

    hidden = module.model(batch[:, :-1])
    logits = module.model.embed_tokens.as_linear(hidden.reshape(-1, hidden.shape[-1])[places])
    losses = nn.losses.cross_entropy(logits, batch[:, 1:].flatten()[places])
    return losses.astype(mx.float32).mean(), places.size


def in_the_models_type(layer, x):
    """mlx-lm's LoRALinear, its float32 A and B as numbers of x's type, so that no input is kept in float32."""
    y = layer.linear(x)
    return y + (x @ layer.lora_a.astype(x.dtype)) @ (layer.scale * layer.lora_b).astype(x.dtype)


class Texts:
    """The rows as one of mlx-lm's data sets of prompts and completions."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"prompt": index, "completion": index}

    def process(self, row: dict) -> tuple:
        """(tokens, how many of them are the prompt)."""
        found = self.rows[row["prompt"]]
        return found.tokens.tolist(), int(np.argmax(found.trained))


def measure(module, way: str, options: argparse.Namespace) -> dict:
    """Milliseconds a step (median) and peak bytes, and the module without adapter layers again."""
    import mlx.core as mx
    from mlx_lm.tuner.lora import LoRALinear

    from mlx_adapters.models.layers import detach

    changed = {kind: kind.__call__ for kind in (type(module.layers[0]), LoRALinear)}
    mx.random.seed(SEED)
    module.freeze()
    began = time.perf_counter()
    updates = ours(module, options, OURS[way]) if way in OURS else theirs(module, options, THEIRS[way])
    losses = []
    for update in updates if options.mixed else updates * WARM_UP:
        losses.append(update()[0])
        print(f"{way}: warm-up {len(losses)}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    ready = time.perf_counter() - began
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    seconds, tokens = [], 0
    for update in updates * options.steps:
        start = time.perf_counter()
        loss, read = update()
        losses.append(loss)
        tokens += read
        seconds.append(time.perf_counter() - start)
        print(f"{way}: {1e3 * seconds[-1]:.0f} ms, {read} tokens", file=sys.stderr, flush=True)
    figures = {
        "way": way,
        "ms": 1e3 * statistics.median(seconds),
        "ms_range": [1e3 * min(seconds), 1e3 * max(seconds)],
        "tokens_per_second": tokens / (sum(seconds) if options.mixed else len(seconds) * statistics.median(seconds)),
        "peak_bytes": mx.get_peak_memory(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "ready_seconds": ready,
    }
    del update, updates
    for kind, call in changed.items():  # mlx-lm's checkpointing changes the class, too
        kind.__call__ = call
    detach(module)
    module.unfreeze()
    gc.collect()
    mx.clear_cache()
    return figures


def line(figures: dict, reference: dict | None) -> str:
    """A row of the table."""
    speed = memory = ""
    if reference:
        speed = f"{figures['tokens_per_second'] / reference['tokens_per_second']:.2f}"
        memory = f"{figures['peak_bytes'] / reference['peak_bytes']:.2f}"
    return (
        f"| {figures['way']} | {figures['ms']:,.0f} | {figures['tokens_per_second']:,.0f} | {speed} "
        f"| {figures['peak_bytes'] / 1e9:.2f} | {memory} |"
    )


def main() -> None:
    """Measure the ways that are named, and print them as they come."""
    assert mlx_adapters.__version__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "demo"], default="0.6b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--mixed", type=int, default=0, metavar="N", help="N batches of rows of many lengths")
    parser.add_argument("--ahead", action="store_true", help="let a GPU work ahead as far as it likes")
    parser.add_argument("--near", type=float, default=1.25, help="of what a step needs, where a GPU waits")
    parser.add_argument("--ways", nargs="*", default=[*THEIRS, *OURS], choices=[*THEIRS, *OURS], metavar="WAY")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from mlx_adapters.storage import files
    from mlx_adapters.system.door import mx
    from mlx_adapters.system.machine import environment, on_gpu

    machine = environment().to_json()
    print(
        f"# {machine['device_name']}, mlx {machine['versions']['mlx']}, mlx-lm {machine['versions']['mlx-lm']}; ",
        end="",
    )
    lengths = f"{'5 to ' if options.mixed else ''}{options.length}"
    print(f"{options.shape}, batch {options.batch} x {lengths}, a quarter trained, rank {RANK}, all linear layers")
    print(
        "| | ms a step | tokens/s | of mlx-lm's | peak GB | of mlx-lm's |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    if not on_gpu():
        mx.disable_compile()  # it would call a C++ compiler for each fused kernel
    module, ways = model_of(options.shape), []
    for way in options.ways:
        ways.append(measure(module, way, options))
        reference = next((figures for figures in ways if figures["way"] == "mlx-lm"), None)
        print(line(ways[-1], reference), flush=True)
    if options.json:
        files.write_text(options.json, json.dumps({"machine": machine, "options": str(options), "ways": ways}))


if __name__ == "__main__":
    main()
