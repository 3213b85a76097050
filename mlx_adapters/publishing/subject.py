"""What is to be published: an adapter, a PEFT export or a model, and what its files say of it.

Of an adapter only its own files go up. Of a model (and a PEFT export) all goes up that belongs to it (see
`checkpoints.contents`); data, logs, checkpoints and optimizer states stay, each with a reason.
"""

import contextlib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlx_adapters.benchmarking.reports import Report, read_report
from mlx_adapters.checkpoints.contents import MODEL_CONFIG, files_below, sorted_out
from mlx_adapters.errors import AdapterError, ConfigError, NotFoundError
from mlx_adapters.models.adapter import Adapter, AdapterOrBase, place_of, read_adapter, weights_file
from mlx_adapters.models.base import INDEX_FILE, OTHER_FILE, WEIGHT_FILES, Base
from mlx_adapters.models.metadata import RECIPE_KINDS, REPORT_KINDS, fit, read_config, read_metadata
from mlx_adapters.publishing.cleaning import clean
from mlx_adapters.sources.lookup import load_adapter, locate, refuse_full, spelled
from mlx_adapters.sources.references import parse_reference
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.hf_names import PEFT_WEIGHTS_FILE
from mlx_adapters.storage.tensor_names import (
    ADAPTER_FILE,
    CHECKPOINT_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    FUSE_RECIPE_FILE,
    METADATA_FILE,
    REPORT_FILE,
)

GGUF_FILE = "model.gguf"
CHECKPOINT = "other checkpoints; NAME@ITERATION publishes one"
LICENSE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# All that goes up of a folder besides licenses. Of models, and of exports to PEFT, all that belongs to them.
PUBLISHED = {
    "adapter": (ADAPTER_FILE, CONFIG_FILE, METADATA_FILE),
    "peft": (PEFT_WEIGHTS_FILE, CONFIG_FILE),
    "model": (MODEL_CONFIG, WEIGHT_FILES, OTHER_FILE, INDEX_FILE, FUSE_RECIPE_FILE, REPORT_FILE),
    "gguf": (GGUF_FILE, FUSE_RECIPE_FILE, REPORT_FILE),
}
REQUIRED = {
    "adapter": (ADAPTER_FILE, CONFIG_FILE),
    "peft": (PEFT_WEIGHTS_FILE, CONFIG_FILE),
    "model": ("config.json",),
    "gguf": (GGUF_FILE,),
}
Kind = Literal["adapter", "peft", "model", "gguf"]
Answers = Mapping[str, Mapping[str, str]]  # question -> whose answer -> its text


@dataclass(frozen=True)
class Subject:
    """What is to be published. `sources` maps the name in the repository to the local file, `left_out` the folder's
    other files to the reason; `metadata`, `config`, `recipe` and `report` are cleaned of local paths."""

    kind: Kind
    name: str
    folder: Path
    sources: dict[str, Path]
    left_out: dict[str, str]
    config: dict[str, Any]
    metadata: dict[str, Any]
    recipe: dict[str, Any]
    report: dict[str, Any]
    adapter: Adapter | None = None
    local_base: str | None = None  # the base's name as recorded, which may be a folder of this machine
    fused: Adapter | None = None  # the one adapter that was fused in, if it is still here
    benchmark: Report | None = None
    answers: Answers = field(default_factory=dict)

    @property
    def base(self) -> dict[str, Any]:
        """The base model's record, {} if it is not known."""
        return _base_of(self.metadata, self.recipe, self.config)

    @property
    def is_model(self) -> bool:
        """Whether this is a whole model and not an adapter."""
        return self.kind in ("model", "gguf")

    @property
    def trained(self) -> dict[str, Any]:
        """The metadata of the training: the adapter's own, or that of the adapter in a fused model."""
        return clean(self.fused.metadata) if self.fused else self.metadata

    @property
    def transformers(self) -> bool:
        """Whether this is a model with the tensor names of the original checkpoint (`fuse --format hf`)."""
        return (self.recipe.get("options") or {}).get("format") == "hf"

    @property
    def library(self) -> str:
        """The Hub's library_name."""
        if self.kind in ("peft", "gguf"):
            return self.kind
        return "transformers" if self.transformers else "mlx"

    @property
    def relation(self) -> str | None:
        """The Hub's base_model_relation; None where nothing says what was done to the base."""
        if not self.is_model:
            return "adapter"
        adapters = self.recipe.get("adapters") or []
        return "merge" if len(adapters) > 1 else "finetune" if self.recipe else None

    @property
    def tags(self) -> list[str]:
        """The Hub's tags."""
        kind = self.config.get("fine_tune_type") or ("dora" if self.config.get("use_dora") else "lora")
        kinds = [] if self.is_model else [kind]
        quantization = self.config.get("quantization")
        bits = [f"{quantization['bits']}-bit"] if isinstance(quantization, dict) and "bits" in quantization else []
        return [self.library, "mlx-adapters", *kinds, *bits]

    @property
    def data_name(self) -> str:
        """What the adapter was trained on, for people."""
        return str((self.metadata.get("data") or {}).get("source") or "validation rows")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """[{"data": name, "metrics": {name: number}}]: validation loss, fidelity, and what `eval` saved."""
        evaluations = []
        fidelity, text = self.report.get("fidelity"), self.report.get("text") or {}
        if isinstance(fidelity, dict) and text.get("source"):
            names = {"loss_fused": "loss", "perplexity_fused": "perplexity", "kl_mean": "kl_from_adapter_model"}
            metrics = {name: fidelity[key] for key, name in names.items() if isinstance(fidelity.get(key), float)}
            evaluations.append({"data": str(text["source"]), "metrics": metrics})
        if self.validation_loss is not None:
            evaluations.append({"data": self.data_name, "metrics": {"validation_loss": self.validation_loss}})
        return [*evaluations, *self._saved_evaluations()]

    def _saved_evaluations(self) -> list[dict[str, Any]]:
        """Those of the published weights: of the named checkpoint, or of what the bare name means."""
        named = self.adapter.iteration if self.adapter else None
        wanted = {named} if named is not None else {None, self.metadata.get("iteration")}
        saved = self.metadata.get("evaluations") or () if self.kind == "adapter" else ()
        return [
            {**entry, "data": f"{entry['data']} ({entry['split']}, {entry['rows']} rows)"}
            for entry in saved
            if entry.get("iteration") in wanted
        ]

    @property
    def validation_loss(self) -> float | None:
        """That of the published weights: of the best iteration, or of the checkpoint that was named."""
        loss = self.metadata.get("best_validation_loss")
        if self.adapter and self.adapter.iteration is not None:
            checkpoint = (self.metadata.get("checkpoints") or {}).get(str(self.adapter.iteration)) or {}
            loss = checkpoint.get("validation")
        return float(loss) if isinstance(loss, int | float) else None

    def without(self, patterns: Iterable[str]) -> "Subject":
        """Leave out the files that match one of `patterns`. Raises ConfigError for a file that must go up."""
        kept = {name: path for name, path in self.sources.items() if not matches(name, patterns)}
        missing = [name for name in REQUIRED[self.kind] if name not in kept]
        if missing:
            raise ConfigError(
                f"'{missing[0]}' cannot be left out: without it the rest is useless.", "take it off --exclude."
            )
        excluded = dict.fromkeys(sorted(set(self.sources) - set(kept)), "excluded")
        return replace(self, sources=kept, left_out=self.left_out | excluded)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name fits one of the wildcard patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def read_subject(
    source: AdapterOrBase, benchmark: Report | str | Path | None = None, answers: Answers | None = None
) -> Subject:
    """Find what `source` means: an adapter's name, NAME@ITERATION, or the folder of an adapter or a model.

    benchmark: a report that belongs to it, or the file of one (`benchmark --output`). answers: to example questions.
    Raises NotFoundError or FormatError.
    """
    if isinstance(source, Adapter):
        if place_of(source) is None:
            hint = "save it with write_adapter or register first."
            raise NotFoundError(f"No folder holds '{source.name}' as it is in memory.", hint)
        folder, iteration = source.folder, source.iteration
    else:
        refuse_full(source)
        # Nothing is published from the Hub to the Hub: what has a slash is a folder.
        text = source.name if isinstance(source, Base) else spelled(source)
        bare = "/" in text and not paths.is_path(text)
        folder, iteration = locate(f"./{text}" if bare else text)
    if folder is None or not folder.is_dir():
        raise NotFoundError(f"There is no folder '{folder}'.", "'mlx-adapters list' shows the adapters there are.")
    report = read_report(benchmark) if isinstance(benchmark, str | Path) else benchmark
    return replace(_subject(folder, iteration), benchmark=report, answers=answers or {})


def _subject(folder: Path, iteration: int | None) -> Subject:
    kind = _kind_of(folder)
    adapter = read_adapter(folder, iteration) if kind == "adapter" else None
    config = (
        {} if kind == "gguf" else files.read_json(folder / "config.json") if kind == "model" else read_config(folder)
    )
    config = adapter.config.to_mlx_lm(config) if adapter else config  # whatever the year, mlx-lm loads it
    reasons = _why_not(kind, files_below(folder))
    sources = {name: folder / name for name, why in reasons.items() if why is None}
    metadata = adapter.metadata if adapter else read_metadata(folder) if kind == "peft" else {}
    if adapter and iteration is not None:
        sources[ADAPTER_FILE] = weights_file(folder, iteration)
        metadata = metadata | {"iteration": iteration, "sha256": {ADAPTER_FILE: files.sha256(sources[ADAPTER_FILE])}}
    left_out = _left_out(reasons)
    name = adapter.name.partition("@")[0] if adapter else folder.name
    recipe, report = (
        fit(files.read_json(folder / file), kinds) if (folder / file).is_file() else {}
        for file, kinds in ((FUSE_RECIPE_FILE, RECIPE_KINDS), (REPORT_FILE, REPORT_KINDS))
    )
    return Subject(
        kind,
        name,
        folder,
        sources,
        left_out,
        clean(config),
        clean(metadata),
        clean(recipe),
        clean(report),
        adapter,
        _base_of(metadata, recipe, config).get("name"),
        _fused_adapter(recipe),
    )


def _why_not(kind: Kind, names: Iterable[str]) -> dict[str, str | None]:
    """Each file of a folder and why it does not go up; None for those that do."""
    reasons = sorted_out(names)
    if kind in ("adapter", "gguf"):
        other = "no part of an adapter" if kind == "adapter" else "no part of a GGUF file"
        reasons = {name: CHECKPOINT if _of_checkpoint(name) else why or other for name, why in reasons.items()}
    own = (*PUBLISHED[kind], *LICENSE_FILES)
    return {name: None if "/" not in name and matches(name, own) else why for name, why in reasons.items()}


def _of_checkpoint(name: str) -> bool:
    return bool(CHECKPOINT_FILE.fullmatch(name)) or name.startswith(f"{CHECKPOINTS_FOLDER}/")


def _left_out(reasons: Mapping[str, str | None]) -> dict[str, str]:
    """What does not go up, and why; a folder of which nothing does is one of them. A card is made anew."""
    kept = {name.partition("/")[0] for name, why in reasons.items() if why is None}
    stays = {name: why for name, why in reasons.items() if why is not None and name != "README.md"}
    return {(name if (top := name.partition("/")[0]) in kept else top): why for name, why in stays.items()}


def _fused_adapter(recipe: Mapping[str, Any]) -> Adapter | None:
    """The adapter that the recipe names, if it is one, still there and still the same."""
    entries = recipe.get("adapters") or []
    reference = entries[0].get("reference") if len(entries) == 1 else None
    with contextlib.suppress(AdapterError):
        if reference and parse_reference(reference).kind != "hub":
            adapter = load_adapter(reference)
            return adapter if adapter.fingerprint == entries[0].get("fingerprint") else None
    return None


def _base_of(metadata: Mapping[str, Any], recipe: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    base = metadata.get("base") or recipe.get("base")
    if isinstance(base, dict):
        return base
    name = config.get("base_model_name_or_path")
    return {"name": name} if isinstance(name, str) and name else {}


def _kind_of(folder: Path) -> Kind:
    if (folder / CONFIG_FILE).is_file():
        return "peft" if "peft_type" in read_config(folder) else "adapter"
    if (folder / GGUF_FILE).is_file():
        return "gguf"
    if (folder / "config.json").is_file():
        return "model"
    raise NotFoundError(
        f"'{folder}' holds neither an adapter nor a model.",
        f"it needs {CONFIG_FILE} with {ADAPTER_FILE}, or config.json with model*.safetensors.",
    )
