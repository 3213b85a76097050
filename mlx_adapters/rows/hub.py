"""Data sets of the Hugging Face Hub, spelled `hf:NAME`, `hf:NAME/CONFIG`, with `@REVISION` and `[SPLIT]` behind."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_adapters.errors import ConfigError, NotFoundError
from mlx_adapters.rows import splits

PREFIX = "hf:"
_SPELLING = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.:+-]+))?(?:@(?P<revision>[^\[\]]+))?(?:\[(?P<split>.+)\])?"
)


@dataclass(frozen=True)
class HubData:
    """What a spelling names. `name` is user/name; `split` alone is what is read, as rows to train on."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None


def parse(spelling: str) -> HubData:
    """A spelling's parts. Raises ConfigError for what is none.

    Example:
        >>> parse("hf:user/name/main@v2[train_sft]")
        HubData(name='user/name', config='main', revision='v2', split='train_sft')
    """
    match = _SPELLING.fullmatch(spelling.removeprefix(PREFIX))
    if match is None:
        raise ConfigError(
            f"'{spelling}' does not name a data set.",
            f"write {PREFIX}user/name or {PREFIX}user/name/CONFIG@REVISION[SPLIT].",
        )
    return HubData(**match.groupdict())


def load(spelling: str) -> dict[str, Iterable[Any]]:
    """The rows of each split, by "train", "valid" and "test". Raises ConfigError, FormatError or NotFoundError."""
    asked = parse(spelling)
    try:
        import datasets
    except ImportError:
        raise NotFoundError(
            f"The data set '{spelling}' needs the package 'datasets'.", "pip install datasets."
        ) from None
    try:
        loaded = datasets.load_dataset(asked.name, asked.config, revision=asked.revision, split=asked.split)
    except Exception as error:  # the Hub's, the network's, and those of a data set's own files
        why = " ".join(str(error).split())[:400].rstrip(".")
        raise NotFoundError(f"The data set '{spelling}' cannot be loaded: {why}.", _hint(asked, why)) from None
    if asked.split is not None:
        return {"train": loaded}
    how = f"choose one: {PREFIX}{asked.name}[SPLIT]."
    chosen = splits.choose(loaded, spelling, how)
    if not chosen:
        raise NotFoundError(f"'{spelling}' has no split to train on; it has: {', '.join(loaded)}.", how)
    return {split: loaded[name] for split, name in chosen.items()}


def _hint(asked: HubData, why: str) -> str | None:
    if "config" in why.lower() and asked.config is None:
        return f"name a configuration: {PREFIX}{asked.name}/CONFIG."
    return None
