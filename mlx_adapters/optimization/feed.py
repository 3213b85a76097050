"""The batches of a run, in their order, for this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import Batch, batch_sequence, epoch_batches, fill_bins, make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import ConfigError
from mlx_adapters.optimization.distributed import World
from mlx_adapters.units import count


@dataclass(frozen=True)
class Feed:
    """Rows and how they are put together. A bin is what fills one line of a batch: one row, or several when
    packing. `pad_to` and `pad_lines` bound the number of shapes."""

    rows: Sequence[Row]
    bins: Sequence[Sequence[int]]
    config: TrainConfig
    pad_to: int
    pad_lines: bool
    world: World

    @property
    def tokens_per_update(self) -> float:
        """The mean number of real tokens in this process's share of an update."""
        lines = self.config.batch_size * self.config.grad_accumulation / self.world.size
        return lines * sum(len(row.tokens) for row in self.rows) / len(self.bins)

    def updates(self, start: int) -> Iterator[tuple[list[Batch], int]]:
        """Yield (this process's batches of one update, trained tokens of all processes), from batch `start` on."""
        lengths = [sum(len(self.rows[i].tokens) for i in line) for line in self.bins]
        sequence = batch_sequence(lengths, self.config.batch_size, self.config.seed, start)
        while True:
            drawn = [next(sequence)[1] for _ in range(self.config.grad_accumulation)]
            tokens = sum(self.rows[i].trained_tokens for d in drawn for line in d for i in self.bins[line])
            yield [self.batch(indexes) for indexes in drawn], tokens

    def fixed(self, count: int | None) -> list[Batch]:
        """The first `count` batches (None: all) of one epoch in an order that never changes."""
        lengths = [sum(len(self.rows[i].tokens) for i in line) for line in self.bins]
        return [self.batch(i) for i in epoch_batches(lengths, self.config.batch_size, 0, 0)[:count]]

    def batch(self, indexes: np.ndarray) -> Batch:
        """The lines of a batch that fall to this process; an empty share is a line that counts nothing."""
        lines = [[self.rows[i] for i in self.bins[line]] for line in indexes]
        mine = lines[self.world.rank :: self.world.size]
        share = -(-self.config.batch_size // self.world.size) if self.pad_lines else None
        made = make_batch(mine or lines[:1], self.pad_to, share, self.config.packing)
        return made if mine else replace(made, weights=np.zeros_like(made.weights), real_tokens=0)


def make_feed(rows: Sequence[Row], config: TrainConfig, *, gpu: bool, world: World | None = None) -> Feed:
    """Bins and padding for `rows`. Raises ConfigError if a batch is larger than the data."""
    lengths = [len(row.tokens) for row in rows]
    bins = fill_bins(lengths, config.max_seq_length) if config.packing else [[i] for i in range(len(rows))]
    if config.batch_size > len(bins):
        there = count(len(bins), "packed sequence" if config.packing else "row")
        raise ConfigError(
            f"batch_size {config.batch_size} is larger than the {there} of training data.",
            f"use --batch-size {len(bins)} or less.",
        )
    # A new shape costs a GPU seconds of compilation; on a CPU the padding costs more.
    return Feed(rows, bins, config, 32 if gpu else 1, gpu, world or World())
