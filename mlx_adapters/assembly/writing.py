"""Write a model folder layer by layer, so that memory holds one layer and not the model.

Every layer of the model becomes a unit: the tensors it will have (name, type, shape), known beforehand, and a
function that makes them. Units are packed into shards; a shard is written as its units are made, and what
the unit read is dropped at once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_adapters.checkpoints.contents import companions, is_of_tokenizer, tokenizer_files
from mlx_adapters.events import OnEvent, Progress
from mlx_adapters.models.base import Base
from mlx_adapters.storage import files, paths, tensor_files
from mlx_adapters.storage.hf_names import TOKENIZER_CONFIG
from mlx_adapters.storage.tensor_files import StoredTensor
from mlx_adapters.system.door import mx
from mlx_adapters.system.limits import trim_cache
from mlx_adapters.system.templates import templates_in

SHARD_BYTES = 5 << 30
SPARE_BYTES = 16 << 20  # of the disk: tokenizer, config and report
OTHER_BITS = "for other bits leave --format (or --for) out: the MLX format has them all."
Layout = list[tuple[str, str, tuple[int, ...]]]


@dataclass(frozen=True)
class Unit:
    """One layer to be written: its tensors as (name, dtype, shape) and how to make them, in that order.

    `begin` has them computed beside what is done with the one before.
    """

    layout: Layout
    make: Callable[[], list[mx.array]]
    begin: Callable[[], None] = lambda: None

    @property
    def size_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor_bytes(dtype, shape) for _, dtype, shape in self.layout)


@dataclass(frozen=True)
class Written:
    """What a writer has written: bytes of the weights (`beside_bytes`: of those that mlx-lm does not use), what is to
    be told about the rest, and SHA-256 of files, if it is known."""

    size_bytes: int
    beside_bytes: int = field(default=0, kw_only=True)
    notes: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)


def dtype_name(dtype: mx.Dtype) -> str:
    """ "bfloat16" for mx.bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor."""
    return getattr(mx, "bool_" if dtype == "bool" else dtype).size * math.prod(shape)


def make_shards(units: list[Unit], limit: int = SHARD_BYTES) -> list[list[Unit]]:
    """Units in order, cut where a shard would grow over `limit` bytes."""
    shards: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not shards or size + unit.size_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.size_bytes
    return shards


def write_weights(
    folder: Path,
    units: list[Unit],
    on_event: OnEvent,
    limit: int = SHARD_BYTES,
    more: Mapping[str, StoredTensor] | None = None,
    made_by: str = "mlx",
) -> Written:
    """Write all units as model*.safetensors with an index.

    `more` goes over as it is, in a last shard. `made_by`: the program whose files these are to be taken for. Raises
    StorageError when the disk is too small, before anything is computed.
    """
    more = more or {}
    beside = sum(tensor.nbytes for tensor in more.values())
    total = sum(unit.size_bytes for unit in units) + beside
    paths.require_free_space(folder, total + SPARE_BYTES)
    shards = make_shards(units, limit)
    index, hashes = dict[str, str](), dict[str, str]()
    done = iter(range(1, len(units) + 1))
    for number, shard in enumerate(shards, 1):
        name = _shard_name(number, len(shards) + bool(more))
        layout = [entry for unit in shard for entry in unit.layout]

        def arrays(shard: list[Unit] = shard) -> Iterator[mx.array]:
            for unit, following in zip(shard, [*shard[1:], None], strict=True):
                if following is not None:
                    following.begin()
                made = unit.make()
                mx.eval(made)
                while made:
                    yield made.pop(0)
                trim_cache()
                on_event(Progress("write", next(done), len(units), "layer"))

        hashes[name] = tensor_files.stream_safetensors(folder / name, layout, arrays(), {"format": made_by}, True)
        index |= {tensor: name for tensor, _, _ in layout}
    if more:
        name = _shard_name(len(shards) + 1, len(shards) + 1)
        tensor_files.copy_tensors(folder / name, more, {"format": made_by})
        index |= dict.fromkeys(more, name)
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return Written(total, beside_bytes=beside, sha256=hashes)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def companion_bytes(base: Base) -> int:
    """Bytes of what `copy_companions` copies."""
    return sum((base.folder / name).stat().st_size for name in companions(base.folder))


def copy_companions(base: Base, folder: Path) -> None:
    """Copy what belongs to a model besides its weights and config: tokenizer, chat templates, licences, code."""
    own = {name: base.tokenizer / name for name in tokenizer_files(base.tokenizer)} if base.tokenizer else {}
    for name, path in own.items():
        files.copy_file(path, folder / name)
    for name in companions(base.folder):
        if not (folder / name).exists() and not (own and is_of_tokenizer(name)):
            files.copy_file(base.folder / name, folder / name)
    templates = templates_in(base.tokenizer or base.folder) or templates_in(base.folder)
    if templates and not templates_in(folder, processor=False):  # where others look for them
        settings = files.read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
        named = [{"name": name, "template": text} for name, text in templates.items()]
        one = templates["default"] if list(templates) == ["default"] else named
        files.write_json(folder / TOKENIZER_CONFIG, settings | {"chat_template": one})


def write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any] | None) -> None:
    """Write config.json with the quantization as mlx-lm reads it, or without any."""
    kept = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config", "_name_or_path")}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = {k: v for k, v in kept["text_config"].items() if k != "quantization_config"}
    if quantization is not None:
        kept |= {"quantization": quantization, "quantization_config": quantization}
    files.write_json(folder / "config.json", files.tagged(kept))
