"""What the host does for each step that a server decodes: microseconds of its two threads, operations, handings-over.

    python scripts/benchmarks/host.py [CASE ...] [--layers 36] [--tokens 64] [--rounds 3] [--json FILE]

A model of many narrow layers, so that a device has nothing to do and the host the same as for a wide one. The server
runs here; its clients stream in a process of their own, all at once. Counted are the steps in which all of them are
decoded and nothing is read, each thread by its own clock of CPU time, so that waiting, for the device or for each
other, is not in it. Medians over the steps (the web's mean: it may be steps behind), then over the rounds, with
their range.

- engine: the thread that runs the model, from one step to the next; of it
- building: until a step's operations are there (Python); handing over: what MLX does with them in that thread
- web: the event loop's thread, which writes what the clients get
- wall: from one step to the next by the clock on the wall, which holds what the two wait for each other and the device
- operations: of a step, as MLX counts them (what is compiled is one); evaluations: how often they are handed over
- joining: what a prompt's coming costs the engine's thread, in microseconds a request, beside the steps
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import mlx_adapters  # noqa: E402, F401  (before mlx: it sees to a fast BLAS)

ADAPTERS = [f"a{i}" for i in range(8)]
CASES = {  # title: (models in turn, plain clients, structured clients, more of each body)
    "base, 1": (["base"], 1, 0, {}),
    "base, 4": (["base"], 4, 0, {}),
    "base, 16": (["base"], 16, 0, {}),
    "one adapter, 1": (ADAPTERS[:1], 1, 0, {}),
    "one adapter, 4": (ADAPTERS[:1], 4, 0, {}),
    "one adapter, 16": (ADAPTERS[:1], 16, 0, {}),
    "eight adapters, 16": (ADAPTERS, 16, 0, {}),
    "beside a fifth": (["base"], 5, 0, {}),
    "beside a schema": (["base"], 4, 1, {}),
    "sampled, 16": (["base"], 16, 0, {"temperature": 0.7, "top_p": 0.9}),
    "logprobs, 4": (["base"], 4, 0, {"logprobs": True, "top_logprobs": 5}),
}
SHOWN = ("engine", "building", "handing over", "web", "wall", "operations", "evaluations", "joining")
ASKING = """
import asyncio, json, sys
import httpx

async def ask(http, body):
    pieces = 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            pieces += line.startswith("data: {")
    return pieces

async def main(address, bodies):
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as http:
        await asyncio.gather(*(ask(http, body) for body in bodies))

asyncio.run(main(sys.argv[1], json.load(sys.stdin)))
"""


class Watch:
    """Notes of an engine's steps. Made before it starts, which is in another thread."""

    def __init__(self, engine):
        self.engine, self.notes, self.built, self.handed, self.evaluations = engine, [], 0.0, 0.0, 0
        self.operations, self.joined, self._web, self._begun = 0, [], None, 0.0
        self._step, engine._step = engine._step, self.step
        self._admit, engine._batcher._admit = engine._batcher._admit, self.admit
        self._forward, engine._batcher._forward = engine._batcher._forward, self.forward

    def watch_web(self, thread):
        self._web = time.pthread_getcpuclockid(thread)

    def step(self):
        batcher = self.engine._batcher
        steady = len(batcher.rows), batcher.reader.idle
        self.notes.append((time.thread_time(), time.clock_gettime(self._web), steady, self.built, self.handed))
        self.notes[-1] += (self.evaluations, time.perf_counter())
        self._step()

    def admit(self):
        waiting, begun = len(self.engine._batcher.rows), time.thread_time()
        self._admit()
        if (more := len(self.engine._batcher.rows) - waiting) > 0:
            self.joined.append((time.thread_time() - begun) / more)

    def forward(self, inputs):
        begun, handed = time.thread_time(), self.handed
        made = self._forward(inputs)
        self.built += time.thread_time() - begun - (self.handed - handed)
        return made

    def handing_over(self, original):
        def call(*arrays):
            begun = time.thread_time()
            original(*arrays)
            self.handed += time.thread_time() - begun
            self.evaluations += 1

        return call

    def clear(self):
        self.notes, self.joined = [], []

    def figures(self, rows):
        """Microseconds and counts of the steps with so many rows."""
        steady = [(a, b) for a, b in zip(self.notes, self.notes[1:], strict=False) if a[2] == b[2] == (rows, True)][2:]
        if len(steady) < 8:
            return None
        middles = [statistics.median(b[i] - a[i] for a, b in steady) for i in (0, 3, 4, 5, 6)]
        engine, built, handed = (1e6 * seconds for seconds in middles[:3])
        web = 1e6 * (steady[-1][1][1] - steady[0][0][1]) / len(steady)
        joined = statistics.median(self.joined) * 1e6 if self.joined else float("nan")
        shown = (engine, built, handed, web, 1e6 * middles[4], self.operations, middles[3], joined)
        return dict(zip(SHOWN, shown, strict=True))


def prepare(place, options):
    """A folder with the base, and adapters on it beside."""
    from chats import random_base
    from serve import random_adapter
    from train_memory import SHAPES

    from mlx_adapters.generation.live import load_model
    from mlx_adapters.models.adapter import write_adapter

    SHAPES["narrow"]["num_hidden_layers"] = options.layers
    folder = random_base("narrow", place / "base")
    model = load_model(str(folder))
    for i, name in enumerate(ADAPTERS):
        write_adapter(random_adapter(model, options.rank, i), place / name)
    return folder


def operations_of(batcher, entries):
    """How many operations a step of these rows has."""
    import re

    import mlx.core as mx

    with tempfile.NamedTemporaryFile("r", suffix=".dot") as file, batcher.pool.routed(entries):
        from mlx_adapters.runtime.row_attention import attending

        cache = batcher.reader._make_cache()
        from mlx_adapters.surgery.caches import merged

        batcher.module(mx.array([[1, 2, 3]]), cache=cache)
        mx.eval([layer.state for layer in cache])
        if len(entries) > 1:
            import copy

            cache = merged([[copy.copy(layer) for layer in cache] for _ in entries])
            mx.eval([layer.state for layer in cache])
        with attending(len(entries)):
            logits = batcher.module(mx.array([[1]] * len(entries)), cache=cache)[:, -1]
        mx.export_to_dot(file.name, mx.argmax(logits, axis=-1))
        return len(set(re.findall(r"(\d+) \[label =\"[^\"]*\", shape=rectangle", Path(file.name).read_text())))


def bodies_of(case, options):
    """What the clients of a case send."""
    from chats import FORMAT, WORDS

    models, plain, structured, more = CASES[case]
    bodies = []
    for i in range(plain + structured):
        words = " ".join(WORDS[(i * 13) % 200 : (i * 13) % 200 + 30])
        body = {"model": models[i % len(models)], "messages": [{"role": "user", "content": words}], "stream": True}
        body |= {"max_tokens": options.tokens, "temperature": 0} | more
        bodies.append(body | ({"response_format": FORMAT} if i >= plain else {}))
    return bodies


def play(watch, address, case, options):
    """The figures of a case, once."""
    watch.clear()
    command = [sys.executable, "-c", ASKING, address]
    bodies = bodies_of(case, options)
    subprocess.run(command, input=json.dumps(bodies), text=True, check=True, timeout=300)
    return watch.figures(len(bodies))


def median(values):
    low, high = min(values), max(values)
    return f"{statistics.median(values):.0f}" + (f" ({low:.0f}-{high:.0f})" if round(low) != round(high) else "")


@contextlib.contextmanager
def served(folder, place):
    """A server in this process, whose engine is watched."""
    import threading

    import mlx.core as mx

    from mlx_adapters.serving.settings import ServeSettings
    from mlx_adapters.serving.start import make_engine, run_server

    settings = ServeSettings(port=0, max_batch=16, max_adapters=8)
    engine = make_engine(str(folder), [(name, str(place / name)) for name in ADAPTERS], settings, name="base")
    watch, started, told = Watch(engine), threading.Event(), []
    plain = mx.async_eval
    mx.async_eval = watch.handing_over(plain)

    def heard(*at):
        told.extend(at)
        started.set()

    thread = threading.Thread(target=run_server, args=(engine, heard), daemon=True)
    thread.start()
    started.wait(120)
    watch.watch_web(thread.ident)
    try:
        yield watch, told[0]
    finally:
        told[1]()
        thread.join(60)
        mx.async_eval = plain


def main():
    from mlx_adapters.system.machine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[], help="some of: " + "; ".join(CASES))
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = [case for case in CASES if not options.cases or case in options.cases]
    results = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        base = prepare(Path(folder), options)
        with served(base, Path(folder)) as (watch, address):
            catalog = watch.engine.catalog
            for number in range(options.rounds):
                for case in cases:
                    models, plain, structured, _ = CASES[case]
                    names = [models[i % len(models)] for i in range(plain + structured)]
                    if number == 0:
                        entries = [(one := catalog.adapter(name)) and one.attached for name in names]
                        results[case].append(operations_of(watch.engine._batcher, entries))
                    watch.operations = results[case][0]
                    figures = play(watch, address, case, options)
                    if figures:
                        results[case].append(figures)
    print(
        f"\n{options.layers} layers, rank {options.rank}, {options.tokens} tokens, {options.rounds} rounds, us a step"
    )
    print(f"{environment().system}, {environment().chip}, {environment().device}\n")
    print("| clients | " + " | ".join(SHOWN) + " |\n|" + " --- |" * (len(SHOWN) + 1))
    for case, (_, *rounds) in results.items():
        print(f"| {case} | " + " | ".join(median([one[key] for one in rounds]) for key in SHOWN) + " |")
    if options.json:
        options.json.write_text(json.dumps({"environment": vars(environment()), "results": results}, default=str))


if __name__ == "__main__":
    main()
