"""Prompts of an exact length made of real text: rows of a data set, one after the other."""

from itertools import cycle, islice
from typing import Any

from mlx_adapters.data.datasets import read_data
from mlx_adapters.data.tokenizing import tokenize
from mlx_adapters.errors import FormatError
from mlx_adapters.system.door import mx


def real_prompts(source: str, tokenizer: Any, batch: int, length: int) -> mx.array:
    """(batch, length) token ids from the test rows (else valid, else train), each prompt starting elsewhere."""
    data = read_data(source, judging=True)
    rows = data.rows(data.judging)
    lines = [row.tokens.tolist() for row in tokenize(rows, tokenizer).rows]
    if not lines:
        raise FormatError(f"The data '{source}' has no row that makes a prompt.", "are all of them empty?")
    prompts = []
    for number in range(batch):
        start = number * len(lines) // batch
        stream = (token for line in cycle(lines[start:] + lines[:start]) for token in line)
        prompts.append(list(islice(stream, length)))
    return mx.array(prompts)
