"""Named adapters in the home folder, and what a reference to one means.

A reference is decided by its spelling, never by what happens to exist: `NAME` and `NAME@ITERATION` are the
registry's, a path starts with `.`, `/` or `~` (with `@ITERATION` for a checkpoint), `user/repo[@revision]`
is on the Hub.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_adapters import files
from mlx_adapters.errors import AdapterError, ConfigError, NotFoundError, did_you_mean
from mlx_adapters.tensor_names import ADAPTER_FILE, CHECKPOINT_FILE, CONFIG_FILE, METADATA_FILE

if TYPE_CHECKING:
    from mlx_adapters.adapter import Adapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class Reference:
    """A parsed reference. `target` is a name, a path or a Hub id."""

    kind: Literal["name", "path", "hub"]
    target: str
    iteration: int | None = None
    revision: str | None = None

    def __str__(self) -> str:
        suffix = self.revision if self.kind == "hub" else self.iteration
        return self.target if suffix is None else f"{self.target}@{suffix}"


def check_name(name: str) -> str:
    """Return `name` if it can name an adapter, else raise ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' cannot be an adapter's name.",
            "use up to 100 letters, digits, '.', '_' and '-'; begin with a letter or digit.",
        )
    return name


def parse_reference(text: str) -> Reference:
    """Parse NAME, NAME@ITERATION, a path, or user/repo[@revision]. Raises ConfigError."""
    if text.startswith((".", "/", "~")):
        match = re.fullmatch(r"(.+)@(\d+)", text)
        return Reference("path", match[1], int(match[2])) if match else Reference("path", text)
    if match := HUB.fullmatch(text):
        return Reference("hub", match[1], revision=match[2])
    name, at, iteration = text.partition("@")
    if at and not iteration.isdecimal():
        raise ConfigError(f"'{text}' is no reference: after '@' comes an iteration.", f"for example '{name}@600'.")
    return Reference("name", check_name(name), int(iteration) if at else None)


def adapters_folder() -> Path:
    """Where named adapters live."""
    return files.home() / "adapters"


def adapter_folder(name: str) -> Path:
    """The folder of a named adapter, whether it exists or not."""
    return adapters_folder() / check_name(name)


def names() -> list[str]:
    """All registered names, sorted."""
    folder = adapters_folder()
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and NAME.fullmatch(p.name))


def locate(reference: str | Reference) -> tuple[Path, int | None]:
    """(folder, iteration) that a reference means; a Hub reference is downloaded once.

    Raises NotFoundError that suggests the nearest names.
    """
    ref = parse_reference(reference) if isinstance(reference, str) else reference
    if ref.kind == "path":
        return Path(ref.target).expanduser().absolute(), ref.iteration
    if ref.kind == "hub":
        from mlx_adapters.hub import adapter_snapshot

        return adapter_snapshot(ref.target, ref.revision), None
    folder = adapter_folder(ref.target)
    if not folder.is_dir():
        raise NotFoundError(
            f"No adapter named '{ref.target}'.", did_you_mean(ref.target, names(), "'mlx-adapters list' shows all.")
        )
    return folder, ref.iteration


def load_adapter(reference: "str | Path | Adapter") -> "Adapter":
    """Read the adapter that a reference (or a folder) means; an `Adapter` is given back as it is.

    Raises NotFoundError, FormatError or HubError.
    """
    from mlx_adapters.adapter import Adapter, read_adapter

    if isinstance(reference, Adapter):
        return reference
    if isinstance(reference, Path):
        return read_adapter(reference)
    return read_adapter(*locate(reference))


@dataclass(frozen=True)
class Entry:
    """One row of `list`. A damaged adapter has `problem` and as much of the rest as could be read."""

    name: str
    folder: Path
    base: str | None = None
    type: str | None = None
    rank: int | None = None
    scale: float | None = None
    iteration: int | None = None
    iterations: tuple[int, ...] = ()
    best_validation_loss: float | None = None
    created: str | None = None
    size_bytes: int = 0
    problem: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)


def list_adapters(base: str | None = None) -> list[Entry]:
    """All named adapters, by name; only those of `base` if one is given. Reads no weights."""
    return [entry for entry in _entries() if base is None or entry.base == base]


def _entries() -> Iterator[Entry]:
    for name in names():
        yield read_entry(adapters_folder() / name)


def read_entry(folder: Path) -> Entry:
    """What an adapter folder says of itself; whatever is wrong ends up in `problem`."""
    try:
        config = files.read_json(folder / CONFIG_FILE)
        metadata = files.read_json(folder / METADATA_FILE) if (folder / METADATA_FILE).is_file() else {}
        parameters = config.get("lora_parameters") or {}
        base = metadata.get("base") or {}
        there = [path.name for path in folder.iterdir()]
        iterations = tuple(sorted(int(m[1]) for m in map(CHECKPOINT_FILE.fullmatch, there) if m))
        weights = folder / ADAPTER_FILE
        problem = None
        if not weights.is_file():
            problem = (
                "unfinished: no adapters.safetensors yet"
                if metadata.get("status")
                else "adapters.safetensors is missing"
            )
        else:
            files.read_safetensors_header(weights)
        return Entry(
            name=folder.name, folder=folder, base=base.get("name") or config.get("model"),
            type=config.get("fine_tune_type", "lora"), rank=parameters.get("rank"), scale=parameters.get("scale"),
            iteration=metadata.get("iteration"), iterations=iterations,
            best_validation_loss=metadata.get("best_validation_loss"), created=metadata.get("date"),
            size_bytes=weights.stat().st_size if weights.is_file() else 0, problem=problem, metadata=metadata,
        )  # fmt: skip
    except (AdapterError, OSError, AttributeError, TypeError) as error:
        return Entry(folder.name, folder, problem=str(error))


def register(adapter: "Adapter", name: str, overwrite: bool = False) -> "Adapter":
    """Write the adapter into the registry under `name` and return it as it is read back.

    Raises ExistsError, FormatError or StorageError; two processes cannot both win a name.
    """
    from dataclasses import replace

    from mlx_adapters.adapter import read_adapter, write_adapter

    folder = adapter_folder(name)
    with files.lock(f"adapter-{name}"):
        write_adapter(replace(adapter, metadata=adapter.metadata | {"name": name}), folder, overwrite)
    return read_adapter(folder)


def made_now() -> dict[str, Any]:
    """The date and the versions, for the metadata of an adapter that is being made."""
    from mlx_adapters.machine import versions

    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}
