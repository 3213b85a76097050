"""Mixed batches with everything on, held against each request alone and cold: no token may differ.

Tiny random models of many architectures get requests at any time: on the base and three adapters, prompts that go on
from what others read or wrote, some under a grammar, all with guesses that are checked, in batches of five whose
prompts are read in pieces of many sizes; some are canceled. Each answer is compared with that of the same request by
itself, without a cache and without guesses. Ends with status 1 if a token differs.

    python scripts/check_batches.py --seconds 14 llama qwen3_5 mamba
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from helpers.adapters import random_adapter  # noqa: E402
from helpers.tiny_configs import tiny_base  # noqa: E402

import mlx_adapters  # noqa: E402, F401  (before mlx: it sees to a fast BLAS)
from mlx_adapters.config.sampling import Drafting, Sampling  # noqa: E402
from mlx_adapters.drafting.drafts import load_drafter  # noqa: E402
from mlx_adapters.errors import AdapterError  # noqa: E402
from mlx_adapters.generation.batching import Batcher  # noqa: E402
from mlx_adapters.generation.live import load_model  # noqa: E402
from mlx_adapters.generation.requests import Request  # noqa: E402
from mlx_adapters.generation.sampling import Sampler  # noqa: E402
from mlx_adapters.runtime.pool import AdapterPool  # noqa: E402

NAMES = ["llama", "qwen3", "gemma3_text", "qwen3_5", "mamba", "deepseek_v3", "qwen3_moe", "gemma3n", "llama4"]
NAMES += ["falcon_h1", "mixtral"]
VOCABULARY = 500
PACES = [0, 1e-6, 1e-3, 4e-3, 1e-2]  # seconds a token: how much is read at once hangs on it


class Even:
    """A grammar: some even tokens, then the end."""

    def __init__(self, count):
        self.left, self.ended = count, False

    def mask(self):
        return np.full(16, 0x55555555, np.uint32)

    def accept(self, token):
        self.left -= 1
        self.ended = self.left == 0


def model_of(name, folder):
    """A tiny model with as many of three adapters as it can have."""
    model = load_model(tiny_base(folder / name, name))
    model.pool = AdapterPool(model.module, group=False)
    for i, kind in enumerate(("lora", "dora", "lora")):
        try:
            model.attach(random_adapter(model, kind, rank=2 + i, seed=i), name=str(i), use=False)
        except AdapterError as error:
            print(f"{name} has no {kind}: {error.message}", file=sys.stderr)
    return model


def request_maker(model, known, chance):
    """A function that makes one and the same request; its prompt may go on from a text of `known`."""
    start = chance.choice(known)
    prompt = [*start, *(chance.randrange(VOCABULARY) for _ in range(chance.choice([1, 5, 9, 17, 40])))][:400]
    adapter = chance.choice([None, *model.pool.attached.values()])
    how, even = Sampling(max_tokens=chance.randint(1, 14)), chance.choice([0, 0, 0, 5])
    return lambda: Request(prompt, adapter, how.max_tokens, Sampler(how), constraint=Even(even) if even else None)


def answer(batcher, requests, chance=None):
    """{request: its tokens}, and those that were canceled. With `chance` they come and go at any time."""
    made, waiting, canceled = {request: [] for request in requests}, list(requests), set()
    while waiting or not batcher.idle:
        if waiting and (chance is None or batcher.idle or chance.random() < 0.5):
            batcher.submit(waiting.pop(0))
        if chance is not None:
            batcher.reader._pace = chance.choice(PACES)
        for token in batcher.step():
            made[token.request].append(token.id)
        if chance is not None and batcher.rows and chance.random() < 0.02:
            canceled.add(request := chance.choice(batcher.rows).request)
            batcher.cancel(request)
    return made, canceled


def check(name, seconds, folder):
    """Compare for so long; how many answers differ."""
    model, chance, start = model_of(name, folder), random.Random(name), time.monotonic()
    drafter = load_drafter(Drafting(prompt_lookup=True), model)
    warm = Batcher(model.module, model.pool, max_batch=5, prefill=32, cache_bytes=4 << 20, drafter=drafter)
    cold = Batcher(model.module, model.pool, max_batch=1)
    systems = [[chance.randrange(VOCABULARY) for _ in range(length)] for length in (3, 20, 70)]
    chats, requests, wrong, known, guessed = [], 0, 0, 0, 0
    while time.monotonic() - start < seconds:
        makers = [request_maker(model, systems + chats, chance) for _ in range(chance.randint(3, 9))]
        mixed, canceled = answer(warm, [make() for make in makers], chance)
        alone, _ = answer(cold, [make() for make in makers])
        for (request, tokens), expected in zip(mixed.items(), alone.values(), strict=True):
            wrong += tokens != (expected[: len(tokens)] if request in canceled else expected)
            known, guessed = known + request.cached_tokens, guessed + request.accepted_tokens
        requests += len(makers)
        chats = [*chats, *([*request.prompt, *tokens] for request, tokens in mixed.items())][-12:]
    how = "together" if warm.can_batch else "in turn"
    print(
        f"{name}: {requests} requests {how}, {known} tokens known, {guessed} guessed right; {wrong} wrong", flush=True
    )
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--seconds", type=float, default=14, help="for each architecture")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(sum([check(name, options.seconds, Path(folder)) for name in options.names]) > 0)


if __name__ == "__main__":
    main()
