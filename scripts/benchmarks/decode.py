"""What each step toward a fast adapter layer brings: decode speed of one model, many ways to attach.

Random weights of a given shape, one adapter of rank 8 on every linear layer of every block. A fused model's matrices
are the base's, so that "base, one token" is the fused model as this package runs it, and "groups, one token" an adapter
as it runs it; "base" and "mlx-lm" are mlx-lm's loop on both. Variants take turns, so that a noisy machine hits all
alike, and the order turns round with each round. A round's ratio is of its own fused model, with the same attention if
that is measured; the median of rounds counts, from the least to the greatest in brackets.

A token takes the longer of two times: the host's, to hand all operations over, and the GPU's, to do them. `--gpu`
measures the GPU's alone, by its own clock, with all of a token handed over before it begins.

    python scripts/benchmarks/decode.py --shapes 4b --batches 1 --only "base, one token" "groups, one token" [--gpu]
    python scripts/benchmarks/decode.py --shapes 4b --batches 1 --gpu --only "base, one token" "groups, one token" \\
        "base, one token by clusters" "groups, after, one token"     # ways of decode_ways.py
    python scripts/benchmarks/decode.py --shapes 8b 0.5b --batches 1 16 --json decode.json
    python scripts/benchmarks/decode.py --shapes 135m --bits 0 --dtype float32 --tokens 4 --rounds 20    # a CPU
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
from functools import partial

if "--gpu" in sys.argv:  # a token as one graph; MLX reads it once
    os.environ |= {"MLX_MAX_OPS_PER_BUFFER": "4000", "MLX_MAX_MB_PER_BUFFER": "100000"}

import mlx_adapters  # noqa: F401  (before mlx: it sees to a fast BLAS)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from decode_ways import WAYS, After, Apart, attending
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

from mlx_adapters.config.training import LoraConfig
from mlx_adapters.drafting.one_token import OneToken
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.dense import weight_shape
from mlx_adapters.models.layers import adaptable_layers, resolve_target_modules
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.runtime import pool as pool_module
from mlx_adapters.runtime.additions import ForAll
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.runtime.sites import Concatenated, at_path, replace_layers
from mlx_adapters.surgery.blocks import by_block
from mlx_adapters.surgery.calls import intercept
from mlx_adapters.system.gpu_kernels import build_quickly

SHAPES = {
    "8b": (
        llama,
        dict(
            model_type="llama",
            hidden_size=4096,
            num_hidden_layers=32,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            vocab_size=128256,
            tie_word_embeddings=False,
        ),
    ),
    "4b": (
        qwen3,
        dict(
            model_type="qwen3",
            hidden_size=2560,
            num_hidden_layers=36,
            intermediate_size=9728,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    "0.5b": (
        qwen2,
        dict(
            model_type="qwen2",
            hidden_size=896,
            num_hidden_layers=24,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    "135m": (
        llama,
        dict(
            model_type="llama",
            hidden_size=576,
            num_hidden_layers=30,
            intermediate_size=1536,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            vocab_size=49152,
            tie_word_embeddings=True,
        ),
    ),
    "tiny": (
        llama,
        dict(
            model_type="llama",
            hidden_size=256,
            num_hidden_layers=4,
            intermediate_size=512,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=512,
            tie_word_embeddings=True,
        ),
    ),
}
RANK, SCALE, ADAPTERS = 8, 2.0, 8
FUSED = "base, one token"
CLOCK = """
if (threadIdx.x == 0) {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  for (int i = 0; i < 2; ++i) when[i] = (unsigned) (now >> 32 * i);
}
for (int i = threadIdx.x; i < x_shape[0]; i += 32) same[i] = x[i];
"""


class Padded(ForAll):
    """Ranks padded to a multiple of 32, for which MLX's CUDA build takes a matrix-vector kernel."""

    def __init__(self, factors):
        super().__init__(factors)
        extra = -factors.a.shape[0] % 32
        a, b = mx.pad(factors.a, [(0, extra), (0, 0)]), mx.pad(factors.b, [(0, 0), (0, extra)])
        self.one_a, self.one_b = mx.contiguous(a).T[None], mx.contiguous(b).T[None]
        mx.eval(self.one_a, self.one_b)


class Gathered(ForAll):
    """The products as gather_mm with one matrix, whose matrix-vector kernel takes any rank."""

    first = mx.zeros((1,), dtype=mx.uint32)

    def linear(self, y, x):
        if x.shape[:-1] != (1, 1):
            return super().linear(y, x)
        z = mx.gather_mm(x, self.one_a, self.first, self.first)
        return y + mx.gather_mm(z, self.one_b, self.first, self.first)


class Added(Padded):
    """Product and sum as one operation."""

    def linear(self, y, x):
        if x.shape[:-1] != (1, 1):
            return super().linear(y, x)
        return mx.addmm(y, x @ self.one_a, self.one_b)


MOST_TOKENS = 16  # with more, the products take longer than Python


class Compiled:
    """Calls a function of hidden states (..., width) as a compiled one, whose constants are weights and factors: once
    for each set of `sites`' updates. What is changed inside afterwards is not seen; `AdapterPool` has none of this."""

    def __init__(self, sites=()):
        self.sites, self.of = list(sites), {}

    def __call__(self, function, x):
        if x.size > MOST_TOKENS * x.shape[-1]:
            return function(x)
        key = tuple(site.update for site in self.sites)
        if key not in self.of:
            self.of[key] = mx.compile(function)
        return self.of[key](x)


def compile_parts(model, sites=()):
    """What lies between a model's attentions, compiled: MLPs as a whole, and each other site by itself."""
    parts = {f"model.layers.{i}.mlp": Compiled() for i in range(len(model.layers))}
    for path, part in parts.items():
        intercept(at_path(model, path), part)
    for site in sites:
        part = parts.get(site.paths[0].rpartition(".")[0])
        if part is None:
            site.outputs = partial(Compiled([site]), site.outputs)
        else:
            part.sites.append(site)


def unpack_for_prompts(model):
    """A fused model whose packed matrices are unpacked for prompts, as those with an adapter are."""
    for layer in adaptable_layers(model).values():
        if isinstance(layer, nn.QuantizedLinear):
            product = Concatenated([layer], layer)
            intercept(layer, lambda original, x, product=product: product(x))


# Name -> (class of the update, keywords of the pool).
VARIANTS = {
    "each layer": (ForAll, dict(group=False)),
    "groups": (ForAll, dict(group=True)),
    "groups compiled": (ForAll, dict(group=True)),
    "groups, one token": (ForAll, dict(group=True)),
    "groups, after, one token": (After, dict(group=True)),
    "groups, apart, one token": (Apart, dict(group=True)),
    "ours, after": (After, dict(group=True)),
    "groups padded": (Padded, dict(group=True)),
    "groups addmm": (Added, dict(group=True)),
    "groups gather": (Gathered, dict(group=True)),
}


def structure(shape, bits, dtype):
    """The model with lazy weights: nothing is computed yet."""
    module, config = SHAPES[shape]
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    return model


def random_adapters(model, dtype, count):
    """LoRA adapters on every linear layer of the blocks."""
    keys = resolve_target_modules(model, LoraConfig(rank=RANK, scale=SCALE))
    layers, made = adaptable_layers(model), []
    for number in range(count):
        mx.random.seed(number + 1)
        weights = {}
        for key in keys:
            out, width = weight_shape(layers[key])
            weights[f"{key}.lora_a"] = mx.random.normal((width, RANK), scale=width**-0.5).astype(dtype)
            weights[f"{key}.lora_b"] = mx.random.normal((RANK, out), scale=0.05).astype(dtype)
        mx.eval(weights)
        made.append(Adapter(AdapterConfig(RANK, SCALE, keys), weights))
    return made


def attach_mlx_lm(model, adapter):
    """mlx-lm's own layers, as mlx_lm.load(adapter_path=...) makes them: A and B in float32."""
    made = {}
    for key, a, b, _ in adapter.layers():
        made[key] = LoRALinear.from_base(adaptable_layers(model)[key], r=RANK, scale=SCALE)
        made[key].lora_a, made[key].lora_b = a.astype(mx.float32), b.astype(mx.float32)
    replace_layers(model, made)
    model.eval()


def prepare(variant, model, adapters):
    """Attach; give (context for decoding, notes)."""
    if variant == "base" or variant.startswith(FUSED):
        return contextlib.nullcontext, {}
    if variant == "base compiled":
        compile_parts(model)
        return contextlib.nullcontext, {}
    if variant == "base unpacked":
        unpack_for_prompts(model)
        return contextlib.nullcontext, {}
    if variant == "mlx-lm":
        attach_mlx_lm(model, adapters[0])
        return contextlib.nullcontext, {}
    name, _, mixed = variant.partition("/")
    kind, options = VARIANTS.get("".join(name.partition("one token")[:2]), (ForAll, {}))
    pool, start = AdapterPool(model, **options), time.perf_counter()
    entries = [pool.add(str(i), adapter) for i, adapter in enumerate(adapters)]
    notes = {"attach_seconds": time.perf_counter() - start, "adapter_bytes": entries[0].nbytes}
    pool_module.ForAll = kind
    pool.select(pool.choose("0"))
    pool_module.ForAll = ForAll
    if variant == "groups compiled":
        compile_parts(model, set(pool._sites.values()))
    start = time.perf_counter()
    pool.select(())
    pool.select(pool.choose("0"))
    notes["switch_ms"] = (time.perf_counter() - start) * 500
    rows = [entries[i % len(entries)] for i in range(int(mixed or 0))]
    return (lambda: pool.routed(rows)) if mixed else contextlib.nullcontext, notes


# Which variants may be one compiled step, and what follows "one token" in a name: the step's attention.
STEPS = ("base", "groups", "groups, after", "groups, apart")


def called(variant, model):
    """What is called with tokens: the model, or for one token after another its compiled step."""
    return OneToken(model, after=0) if "one token" in variant else model


def attention_of(variant):
    """Steps of this variant are made in its block."""
    return attending(variant.partition("one token")[2].strip())


def decode(variant, model, batch, tokens, clock, before=16, gpu=False):
    """Seconds of each of `tokens` steps of `batch` rows after a prompt of `before` tokens; or the GPU's own."""
    cache, model = make_prompt_cache(model), called(variant, model)
    y = mx.argmax(model(mx.zeros((batch, before), dtype=mx.uint32), cache=cache)[:, -1], axis=-1)
    mx.eval(y)
    stamp = build_quickly("stamp", ["x"], ["same", "when"], CLOCK, "") if gpu else None
    steps, start = [], clock()
    for _ in range(tokens):
        if stamp is not None:
            y, began = stamped(stamp, y)
            y, ended = stamped(stamp, mx.argmax(model(y[:, None], cache=cache)[:, -1], axis=-1))
            mx.eval(y, began, ended)
            began, ended = (int(low) + (int(high) << 32) for low, high in (began.tolist(), ended.tolist()))
            steps.append((ended - began) * 1e-9)
            continue
        following = mx.argmax(model(y[:, None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(following)
        mx.eval(y)
        y = following
        steps.append(clock() - start)
        start = clock()
    mx.eval(y)
    return steps[1:]


def stamped(stamp, x):
    """(x, the GPU's nanoseconds when it is there, in two words)."""
    return stamp(
        inputs=[x],
        template=[],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape, (2,)],
        output_dtypes=[x.dtype, mx.uint32],
    )


def prefill(variant, model, batch, tokens, clock):
    """Seconds of reading a prompt of so many tokens, the last logits evaluated."""
    called = model if variant in ("base", "mlx-lm") else by_block(model)
    cache, start = make_prompt_cache(model), clock()
    mx.eval(called(mx.zeros((batch, tokens), dtype=mx.uint32), cache=cache)[:, -1])
    return clock() - start


def logits(model, batch):
    """Logits of one decode step, in float32."""
    cache = make_prompt_cache(model)
    model(mx.zeros((batch, 40), dtype=mx.uint32), cache=cache)
    return model(mx.full((batch, 1), 7, dtype=mx.uint32), cache=cache).astype(mx.float32)


def run(shape, batch, options, clock):
    dtype, begun = getattr(mx, options.dtype), time.time()
    mx.random.seed(0)
    first = structure(shape, options.bits, dtype)
    mx.eval(first.parameters())
    adapters = random_adapters(first, dtype, ADAPTERS if batch > 1 else 1)
    names = (
        ["base", "base, one token", "base compiled", "base unpacked", "mlx-lm", *VARIANTS]
        if batch == 1
        else ["base", "mlx-lm", "ours", "ours, after", f"ours/{batch}"]
    )
    ready, results, reference = {}, {}, None
    steps = [f"{step}, one token {way}" for way in WAYS if way for step in STEPS] if batch == 1 else []
    for name in [n for n in [*names, *steps] if n in (options.only or names)]:
        model = structure(shape, options.bits, dtype)
        model.update(first.parameters())
        try:
            context, notes = prepare(name, model, adapters if batch > 1 else adapters[:1])
            with context():
                computed = logits(model, batch)[0]
                mx.eval(computed)
                with attention_of(name) as off:
                    notes["attention_off"] = off
                    decode(name, model, batch, 4, clock, options.before, options.gpu)
                for tokens in options.prefill:
                    prefill(name, model, batch, tokens, clock)
        except Exception as failure:
            print(f"  {name}: failed: {failure}", flush=True)
            continue
        reference = computed if name == "mlx-lm" else reference
        if reference is not None:
            notes["error"] = (mx.abs(computed - reference).max() / mx.abs(reference).max()).item()
        ready[name], results[name] = (model, context), {**notes, "rounds": [], "prefill": {}}
        print(f"  {name} ready after {time.time() - begun:.0f} s", flush=True)
    for number in range(options.rounds):
        if time.time() - begun > options.budget:
            break
        for name in list(ready)[:: -1 if number % 2 else 1]:
            model, context = ready[name]
            with context():
                steps = decode(name, model, batch, options.tokens, clock, options.before, options.gpu)
                results[name]["rounds"].append(steps)
                for tokens in options.prefill:
                    seconds = results[name]["prefill"].setdefault(tokens, [])
                    seconds.append(prefill(name, model, batch, tokens, clock))
    show(shape, batch, options, results, time.time() - begun)
    return {"shape": shape, "batch": batch, "results": results}


def show(shape, batch, options, results, seconds):
    fused = FUSED if FUSED in results else "base"
    print(
        f"\n{shape}, {options.bits or 'no'} bits, {options.dtype}, batch {batch}, rank {RANK}, after {options.before} "
        f"tokens, rounds of {options.tokens}, {mx.default_device()}{', its own time' if options.gpu else ''}, "
        f"{seconds:.0f} s"
    )
    print(f"{'variant':44}{'ms a token':>11}{'tok/s':>8}   of {fused!r:24}{'error':>9}{'switch ms':>10}{'attach s':>9}")
    for name, result in results.items():
        means = [statistics.mean(steps) for steps in result["rounds"]]
        alike = FUSED + name.partition("one token")[2]  # with the same attention
        if not means or not results.get(fused, {}).get("rounds"):
            continue
        pairs = zip(results[alike if alike in results else fused]["rounds"], means, strict=True)
        ratios = sorted(statistics.mean(steps) / own for steps, own in pairs)
        result["seconds"], result["of_fused"] = statistics.median(means), statistics.median(ratios)
        figures = f"{result['of_fused']:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(
            f"{name:44}{1e3 * result['seconds']:11.3f}{batch / result['seconds']:8.1f}   {figures:27}"
            f"{result.get('error', 0):9.1e}{result.get('switch_ms', 0):10.2f}{result.get('attach_seconds', 0):9.2f}",
            flush=True,
        )
    for tokens in options.prefill:
        for name in results:
            ratios = []
            for base in (base for base in ("base", "base unpacked") if base in results):
                for middle in (statistics.median, min):
                    own, of = (middle(results[n]["prefill"].get(tokens) or [math.nan]) for n in (name, base))
                    ratios.append(f"{own / of:.3f}")
                ratios.append(f"of {base}")
            own = statistics.median(results[name]["prefill"].get(tokens) or [math.nan])
            print(f"prefill of {tokens} tokens: {name:31} {1e3 * own:8.1f} ms, {' '.join(ratios)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8b", "0.5b"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--bits", type=int, default=4, help="0: not quantized")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--before", type=int, default=16, help="tokens of the prompt that is decoded after")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prefill", nargs="*", type=int, default=[], help="tokens of prompts to read, too")
    parser.add_argument("--only", nargs="+", help="some of the variants")
    parser.add_argument("--budget", type=float, default=300, help="seconds for each shape and batch")
    parser.add_argument("--gpu", action="store_true", help="the GPU's own time (CUDA)")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's CPU seconds (busy machine)")
    parser.add_argument("--json")
    options = parser.parse_args()
    clock, reports = time.process_time if options.cpu_time else time.perf_counter, []
    for shape in options.shapes:
        for batch in options.batches:
            reports.append(run(shape, batch, options, clock))
            mx.clear_cache()
            if options.json:
                with open(options.json, "w") as file:
                    json.dump({"mlx": mx.__version__, "reports": reports}, file)


if __name__ == "__main__":
    main()
