"""Chats of several clients with this server and with mlx-lm's, in one run on one machine.

    python scripts/benchmarks/chats.py [--base demo] [base long adapter mixed structured] [--rounds 3] [--json FILE]
    python scripts/benchmarks/chats.py adapter mixed structured base --shape 4b --seconds 220    # a GPU, 4 bits

Each client has a chat of five turns: it sends what was said so far and a new text of its own, and reads the answer as
it is written, a fixed number of tokens (the end tokens are forbidden by `logit_bias`, or have no weights). All servers
run from the beginning to the end. In each round every leg has its turn, the largest crowds first (`mixed` has two,
`structured` three), and in a leg each side is first in turn, with new texts; before its first turn a leg is played
shortly, and not counted. `--seconds`: what would end later is not begun. Shown are medians and, in brackets, the range
over the rounds. On a CPU both get OpenBLAS and a float32 copy of the base.

- base: 1, 4 and 16 clients without an adapter
- long: one client, whose first text is long
- adapter: 1, 4 and 16 clients, all with one adapter
- mixed: 16 clients over 8 adapters, against 16 with one
- structured: 4 clients beside a fifth whose answers are JSON of a schema, against 4 beside a fifth like them
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from helpers.serving import Served  # noqa: E402

import mlx_adapters  # noqa: E402, F401  (before mlx: it sees to a fast BLAS)

TURNS, ADAPTERS = 5, [f"a{i}" for i in range(8)]
SHORT = {"turns": 2, "tokens": 6}  # before a leg counts; of one client more, whose steps may be compiled
SHORT_ALONE = {"turns": 5, "tokens": 14}
# An answer of as many tokens as the others': what ends sooner asks sooner, and each prompt holds others up.
SCHEMA = {"type": "object", "properties": {"said": {"type": "string", "minLength": 500}}, "required": ["said"]}
SCHEMA |= {"additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "said", "schema": SCHEMA, "strict": True}}
OFTENER = {
    "mixed": 2,
    "structured": 3,
}  # both sides are this server's, and near each other: more rounds tell them apart
SHOWN = ("tokens_per_second", "first", "later")
WORDS = (ROOT / "LICENSE").read_text().lower().split()
# With the same BLAS, and room for clients that come at once: its own 5 lets others wait a second, or loses them.
THEIRS = "import socketserver; socketserver.TCPServer.request_queue_size = 128; import mlx_adapters; "
THEIRS += "from mlx_lm.server import main; main()"


class MlxLm:
    """mlx-lm's server in a process of its own."""

    def __init__(self, base, *options):
        with httpx.Client() as http:
            port = random.randint(20_000, 40_000)
            command = [sys.executable, "-c", THEIRS, "--model", str(base), "--port", str(port), "--log-level", "ERROR"]
            self.process = subprocess.Popen([*command, *map(str, options)], cwd=ROOT, stderr=subprocess.DEVNULL)
            self.address = f"http://127.0.0.1:{port}"
            for _ in range(1200):
                try:
                    if http.get(self.address + "/health").status_code == 200:
                        return
                except httpx.TransportError:
                    time.sleep(0.1)
        raise RuntimeError("mlx-lm's server did not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


class Talk:
    """One client's chat; `firsts`: the seconds to the first token of each turn; `made`: the tokens of its answers."""

    def __init__(self, model, seed, options, more=None, first=None):
        self.words = first or options.words
        self.model, self.chance, self.options, self.more = model, random.Random(seed), options, more or {}
        self.firsts, self.made, self.seconds, self.cached = [], 0, 0.0, 0

    async def run(self, http):
        messages, start = [], time.monotonic()
        for _ in range(self.options.turns):
            messages.append({"role": "user", "content": " ".join(self.chance.choices(WORDS, k=self.words))})
            self.words = self.options.words
            messages.append({"role": "assistant", "content": await self.turn(http, messages)})
        self.seconds = time.monotonic() - start

    async def turn(self, http, messages):
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.options.tokens,
            "temperature": 0,
            "stream": True,
        }
        body |= {"stream_options": {"include_usage": True}, "logit_bias": self.options.bias} | self.more
        start, text, first = time.monotonic(), "", None
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError((await answer.aread())[:500])
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    self.made += chunk["usage"]["completion_tokens"]
                    self.cached += (chunk["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                if chunk.get("choices") and (said := chunk["choices"][0]["delta"].get("content")):
                    first = first or time.monotonic() - start
                    text += said
        self.firsts.append(first if first is not None else time.monotonic() - start)
        return text


async def crowd(address, talks):
    """Figures of talks that are held at once."""
    limits = httpx.Limits(max_connections=len(talks) * 2)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        start = time.monotonic()
        await asyncio.gather(*(talk.run(http) for talk in talks))
        spent = time.monotonic() - start
    return {
        "tokens_per_second": sum(talk.made for talk in talks) / spent,
        "first": statistics.median(talk.firsts[0] for talk in talks),
        "later": statistics.median(first for talk in talks for first in talk.firsts[1:]),
        "cached": sum(talk.cached for talk in talks),
        "made": sum(talk.made for talk in talks),
    }


def crowded(address, models, count, first=None):
    """A side of a leg: so many talks with these models in turn. It gives the figures."""

    def play(tag, options):
        made = [Talk(models[i % len(models)], f"{tag} {i}", options, first=first) for i in range(count)]
        return crowd(address, made)

    return play


class Beside(Talk):
    """A client that asks until it is ended, and is not counted."""

    async def run(self, http):
        while True:
            await self.turn(http, [{"role": "user", "content": " ".join(self.chance.choices(WORDS, k=20))}])


def beside(address, more):
    """A side of a leg: four plain talks, whose figures count, beside a fifth client of this kind."""

    async def play(tag, options):
        async with httpx.AsyncClient(base_url=address, timeout=600) as http:
            fifth = asyncio.ensure_future(Beside("base", f"{tag} fifth", options, more).run(http))
            try:
                figures = await crowd(address, [Talk("base", f"{tag} {i}", options) for i in range(4)])
                if fifth.done():
                    fifth.result()  # it failed
            finally:
                fifth.cancel()
        return {"tokens_per_second": figures["tokens_per_second"]}

    return play


def legs_of(options, ours, theirs):
    """{title: {side: what plays it}}, the largest crowds first; `theirs`: addresses by leg."""
    legs = {}

    def add(name, count, models, first=None):
        sides = {
            "this server": crowded(ours, models, count, first),
            "mlx-lm": crowded(theirs["adapter" if name == "adapter" else "base"], ["default_model"], count, first),
        }
        legs[f"{name}, {count} client" + ("s" if count > 1 else "")] = sides

    for count in sorted(options.clients, reverse=True):
        for name, models in (("adapter", ADAPTERS[:1]), ("base", ["base"])):
            if name in options.legs:
                add(name, count, models)
        if "mixed" in options.legs and count == max(options.clients):
            legs["mixed, 16 clients"] = {
                "8 adapters": crowded(ours, ADAPTERS, 16),
                "one adapter": crowded(ours, ADAPTERS[:1], 16),
            }
    if "structured" in options.legs:
        schema = {"response_format": FORMAT, "logit_bias": None}
        legs["structured, 4 clients"] = {
            "beside a schema": beside(ours, schema),
            "beside one like them": beside(ours, {}),
        }
    if "long" in options.legs:
        add("long", 1, ["base"], options.long)
    return legs


def race(legs, options, end):
    """{title: {side: [figures of each round]}}, as far as the time reaches, a line of each as it is known.

    Next comes always the leg that is furthest behind, among those that would end in time.
    """
    start, results, lasted, played_rounds = time.monotonic(), {}, {}, dict.fromkeys(legs, 0)

    def say(*words):
        print(f"[{time.monotonic() - start:5.1f}]", *words, file=sys.stderr, flush=True)

    def played(play, tag, **short):
        made = play(tag, argparse.Namespace(**vars(options) | short))
        return asyncio.run(asyncio.wait_for(made, None if end == math.inf else max(end - time.monotonic(), 0.1)))

    def turn(number, title, sides):
        for side, play in sides.items() if number == 0 else ():
            played(play, f"short {side}", **(SHORT_ALONE if " 1 client" in title else SHORT))
        figures, begun = {}, time.monotonic()
        for side in list(sides)[:: -1 if number % 2 else 1]:
            figures[side] = played(sides[side], f"{number} {title}")
            say(f"{title}, round {number + 1}, {side}:", {key: round(x, 3) for key, x in figures[side].items()})
        lasted[title] = time.monotonic() - begun
        first, second = (figures[side] for side in sides)
        say(
            f"{title}, {' / '.join(sides)}:", {key: round(first[key] / second[key], 3) for key in SHOWN if key in first}
        )
        for side in sides:
            results.setdefault(title, {}).setdefault(side, []).append(figures[side])

    def behind(title):
        return played_rounds[title] / OFTENER.get(title.partition(",")[0], 1)

    while left := [
        title for title in legs if behind(title) < options.rounds and time.monotonic() + lasted.get(title, 0) < end
    ]:
        title = min(left, key=behind)
        try:
            turn(played_rounds[title], title, legs[title])
        except TimeoutError:
            break
        except (httpx.HTTPError, RuntimeError) as error:
            say(f"{title}: failed: {error!r}")
        played_rounds[title] += 1
    return results


def random_base(shape, folder):
    """A folder with random weights of the shape and the demo's tokenizer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map
    from mlx_lm.utils import save_model
    from train_memory import QWEN3, SHAPES

    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.system.door import make_module
    from mlx_adapters.system.machine import on_gpu

    demo = resolve_base("demo").folder
    own = json.loads((demo / "config.json").read_text())
    config = QWEN3 | SHAPES[shape] | {name: own.get(name) for name in ("vocab_size", "eos_token_id")}
    module = make_module(config)
    ends = [own["eos_token_id"]] if isinstance(own["eos_token_id"], int) else own["eos_token_id"]
    module.model.embed_tokens.weight[mx.array(ends)] = 0  # never the likeliest
    if on_gpu():
        module.update(tree_map(lambda array: array.astype(mx.bfloat16), module.parameters()))
        nn.quantize(module, 64, 4)
        config["quantization"] = {"group_size": 64, "bits": 4}
    save_model(folder, module)
    (folder / "config.json").write_text(json.dumps(config))
    for file in demo.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    return folder


def prepare(place, options):
    """A base that both can load, and adapters on it."""
    import mlx.core as mx
    from race import dense_copy
    from serve import random_adapter

    from mlx_adapters.generation.live import load_model
    from mlx_adapters.models.adapter import write_adapter
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.system.machine import on_gpu

    if options.shape:
        folder = random_base(options.shape, place / "base")
    else:
        base = resolve_base(options.base)
        folder = base.folder if on_gpu() else dense_copy(base, place / "base")
    model = load_model(str(folder))
    for i, name in enumerate(ADAPTERS):
        write_adapter(random_adapter(model, options.rank, i), place / name)
    mx.clear_cache()
    options.bias = {} if options.shape else {str(token): -100 for token in model.tokenizer.eos_token_ids}
    return folder


def median(values, form="{:.1f}"):
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.median(values)) + (f" ({low}-{high})" if low != high else "")


def ratio(figures, ours, theirs, key):
    return median([a[key] / b[key] for a, b in zip(figures[ours], figures[theirs], strict=True)], "{:.2f}")


def show(name, figures):
    """Rows of the table."""
    first, second = list(figures)
    keys = [key for key in SHOWN if key in figures[first][0]]
    name += f" ({len(figures[first])} rounds)"
    for side, rounds in figures.items():
        cells = [median([one[key] for one in rounds], "{:.1f}" if key == SHOWN[0] else "{:.2f}") for key in keys]
        print(f"| {name} | {side} | " + " | ".join(cells) + " |")
    print(f"| {name} | *{first} / {second}* | " + " | ".join(ratio(figures, first, second, key) for key in keys) + " |")


@contextlib.contextmanager
def servers(base, place, options):
    """This server's address, and by leg those of mlx-lm's, all started at once."""
    adapters = [f"{name}={place / name}" for name in ADAPTERS]
    kinds = {"base": ()} if {"base", "long"} & set(options.legs) else {}
    kinds |= {"adapter": ("--adapter-path", place / ADAPTERS[0])} if "adapter" in options.legs else {}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as threads:
        ours = threads.submit(Served, base, "--max-batch", 16, "--max-adapters", 8, adapters=adapters)
        theirs = {kind: threads.submit(MlxLm, base, *told) for kind, told in kinds.items()}
        for started in (ours, *theirs.values()):
            if started.exception() is None:
                stack.enter_context(started.result())
        yield ours.result().address, {kind: started.result().address for kind, started in theirs.items()}


def main():
    from mlx_adapters.system.machine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("legs", nargs="*", default=["base", "long", "adapter", "mixed", "structured"])
    parser.add_argument("--base", default="demo")
    parser.add_argument("--shape", help="instead of a base, random weights of a shape of train_memory.py's")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--words", type=int, default=30)
    parser.add_argument("--long", type=int, default=500, help="words of the first text of the leg `long`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="after these, from the start, no more is played"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.turns, end = TURNS, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        base = prepare(place, options)
        with servers(base, place, options) as (ours, theirs):
            results = race(legs_of(options, ours, theirs), options, end)
    turns = f"turns of {options.words} words, answers of {options.tokens} tokens"
    print(
        f"\n{options.shape or options.base}, rank {options.rank}; {turns}, {options.rounds} rounds; {environment()}\n"
    )
    print("| chats | | tokens/s | first token, s | of later turns, s |\n| --- | --- | --- | --- | --- |")
    for name, figures in results.items():
        show(name, figures)
    if options.json:
        told = {
            "environment": environment(),
            "options": {k: str(v) for k, v in vars(options).items()},
            "results": results,
        }
        options.json.write_text(json.dumps(told, indent=1, default=str))


if __name__ == "__main__":
    main()
