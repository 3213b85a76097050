"""Rounded layers on the disk until the model is written, and kept where the fuse stopped before that.

They lie in a hidden folder beside the output. A fuse that ends well, or that is stopped within a minute, leaves nothing
there; one that took longer keeps what it has rounded for the next to go on from. What a kill leaves is a draft like any
other, swept by the next write there if that is not the fuse that goes on. A layer's rounding depends on nothing but the
fuse's ingredients, so what comes out is the same to the byte.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_adapters.config.mapping import from_mapping, to_mapping
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.errors import AdapterError, FidelityError, NotFoundError
from mlx_adapters.events import Note, OnEvent
from mlx_adapters.rounding.packed import Packed
from mlx_adapters.rounding.workers import Done
from mlx_adapters.storage import files, locks, paths, tensor_files
from mlx_adapters.storage.temporaries import MARKER
from mlx_adapters.units import count

WORTH_KEEPING = 60.0  # seconds of work
RECORD = "rounded.json"
Key = tuple[str, Quantization]


class Spool:
    """Rounded layers on the disk, by path and precision, until the shards are written.

    `key` says what they are made of; with `resume` those in the folder that have the same are taken up. `losses` are
    their errors; `nearest` those where rounding to nearest was better than calibration.
    """

    def __init__(self, folder: Path, key: str = "", resume: bool = False) -> None:
        self.folder, self.key = folder, key
        self.losses: dict[Key, float] = {}
        self.nearest: set[Key] = set()
        self._files: dict[Key, str] = {}
        if resume:
            self._read()

    def sweep(self) -> None:
        """Delete from the folder what is none of these layers."""
        kept = {*self._files.values(), RECORD if self._files else "", MARKER}
        for path in self.folder.iterdir():
            if path.name not in kept:
                files.remove(path)

    def _read(self) -> None:
        with contextlib.suppress(AdapterError, KeyError, TypeError):  # a record that is not whole is none
            record = files.read_json(self.folder / RECORD)
            if record["key"] != self.key:
                return
            for entry in record["layers"]:
                key = entry["path"], from_mapping(Quantization, entry["quantization"], "the record")
                tensor_files.read_safetensors_header(self.folder / entry["file"])
                self.losses[key], self._files[key] = entry["loss"], entry["file"]
                self.nearest |= {key} if entry["nearest"] else set()

    def put(self, path: str, done: Done) -> None:
        """Keep one rounded layer."""
        key = (path, done.packed.quantization)
        name = f"{len(self._files):06d}.safetensors"
        tensor_files.write_safetensors(self.folder / name, done.packed.tensors)
        self.losses[key], self._files[key] = done.loss, name
        if done.nearest:
            self.nearest.add(key)
        layers = [
            {
                "path": p,
                "quantization": to_mapping(q),
                "file": n,
                "loss": self.losses[p, q],
                "nearest": (p, q) in self.nearest,
            }
            for (p, q), n in self._files.items()
        ]
        files.write_json(self.folder / RECORD, {"key": self.key, "layers": layers})

    def get(self, path: str, quantization: Quantization | None) -> Packed | None:
        """The layer rounded to that precision, or None."""
        file = self._files.get((path, quantization)) if quantization is not None else None
        if file is None or quantization is None:
            return None
        return Packed.of(tensor_files.read_safetensors(self.folder / file), quantization)

    def exchange(self, path: str, packed: Packed) -> None:
        """Hand out this in place of the layer at that precision. The record keeps what was there: who goes on from it
        starts there again."""
        name = f"exchanged-{len(self._files):06d}-{path}.safetensors"
        tensor_files.write_safetensors(self.folder / name, packed.tensors)
        self._files[path, packed.quantization] = name

    def remove(self) -> None:
        """Delete and forget everything."""
        self._files = {}
        if self.folder.is_dir():
            files.remove(self.folder)


def parts_folder(out: Path) -> Path:
    """Where the rounded layers of a fuse into `out` lie while it works."""
    return out.with_name(f"{paths.TEMPORARY_PREFIX}parts-{out.name}")


def kept_folder(out: Path) -> Path:
    """Where they lie once it was stopped."""
    return out.with_name(f".{out.name}.mlx-adapters-parts")


def key_of(ingredients: Any) -> str:
    """One text for all that decides how layers are rounded, which must be JSON."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def spooled(out: Path, key: str, resume: bool, on_event: OnEvent) -> Iterator[Spool]:
    """The spool of a fuse into `out`, gone when the block ends; if that fails after a minute, it stays.

    `resume`: take up what lies there. Raises NotFoundError if that is nothing, TrainingError if it is in use.
    """
    folder, kept, started = parts_folder(out), kept_folder(out), time.monotonic()
    with files.storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if resume and kept.is_dir() and not folder.exists():
            os.rename(kept, folder)
        folder.mkdir(exist_ok=True)
        (folder / MARKER).touch()
    with locks.lock_file(folder / MARKER, busy=f"Another process is fusing into '{out}'."):
        if kept.is_dir():
            files.remove(kept)
        spool = Spool(folder, key, resume)
        if resume and not spool.losses:
            if (folder / RECORD).is_file():  # another fuse's, which may still go on
                os.rename(folder, kept)
            else:
                spool.remove()
            raise NotFoundError(
                f"Nothing of this fuse into '{out}' was kept.",
                "leave --continue out; with it, base, adapter, text and options are as they were.",
            )
        spool.sweep()
        if resume:
            on_event(Note(f"Going on after {count(len(spool.losses), 'layer')}."))
        try:
            yield spool
        except BaseException as error:
            if time.monotonic() - started < WORTH_KEEPING or isinstance(error, FidelityError) or not spool.losses:
                spool.remove()
            else:
                os.rename(folder, kept)
                on_event(Note(f"{count(len(spool.losses), 'layer')} rounded; the same with --continue goes on there."))
            raise
        spool.remove()
