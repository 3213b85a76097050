"""docs/architectures.md: what `matrix` found, as a table that is read back as what is expected.

PYTHONPATH=.:tests python -m helpers.matrix_page [NAME...]    try all of mlx-lm's models, or these, and write it
"""

import re
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
MARKS = ("yes", "-")  # told in the table itself: it works, or was not tried for want of an earlier step
Rows = dict[str, dict[str, str]]  # model type -> column -> "yes", or why not
INTRODUCTION = """# Architectures

Each of mlx-lm's models is built small, with random weights in 4 bits, and taken through everything on a CPU. Where a
step is refused, the number tells what the program says, and what needs that step is not tried. `scripts/architectures`
makes this page, and the tests hold it.

- **train**: two updates with the default targets; what is trained is the function that generates.
- **load**: plain `mlx_lm.load` takes the adapter, and so does a model that many adapters share.
- **fuse 4, 8, none**: plain `mlx_lm.load` takes the fused model, and it is the adapter's: to a KL of {exact} nats per
  token unquantized, {eight} in 8 bits. 4 bits are calibrated. A vision tower goes over as it is.
- **PEFT out, in**: the adapter is written in PEFT's format, and comes back computing the same.
- **hf, GGUF**: the fused model is written in that format; if mlx-lm reads it, it computes the same.
  `scripts/check_hf.py` holds such folders against transformers.
- **mixed batches**: four prompts of several lengths with two adapters and none, decoded together, get the tokens that
  each gets alone.
- **checkpointing, packing**: train the same adapter.
"""


def read_page() -> Rows:
    """The table of docs/architectures.md, with the reasons in place of their numbers."""
    text = PAGE.read_text()
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    titles = lines[0][1:]
    return {
        name: {title: reasons.get(cell, cell) for title, cell in zip(titles, cells, strict=True)}
        for name, *cells in lines[2:]
    }


def page_of(rows: Rows) -> str:
    """The page that tells these rows."""
    from helpers.matrix import COLUMNS, EIGHT_KL, EXACT_KL

    numbers: dict[str, int] = {}
    lines = []
    for name in sorted(rows, key=str.lower):
        cells = [rows[name][column] for column in COLUMNS]
        told = [cell if cell in MARKS else str(numbers.setdefault(cell, len(numbers) + 1)) for cell in cells]
        lines.append(f"| {name} | {' | '.join(told)} |")
    table = [f"| model | {' | '.join(COLUMNS)} |", "|" + " --- |" * (len(COLUMNS) + 1), *lines]
    reasons = [f"{number}. {reason}" for reason, number in numbers.items()]
    return "\n".join([INTRODUCTION.format(exact=EXACT_KL, eight=EIGHT_KL), *table, "", *reasons, ""])


def tried(name: str) -> tuple[str, Mapping[str, str]]:
    """A model's row."""
    from helpers.matrix import row_of

    with tempfile.TemporaryDirectory() as folder:
        return name, row_of(name, Path(folder))


def main(names: list[str]) -> None:
    """Try these models (all, if there is none) and write the page."""
    from helpers.tiny_configs import model_names

    rows: Rows = {} if not names else read_page()
    with get_context("spawn").Pool(2, maxtasksperchild=20) as pool:
        for name, row in pool.imap(tried, names or model_names()):
            rows[name] = dict(row)
            print(name, *(f"\n    {column}: {cell}" for column, cell in row.items() if cell not in MARKS), flush=True)
    PAGE.write_text(page_of(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
