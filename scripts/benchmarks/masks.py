"""How fast chat rows become tokens with their loss mask, against mlx-lm's own data set.

Rows of four messages (two questions, two answers of 40 words on average, three quarters ASCII). Per template family
of the tests, or for one --base: rows per second of CPU time with mask and without, and the ratio to mlx-lm's
`ChatDataset` doing the same (whose mask holds the last answer alone, by rendering the rest once more).

    python scripts/benchmarks/masks.py [--rows 10000] [--base FOLDER] [FAMILY ...]
"""

import argparse
import random
import sys
import time
from pathlib import Path

from mlx_adapters.data.tokenizing import tokenize
from mlx_adapters.models.loading import load_tokenizer_of
from mlx_adapters.rows.row import RawRow
from mlx_adapters.sources.bases import resolve_base

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from helpers.chat_families import FAMILIES, chat_tokenizer
from mlx_lm.tuner.datasets import ChatDataset

TEXT = "the weather in Paris is sunny and the sum of 3 and 4 is 7, as one can see here: `x = 7` über 日本 é"
WORDS = TEXT.split()


def messages(rng: random.Random) -> list[dict]:
    """Two questions and two answers."""
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for _ in range(4)]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def seconds(work) -> float:
    """CPU seconds of a call; the better of two."""
    taken = []
    for _ in range(2):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def measure(name: str, tokenizer, count: int) -> None:
    """Print a family's line."""
    rng = random.Random(0)
    rows = [messages(rng) for _ in range(count)]
    raws = [RawRow({"messages": row}, "row") for row in rows]
    figures = []
    for mask in (True, False):
        theirs = ChatDataset([{"messages": row} for row in rows], tokenizer, mask_prompt=mask)
        own = seconds(lambda mask=mask: tokenize(raws, tokenizer, mask_prompt=mask))
        other = seconds(lambda theirs=theirs: [theirs.process(row) for row in theirs])
        figures += [f"{count / own:8,.0f}", f"{count / other:8,.0f}", f"{other / own:6.2f}"]
    print(f"{name:16}", *figures, flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--base", help="a base model, instead of the families")
    args = parser.parse_args()
    print(f"rows per second of CPU time, {args.rows:,} rows; ratio above 1: faster than mlx-lm")
    print(f"{'':16} {'masked':>8} {'mlx-lm':>8} {'ratio':>6} {'whole':>8} {'mlx-lm':>8} {'ratio':>6}")
    if args.base:
        measure(args.base, load_tokenizer_of(resolve_base(args.base)), args.rows)
        return
    for family in args.families:
        measure(family, chat_tokenizer(family), args.rows)


if __name__ == "__main__":
    main()
