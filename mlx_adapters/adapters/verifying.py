"""Whether an adapter is sound: its files, its tensors, its fit to the base."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_adapters.display.tables import Rows, Table, flat
from mlx_adapters.errors import AdapterError, FormatError, NotFoundError
from mlx_adapters.models.adapter import Adapter, AdapterLike, place_of, read_adapter
from mlx_adapters.models.base import Base, BaseLike
from mlx_adapters.models.layers import check_fits, check_made_for
from mlx_adapters.models.loading import load_module
from mlx_adapters.models.metadata import FULL, base_of
from mlx_adapters.sources import lookup, registry
from mlx_adapters.sources.bases import full_weights, resolve_base
from mlx_adapters.sources.registry import Entry
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, CHECKPOINTS_FOLDER
from mlx_adapters.units import count


@dataclass(frozen=True)
class Check:
    """One thing looked at. `sound` None: it could not be looked at, `detail` says why."""

    what: str
    sound: bool | None
    detail: str


@dataclass(frozen=True, repr=False)
class Verification(Table):
    """All checks of one adapter."""

    name: str
    checks: tuple[Check, ...]

    def records(self) -> list[dict[str, Any]]:
        """One for each check."""
        return [flat(check) for check in self.checks]

    @property
    def problems(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.sound is False)

    @property
    def sound(self) -> bool:
        """Whether no check failed."""
        return not self.problems


TRIES = 5
Modules = dict[str, tuple[Base, Any] | AdapterError]


def verify(reference: AdapterLike, *, base: BaseLike | None = None, _modules: Modules | None = None) -> Verification:
    """Checksums, tensors against the config, NaN, all checkpoints, and the fit to the base's layers.

    Args:
        reference: the adapter; one in memory has no files, checksums and checkpoints.
        base: the base to hold it against; None: its own, if it is on this machine. Nothing is downloaded.

    Raises ConfigError, NotFoundError or HubError if there is no such adapter; what is wrong with it is returned.

    Example:
        >>> ma.verify("sql").problems
        ()
    """
    modules = {} if _modules is None else _modules
    if isinstance(reference, Adapter):
        if (place := place_of(reference)) is None:
            return Verification(reference.name, _checks_in_memory(reference, base, modules))
        reference = place
    folder, iteration = lookup.locate(reference)
    if not folder.is_dir():
        raise NotFoundError(f"There is no adapter folder '{folder}'.", "'mlx-adapters list' shows the named ones.")
    for _ in range(TRIES):
        entry = registry.read_entry(folder)
        checks = _checks(entry, iteration, base, modules)
        if registry.read_entry(folder) == entry:  # else a change has overtaken the checks
            break
    return Verification(lookup.spelled(reference), checks)


def _checks(entry: Entry, iteration: int | None, base: BaseLike | None, modules: Modules) -> tuple[Check, ...]:
    folder = entry.folder
    checks = [Check("files", entry.problem is None, entry.problem or "all there and readable")]
    checks.append(_check("checksums", lambda: _check_checksums(entry)))
    read: list[Adapter] = []
    for i in (iteration,) if iteration is not None else (None, *entry.iterations):
        what = "tensors" if i is None else f"tensors of @{i}"
        look = _check_full if entry.type == FULL else partial(_check_tensors, read=read)
        checks.append(_check(what, partial(look, folder, i)))
    if entry.type == FULL:
        checks.append(_check("base", lambda: _check_whole(folder)))
    if read:
        checks.append(_check("base", lambda: _check_base(read[0], base, modules)))
    return tuple(checks)


def _checks_in_memory(adapter: Adapter, base: BaseLike | None, modules: Modules) -> tuple[Check, ...]:
    tensors = _check("tensors", lambda: _found(adapter.check()))
    return tensors, _check("base", lambda: _check_base(adapter, base, modules))


def verify_all(base: BaseLike | None = None) -> Rows[Verification]:
    """`verify` for every named adapter; each base's layers are looked up once.

    Args:
        base: the base to hold them against; None: each one's own.

    Example:
        >>> [verification.name for verification in ma.verify_all()]
        ['chat', 'sql']
    """
    modules: Modules = {}
    verifications: Rows[Verification] = Rows()
    for name in registry.names():
        with contextlib.suppress(NotFoundError):  # removed meanwhile
            verifications.append(verify(name, base=base, _modules=modules))
    return verifications


class _NotCheckedError(Exception):
    """What was to be checked is not there to be checked."""


def _check(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, True, look())
    except _NotCheckedError as reason:
        return Check(what, None, str(reason))
    except AdapterError as error:
        return Check(what, False, error.message + (f" ({error.hint})" if error.hint else ""))
    except OSError as error:  # one folder that cannot be read hides none of the others
        return Check(what, False, f"{error.strerror}: '{error.filename}'")


def _check_checksums(entry: Entry) -> str:
    recorded = {entry.folder / name: digest for name, digest in registry.checksums_of(entry.metadata).items()}
    copies: dict[Path, str] = {}
    for state in paths.visible(entry.folder, f"{CHECKPOINTS_FOLDER}/*/state.json"):
        sums = registry.checksums_of(files.read_json(state))
        recorded |= {state.parent / name: digest for name, digest in sums.items()}
        copy = entry.folder / f"{state.parent.name}_{ADAPTER_FILE}"
        if ADAPTER_FILE in sums and copy.is_file():
            copies[copy] = sums[ADAPTER_FILE]
    if not recorded:
        raise _NotCheckedError("none are recorded")
    for path, expected in (recorded | copies).items():
        shown = f"{path.parent.name}/{path.name}"
        if path.name not in {there.name for there in path.parent.iterdir() if there.is_file()}:
            raise FormatError(f"'{shown}' is recorded but missing.", "copy or download the whole adapter.")
        if (digest := files.sha256(path)) != expected:
            raise FormatError(f"'{shown}' is not the file that was recorded.", _whose(entry, digest, path))
    return f"{count(len(recorded | copies), 'file')} as recorded"


def _whose(entry: Entry, digest: str, path: Path) -> str:
    if path.name == ADAPTER_FILE and path.parent == entry.folder:
        for iteration in entry.iterations:
            if files.sha256(registry.checkpoint_path(entry, iteration)) == digest:
                return f"it is checkpoint {iteration}: 'use {entry.name}@{iteration}' records that."
    whole = entry.folder / CHECKPOINTS_FOLDER / path.name.removesuffix(f"_{ADAPTER_FILE}") / ADAPTER_FILE
    if path.parent == entry.folder and whole.is_file():
        return f"it was written over; as it was saved it is in '{whole.relative_to(entry.folder)}'."
    return "it was changed or damaged after it was written."


def _check_tensors(folder: Path, iteration: int | None, read: list[Adapter]) -> str:
    adapter = read_adapter(folder, iteration, folder.name)
    read.append(adapter)
    return _found(adapter)


def _check_full(folder: Path, iteration: int | None) -> str:
    return f"{count(len(full_weights(folder, iteration)), 'tensor')} of a full fine-tune, all finite"


def _check_whole(folder: Path) -> str:
    base = resolve_base(folder, download=False)
    load_module(base)
    return "it is the model that was trained, and has all its tensors"


def _found(adapter: Adapter) -> str:
    note = f". {adapter.strength_note}" if adapter.strength_note else ""
    return f"{count(len(adapter.config.keys), 'layer')} of rank {adapter.config.rank}, all finite{note}"


def _check_base(adapter: Adapter, base: BaseLike | None, modules: Modules) -> str:
    name = adapter.base_name if base is None else registry.base_name(base)
    if name is None:
        raise _NotCheckedError("its base is not recorded; name one with --base")
    if name not in modules:
        try:
            resolved = resolve_base(name if base is None else base, download=base is not None)
            modules[name] = (resolved, load_module(resolved)[0])
        except AdapterError as error:
            modules[name] = error
    looked_up = modules[name]
    if isinstance(looked_up, NotFoundError) and base is None:
        raise _NotCheckedError(looked_up.message)
    if isinstance(looked_up, AdapterError):
        raise looked_up
    resolved, module = looked_up
    check_fits(adapter, module, f"'{name}'")
    check_made_for(adapter, name, resolved.fingerprint)
    known = "" if base_of(adapter.metadata).get("fingerprint") else " (its base's weights are not recorded)"
    return f"fits '{name}'{known}"
