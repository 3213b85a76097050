"""The measured work itself: reading a prompt and writing tokens, as mlx-lm does it, with a clock beside it.

- TTFT: from the call to the first token, evaluated. The prompt is read in chunks of 2048 tokens, its last
  token in a step of its own, which gives the first token.
- Prefill speed: prompt tokens of the whole batch over the TTFT.
- Decode speed: tokens of the whole batch after the first, over the time from the first token to the last.
  One step is always queued ahead, so that a GPU does not wait for Python.
- Stretch speed: the same over the fastest steps in a row (see `plan.stretch`), the least disturbed part of the
  trial. A single step would not do: after a hold-up of Python the one that was queued seems to take no time.

Decoding is greedy and does not stop at an end token: every trial does the same amount of work.
"""

import time
from typing import Any

import numpy as np

from mlx_adapters.benchmarking.schedule import stretch
from mlx_adapters.generation.memory import PREFILL_CHUNK, bytes_of
from mlx_adapters.models.layers import EMBEDDING, SWITCH, adaptable_layers
from mlx_adapters.system.door import make_prompt_cache, mx, nn
from mlx_adapters.system.machine import on_gpu


def prefill(module: nn.Module, cache: list[Any], tokens: mx.array) -> mx.array:
    """Read the prompts (batch, length) into the cache; the first new token of each, (batch,), not evaluated."""
    last = tokens.shape[1] - 1
    for start in range(0, last, PREFILL_CHUNK):
        module(tokens[:, start : min(start + PREFILL_CHUNK, last)], cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
    return step(module, cache, tokens[:, last:])


def step(module: nn.Module, cache: list[Any], tokens: mx.array) -> mx.array:
    """The likeliest next tokens (batch,) after `tokens` (batch, n)."""
    return mx.argmax(module(tokens, cache=cache)[:, -1], axis=-1)


def run_trial(module: nn.Module, tokens: mx.array, decode_tokens: int) -> dict[str, Any]:
    """Time one generation for the prompts (batch, length); `token_ids` are those of the first prompt."""
    batch, length = tokens.shape
    cache = make_prompt_cache(module)
    start = time.perf_counter()
    current = prefill(module, cache, tokens)
    mx.eval(current)
    marks, written = [time.perf_counter()], [current]
    upcoming = step(module, cache, current[:, None])
    mx.async_eval(upcoming)
    for remaining in range(decode_tokens - 1, 0, -1):
        current = upcoming
        if remaining > 1:
            upcoming = step(module, cache, current[:, None])
            mx.async_eval(upcoming)
        mx.eval(current)
        marks.append(time.perf_counter())
        written.append(current)
    ttft, decode = marks[0] - start, marks[-1] - marks[0]
    steps = stretch(decode_tokens)
    fastest = min(np.subtract(marks[steps:], marks[:-steps]))
    return {
        "ttft_seconds": ttft,
        "prefill_tps": batch * length / ttft,
        "decode_tps": batch * (decode_tokens - 1) / decode,
        "stretch_tps": batch * steps / float(fastest),
        "tpot_seconds": float(np.median(np.diff(marks))),
        "kv_cache_bytes": sum(layer.nbytes for layer in cache),
        "token_ids": [token[0].item() for token in written],
    }


def random_prompts(vocabulary: int, batch: int, length: int, seed: int) -> mx.array:
    """(batch, length) token ids, the same for every variant with this vocabulary."""
    return mx.array(np.random.default_rng([seed, batch, length]).integers(0, vocabulary, (batch, length), np.int32))


def vocabulary_size(module: nn.Module) -> int:
    """Rows of the token embedding."""
    return next(layer.weight.shape[0] for layer in adaptable_layers(module).values() if isinstance(layer, EMBEDDING))


def bytes_per_token(module: nn.Module, config: dict[str, Any]) -> int:
    """Weight bytes that one decode step for one sequence must read.

    Of an input embedding that is not the output matrix too, one row; of experts, the share that is chosen.
    """
    total = bytes_of(module)
    layers = adaptable_layers(module)
    heads = [path for path, layer in layers.items() if path.endswith("lm_head")]
    experts = config.get("num_experts") or config.get("num_local_experts") or 1
    chosen = config.get("num_experts_per_tok") or experts
    for layer in layers.values():
        size = bytes_of(layer)
        if isinstance(layer, EMBEDDING) and heads:
            total -= size - size // layer.weight.shape[0]
        elif isinstance(layer, SWITCH):
            total -= round(size * (1 - chosen / experts))
    return total


def bandwidth(size_bytes: int, seconds: float = 0.5) -> float:
    """Bytes per second that this device reads in a matrix-vector product over `size_bytes` of float32 weights:
    the ceiling for decoding, which reads all weights for each token. The best of the runs that fit in `seconds`;
    by MLX on a GPU, by NumPy on a CPU (MLX's own product reads at a quarter of that speed there).
    """
    width = 4096
    rows = max(1, min(size_bytes, 1 << 30) // (4 * width))
    matrix, vector = mx.ones((rows, width)), mx.ones((width,))
    if on_gpu():

        def read() -> None:
            mx.eval(matrix @ vector)
    else:
        array, other = np.array(matrix), np.array(vector)

        def read() -> None:
            array @ other

    read()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        read()
        best = max(best, matrix.nbytes / (time.perf_counter() - start))
    return best
