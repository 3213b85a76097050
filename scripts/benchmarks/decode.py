"""What each step toward a fast adapter layer brings: decode speed of one model, many ways to attach.

Random weights of a given shape, rank 8 on every linear layer of every block. `base` is also what a fused
model costs: the same matrices. Variants run round-robin, so that a noisy machine hits all alike; the table
shows the median, the range and the ratio to `base` of tokens per second.

    python scripts/benchmarks/decode.py --shapes 8b 0.5b --batches 1 16 --json decode.json
    python scripts/benchmarks/decode.py --shapes tiny --batches 1 4            # on a CPU
"""

import argparse
import json
import statistics
import time
import traceback

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

SHAPES = {
    "8b": (llama, dict(model_type="llama", hidden_size=4096, num_hidden_layers=32, intermediate_size=14336,
                       num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=128256,
                       tie_word_embeddings=False)),
    "0.5b": (qwen2, dict(model_type="qwen2", hidden_size=896, num_hidden_layers=24, intermediate_size=4864,
                         num_attention_heads=14, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=151936,
                         tie_word_embeddings=True)),
    "tiny": (llama, dict(model_type="llama", hidden_size=256, num_hidden_layers=4, intermediate_size=512,
                         num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=512,
                         tie_word_embeddings=True)),
    "135m": (llama, dict(model_type="llama", hidden_size=576, num_hidden_layers=30, intermediate_size=1536,
                         num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, vocab_size=49152,
                         tie_word_embeddings=True)),
}  # fmt: skip
GROUPS = {
    "self_attn": (("q_proj", "k_proj", "v_proj"), ("o_proj",)),
    "mlp": (("gate_proj", "up_proj"), ("down_proj",)),
}
RANK, SCALE, ADAPTERS = 8, 2.0, 8
CLOCK = time.perf_counter


def build(shape, bits, dtype):
    module, config = SHAPES[shape]
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    return model


def sizes(linear):
    out, width = linear.weight.shape
    return out, width * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else width


def pad(array, axis, multiple):
    extra = -array.shape[axis] % multiple
    widths = [(0, extra if i == axis else 0) for i in range(array.ndim)]
    return mx.pad(array, widths) if extra else array


class Concatenated(nn.Module):
    """The base matrices that share an input, one below the other."""

    def __init__(self, linears, extra_rows=None):
        super().__init__()
        self.quantized = isinstance(linears[0], nn.QuantizedLinear)
        self.out = sum(sizes(linear)[0] for linear in linears)
        names = ("weight", "scales", "biases") if self.quantized else ("weight",)
        for index, name in enumerate(names):
            parts = [linear[name] for linear in linears]
            if extra_rows is not None:
                parts.append(extra_rows[index])
            self[name] = mx.concatenate(parts)
        if self.quantized:
            self.bits, self.group_size = linears[0].bits, linears[0].group_size
        if "bias" in linears[0]:
            self.bias = mx.concatenate([linear.bias for linear in linears])
            if extra_rows is not None:
                self.bias = mx.pad(self.bias, [(0, extra_rows[0].shape[0])])

    def __call__(self, x):
        if self.quantized:
            y = mx.quantized_matmul(
                x,
                self.weight,
                scales=self.scales,
                biases=self.biases,
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
            )
        else:
            y = x @ self.weight.T
        return y + self.bias if "bias" in self else y


class Shared:
    """Computes a group's product for the first member that is called and hands the parts to the others."""

    def __init__(self, compute, widths):
        self.compute, self.widths, self.x, self.parts = compute, widths, None, {}

    def part(self, x, index):
        if self.x is not x or index not in self.parts:
            y, start, self.x = self.compute(x), 0, x
            for i, width in enumerate(self.widths):
                self.parts[i] = y[..., start : start + width]
                start += width
        part = self.parts.pop(index)
        if not self.parts:
            self.x = None
        return part


class Part(nn.Module):
    def __init__(self, shared, index):
        super().__init__()
        self._shared, self._index = [shared], index

    def __call__(self, x):
        return self._shared[0].part(x, self._index)


class Function(nn.Module):
    def __init__(self, linear, function):
        super().__init__()
        self.linear, self._function = linear, [function]

    def __call__(self, x):
        return self._function[0](self.linear(x), x)


# -- the low-rank updates: factors -> f(y, x) = y + B A x --------------------------------------------------


def stacked(factors, adapter):
    """a (sum r, in) and block-diagonal b (out, sum r) of one adapter; scale folded in."""
    a = mx.concatenate([f[adapter][0].T for f in factors])
    total, rows, start = a.shape[0], [], 0
    for f in factors:
        b = SCALE * f[adapter][1].T
        rows.append(mx.pad(b, [(0, 0), (start, total - start - b.shape[1])]))
        start += b.shape[1]
    return a, mx.concatenate(rows)


def matmul_update(factors, slots, multiple=1):
    a, b = stacked(factors, 0)
    a, b = pad(a, 0, multiple), pad(b, 1, multiple)
    mx.eval(a, b)
    return lambda y, x: y + (x @ a.T) @ b.T


def addmm_update(factors, slots):
    a, b = stacked(factors, 0)
    mx.eval(a, b)
    return lambda y, x: mx.addmm(y, x @ a.T, b.T)


def gather_update(factors, slots):
    pairs = [stacked(factors, i) for i in range(len(factors[0]))]
    a, b = mx.stack([p[0] for p in pairs]), mx.stack([p[1] for p in pairs])
    order = mx.arange(slots.size, dtype=mx.uint32)
    mx.eval(a, b, order)

    def update(y, x):
        if x.shape[1] > 1:
            return y + (x @ a[0].T) @ b[0].T
        z = mx.gather_mm(x, a.swapaxes(1, 2), order, slots)
        return y + mx.gather_mm(z, b.swapaxes(1, 2), order, slots)

    return update


def dense_mask_update(factors, slots):
    """All adapters' A at once, a mask that keeps each row's own, all B's at once."""
    pairs = [stacked(factors, i) for i in range(len(factors[0]))]
    a, b = mx.concatenate([p[0] for p in pairs]), mx.concatenate([p[1] for p in pairs], axis=1)
    rank = pairs[0][0].shape[0]
    mask = (mx.arange(a.shape[0])[None] // rank == slots[:, None]).astype(a.dtype)[:, None]
    mx.eval(a, b, mask)
    return lambda y, x: y + ((x @ a.T) * mask) @ b.T


KERNEL = """
constexpr int VECTOR = 16 / sizeof(T);
__shared__ float partial[THREADS / 32][RANKS];
__shared__ float z[RANKS];
int row = blockIdx.y, thread = threadIdx.x;
long slot = slots[row];
const T* xr = x + (long)row * IN;
const T* ar = a + slot * RANKS * IN;
float sums[RANKS];
for (int k = 0; k < RANKS; ++k) sums[k] = 0.f;
for (int c = thread * VECTOR; c < IN; c += THREADS * VECTOR) {
  uint4 xv = *reinterpret_cast<const uint4*>(xr + c);
  const T* xs = reinterpret_cast<const T*>(&xv);
#pragma unroll
  for (int k = 0; k < RANKS; ++k) {
    uint4 av = *reinterpret_cast<const uint4*>(ar + k * IN + c);
    const T* as = reinterpret_cast<const T*>(&av);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sums[k] += static_cast<float>(as[j]) * static_cast<float>(xs[j]);
  }
}
#pragma unroll
for (int k = 0; k < RANKS; ++k) {
  for (int offset = 16; offset > 0; offset /= 2) sums[k] += __shfl_down_sync(0xffffffff, sums[k], offset);
  if (thread % 32 == 0) partial[thread / 32][k] = sums[k];
}
__syncthreads();
if (thread < RANKS) {
  float sum = 0.f;
  for (int w = 0; w < THREADS / 32; ++w) sum += partial[w][thread];
  z[thread] = sum;
}
__syncthreads();
int end = min(OUT, (int)(blockIdx.x + 1) * ROWS);
for (int o = blockIdx.x * ROWS + thread; o < end; o += THREADS) {
  const float* zp = z + RANK * ((o >= FIRST) + (o >= SECOND));
  const T* br = b + (slot * OUT + o) * RANK;
  float sum = static_cast<float>(y[(long)row * OUT + o]);
#pragma unroll
  for (int k = 0; k < RANK; ++k) sum += static_cast<float>(br[k]) * zp[k];
  out[(long)row * OUT + o] = static_cast<T>(sum);
}
"""


def kernel_update(factors, slots, threads=512):
    """One CUDA kernel: every block computes z = A x for itself, then its rows of y + B z."""
    kernel = mx.fast.cuda_kernel(
        name="lowrank_update", input_names=["y", "x", "a", "b", "slots"], output_names=["out"], source=KERNEL
    )
    count = len(factors[0])
    a = mx.stack([mx.concatenate([f[i][0].T for f in factors]) for i in range(count)])
    b = mx.stack([mx.concatenate([SCALE * f[i][1].T for f in factors]) for i in range(count)])
    mx.eval(a, b)
    widths = [f[0][1].shape[1] for f in factors]
    ends = [sum(widths[: i + 1]) if i + 1 < len(widths) else b.shape[1] for i in range(2)]
    out, rank = b.shape[1], b.shape[2]
    rows = max(32, -(-out // 132 // 32) * 32)
    template = [
        ("T", a.dtype),
        ("IN", a.shape[2]),
        ("OUT", out),
        ("RANKS", a.shape[1]),
        ("RANK", rank),
        ("FIRST", ends[0]),
        ("SECOND", ends[1]),
        ("ROWS", rows),
        ("THREADS", threads),
    ]
    blocks = -(-out // rows)
    slow = matmul_update(factors, slots)

    def update(y, x):
        if x.shape[1] > 1:
            return slow(y, x)
        return kernel(
            inputs=[y, x, a, b, slots],
            template=template,
            grid=(blocks * threads, x.shape[0], 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[y.shape],
            output_dtypes=[y.dtype],
        )[0]

    return update


def ride(linears, factors, levels=3):
    """A as more rows of the quantized base matrix: each level quantizes what the one before left over."""
    a, b = stacked(factors, 0)
    quantized = isinstance(linears[0], nn.QuantizedLinear)
    if not quantized:
        extra, wide = (a,), b
    else:
        rest, parts = a.astype(mx.float32), []
        for _ in range(levels):
            options = dict(group_size=linears[0].group_size, bits=linears[0].bits)
            codes, scales, biases = mx.quantize(rest.astype(mx.float32), **options)
            scales, biases = scales.astype(a.dtype), biases.astype(a.dtype)
            rest = rest - mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), **options)
            parts.append((codes, scales, biases))
        extra = [pad(mx.concatenate(p), 0, 32) for p in zip(*parts, strict=True)]
        wide = pad(mx.concatenate([b] * levels, axis=1), 1, 32)
    base = Concatenated(linears, extra)
    mx.eval(base.parameters(), wide)

    def compute(x):
        y = base(x)
        return y[..., : base.out] + y[..., base.out :] @ wide.T

    return compute


# -- variants ------------------------------------------------------------------------------------------


def each_group(model):
    for layer in model.layers:
        for block, groups in GROUPS.items():
            for names in groups:
                yield layer[block], names


def make_factors(model):
    """For each group, for each linear layer, for each adapter: (a (in, r), b (r, out))."""
    mx.random.seed(1)
    groups = []
    for block, names in each_group(model):
        group = []
        for name in names:
            out, width = sizes(block[name])
            dtype = block[name].scales.dtype if "scales" in block[name] else block[name].weight.dtype
            group.append(
                [
                    (
                        mx.random.normal((width, RANK), scale=width**-0.5).astype(dtype),
                        mx.random.normal((RANK, out), scale=0.1).astype(dtype),
                    )
                    for _ in range(ADAPTERS)
                ]
            )
        mx.eval(group)
        groups.append(group)
    return groups


def modules_of(variant, model, factors, slots, bases):
    """The modules that replace each group's linear layers, as [(block, name, module)]."""
    result = []
    for index, ((block, names), group) in enumerate(zip(each_group(model), factors, strict=True)):
        linears = [block[name] for name in names]
        if variant == "mlx-lm":
            for name, linear, f in zip(names, linears, group, strict=True):
                layer = LoRALinear.from_base(linear, r=RANK, scale=SCALE)
                layer.lora_a, layer.lora_b = (m.astype(mx.float32) for m in f[0])
                result.append((block, name, layer.eval()))
        elif variant.startswith("each"):
            for name, linear, f in zip(names, linears, group, strict=True):
                result.append((block, name, Function(linear, UPDATES[variant.split()[1]]([f], slots))))
        else:
            kind = variant.split()[1]
            if kind == "ride":
                compute = ride(linears, group)
            else:
                base = bases.get(index) or bases.setdefault(index, Concatenated(linears))
                mx.eval(base.parameters())
                update = UPDATES[kind](group, slots)
                compute = (lambda x, base=base, update=update: update(base(x), x)) if update else base
            shared = Shared(compute, [sizes(linear)[0] for linear in linears])
            result += [(block, name, Part(shared, i)) for i, name in enumerate(names)]
    return result


UPDATES = {
    "none": lambda factors, slots: None,
    "matmul": matmul_update,
    "padded": lambda factors, slots: matmul_update(factors, slots, 32),
    "addmm": addmm_update,
    "gather": gather_update,
    "dense": dense_mask_update,
    "kernel": kernel_update,
}
SINGLE = [
    "base",
    "mlx-lm",
    "each matmul",
    "each padded",
    "each gather",
    "each kernel",
    "group none",
    "group matmul",
    "group padded",
    "group addmm",
    "group gather",
    "group ride",
    "group kernel",
]
MIXED = ["base", "each gather", "group none", "group matmul", "group gather", "group dense", "group kernel"]


def decode(model, batch, tokens):
    """Tokens per second of `batch` rows over `tokens` steps after a 16-token prompt."""
    cache = make_prompt_cache(model)
    y = mx.argmax(model(mx.zeros((batch, 16), dtype=mx.uint32), cache=cache)[:, -1], axis=-1)
    mx.eval(y)
    start = CLOCK()
    for _ in range(tokens):
        following = mx.argmax(model(y[:, None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(following)
        mx.eval(y)
        y = following
    mx.eval(y)
    return batch * tokens / (CLOCK() - start)


def step_logits(model, batch):
    cache = make_prompt_cache(model)
    model(mx.zeros((batch, 4), dtype=mx.uint32), cache=cache)
    return model(mx.full((batch, 1), 7, dtype=mx.uint32), cache=cache).astype(mx.float32)


def swap_in(modules):
    for block, name, module in modules:
        block[name] = module


def run(shape, bits, dtype, batch, tokens, rounds, only, budget):
    model = build(shape, bits, dtype)
    factors = make_factors(model)
    slots = mx.arange(batch, dtype=mx.uint32) % (ADAPTERS if batch > 1 else 1)
    mx.eval(slots)
    original = [(block, name, block[name]) for block, names in each_group(model) for name in names]
    variants, bases = {"base": original}, {}
    begun, reference, results = time.time(), None, {}
    for variant in MIXED if batch > 1 else SINGLE:
        if only and variant not in only and variant != "base":
            continue
        try:
            swap_in(original)
            if variant != "base":
                variants[variant] = modules_of(variant, model, factors, slots, bases)
            swap_in(variants[variant])
            logits = step_logits(model, batch)[0]
            mx.eval(logits)
            if variant in ("mlx-lm", "each gather") and reference is None:
                reference = logits
            error = None
            if reference is not None and variant not in ("base", "group none"):
                error = (mx.abs(logits - reference).max() / mx.abs(reference).max()).item()
            first = time.time()
            decode(model, batch, 4)
            results[variant] = {"trials": [], "relative_error": error, "warm_up_seconds": time.time() - first}
        except Exception as failure:
            variants.pop(variant, None)
            print(f"  {variant}: failed: {str(failure).splitlines()[0][:300]}", flush=True)
            traceback.print_exc(limit=3)
    for _ in range(rounds):
        for variant in list(results):
            if time.time() - begun < budget:
                swap_in(variants[variant])
                results[variant]["trials"].append(decode(model, batch, tokens))
    swap_in(original)
    base = statistics.median(results["base"]["trials"])
    print(
        f"\n{shape}, {bits or 'no'} bits, {dtype}, batch {batch}, {tokens} tokens, rounds {rounds}, "
        f"rank {RANK}, {mx.default_device()}, {time.time() - begun:.0f} s",
        flush=True,
    )
    print(f"{'variant':16}{'tok/s':>9}{'min':>9}{'max':>9}{'of base':>9}{'error':>10}")
    for variant, result in results.items():
        trials = result["trials"] or [float("nan")]
        result["median"] = statistics.median(trials)
        error = "" if result["relative_error"] is None else f"{result['relative_error']:.1e}"
        print(
            f"{variant:16}{result['median']:9.1f}{min(trials):9.1f}{max(trials):9.1f}"
            f"{result['median'] / base:9.3f}{error:>10}",
            flush=True,
        )
    return {"shape": shape, "bits": bits, "batch": batch, "tokens": tokens, "results": results}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["8b", "0.5b"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--budget", type=float, default=80, help="seconds for each shape and batch")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's CPU seconds (busy machine)")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.cpu_time:
        global CLOCK
        CLOCK = time.process_time
    reports = []
    for shape in options.shapes:
        for batch in options.batches:
            reports.append(
                run(
                    shape,
                    options.bits,
                    getattr(mx, options.dtype),
                    batch,
                    options.tokens,
                    options.rounds,
                    options.only,
                    options.budget,
                )
            )
            mx.clear_cache()
            if options.json:
                with open(options.json, "w") as file:
                    json.dump({"mlx": mx.__version__, "reports": reports}, file, indent=1)


if __name__ == "__main__":
    main()
