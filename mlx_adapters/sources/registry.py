"""Named adapters in the home folder: their names, what each says of itself, and who may change one."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_adapters.display.tables import Rows
from mlx_adapters.errors import AdapterError, TrainingError
from mlx_adapters.models.metadata import (
    FULL,
    base_of,
    check_config,
    examine_metadata,
    losses_of,
    read_config,
    read_metadata,
    read_version,
)
from mlx_adapters.sources.references import NAME, check_name
from mlx_adapters.storage import files, locks, paths, replacing, temporaries, tensor_files
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    ADAPTER_OUTPUT,
    CHECKPOINTS_FOLDER,
    METADATA_FILE,
    checkpoint_file,
)

if TYPE_CHECKING:
    from mlx_adapters.models.adapter import Adapter
    from mlx_adapters.models.base import BaseLike

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,49}")


def adapters_folder() -> Path:
    """Where named adapters live."""
    return paths.home() / "adapters"


def adapter_folder(name: str) -> Path:
    """The folder of a named adapter, whether it exists or not.

    Names that differ in case alone are one name, as they are one folder on many disks.
    """
    check_name(name)
    try:
        there = os.listdir(adapters_folder())
    except OSError:
        there = []
    alike = [name] if name in there else [other for other in there if other.casefold() == name.casefold()]
    return adapters_folder() / (alike[0] if alike else name)


def names() -> list[str]:
    """All registered names, sorted."""
    folder = adapters_folder()
    if not folder.is_dir():
        return []
    # a link that leads nowhere is an adapter on a disk that is not connected
    return sorted(p.name for p in folder.iterdir() if (p.is_dir() or p.is_symlink()) and NAME.fullmatch(p.name))


@dataclass(frozen=True, repr=False)
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
    tags: tuple[str, ...] = ()
    problem: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        facts = [str(self.type), f"rank {self.rank}", f"base {self.base!r}", f"checkpoints {list(self.iterations)}"]
        return f"Entry({self.name!r}, {', '.join(facts if self.problem is None else [self.problem])})"

    @property
    def reference(self) -> str:
        """How the adapter is spelled: by its name, elsewhere than among the named ones by its folder."""
        return self.name if self.folder == adapters_folder() / self.name else str(self.folder)

    @property
    def validation_loss(self) -> float | None:
        """That of the checkpoint which the bare name means, in nats per token; None where it is not known."""
        known = dict(losses_of(self.metadata)[1])
        return known.get(self.iteration) if known and self.iteration is not None else self.best_validation_loss


def list_adapters(base: "BaseLike | None" = None, tag: str | None = None) -> Rows[Entry]:
    """All named adapters, by name: a list, and a table. Reads no weights.

    Args:
        base: only those made for this base.
        tag: only those with this tag.

    Example:
        >>> [(entry.name, entry.iterations) for entry in ma.list_adapters()]
        [('chat', (100, 200)), ('sql', (200, 400, 500, 600))]
    """
    name = "" if base is None else base_name(base)
    wanted = (name, str(paths.expanded(name)))
    return Rows(
        e
        for e in _entries()
        if (base is None or any(paths.same_source(e.base or "", name) for name in wanted))
        and (tag is None or tag in e.tags)
    )


def base_name(base: "BaseLike") -> str:
    """What a base is called, in whatever form it is given."""
    if isinstance(base, str | Path):
        return base if isinstance(base, str) else str(paths.expanded(base))
    return str(getattr(base, "reference", None) or getattr(base, "base", base).name)  # type: ignore[union-attr]


def _entries() -> list[Entry]:
    """Looked at again where one went away meanwhile: a rename or removal is seen as before it or after it."""
    for _ in range(10):
        entries = [read_entry(adapters_folder() / name) for name in names()]
        there = [entry for entry in entries if os.path.lexists(entry.folder)]
        if len(there) == len(entries):
            break
    return there


def read_entry(folder: Path) -> Entry:
    """What an adapter folder says of itself; whatever is wrong ends up in `problem`."""

    def read() -> Entry:
        fields: dict[str, Any] = {}
        for step in (_look_at_files, _look_at_config, _look_at_metadata):
            try:
                step(folder, fields)
            except AdapterError as error:
                fields.setdefault("problem", str(error))
            except OSError as error:
                fields.setdefault("problem", f"{error.strerror}: '{error.filename}'")
        return Entry(folder.name, folder, **fields)

    try:
        return read_version(folder, read)
    except AdapterError as error:
        return Entry(folder.name, folder, problem=error.message)


def _look_at_files(folder: Path, fields: dict[str, Any]) -> None:
    fields["iterations"] = files.iterations_of(folder)
    if not (folder / ADAPTER_FILE).is_file():
        fields["problem"] = f"{ADAPTER_FILE} is missing"
    else:
        fields["size_bytes"] = tensor_files.glance_at_safetensors(folder / ADAPTER_FILE)


def _look_at_config(folder: Path, fields: dict[str, Any]) -> None:
    config = read_config(folder)
    parameters = _typed(config.get("lora_parameters"), dict) or {}
    fields["rank"] = _typed(parameters.get("rank"), int)
    fields["scale"] = _typed(parameters.get("scale"), int, float)
    fields["base"] = _typed(config.get("model"), str)
    fields["type"] = _typed(config.get("fine_tune_type", "lora"), str)
    if fields["type"] != FULL:
        check_config(config, f"'{folder.name}'")


def _look_at_metadata(folder: Path, fields: dict[str, Any]) -> None:
    if not (folder / METADATA_FILE).exists():  # as plain mlx-lm leaves it
        return
    metadata, wrong = examine_metadata(folder)
    fields["base"] = base_of(metadata).get("name") or fields.get("base")
    fields["iteration"], fields["created"] = metadata.get("iteration"), metadata.get("date")
    fields["best_validation_loss"] = metadata.get("best_validation_loss")
    fields["tags"], fields["metadata"] = tags_of(metadata), metadata
    if metadata.get("status") == "unfinished" and "size_bytes" not in fields:
        fields["problem"] = "unfinished: nothing is saved yet"
    if wrong:
        shown = ", ".join(repr(name) for name in wrong[:3]) + (" and others" if len(wrong) > 3 else "")
        fields.setdefault("problem", f"{METADATA_FILE} holds nothing that can be used as {shown}")


def _typed(value: Any, *kinds: type) -> Any:
    return value if isinstance(value, kinds) and not isinstance(value, bool) else None


def checkpoint_path(entry: Entry, iteration: int) -> Path:
    """The file of one of an entry's checkpoints."""
    return entry.folder / checkpoint_file(iteration)


def tags_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """The tags in an adapter's metadata."""
    return tuple(tag for tag in _typed(metadata.get("tags"), list) or [] if isinstance(tag, str))


def checksums_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SHA-256, as recorded in an adapter's metadata."""
    recorded = _typed(metadata.get("sha256"), dict) or {}
    return {name: value for name, value in recorded.items() if isinstance(value, str)}


@contextlib.contextmanager
def changing(*names: str) -> Iterator[None]:
    """Hold named adapters while they are changed: other short changes wait.

    Raises TrainingError at once if a run is writing into one of them.
    """
    folders = {locks.place_name(folder): folder for folder in map(adapter_folder, names)}
    with contextlib.ExitStack() as stack:
        for place, folder in sorted(folders.items()):  # always in one order, so that no two can wait for each other
            busy = f"'{folder.name}' is being trained."
            stack.enter_context(locks.lock(locks.change_of(folder)))
            stack.enter_context(locks.lock(f"run-{place}", wait=False, busy=busy))
            if folder.is_dir():  # a run of another home holds its folder alone
                stack.enter_context(locks.lock_file(folder, busy=busy))
            for written in (folder.parent, folder, folder / CHECKPOINTS_FOLDER):
                temporaries.sweep(written)
        yield


@contextlib.contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Hold the place that a run writes to, there or not yet, as long as the run lasts; short changes end first.

    Raises TrainingError at once if another run holds it.
    """
    place = locks.place_name(folder)
    with contextlib.ExitStack() as stack:
        with locks.lock(locks.change_of(folder)):
            busy = f"'{folder.name}' is being trained by another process."
            stack.enter_context(locks.lock(f"run-{place}", wait=False, busy=busy))
            if not paths.same_place(folder.parent, adapters_folder()):  # a path, which another home may train, too
                stack.enter_context(locks.lock(f"run-{place}", wait=False, busy=busy, of_all_homes=True))
        yield


def is_being_trained(folder: Path) -> bool:
    """Whether a run holds the place; it may have saved nothing yet."""
    try:
        with training_lock(folder):
            return False
    except TrainingError:
        return True


def register(adapter: "Adapter", name: str, overwrite: bool = False) -> "Adapter":
    """Write the adapter into the registry under `name` and return it as it stands there.

    Raises ExistsError, FormatError or StorageError; two processes cannot both win a name.
    """
    from mlx_adapters.models.adapter import write_adapter

    folder = adapter_folder(name)
    replacing.refuse_existing(folder, overwrite, ADAPTER_OUTPUT)
    with changing(name):
        write_adapter(replace(adapter, metadata=adapter.metadata | {"name": name}), folder, overwrite)
        return replace(adapter, metadata=read_metadata(folder), folder=folder, iteration=None)
