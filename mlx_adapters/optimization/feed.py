"""The batches of a run, in their order, for this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mlx_adapters.config.training import TrainConfig
from mlx_adapters.data.batches import Batch, batch_sequence, epoch_batches, fill_bins, make_batch
from mlx_adapters.data.tokenizing import Row
from mlx_adapters.errors import ConfigError
from mlx_adapters.optimization.distributed import World
from mlx_adapters.units import count


@dataclass(frozen=True)
class Draw:
    """What one loss is taken over: the rows of an update, or of a validation.

    `batches` are this process's, of the lines `drawn`; the numbers are of all processes. `tokens`: those whose
    likelihood is learned; `trained_tokens`: all that the loss depends on; `real_tokens`: all that are read; `examples`:
    preferences, 0 in plain fine-tuning. `aside`: the prompts of `batches` with answers of other rows, where the
    objective looks at these first (KTO).
    """

    batches: list[Batch]
    tokens: int
    trained_tokens: int
    real_tokens: int
    examples: int = 0
    aside: list[Batch] = field(default_factory=list)
    drawn: Sequence[np.ndarray] = ()

    @property
    def weight(self) -> int:
        """What a mean over several draws counts this one by."""
        return self.examples or self.tokens


def draw_of(*batches: Batch) -> Draw:
    """Batches of one process."""
    tokens = sum(batch.trained_tokens for batch in batches)
    return Draw(list(batches), tokens, tokens, sum(batch.real_tokens for batch in batches))


@dataclass(frozen=True)
class Feed:
    """Rows and how they are put together. A bin is what fills one line of a batch: one row, or several when
    packing. `pad_to` and `pad_lines` bound the number of shapes. `aside` holds a row beside each of `rows`, or none.
    `reference`: (rows, 2) float32 log-probabilities of each row's answer, and of its rejected answer or its row aside.
    `most`: a draw's batches are cut into parts of so many predictions, but of one line at least; None: never.
    """

    rows: Sequence[Row]
    bins: Sequence[Sequence[int]]
    config: TrainConfig
    pad_to: int
    pad_lines: bool
    world: World
    aside: Sequence[Row] = ()
    reference: np.ndarray | None = None
    most: int | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each bin."""
        return [sum(self.rows[i].length for i in line) for line in self.bins]

    @property
    def tokens_per_update(self) -> float:
        """The mean number of real tokens in an update."""
        lines = self.config.batch_size * self.config.grad_accumulation
        return lines * sum(len(part.tokens) for row in self.rows for part in row.sequences) / len(self.bins)

    def updates(self, start: int) -> Iterator[Draw]:
        """What each update is made of, from batch `start` on."""
        sequence = batch_sequence(self.lengths, self.config.batch_size, self.config.seed, start)
        while True:
            yield self.draw([next(sequence)[1] for _ in range(self.config.grad_accumulation)])

    def fixed(self, count: int | None) -> Draw:
        """The first `count` batches (None: all) of one epoch in an order that never changes."""
        return self.draw(epoch_batches(self.lengths, self.config.batch_size, 0, 0)[:count])

    def draw(self, drawn: Sequence[np.ndarray]) -> Draw:
        """The batches of these lines."""
        rows = [self.rows[i] for indexes in drawn for line in indexes for i in self.bins[line]]
        shares = [share for indexes in drawn for share in self._parts(self.mine(indexes), indexes)]
        batches = [self._batch(*share) for share in shares]
        aside = [self._batch(*share, aside=True) for share in shares] if self.aside else []
        parts = [part for row in rows for part in row.sequences]
        trained, real = sum(part.trained_tokens for part in parts), sum(len(part.tokens) for part in parts)
        examples = sum(row.answer is not None for row in rows)
        return Draw(batches, sum(row.trained_tokens for row in rows), trained, real, examples, aside, drawn)

    def mine(self, indexes: np.ndarray) -> np.ndarray:
        """Of the lines of a batch those that fall to this process."""
        return indexes[self.world.rank :: self.world.size]

    def batch(self, indexes: np.ndarray, aside: bool = False) -> Batch:
        """This process's lines of a batch, or the rows aside; an empty share is a line that counts nothing."""
        return self._batch(self.mine(indexes), self.share, indexes, aside)

    @property
    def share(self) -> int:
        """How many lines of a full batch fall to each process."""
        return -(-self.config.batch_size // self.world.size)

    @property
    def _texts(self) -> list[Sequence[Row]]:
        return [self.rows, self.aside] if self.aside else [self.rows]

    def _parts(self, mine: np.ndarray, indexes: np.ndarray) -> list[tuple[np.ndarray, int, np.ndarray]]:
        """(lines, how many there are in a full part, the whole batch) of each part that is computed by itself."""
        if self.most is None or not len(mine):
            return [(mine, self.share, indexes)]
        sides = len(self.rows[0].sequences)
        widest = max(sum(rows[i].length for i in self.bins[line]) for line in mine for rows in self._texts)
        each = sides * -(-(widest - 1) // self.pad_to) * self.pad_to
        fit = min(max(self.most // each, 1), self.share)
        return [(mine[i : i + fit], fit, indexes) for i in range(0, len(mine), fit)]

    def _batch(self, mine: np.ndarray, share: int, indexes: np.ndarray, aside: bool = False) -> Batch:
        rows = self.aside if aside else self.rows
        lines = [[rows[i] for i in self.bins[line]] for line in (mine if len(mine) else indexes[:1])]
        made = make_batch(lines, self.pad_to, share if self.pad_lines else None, self.config.packing)
        if not len(mine):
            nothing = None if made.labels is None else np.zeros_like(made.labels)
            return replace(made, weights=np.zeros_like(made.weights), labels=nothing, real_tokens=0)
        if self.reference is None:
            return made
        sides = len(lines[0][0].sequences)
        reference = np.zeros((sides, len(made.tokens) // sides), np.float32)
        values = self.reference[[self.bins[line][0] for line in mine]].T  # (2, lines)
        reference[:, : len(mine)] = values[1:] if aside else values[:sides]
        return replace(made, reference=reference.reshape(-1))


def bins_of(rows: Sequence[Row], config: TrainConfig) -> list[list[int]]:
    """The rows in each line of a batch: one, or several when packing."""
    lengths = [len(row.tokens) for row in rows]
    return fill_bins(lengths, config.max_seq_length) if config.packing else [[i] for i in range(len(rows))]


def make_feed(rows: Sequence[Row], config: TrainConfig, *, gpu: bool, world: World | None = None) -> Feed:
    """Bins and padding for `rows`. Raises ConfigError if a batch is larger than the data."""
    bins = bins_of(rows, config)
    if config.batch_size > len(bins):
        there = count(len(bins), "packed sequence" if config.packing else "row")
        raise ConfigError(
            f"batch_size {config.batch_size} is larger than the {there} of training data.",
            f"use --batch-size {len(bins)} or less.",
        )
    aside = mismatched(rows, config.max_seq_length) if config.objective.rows == "labeled" else ()
    # A new shape costs a GPU seconds of compilation; on a CPU the padding costs more.
    return Feed(rows, bins, config, 32 if gpu else 1, gpu, world or World(), aside)


def largest_draw(rows: Sequence[Row], config: TrainConfig, gpu: bool, most: int | None = None) -> Draw:
    """The update of the longest rows."""
    feed = replace(make_feed(rows, config, gpu=gpu), most=most)
    return feed.draw([np.argsort(feed.lengths)[-config.batch_size :]] * config.grad_accumulation)


def mismatched(rows: Sequence[Row], max_seq_length: int) -> list[Row]:
    """Each row's prompt with the answer of the next row that has another prompt (or of the next, if all have one).

    None for a single row: there is no other answer.
    """
    starts = [int(np.argmax(row.answer)) for row in rows if row.answer is not None]
    prompts = [row.tokens[:start].tobytes() for row, start in zip(rows, starts, strict=True)]
    n, one = len(rows), len(set(prompts)) == 1
    following = [(i + 1) % n for i in range(n)]
    for i in [*range(n - 1, -1, -1)] * 2:  # twice: around the end
        if not one and prompts[following[i]] == prompts[i]:
            following[i] = following[(i + 1) % n]
    return (
        []
        if n == 1
        else [_joined(rows[i], rows[j], starts[i], starts[j], max_seq_length) for i, j in enumerate(following)]
    )


def _joined(row: Row, other: Row, start: int, begin: int, most: int) -> Row:
    assert row.answer is not None and other.answer is not None
    tokens = np.concatenate([row.tokens[:start], other.tokens[begin:]])[:most]
    answer = np.concatenate([np.zeros(start, bool), other.answer[begin:]])[:most]
    return replace(row, tokens=tokens, trained=answer, answer=answer, full_length=len(tokens))
