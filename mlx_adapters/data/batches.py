"""Which rows form a batch, in which order, and how they are padded.

Rows of like length go together, so little is padded. They are sought within pools of `POOL` batches that are drawn
anew in each epoch, so the same rows do not always meet, and the order of the batches is shuffled.
All of it is a pure function of the lengths, the seed and the epoch: a resumed run needs to know only how
many batches it has seen. Every row comes once per epoch, the last, smaller batch included.

Calibration and the check of a fuse go through their rows once, sorted by length (`make_batches`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_adapters.data.tokenizing import Row
from mlx_adapters.system.door import mx

POOL = 50  # batches; with rows of 5 to 400 tokens, 4 in each, 1 to 3 % are padding


@dataclass(frozen=True)
class Batch:
    """Rows as one array.

    `tokens`: (rows, width) int32, padded with 0 at the right. `positions`: (n,) int32, where in the flat
    (rows * (width - 1)) grid of predictions a trained token is foretold. `targets`: (n,) int32, these tokens.
    `weights`: (n,) float32, 1 for a trained token and 0 for padding of the list. `segments`: (rows, width)
    int32 numbering the packed rows from 1 (0 is padding), or None when nothing is packed.

    Of preferences also: `answers` (n,) float32, 1 for a token of an answer; `labels` (examples,) float32, 1 or -1 for a
    desirable or undesirable answer, 1 for a pair, 0 for padding; `reference` (rows,) float32, the answers'
    log-probabilities under the reference model. Of pairs the first half of the rows is chosen, the second rejected.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray | None
    real_tokens: int
    where: tuple[str, ...]
    answers: np.ndarray | None = None
    labels: np.ndarray | None = None
    reference: np.ndarray | None = None

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts."""
        return int(self.weights.sum())


def epoch_batches(groups: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch as arrays of row indexes; `groups` holds the rows' lengths.

    Pools, equal lengths and batches are in a random order that depends on (seed, epoch) alone.
    """
    random = np.random.default_rng([seed, epoch])
    lengths, shuffled = np.asarray(groups), random.permutation(len(groups))
    pools = [shuffled[i : i + POOL * batch_size] for i in range(0, len(shuffled), POOL * batch_size)]
    order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def batch_sequence(
    groups: Sequence[int], batch_size: int, seed: int, start: int = 0
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (epoch, row indexes) without end, from the batch numbered `start` on."""
    per_epoch = -(-len(groups) // batch_size)
    epoch, skip = divmod(start, per_epoch)
    while True:
        for batch in epoch_batches(groups, batch_size, seed, epoch)[skip:]:
            yield epoch, batch
        epoch, skip = epoch + 1, 0


def make_batch(bins: Sequence[Sequence[Row]], pad_to: int = 1, rows: int | None = None, packed: bool = False) -> Batch:
    """Lay out rows, one list of rows per line of the array (more than one only when packing).

    The width is rounded up to `pad_to` predictions, the trained positions to twice that, and with `rows` the
    array has at least that many lines (empty ones at the end): few shapes mean few compilations on a GPU, while
    on a CPU padding costs time. Of pairs, as many lines with the rejected rows follow.
    """
    examples = max(len(bins), rows or 0)
    lines = [*bins, *[()] * (examples - len(bins))]
    first = bins[0][0]
    if first.rejected is not None:
        lines += [[row.rejected for row in line if row.rejected is not None] for line in lines]
    width = 1 + _round_up(max(sum(len(r.tokens) for r in line) for line in lines) - 1, pad_to)
    tokens = np.zeros((len(lines), width), np.int32)
    trained, answer = np.zeros((2, len(lines), width), bool)
    segments = np.zeros((len(lines), width), np.int32)
    for i, line in enumerate(lines):
        offset = 0
        for number, row in enumerate(line, 1):
            stop = offset + len(row.tokens)
            tokens[i, offset:stop], trained[i, offset:stop] = row.tokens, row.trained
            answer[i, offset:stop] = False if row.answer is None else row.answer
            segments[i, offset:stop] = number
            offset = stop
    positions = np.flatnonzero(trained[:, 1:]).astype(np.int32)
    extra = _round_up(len(positions), 2 * pad_to) - len(positions)

    def listed(grid: np.ndarray) -> np.ndarray:
        return np.pad(grid[:, 1:].reshape(-1)[positions], (0, extra))

    labels = [1.0 if line[0].desirable else -1.0 for line in bins]
    return Batch(
        tokens=tokens,
        positions=np.pad(positions, (0, extra)),
        targets=listed(tokens),
        weights=listed(trained).astype(np.float32),
        segments=segments if packed else None,
        real_tokens=int((segments > 0).sum()),
        where=tuple(row.where for line in bins for row in line),
        answers=None if first.answer is None else listed(answer).astype(np.float32),
        labels=None if first.answer is None else np.array(labels + [0.0] * (examples - len(bins)), np.float32),
    )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def fill_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put rows into bins of at most `capacity` tokens, longest first into the fullest bin that has room.

    Returns lists of row indexes; every row is in exactly one bin (best-fit decreasing).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b, free in enumerate(room) if free >= lengths[index]]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
            bins[best].append(index)
            room[best] -= lengths[index]
        else:
            bins.append([index])
            room.append(capacity - lengths[index])
    return bins


@dataclass(frozen=True)
class TokenBatch:
    """Rows of one batch. `tokens` (rows, length) int32, padded on the right; `judged` (n,) indices into the
    flattened (rows · length) positions whose next token `targets` (n,) the loss counts; `real` (m,) indices of
    positions that are not padding."""

    tokens: mx.array
    judged: mx.array
    targets: mx.array
    real: mx.array


TokenRow = tuple[np.ndarray, np.ndarray]  # tokens (length,) int32, and which of them the loss counts (length,) bool


def make_batches(
    rows: list[TokenRow], tokens_per_batch: int = 2048, pad_to: int = 1, most: int | None = None
) -> list[TokenBatch]:
    """Batches of (tokens, judged) rows of like length. judged[t]: whether the loss counts token t as a target.

    Rows are padded to a multiple of `pad_to`, but to no more than `most` tokens.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i][0]), i))
    groups: list[list[int]] = []
    for i in order:
        width = _padded(len(rows[i][0]), pad_to, most)
        if not groups or (len(groups[-1]) + 1) * width > tokens_per_batch:
            groups.append([])
        groups[-1].append(i)
    return [_lay_out([rows[i] for i in group], pad_to, most) for group in groups]


def _padded(length: int, multiple: int, most: int | None) -> int:
    padded = _round_up(length, multiple)
    return padded if most is None else max(length, min(padded, most))


def _lay_out(rows: list[TokenRow], pad_to: int, most: int | None) -> TokenBatch:
    width = _padded(max(len(tokens) for tokens, _ in rows), pad_to, most)
    tokens = np.zeros((len(rows), width), np.int32)
    judged, targets, real = [], [], []
    for r, (row, counts) in enumerate(rows):
        tokens[r, : len(row)] = row
        places = np.flatnonzero(counts[1:])
        judged.append(r * width + places)
        targets.append(row[1:][places])
        real.append(r * width + np.arange(len(row) - 1))
    parts = (np.concatenate(p).astype(np.int32) for p in (judged, targets, real))
    return TokenBatch(mx.array(tokens), *(mx.array(part) for part in parts))
