"""The recipe that a fused folder carries: enough to make the same bytes again."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import Precision
from mlx_adapters.errors import AdapterError, ConfigError, FormatError, IncompatibleError
from mlx_adapters.models import metadata
from mlx_adapters.models.adapter import Adapter, AdapterLike, place_of, template_of
from mlx_adapters.models.base import OTHER_FILE, Base, Named
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.replacing import NOTHING, Output
from mlx_adapters.storage.temporaries import flush_path
from mlx_adapters.storage.tensor_names import FUSE_RECIPE_FILE, REPORT_FILE

WEIGHT_FILES = ("model*.safetensors", OTHER_FILE, "*.gguf")
# What a fused model consisted of before its report listed its files.
UNRECORDED = (
    r"(generation_)?config\.json|model[^/]*\.(safetensors|json|gguf)|fuse_recipe\.json|(special_tokens_map|added_tokens)"
    r"\.json|tokenizer[^/]*|vocab\.(json|txt)|merges\.txt|chat_template[^/]*|(pre)?processor_config\.json|LICENSE"
)
KINDS = metadata.WholeRecord(
    base=metadata.WholeRecord(name=str, fingerprint=str),
    adapters=[metadata.WholeRecord(fingerprint=str, weight=float)],
    dtype=str,
    method=str,
    targets={},
    options={},
    versions={"*": str},
    weights_sha256={"*": str},
)
ANEW = "put the old one back, or fuse anew without --again."


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of a fused model. `targets`: layers with a precision of their own."""

    base: dict[str, Any]
    adapters: list[dict[str, Any]]
    quantization: dict[str, Any] | str
    dtype: str
    method: str
    targets: dict[str, dict[str, Any] | None]
    text: dict[str, Any] | None
    options: dict[str, Any]
    versions: dict[str, str]
    weights_sha256: dict[str, str]


def describe_adapter(given: AdapterLike, adapter: Adapter, weight: float) -> dict[str, Any]:
    """How to find an adapter again, and its fingerprint to hold it against."""
    reference = None
    if not isinstance(given, Adapter):
        text = str(given)
        path = isinstance(given, Path) or paths.is_path(text)
        reference = str(paths.expanded(text)) if path else text
    else:
        reference = place_of(adapter)
    told = {"reference": reference, "name": adapter.name, "fingerprint": adapter.fingerprint, "weight": weight}
    return told | _seen(template_of(adapter))


def describe_base(base: Base) -> dict[str, Any]:
    """What a recipe says of the base; of a full fine-tune also how it was trained to see conversations."""
    return base.record() | _seen(base.template)


def _seen(template: TemplateConfig) -> dict[str, Any]:
    return {"chat_template_args": template.chat_template_args} if template.chat_template_args else {}


def weights_sha256(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of each weight file, which then is on the disk and not on its way there: the folder is soon flushed.

    `known`: of those whose writer knows it.
    """
    hashes: dict[str, str] = {}
    for path in (path for pattern in WEIGHT_FILES for path in paths.visible(folder, pattern)):
        hashes[path.name] = known.get(path.name) or files.sha256(path)
        flush_path(path, platter=False)
    return hashes


def earlier_output(out: Path) -> Output:
    """What an earlier fuse, by its own report, has written into the folder `out`, and what `card` adds to it."""
    try:
        recorded = files.read_json(out / REPORT_FILE).get("files")
    except AdapterError:
        return NOTHING
    known = "|".join(re.escape(str(name)) for name in recorded) if isinstance(recorded, list) else UNRECORDED
    return Output(REPORT_FILE, f"README\\.md|loss\\.svg|{known}")


def written_in(folder: Path) -> list[str]:
    """The files of a fused model, by their paths in its folder."""
    return sorted(path.relative_to(folder).as_posix() for path in paths.visible(folder, "**/*") if path.is_file())


def differences(asked: Recipe, made: Recipe) -> str | None:
    """A sentence on the weight files of `made` that are unlike those of `asked`, None if there are none."""
    names = sorted(asked.weights_sha256.keys() | made.weights_sha256.keys())
    unlike = [name for name in names if asked.weights_sha256.get(name) != made.weights_sha256.get(name)]
    if not unlike:
        return None
    versions = [
        f"{name} {asked.versions.get(name)}, now {made.versions.get(name)}"
        for name in sorted(asked.versions.keys() | made.versions.keys())
        if asked.versions.get(name) != made.versions.get(name)
    ]
    because = f"it was made with {'; '.join(versions)}" if versions else "another processor or BLAS can round otherwise"
    return f"The weights differ from the recipe's in {', '.join(unlike)}: {because}."


def read_recipe(path: str | Path | Named) -> Recipe:
    """Read a recipe from its file or the folder that holds it. Raises NotFoundError or FormatError."""
    path = paths.expanded(path if isinstance(path, str | Path) else path.reference)
    raw = files.read_json(path / FUSE_RECIPE_FILE if path.is_dir() else path)
    form = raw.pop("format", 1)
    try:
        recipe = Recipe(**raw)
    except TypeError:
        raise FormatError(f"'{path}' is not a fuse recipe.", f"it is called {FUSE_RECIPE_FILE}.") from None
    metadata.check(raw, KINDS, f"The fuse recipe '{path}'")
    if form == 1 and recipe.options.get("thorough"):  # it meant no more then than not to be quick
        recipe.options["thorough"] = None
    try:
        Precision.of(recipe.quantization)
        require(isinstance(recipe.text, dict | None), "Its text is not as it was written.")
    except ConfigError as error:
        raise FormatError(f"The fuse recipe '{path}' is damaged. {error.message}", "fuse anew.") from None
    return recipe


def fused_here(adapter: Adapter, base: Base, top: Path) -> dict[str, Path]:
    """The models at most two folders below `top` that are fused of this adapter alone and `base`, calibrated where that
    is due; of several of one precision the first.

    What a plain fuse makes goes by its bits ("4", "none"), what has other groups by both: "4 bits in groups of 32".
    """
    found: dict[str, Path] = {}
    for path in sorted(file for depth in ("*", "*/*") for file in top.glob(f"{depth}/{FUSE_RECIPE_FILE}")):
        with contextlib.suppress(AdapterError, KeyError, TypeError, AttributeError, OSError):
            recipe = read_recipe(path.parent)
            precision = Precision.of(recipe.quantization)
            whole = [(one["fingerprint"], one["weight"]) for one in recipe.adapters] == [(adapter.fingerprint, 1)]
            own = recipe.base["fingerprint"] == base.fingerprint and recipe.options.get("format") == "mlx"
            # A plain fuse calibrates under 8 bits: one that was told to round to nearest is another model.
            coarse = recipe.method == recipe.options.get("method") == "nearest" and precision.bits != 8
            if whole and own and not coarse and precision.mode in (None, "affine"):
                plain = precision.settled(base.quantization) == Precision.of(precision.bits).settled(base.quantization)
                grouped = f"{precision.bits} bits in groups of {precision.group_size}"
                found.setdefault(str(precision.bits) if plain else grouped, path.parent)
    return found


def ingredients(recipe: Recipe) -> tuple[Base, list[Adapter]]:
    """The base and adapters of a recipe, proven to be the same. Raises IncompatibleError if they changed."""
    base = resolve_base(recipe.base["name"])
    if base.fingerprint != recipe.base["fingerprint"]:
        raise IncompatibleError(f"The base '{base.name}' is not the one of the recipe any more.", ANEW)
    adapters = []
    for entry in recipe.adapters:
        if entry.get("reference") is None:
            raise FormatError("The recipe was made with an adapter that lay in memory only.", "fuse it by hand.")
        adapter = load_adapter(str(entry["reference"]))
        if adapter.fingerprint != entry["fingerprint"]:
            raise IncompatibleError(f"Adapter '{entry['reference']}' is not the one of the recipe any more.", ANEW)
        adapters.append(adapter)
    return base, adapters
