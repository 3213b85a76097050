"""Text for calibration and for the check, taken apart so that no row serves both.

In this order: what the caller names; the data that the adapter was trained on, if that was on this machine (a
stranger's record may name anything), it is still there and long enough; a small general text of the package.
The rows are taken in batches as memory allows.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlx_adapters.config.data import DataConfig
from mlx_adapters.data.batches import TokenBatch, TokenRow, make_batches
from mlx_adapters.data.datasets import PYTHON, Data, DataSet, RawRow, read_again, read_as_trained, spread
from mlx_adapters.data.tokenizing import tokenize_row
from mlx_adapters.errors import AdapterError, FormatError, ModelError, NotFoundError
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import Base, Trained
from mlx_adapters.models.metadata import data_config
from mlx_adapters.storage import paths
from mlx_adapters.system.door import mx
from mlx_adapters.system.limits import out_of_memory
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.system.origin import made_here

GENERAL = "general text of the package"
MAX_LENGTH = 512
LEAST_TOKENS = 256
LEAST_CHARACTERS = 4 * LEAST_TOKENS
TOKENS = (2048, 1024, 256)  # at a time: fewer, where memory is short
Tokenize = Callable[[list[RawRow]], list[TokenRow]]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Text:
    """Rows of (tokens, judged): `calibration` to round by, `check` to judge by. `source` says whence.

    `why` says, if it is the general text, why the adapter's own data is not used.
    """

    calibration: list[TokenRow]
    check: list[TokenRow]
    source: str
    sha256: str
    why: str | None = None

    def describe(self) -> dict[str, Any]:
        """What recipe and report record."""
        return {
            "source": self.source,
            "why": self.why,
            "sha256": self.sha256,
            "calibration_rows": len(self.calibration),
            "calibration_tokens": tokens_in(self.calibration),
            "check_rows": len(self.check),
        }


def choose_text(
    asked: Data | None,
    adapters: Sequence[Adapter],
    tokenizer: Any,
    calibration_rows: int,
    check_rows: int,
    base: Base | None = None,
) -> Text:
    """The text to use, tokenized, rows cut to 512 tokens, or to the positions of a `base` that learned each.

    Without adapters a full fine-tune's own data, `base`'s, counts as theirs.

    `asked` is what `read_data` takes, a .txt file, GENERAL, or None. Raises NotFoundError or FormatError
    if a text that was asked for is missing, malformed or too short; the adapters' own data then only gives way.
    """

    length = min(MAX_LENGTH, (base.positions if base else None) or MAX_LENGTH)
    records: list[Adapter | Trained] = [*adapters] or ([base.trained] if base and base.trained else [])

    def tokens_of(rows: list[RawRow]) -> list[TokenRow]:
        return _tokenize(rows, tokenizer, length)

    def prepare(source: str, rows: Rows, why: str | None = None) -> Text:
        return _prepare(source, *_apart(*rows, source), tokens_of, calibration_rows, check_rows, why)

    if asked is not None and not (isinstance(asked, str) and asked == GENERAL):
        return prepare(*_read_asked(asked, records))
    why = None
    if asked is None:
        try:
            return prepare(*_own_data(records))
        except AdapterError as error:
            why = error.message
    return prepare(GENERAL, _split_paragraphs(general_text(), GENERAL), why)


def _prepare(
    source: str,
    train: list[RawRow],
    held: list[RawRow],
    tokens_of: Tokenize,
    calibration_rows: int,
    check_rows: int,
    why: str | None,
) -> Text:
    digest = hashlib.sha256("\n".join(row.key() for row in [*train, *held]).encode()).hexdigest()
    check = _enough(held, check_rows, tokens_of, set())
    judged = {tokens.tobytes() for tokens, _ in check}
    calibration = _enough(train, calibration_rows, tokens_of, judged)  # other rows may say the same
    for rows, what in ((calibration, "calibration"), (check, "the check")):
        if (tokens := tokens_in(rows)) < LEAST_TOKENS:
            raise FormatError(
                f"'{source}' is too short: {tokens} tokens for {what}, at least {LEAST_TOKENS} are needed.",
                "give more rows, or leave --calibration away to use the general text.",
            )
    return Text(calibration, check, source, digest, why)


Rows = tuple[list[RawRow], list[RawRow]]  # to calibrate on, to check on (perhaps none)


def _read_asked(asked: Data, records: Sequence[Adapter | Trained]) -> tuple[str, Rows]:
    """(source, rows) of a text that was asked for, read as the first record's own; columns that it does not have go
    by their usual names."""
    if isinstance(asked, str | Path):
        if str(asked) == PYTHON:  # of a recipe
            return PYTHON, _parts(read_again(PYTHON, None))
        path = paths.expanded(asked)
        if path.suffix == ".txt" and not path.is_dir():
            return str(asked), _read_paragraphs(path, str(asked))
    data = read_as_trained(asked, data_config(records[0].metadata) if records else DataConfig())
    return str(asked) if isinstance(asked, str | Path) else data.source, _parts(data)


def _parts(data: DataSet) -> Rows:
    return list(data.rows("train")), [*data.rows("valid"), *data.rows("test")]


def _read_paragraphs(path: Path, source: str) -> Rows:
    try:
        return _split_paragraphs(path.read_text(encoding="utf-8"), source)
    except FileNotFoundError:
        raise NotFoundError(
            f"There is no text '{source}'.", "--calibration takes a data folder, a file of rows or a .txt file."
        ) from None
    except (UnicodeDecodeError, OSError) as error:
        raise FormatError(f"'{source}' is not readable text: {error}.", "save it as UTF-8.") from None


def general_text() -> str:
    """The package's own text: prose, code, mathematics, several languages."""
    return (package_files("mlx_adapters.calibration") / "general_text.txt").read_text(encoding="utf-8")


def _split_paragraphs(text: str, source: str) -> Rows:
    parts = [part.strip() for part in text.split("\n\n")]
    rows = [RawRow({"text": part}, f"{source}, paragraph {i}") for i, part in enumerate(parts, 1) if part]
    if not rows:
        raise FormatError(f"'{source}' holds no text.", "leave --calibration away to use the general text.")
    return rows, []


def _own_data(records: Sequence[Adapter | Trained]) -> tuple[str, Rows]:
    """(sources, rows) of the training data of what was trained here, as far as it can be read. Raises AdapterError."""
    train: list[RawRow] = []
    held: list[RawRow] = []
    sources: list[str] = []
    reason: AdapterError = NotFoundError(f"The {_called(records)} does not say what it was trained on.")
    for record in records:
        source = _source_of(record)
        if source is None:
            continue
        if not made_here(source, record.metadata.get("signature")):
            why = f"The {_called(records)} names '{source}' as its data, but "
            unsigned = record.metadata.get("signature") is None  # so were all before 0.2
            why += "does not prove that it was trained here" if unsigned else "was not trained on this machine"
            reason = NotFoundError(f"{why}; --calibration {source} takes it all the same.")
            continue
        try:
            rows = _parts(read_again(source, record.folder, read=data_config(record.metadata)))
        except AdapterError as error:
            reason = error
            continue
        train, held, sources = train + rows[0], held + rows[1], [*sources, source]
    if not train:
        raise reason
    return ", ".join(dict.fromkeys(sources)), (train, held)


def _called(records: Sequence[Adapter | Trained]) -> str:
    return "adapter" if any(isinstance(record, Adapter) for record in records) else "model"


def _source_of(record: Adapter | Trained) -> str | None:
    """Where its metadata says that the training data lies."""
    data = record.metadata.get("data") or record.metadata.get("dataset")
    if isinstance(data, dict):
        data = data.get("source") or data.get("path")
    return data if isinstance(data, str) else None


def _apart(train: list[RawRow], held: list[RawRow], source: str) -> tuple[list[RawRow], list[RawRow]]:
    """No row twice, and none in both parts; with too little to check by, a fifth of the training rows is set aside."""
    train = list({row.key(): row for row in train}.values())
    seen = {row.key() for row in train}
    held = [row for key, row in {row.key(): row for row in held}.items() if key not in seen]
    if sum(len(row.key()) for row in held) < LEAST_CHARACTERS:
        held, train = held + train[::5], [row for i, row in enumerate(train) if i % 5]
    if not train or not held:
        raise FormatError(
            f"'{source}' is too short to calibrate on and to check by.", "give at least ten different rows."
        )
    return train, held


def _enough(rows: list[RawRow], count: int, tokens_of: Tokenize, without: set[bytes]) -> list[TokenRow]:
    """`count` rows, evenly spaced, or as many more as LEAST_TOKENS take; none whose tokens are in `without`."""
    while True:
        enough = [row for row in tokens_of(spread(rows, count)) if row[0].tobytes() not in without]
        if count >= len(rows) or tokens_in(enough) >= LEAST_TOKENS:
            return enough
        count *= 2


def tokens_in(rows: list[TokenRow]) -> int:
    """How many tokens they have together."""
    return sum(len(tokens) for tokens, _ in rows)


def _tokenize(rows: list[RawRow], tokenizer: Any, length: int) -> list[TokenRow]:
    tokenized = []
    for raw in rows:
        row = tokenize_row(raw, tokenizer, length, mask_prompt=raw.format != "text")
        if row.trained.any():
            tokenized.append((np.asarray(row.tokens), np.asarray(row.trained)))
    return tokenized


def batches_of(rows: list[TokenRow], base: Base, most: int = TOKENS[0]) -> list[TokenBatch]:
    """Batches of rows, of at most `most` tokens; on a GPU padded to few shapes: each new one is compiled for seconds.

    Never to more tokens than a model with learned positions has: the next ones would be foreign memory.
    """
    return make_batches(rows, most, 64, base.positions) if on_gpu() else make_batches(rows, most)


def as_memory_allows(
    work: Callable[[list[TokenBatch]], Found], rows: list[TokenRow], base: Base, less: str = ""
) -> Found:
    """`work` of batches of `rows`, with fewer rows at a time where memory is too small for more. Raises ModelError,
    which says what takes `less`."""
    for most in TOKENS:
        try:
            return work(batches_of(rows, base, most))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        mx.clear_cache()  # after the block: the error holds what took the memory
    raise ModelError(
        "There is too little memory even for a few rows at a time.",
        f"close what else uses it and try again{less}.",
    )
