"""What each variant on the command line means, and making it ready to load. Imports no MLX.

A variant is `base`, an adapter reference (`sql`, `sql@500`, `./folder`, `user/repo`), a model (`demo`, a
folder, a Hub id) or `fuse:REF:BITS`, which is fused for the occasion. The same variant may be given twice:
comparing a model with itself shows how far the machine's noise reaches.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import BITS, Precision
from mlx_adapters.errors import AdapterError, ConfigError, NotFoundError, did_you_mean
from mlx_adapters.events import Note, OnEvent, without_notes
from mlx_adapters.models.metadata import base_of, data_config, read_metadata
from mlx_adapters.sources import lookup
from mlx_adapters.sources.lookup import locate
from mlx_adapters.sources.references import parse_reference
from mlx_adapters.sources.registry import adapter_folder, base_name, names
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.tensor_names import CONFIG_FILE

if TYPE_CHECKING:
    from mlx_adapters.models.adapter import AdapterOrBase
    from mlx_adapters.models.base import BaseLike

BASE, FUSE = "base", "fuse"


@dataclass(frozen=True)
class Variant:
    """One row of the report: a base model, maybe with an adapter on it.

    `fuse_bits` asks for fusing first; the fused folder then takes the place of both. `problem` says why the
    variant cannot be measured.
    """

    label: str
    base: str | None = None
    adapter: str | None = None
    fuse_bits: str | None = None
    problem: str | None = None


def parse_variant(text: str) -> Variant:
    """The variant that `text` spells. Raises ConfigError or NotFoundError."""
    if text == BASE:
        if adapter_folder(BASE).is_dir():
            raise ConfigError(
                f"'{BASE}' means the model without an adapter, and there is an adapter of that name.",
                f"rename it: mlx-adapters rename {adapter_folder(BASE).name} {BASE}-1",
            )
        return Variant(text)
    head, _, rest = text.partition(":")
    if head == FUSE:
        reference, _, bits = rest.rpartition(":")
        if bits not in BITS or not reference:
            raise ConfigError(f"'{text}' is no variant.", "write fuse:ADAPTER:BITS, for example fuse:sql:4.")
        lookup.reference_of(reference)
        return Variant(text, adapter=reference, fuse_bits=bits)
    if text == "demo":
        return Variant(text, base=text)
    if lookup.place_of_full(text) is not None:
        return Variant(text, base=text)
    place = lookup.spelled(text)
    if paths.is_path(place) and (folder := paths.expanded(place)).is_dir():
        is_adapter = (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
        return Variant(text, adapter=str(folder)) if is_adapter else Variant(text, base=text)
    kind = parse_reference(place).kind
    if kind == "hub":
        return Variant(text, adapter=text) if is_hub_adapter(text) else Variant(text, base=text)
    if kind == "name" and not adapter_folder(parse_reference(text).target).is_dir():
        near = did_you_mean(text, [*names(), BASE, "demo"], "'mlx-adapters list' shows the adapters.")
        raise NotFoundError(f"No adapter or model named '{text}'.", near)
    return Variant(text, adapter=text)


def is_hub_adapter(text: str) -> bool:
    """Whether a repository on the Hub (or in its cache) holds an adapter rather than a whole model."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    if parse_reference(text).subfolder:
        return True
    repo, _, revision = text.partition("@")
    if isinstance(try_to_load_from_cache(repo, CONFIG_FILE, revision=revision or None), str):
        return True
    if isinstance(try_to_load_from_cache(repo, "config.json", revision=revision or None), str):
        return False
    try:
        return file_exists(repo, CONFIG_FILE, revision=revision or None)
    except (OSError, ValueError):
        return False  # the download that follows says what is wrong


def parse_variants(texts: Sequence[str | Variant], base: str | None = None) -> list[Variant]:
    """All variants, with the base each stands on; repeated ones are numbered.

    `base` is what the word "base" means; by default the base that the first adapter was trained on. What is
    not there or not readable becomes the variant's `problem`. Raises ConfigError for what cannot be a variant,
    and when no variant can be measured the first one's error.
    """
    require(len(texts) > 0, "Name at least one variant.", "for example: benchmark base sql")
    variants, errors = [], []
    for text in texts:
        try:
            variants.append(_with_base(text if isinstance(text, Variant) else parse_variant(text), base))
        except ConfigError:
            raise
        except AdapterError as error:
            errors.append(error)
            label = text.label if isinstance(text, Variant) else text
            variants.append(Variant(label, problem=error.with_hint))
    if len(errors) == len(texts):
        raise errors[0]
    return _numbered(_with_common_base(variants, base))


def _with_common_base(variants: list[Variant], base: str | None) -> list[Variant]:
    """The variants, `base` among them standing on the common base."""
    common = base or next((v.base for v in variants if v.adapter and v.base), None)
    if common is None and any(v.base is None and not v.problem for v in variants):
        raise ConfigError("It is not known which model 'base' means.", "give --base, or an adapter among the variants.")
    return [replace(variant, base=variant.base or common) for variant in variants]


def _numbered(variants: list[Variant]) -> list[Variant]:
    """The variants with "(2)", "(3)", ... behind labels that come again."""
    seen: Counter[str] = Counter()
    result = []
    for variant in variants:
        seen[variant.label] += 1
        count = seen[variant.label]
        result.append(variant if count == 1 else replace(variant, label=f"{variant.label} ({count})"))
    return result


def short_names(labels: Iterable[str]) -> dict[str, str]:
    """{label: what people read in its place}: of a folder its last part, `~/...` where two would read alike."""
    short = {label: _last_part(label) for label in labels}
    shared = Counter([*short.values(), *({BASE, "demo"} - short.keys())])
    return {label: name if shared[name] == 1 else _from_home(label) for label, name in short.items()}


def _last_part(label: str) -> str:
    start, path = (f"{FUSE}:", label[len(FUSE) + 1 :]) if label.startswith(f"{FUSE}:") else ("", label)
    is_folder = paths.is_path(path) or path.partition("@")[0].count("/") > 1
    return start + re.sub(r".*/(?=[^/\s])", "", path).rstrip("/") if is_folder else label


def _from_home(label: str) -> str:
    home = f"{Path.home()}/"
    return label.replace(home, "~/", 1) if label.removeprefix(f"{FUSE}:").startswith(home) else label


def _with_base(variant: Variant, base: str | None) -> Variant:
    if variant.adapter is None or variant.base is not None:
        return variant
    if base is not None:
        return replace(variant, base=base)
    from mlx_adapters.models.adapter import weights_file

    folder, iteration = locate(variant.adapter)
    weights_file(folder, iteration)  # says what is missing
    name = base_of(read_metadata(folder)).get("name")
    require(bool(name), f"Adapter '{variant.label}' does not say what base it was made for.", "give --base.")
    return replace(variant, base=name)


def read_variants(
    given: "AdapterOrBase | Iterable[AdapterOrBase]", base: "BaseLike | None", folder: Path, on_event: OnEvent
) -> list[Variant]:
    """`parse_variants` of what Python's functions take; an adapter that no file holds as it is, is written into
    `folder`. Adapters that do not stand on the first one's base are told."""
    from mlx_adapters.models.adapter import AdapterOrBase

    several = [given] if isinstance(given, AdapterOrBase) else given
    texts = [_spelled(variant, folder / f"{number}") for number, variant in enumerate(several)]
    variants = parse_variants(texts, None if base is None else base_name(base))
    adapted = [variant for variant in variants if variant.adapter and not variant.problem]
    for other in (variant for variant in adapted if variant.base != adapted[0].base):
        on_event(
            Note(f"'{other.label}' stands on '{other.base}', '{adapted[0].label}' on '{adapted[0].base}'.", "warning")
        )
    return variants


def _spelled(variant: "AdapterOrBase", folder: Path) -> str | Variant:
    from mlx_adapters.models.adapter import Adapter, place_of, write_adapter

    if isinstance(variant, Adapter) and not place_of(variant):
        return Variant(_text_of(variant), adapter=str(write_adapter(variant, folder)))
    return variant if isinstance(variant, str) else _text_of(variant)


def _text_of(variant: "AdapterOrBase") -> str:
    """How a variant is spelled, and what it is called where it is in memory only."""
    from mlx_adapters.models.adapter import Adapter, place_of
    from mlx_adapters.models.base import Base

    if isinstance(variant, Adapter):
        return place_of(variant) or (f"{variant.name} (in memory)" if variant.metadata.get("name") else variant.name)
    if isinstance(variant, Base):
        return variant.name
    loaded = isinstance(getattr(variant, "base", None), Base)
    require(not loaded, "A loaded model is no variant.", "give its base (model.base) and its adapter, one by one.")
    return lookup.spelled(variant)


def trained_on(variants: Iterable[Variant]) -> DataConfig:
    """How the first adapter among them read its rows, as evaluating does; the defaults, if there is none."""
    adapter = next((v.adapter for v in variants if v.adapter and not v.problem), None)
    with contextlib.suppress(AdapterError):  # it will be said of the variant
        return data_config(read_metadata(locate(adapter)[0])) if adapter else DataConfig()
    return DataConfig()


def label_of(variant: "AdapterOrBase", labels: Iterable[str]) -> str:
    """The one of `labels` that a variant stands behind, in whatever form it is given; else its own text."""
    text = _text_of(variant)
    known = [label for label in labels if label in (variant, text)]
    known += [label for label in labels if _folder_of(label) == _folder_of(text) is not None]
    return known[0] if known else text


def _folder_of(text: str) -> Path | None:
    place = lookup.spelled(text)
    return paths.expanded(place) if paths.is_path(place) else None


def prepare(variant: Variant, folder: Path, any_base: bool, on_event: OnEvent) -> Variant:
    """The variant ready to load: fused into `folder` if it asks for that. What fails becomes its `problem`."""
    if not variant.problem and variant.fuse_bits is not None:
        from mlx_adapters.fusion.fuse import fuse

        bits, out = variant.fuse_bits, folder / variant.label.replace(":", "-").replace("/", "-")
        on_event(Note(f"Fusing {variant.adapter} for '{variant.label}' ..."))
        try:
            if not out.is_dir():
                precision = Precision.spelled(bits)
                told = without_notes(on_event)
                fuse(variant.base, variant.adapter or "", out, quantization=precision, any_base=any_base, on_event=told)
            variant = replace(variant, base=str(out), adapter=None)
        except AdapterError as error:
            variant = replace(variant, problem=error.with_hint)
    if variant.problem:
        on_event(Note(f"'{variant.label}' is left out: {variant.problem}", "warning"))
    return variant


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for jobs and fused models, gone afterward; in the home folder, where large models have room."""
    with files.draft_beside(paths.home() / "workspace") as folder:
        yield folder
