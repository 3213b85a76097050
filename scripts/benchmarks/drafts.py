"""What guesses bring: how many of them are right, and the speed with them over the speed without, in one run.

    python scripts/benchmarks/drafts.py                                   # the embedded model, also as its own draft
    python scripts/benchmarks/drafts.py --base BIG --draft-model SMALL --adapter NAME --rows 1 4

Texts of three kinds: one that repeats what it was given, one that changes a little of it, one that is free. For each
number of rows the ways take turns, in shuffled order; seconds are medians. `same` says whether the tokens are those
without guesses (where two tokens are equally likely within the rounding of floats, they may not be).
"""

import argparse
import random
import statistics
import time

import mlx_adapters  # noqa: F401  (before mlx: it sees to a fast BLAS)
from mlx_adapters.config.sampling import Drafting
from mlx_adapters.drafting.drafts import load_drafter
from mlx_adapters.generation.batching import answer_all
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.requests import Request
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.system.machine import environment
from mlx_adapters.units import format_table

TABLE = "CREATE TABLE student (id INT, name TEXT, year INT); CREATE TABLE course (id INT, title TEXT, student_id INT);"
CODE = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n    return result\n"
KINDS = {
    "repeats": f"Repeat this text word for word, twice:\n{TABLE}",
    "changes": f"Rename `values` to `prices` in this function and give all of it:\n{CODE}",
    "free": "Tell a short story about a lighthouse.",
}


def written(model, drafter, prompts, adapter, tokens):
    """(seconds, answers, tokens guessed, of them right) of prompts that are answered together."""
    entry = None if adapter is None else model.pool.get(adapter)
    requests = [Request(prompt, entry, tokens) for prompt in prompts]
    start = time.perf_counter()
    answers = dict(answer_all(model.module, model.pool, requests, drafter=drafter))
    seconds = time.perf_counter() - start
    guessed = sum(request.guessed_tokens for request in requests)
    return seconds, [answers[r] for r in requests], guessed, sum(request.accepted_tokens for request in requests)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="demo")
    parser.add_argument("--draft-model", help="the base itself if none is given")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--adapter", help="on the main model")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, adapter = load_model(options.base), None
    if options.adapter:
        adapter = model.attach(load_adapter(options.adapter), name="adapter", use=False)
    draft = options.draft_model or str(model.base.folder)
    ways = {
        "none": None,
        "lookup": Drafting(prompt_lookup=True, draft_tokens=options.draft_tokens),
        "model": Drafting(draft_model=draft, draft_tokens=options.draft_tokens),
    }
    drafters = {way: None if how is None else load_drafter(how, model) for way, how in ways.items()}
    rows = []
    for count in options.rows:
        for kind, text in KINDS.items():
            prompts = [model.encode_chat([{"role": "user", "content": f"{text} ({i})"}]) for i in range(count)]
            results = {way: [] for way in ways}
            for number in range(options.rounds):
                for way in random.Random(number).sample(list(ways), len(ways)):
                    results[way].append(written(model, drafters[way], prompts, adapter, options.tokens))
            plain, wanted = statistics.median(r[0] for r in results["none"]), results["none"][0][1]
            for way in list(ways)[1:]:
                _, answers, guessed, right = results[way][0]
                speed = plain / statistics.median(r[0] for r in results[way])
                share = f"{right}/{guessed} ({right / guessed:.0%})" if guessed else "0/0"
                rows.append([str(count), kind, way, share, f"{speed:.2f}", "yes" if answers == wanted else "no"])
                print("#", *rows[-1], flush=True)
    print(f"\n{options.base}, drafts of {draft}, {options.draft_tokens} at a time; {environment()}\n")
    print(format_table(["ROWS", "TEXT", "GUESSED BY", "RIGHT / GUESSED", "SPEED / WITHOUT", "SAME"], rows))


if __name__ == "__main__":
    main()
