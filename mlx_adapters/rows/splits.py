"""Which files of a folder, or which splits of a data set, are train, valid and test."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlx_adapters.errors import FormatError
from mlx_adapters.rows.files import SUFFIXES

NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
KNOWN = tuple(word for words in NAMES.values() for word in words)
SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?")  # the Hub's older parts have a hash behind
SAVED_BY_DATASETS = {"dataset_info.json", "dataset_dict.json", "state.json"}
_FILE = re.compile(
    rf"(?P<name>\w+)(?P<shard>{SHARD.pattern})?(?:{'|'.join(re.escape(suffix) for suffix in SUFFIXES)})", re.IGNORECASE
)


def choose(names: Iterable[str], source: str, how: str) -> dict[str, str]:
    """The name of each split that is there, by "train", "valid" and "test".

    Beside the plain names those are known that go on after them, as in the Hub's `train_sft`.

    Args:
        names: what there is.
        source: whose they are, for an error.
        how: what helps if two could be meant.

    Raises FormatError if two names could be meant.
    """
    names = sorted(names)
    chosen = {}
    for split, known in NAMES.items():
        likely = [name for name in names if name.lower() in known]
        likely = likely or [name for name in names if name.lower().startswith(tuple(f"{word}_" for word in known))]
        if len(likely) > 1:
            likely = [name for name in likely if name.lower().endswith("_sft")] or likely
        if len(likely) > 1:
            raise FormatError(f"'{source}' has several splits to {_purpose(split)}: {', '.join(likely)}.", how)
        if likely:
            chosen[split] = likely[0]
    return chosen


def _purpose(split: str) -> str:
    return {"train": "train on", "valid": "validate by", "test": "test by"}[split]


def files_of(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder or, as in a copy of a data set of the Hub, in its folder `data`.

    Raises FormatError if two could be meant, or if a part of one is missing.
    """
    found: dict[str, list[Path]] = {}
    for place in _places(folder):
        groups = _groups(place)
        chosen = choose(groups, str(place), "keep one, or give the file itself.")
        there = {split: _whole(split, groups[name]) for split, name in chosen.items()}
        if "train" in there:
            return there
        found = found or there
    return found


def passed_over(folder: Path, read: Iterable[Path]) -> list[str]:
    """What in a folder looks like rows, or is called as a split is, and is not `read`: paths below the folder."""
    read = set(read)
    paths = [path for place in _places(folder) for path in sorted(place.iterdir())]
    return [str(path.relative_to(folder)) for path in paths if path not in read and _may_hold_rows(path)]


def _may_hold_rows(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name in {*SAVED_BY_DATASETS, "dataset_infos.json"}:
        return False
    return name.endswith(SUFFIXES) or re.split(r"[^a-z]", name)[0] in KNOWN


def _places(folder: Path) -> list[Path]:
    return [place for place in (folder, folder / "data") if place.is_dir()]


def _groups(folder: Path) -> Mapping[str, list[Path]]:
    """Files whose names begin as a split does, by that beginning."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        name = match["name"] if match else ""
        if name.lower() in KNOWN or name.lower().startswith(tuple(f"{word}_" for word in KNOWN)):
            if not path.is_file():
                raise FormatError(f"'{path}' is no file.", "a broken link, a pipe or a folder? Take it away.")
            groups.setdefault(name, []).append(path)
    return groups


def _whole(split: str, paths: list[Path]) -> list[Path]:
    """The parts of a split, all there, in their order."""
    if len(paths) == 1 and not SHARD.search(paths[0].name):
        return paths
    numbers = [SHARD.search(path.name) for path in paths]
    if not all(numbers):
        raise FormatError(f"Both '{paths[0]}' and '{paths[1]}' exist.", f"keep one file for {split}.")
    counts = {int(match[2]) for match in numbers if match}
    there = {int(match[1]) for match in numbers if match}
    if len(counts) > 1 or len(there) < len(paths):
        raise FormatError(f"'{paths[0].parent}' holds parts of two data sets as {split}.", "keep those of one.")
    if missing := sorted(set(range(counts.pop())) - there):
        raise FormatError(f"Part {missing[0]} of {split} is missing in '{paths[0].parent}'.", "download it again.")
    return paths
