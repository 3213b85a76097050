"""Write an adapter as a folder that `PeftModel.from_pretrained` loads."""

from dataclasses import dataclass
from pathlib import Path

from mlx_adapters.checkpoints.originals import layout_of
from mlx_adapters.errors import HubError, NotFoundError
from mlx_adapters.events import Note, OnEvent, log_warnings
from mlx_adapters.models.adapter import Adapter, AdapterLike, template_of
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.layers import SWITCH, adaptable_layers, check_fits, tied
from mlx_adapters.models.loading import load_module
from mlx_adapters.models.metadata import base_of
from mlx_adapters.peft_format.own_form import Facts
from mlx_adapters.peft_format.to_peft import to_peft
from mlx_adapters.sources import lookup, references, registry
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.demo_base import DEMO_BASE
from mlx_adapters.storage import files, paths, replacing, tensor_files, tensor_names
from mlx_adapters.storage.hf_names import EMBEDDINGS, PEFT_OUTPUT, PEFT_SCALE, PEFT_WEIGHTS_FILE, TEMPLATE_FILE
from mlx_adapters.storage.replacing import stamp
from mlx_adapters.storage.tensor_names import CONFIG_FILE

NAME_BASE = "name the base it was trained on with --base."
OWN_NUMBERS = (
    "The adapter started as what its base's quantization lost (LoftQ): PEFT computes the same on the base's own "
    "numbers, which 'mlx_lm.convert --dequantize' writes, and another function on the original's."
)
README = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- {kind}
---

# {name}

A {kind} adapter of rank {rank} for `{base}`, converted from MLX by mlx_adapters.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


@dataclass(frozen=True)
class PeftExport:
    """What was written.

    Args:
        folder: where it lies.
        tensors: how many.
        size_bytes: of their file.
        base_model: the one it names.

    Example:
        >>> export = ma.export_peft("sql", "out/exported")
        >>> export.folder.name, export.size_bytes > 0
        ('exported', True)
    """

    folder: Path
    tensors: int
    size_bytes: int
    base_model: str

    @property
    def reference(self) -> str:
        """How it is spelled where PEFT's adapters are asked for."""
        return str(self.folder)


def export_peft(
    adapter: AdapterLike,
    out: str | Path,
    *,
    base_model: str | None = None,
    base: BaseLike | None = None,
    overwrite: bool = False,
    on_event: OnEvent = log_warnings,
) -> PeftExport:
    """Write an adapter as a PEFT folder, whole or not at all.

    Args:
        adapter: what `load_adapter` takes.
        out: the folder to make.
        base_model: the transformers model to name in it; None: the one it was trained on in PEFT, else its MLX base.
        base: the MLX base, of which names are read unless the adapter came from PEFT; None: the adapter's own, if it is
            on this machine.
        overwrite: replace an earlier export in `out`.
        on_event: called with progress and notes.

    Raises FormatError for what PEFT cannot express, ExistsError, NotFoundError or StorageError.

    Example:
        >>> ma.export_peft("sql", "out/peft", base_model="HuggingFaceTB/SmolLM2-135M-Instruct").tensors
        4
    """
    out = paths.expanded(out)
    replacing.refuse_existing(out, overwrite, PEFT_OUTPUT)
    loaded = lookup.load_adapter(adapter)
    replacing.refuse_reading_inside(out, [loaded, None if base is None else registry.base_name(base)])
    form = to_peft(loaded, lambda: _facts(loaded, base))
    named = base_model or form.config.get("base_model_name_or_path")
    form.config["base_model_name_or_path"] = named
    readme = README.format(base=named or "unknown", kind=loaded.config.type, name=loaded.name, rank=loaded.config.rank)
    with files.atomic_folder(out, overwrite, PEFT_OUTPUT) as temporary:
        scale = {PEFT_SCALE: repr(loaded.config.scale)} if not form.config.get("alpha_pattern") else {}
        tensor_files.write_safetensors(temporary / PEFT_WEIGHTS_FILE, form.tensors, {"format": "pt"} | scale)
        files.write_json(temporary / CONFIG_FILE, form.config)
        if (own := template_of(loaded).chat_template) is not None:
            files.write_text(temporary / TEMPLATE_FILE, own)
        files.write_text(temporary / "README.md", f"{readme}\n{stamp(readme)}\n")
    if not base_model and (problem := _base_problem(loaded, named)):
        name_it = "Name the original model: --base-model user/name."
        on_event(Note(f"PEFT cannot load it yet: {problem}. {name_it}", "warning"))
    if loaded.metadata.get("init") == "loftq":
        on_event(Note(OWN_NUMBERS, "warning"))
    return PeftExport(out, len(form.tensors), paths.size_on_disk(out), str(named))


def _base_problem(adapter: Adapter, named: str | None) -> str:
    """What keeps transformers from loading the base that the folder names; "" for nothing that is known here."""
    if not named:
        return "the adapter names no base model"
    if not references.hub_id(named):
        return f"its base is named '{named}', which is known to this machine only"
    if "peft" not in adapter.metadata and base_of(adapter.metadata).get("quantization"):
        return f"its base '{named}' is quantized for MLX"
    return ""


def _facts(adapter: Adapter, base: BaseLike | None) -> Facts:
    """What the base tells. Raises NotFoundError if it is not on this machine."""
    name = base or base_of(adapter.metadata).get("name")
    if name is None:
        raise NotFoundError("The adapter does not say what base it is for.", NAME_BASE)
    try:
        resolved = resolve_base(name, download=base is not None or name == DEMO_BASE)
    except (NotFoundError, HubError) as error:
        raise NotFoundError(f"PEFT's names are read off the adapter's base. {error.message}", NAME_BASE) from error
    module = load_module(resolved)[0]
    embeddings = any(tensor_names.split(key)[1] in EMBEDDINGS for key in adapter.config.keys)
    layers = adaptable_layers(module)
    check_fits(adapter, layers, f"'{resolved.name}'")
    experts = any(isinstance(layer, SWITCH) for layer in layers.values())
    from transformers import CONFIG_MAPPING  # late: it takes a second

    kind, layout = resolved.config.get("model_type"), layout_of(resolved, module)
    return Facts(kind, embeddings and tied(layers), experts, layout, kind in CONFIG_MAPPING)
