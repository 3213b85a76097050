"""An adapter: low-rank weights, the settings they need, and where they come from.

For a linear layer W (out, in) the update is scale · (lora_a lora_b)ᵀ (LoRA, arXiv 2106.09685); DoRA
(arXiv 2402.09353) then rescales each row of the sum to the trained magnitude m. The tensors say which
modules are adapted; the config holds rank, scale and type.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.display.notebook import html_block, html_facts, loss_curve
from mlx_adapters.errors import AdapterError, FormatError, NotFoundError
from mlx_adapters.models.base import Base, Named
from mlx_adapters.models.dense import INFINITY, LARGE, first_not_finite
from mlx_adapters.models.metadata import (
    AdapterConfig,
    base_of,
    check_config,
    data_config,
    is_number,
    losses_of,
    parse_config,
    read_config,
    read_metadata,
    read_version,
)
from mlx_adapters.storage import files, paths, tensor_files, tensor_names
from mlx_adapters.storage.hf_names import PEFT_WEIGHTS_FILE
from mlx_adapters.storage.replacing import file_version
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    ADAPTER_LEAVES,
    ADAPTER_OUTPUT,
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    METADATA_FILE,
)
from mlx_adapters.units import count

Weights = dict[str, mx.array]  # by tensor name
LARGE_SCALE, LARGEST_UPDATE = 1e6, 1e15
SMALLEST_SCALE = 2.0**-126  # of float32; what is below a device may take for 0


class StrengthWarning(UserWarning):
    """An adapter may have been trained at another strength than it is used at (see `Adapter.strength_note`)."""


@dataclass(frozen=True, repr=False)
class Adapter:
    """An adapter in memory.

    Args:
        config: what is needed to apply it.
        weights: `{module path}.lora_a` (in, rank), `.lora_b` (rank, out) and, for DoRA, `.m` (out,); with experts
            (experts, rank, in) and (experts, out, rank); of an embedding (vocab, rank) and (rank, dim). float32,
            bfloat16 or float16.
        metadata: its record: name, base, losses and what made it.
        folder: where it was read from.
        iteration: the checkpoint it is, if it is one.
        alpha: what a config holds beside the scale, None for most; see `strength_note`.

    Example:
        >>> adapter = ma.load_adapter("sql")
        >>> for key, a, b, m in adapter.layers():
        ...     assert a.shape[1] == b.shape[0] == adapter.config.rank
        >>> adapter.factors(adapter.config.keys[0])[0].dtype
        mlx.core.float32
    """

    config: AdapterConfig
    weights: Weights
    metadata: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    iteration: int | None = None
    alpha: float | None = None

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Adapter({self.name!r}, {c.type}, rank {c.rank}, scale {c.scale:g}, {count(len(c.keys), 'layer')}, "
            f"{self.parameters:,} parameters, base {self.base_name!r})"
        )

    def _repr_html_(self) -> str:
        c, m = self.config, self.metadata
        facts = {
            "type": c.type,
            "rank": c.rank,
            "scale": f"{c.scale:g}",
            "layers": len(c.keys),
            "parameters": f"{self.parameters:,}",
            "base": self.base_name,
            "iteration": self.iteration or m.get("iteration"),
            "best validation loss": m.get("best_validation_loss"),
        }
        return html_block(self.name, html_facts(facts), loss_curve(*losses_of(m)))

    @property
    def name(self) -> str:
        """The registry's name, else the folder's."""
        name = self.metadata.get("name") or (self.folder.name if self.folder else "adapter")
        return f"{name}@{self.iteration}" if self.iteration is not None else str(name)

    @property
    def base_name(self) -> str | None:
        """The base model as it was named when the adapter was made."""
        name = base_of(self.metadata).get("name")
        return None if name in ("", "None") else name  # as some programs write that there is none

    @property
    def strength_note(self) -> str | None:
        """What to tell of an adapter that was trained at another strength than it is used at, as far as one can know.

        mlx-lm before mid-2024 computed scale · alpha / rank where the config has both; today it takes the scale alone.
        """
        c, alpha = self.config, self.alpha
        if alpha is None or alpha in (0, c.rank):
            return None
        return (
            f"'{self.name}' has alpha {alpha:g} beside scale {c.scale:g}: mlx-lm before mid-2024 trained that at "
            f"{c.scale * alpha / c.rank:g}. It is used at {c.scale:g}, as mlx-lm does today; "
            f"'mlx-adapters scale {self.name} {alpha / c.rank:g} --name NAME' makes one of the other strength."
        )

    @property
    def parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(w.size for w in self.weights.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over settings and weights; equal for equal adapters."""
        digest = hashlib.sha256(repr((self.config.type, self.config.rank, self.config.scale)).encode())
        for name in sorted(self.weights):
            array = self.weights[name]
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(tensor_files.raw_bytes(array))
        return digest.hexdigest()

    def factors(self, key: str) -> tuple[mx.array, mx.array, mx.array | None]:
        """(lora_a, lora_b, m or None) of one module, in the shapes of `weights`.

        Args:
            key: its path, one of `config.keys`.
        """
        get = self.weights.get
        join = tensor_names.join
        return self.weights[join(key, LORA_A)], self.weights[join(key, LORA_B)], get(join(key, MAGNITUDE))

    def layers(self) -> Iterator[tuple[str, mx.array, mx.array, mx.array | None]]:
        """(key, lora_a, lora_b, m or None) of each adapted module."""
        for key in self.config.keys:
            yield (key, *self.factors(key))

    def spelled(self, beside: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Its `adapter_config.json`, from which plain mlx-lm loads it.

        Args:
            beside: a config whose other fields stay.

        Example:
            >>> ma.load_adapter("sql").spelled()["num_layers"]
            -1
        """
        config = self.config.to_mlx_lm(beside) | ({"model": self.base_name} if self.base_name else {})
        if self.alpha is not None:
            config["lora_parameters"]["alpha"] = self.alpha
        return config

    def with_weights(self, weights: Weights) -> "Adapter":
        """The same adapter with other weights: it lies in memory only, whatever it was read from.

        Args:
            weights: as in the class; `check` holds them against the config.
        """
        return replace(self, weights=weights, folder=None, iteration=None)

    def check(self) -> "Adapter":
        """Hold tensors against the config; return self.

        Raises FormatError for missing, unknown, empty or misshapen tensors, for other numbers than floats, and for NaN,
        Inf and an update that makes them.
        """
        check_shapes({name: tuple(w.shape) for name, w in self.weights.items()}, self.config, self.name)
        for name, array in self.weights.items():
            if array.dtype not in INFINITY:
                kinds = "float32, bfloat16 or float16"
                kind = str(array.dtype).removeprefix("mlx.core.")
                raise FormatError(f"Adapter '{self.name}': '{name}' is {kind}; an adapter's are {kinds}.", _DAMAGED)
        large = first_not_finite(self.weights, LARGE)
        if large and (bad := first_not_finite(self.weights)):
            raise FormatError(f"Adapter '{self.name}' holds NaN or Inf in '{bad}'.", _DIVERGED)
        if large or abs(self.config.scale) >= LARGE_SCALE:
            self._check_update()
        if 0 < abs(self.config.scale) < SMALLEST_SCALE:
            message = f"Adapter '{self.name}' has scale {self.config.scale:g}, of which float32 makes nothing."
            raise FormatError(message, "give it a larger scale.")
        return self

    def _check_update(self) -> None:
        """Raise FormatError for an update scale · B·A whose squares float32 could not add up."""
        scale = abs(self.config.scale)
        tops = [(mx.abs(a).max(), mx.abs(b).max()) for _, a, b, _ in self.layers()]
        largest = max((a.astype(mx.float32) * b.astype(mx.float32)).item() for a, b in tops)
        if scale > LARGEST_UPDATE or scale * self.config.rank * largest > LARGEST_UPDATE:
            message = (
                f"Adapter '{self.name}' has scale {scale:g} and factors whose product reaches {largest:.3g}, which"
            )
            hint = "give it a smaller scale." if scale >= LARGE_SCALE else _DIVERGED
            raise FormatError(f"{message} makes an update beyond float32.", hint)


AdapterLike = Adapter | str | Path | Named  # what stands for an adapter above `sources`: itself, or a reference to it
AdapterOrBase = AdapterLike | Base  # where a model will do as well


def template_of(adapter: Adapter) -> TemplateConfig:
    """How the adapter was trained to see conversations."""
    return data_config(adapter.metadata).template


def templates_of(base: Base, adapters: Iterable[Adapter]) -> list[TemplateConfig]:
    """How each adapter was trained to see conversations; without any, how what the base holds was."""
    return [template_of(adapter) for adapter in adapters] or [base.template]


_DIVERGED = "its training diverged or the file is damaged; take an earlier checkpoint."
_DAMAGED = "its file and its config do not belong together; copy or download both again."


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: AdapterConfig, name: str) -> None:
    """Raise FormatError unless the tensors are a whole adapter of `config`."""
    keys = set(config.keys)
    for tensor in shapes:
        path, leaf = tensor_names.split(tensor)
        if leaf not in ADAPTER_LEAVES or not path:
            raise FormatError(f"Adapter '{name}' has a tensor '{tensor}' that no adapter has.", _DAMAGED)
        if keys and path not in keys:
            raise FormatError(f"Adapter '{name}' has a tensor '{tensor}', which is of none of its layers.", _DAMAGED)
        if 0 in shapes[tensor]:
            raise FormatError(f"Adapter '{name}': '{tensor}' is empty, with shape {shapes[tensor]}.", _DAMAGED)
    if not config.keys:
        raise FormatError(f"Adapter '{name}' holds no tensors.", _DAMAGED)
    for key in config.keys:
        a, b = (shapes.get(tensor_names.join(key, leaf)) for leaf in (LORA_A, LORA_B))
        m = shapes.get(tensor_names.join(key, MAGNITUDE))
        if a is None or b is None:
            lacking = tensor_names.join(key, LORA_A if a is None else LORA_B)
            raise FormatError(f"Adapter '{name}' lacks '{lacking}'.", _DAMAGED)
        if (m is not None) != (config.type == "dora"):
            raise FormatError(
                f"Adapter '{name}' is of type {config.type}, but '{key}' has {'a' if m else 'no'} magnitude.", _DAMAGED
            )
        ranks = (a[1], b[0]) if len(a) == len(b) == 2 else (a[1], b[2]) if len(a) == len(b) == 3 else (0, 0)
        if ranks != (config.rank, config.rank) or (len(a) == 3 and a[0] != b[0]):
            raise FormatError(
                f"Adapter '{name}': '{key}' has shapes {a} and {b}, which do not fit rank {config.rank}.",
                "all layers share one rank; pad the factors of smaller ones with zeros.",
            )


def weights_file(folder: Path, iteration: int | None = None) -> Path:
    """The file of the adapter, or of its checkpoint. Raises NotFoundError that lists what there is."""
    folder = Path(folder)
    if not folder.is_dir():
        if folder.is_file():
            hint = "name the folder; 'mlx-adapters add' takes in a file of weights, or a packed one."
            raise NotFoundError(f"'{folder}' is a file, not an adapter's folder.", hint)
        raise NotFoundError(f"There is no adapter folder '{folder}'.", "'mlx-adapters list' shows the named ones.")
    path = folder / (ADAPTER_FILE if iteration is None else tensor_names.checkpoint_file(iteration))
    if path.is_file():
        return path
    there = ", ".join(map(str, files.iterations_of(folder)))
    if iteration is None:
        if (folder / "config.json").is_file():
            raise NotFoundError(f"'{folder}' is a model, not an adapter.", "name it as the base: --base.")
        if (folder / PEFT_WEIGHTS_FILE).is_file():
            hint = "take it in with 'mlx-adapters import-peft', or fuse it with 'mlx-adapters fuse --from-peft'."
            raise NotFoundError(f"'{folder}' is a PEFT adapter.", hint)
        raise NotFoundError(
            f"'{folder}' has no {ADAPTER_FILE}.", f"its checkpoints: {there}." if there else "is it an adapter folder?"
        )
    raise NotFoundError(
        f"'{folder.name}' has no checkpoint {iteration}.", f"there are: {there}." if there else "it has no checkpoints."
    )


def keys_of(names: Mapping[str, Any]) -> tuple[str, ...]:
    """The module paths that the tensors belong to, in a natural order (layer 2 before layer 10)."""
    paths = {tensor_names.split(name)[0] for name in names}
    return tuple(sorted(paths, key=tensor_names.natural_order))


def read_adapter(folder: str | Path, iteration: int | None = None, name: str | None = None) -> Adapter:
    """Read and check an adapter folder, ours or plain mlx-lm's.

    Args:
        folder: where it lies.
        iteration: the checkpoint to read; None: the adapter itself.
        name: what it is called instead of what its record says.

    Raises NotFoundError or FormatError with what is wrong.

    Example:
        >>> from pathlib import Path
        >>> folder = ma.write_adapter(ma.load_adapter("sql"), Path("out/sql"))
        >>> ma.read_adapter(folder).fingerprint == ma.load_adapter("sql").fingerprint
        True
    """
    folder = paths.expanded(folder)
    weights = ADAPTER_FILE if iteration is None else tensor_names.checkpoint_file(iteration)
    return read_version(folder, lambda: _read(folder, iteration, name), [weights])


def _read(folder: Path, iteration: int | None, name: str | None) -> Adapter:
    path = weights_file(folder, iteration)
    raw = read_config(folder)
    check_config(raw, f"'{name or folder}'")
    weights = tensor_files.read_safetensors(path)
    config = parse_config(raw, keys_of(weights), f"'{folder}'")
    metadata = read_metadata(folder) | ({"name": name} if name else {})
    alpha = raw["lora_parameters"].get("alpha")
    return Adapter(config, weights, metadata, folder, iteration, float(alpha) if is_number(alpha) else None).check()


def place_of(adapter: Adapter) -> str | None:
    """The reference of the folder that holds this very adapter; None if it is in memory only, or not as it was read.

    Its files are read again: an adapter is what it holds, whatever it says of its folder.
    """
    if adapter.folder is None:
        return None
    try:
        there = read_adapter(adapter.folder, adapter.iteration)
    except AdapterError:
        return None
    same = (there.config, there.fingerprint) == (adapter.config, adapter.fingerprint)
    return f"{adapter.folder}{'' if adapter.iteration is None else f'@{adapter.iteration}'}" if same else None


def version_of(adapter: Adapter) -> tuple[Any, ...] | None:
    """Which version of its files lies in the folder that it was read from: another one after they were replaced."""
    if adapter.folder is None:
        return None
    weights = ADAPTER_FILE if adapter.iteration is None else tensor_names.checkpoint_file(adapter.iteration)
    return tuple(file_version(adapter.folder / name) for name in (CONFIG_FILE, weights))


def equal_files(one: Adapter, other: Adapter) -> bool:
    """Whether two versions of an adapter are known to hold the same weights."""
    recorded = [adapter.metadata.get("sha256") for adapter in (one, other)]
    return one.iteration is None and recorded[0] is not None and recorded[0] == recorded[1]


def write_adapter(adapter: Adapter, folder: str | Path, overwrite: bool = False) -> Path:
    """Write an adapter as a folder that `mlx_lm.load(adapter_path=...)` takes, whole or not at all; the folder.

    Args:
        adapter: what to write.
        folder: the folder to make.
        overwrite: replace an adapter that lies there.

    Raises ExistsError, FormatError or StorageError.

    Example:
        >>> from pathlib import Path
        >>> sorted(path.name for path in ma.write_adapter(ma.scale("sql", 0.5), Path("out/half")).iterdir())
        ['adapter_config.json', 'adapter_metadata.json', 'adapters.safetensors']
    """
    adapter.check()
    folder = paths.expanded(folder)
    with files.atomic_folder(folder, overwrite, ADAPTER_OUTPUT) as temporary:
        write_adapter_files(adapter, temporary)
    return folder


def write_adapter_files(adapter: Adapter, folder: Path) -> None:
    """Write the three files of an adapter into a folder (each whole or not at all)."""
    digest = tensor_files.write_safetensors(folder / ADAPTER_FILE, adapter.weights, hashed=True)
    files.write_json(folder / CONFIG_FILE, adapter.spelled())
    metadata = adapter.metadata | {"sha256": {ADAPTER_FILE: digest}}
    files.write_json(folder / METADATA_FILE, metadata)
