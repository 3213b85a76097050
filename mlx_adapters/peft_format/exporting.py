"""Write an adapter as a folder that `PeftModel.from_pretrained` loads."""

from dataclasses import dataclass
from pathlib import Path

from mlx_adapters import files, registry, tensor_names
from mlx_adapters.adapter import Adapter, base_of
from mlx_adapters.events import Note, OnEvent, ignore
from mlx_adapters.layers import adaptable_layers
from mlx_adapters.model import Base, load_module, resolve_base
from mlx_adapters.peft_format.to_mlx import tied
from mlx_adapters.peft_format.to_peft import to_peft
from mlx_adapters.tensor_names import CONFIG_FILE, EMBEDDINGS, PEFT_SCALE, PEFT_WEIGHTS_FILE

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
    """What was written: the folder, its tensors, and the base model it names."""

    folder: Path
    tensors: int
    size_bytes: int
    base_model: str


def export_peft(
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    base_model: str | None = None,
    base: str | Path | Base | None = None,
    overwrite: bool = False,
    on_event: OnEvent = ignore,
) -> PeftExport:
    """Write `adapter` as a PEFT folder, whole or not at all.

    base_model: the transformers model to name in it (default: the one it was trained on in PEFT, else its MLX
    base). base: the MLX base, read only if an embedding is adapted (default: the adapter's own). Raises
    FormatError for what PEFT cannot express, ExistsError, NotFoundError or StorageError.
    """
    out = Path(out).expanduser()
    files.refuse_existing(out, overwrite)
    found = registry.load_adapter(adapter)
    form = to_peft(found, _is_tied(found, base))
    named = base_model or form.config.get("base_model_name_or_path")
    if not named:
        on_event(Note("The adapter names no base model; PEFT needs one: pass --base-model.", "warning"))
    form.config["base_model_name_or_path"] = named
    readme = README.format(base=named or "unknown", kind=found.config.type, name=found.name, rank=found.config.rank)
    with files.atomic_folder(out, overwrite) as temporary:
        scale = {PEFT_SCALE: repr(found.config.scale)} if not form.config.get("alpha_pattern") else {}
        files.write_safetensors(temporary / PEFT_WEIGHTS_FILE, form.tensors, {"format": "pt"} | scale)
        files.write_json(temporary / CONFIG_FILE, form.config)
        files.write_text(temporary / "README.md", readme)
    return PeftExport(out, len(form.tensors), files.size_on_disk(out), str(named))


def _is_tied(adapter: Adapter, base: str | Path | Base | None) -> bool:
    """Whether the base's output layer is its embedding; looked up only if that makes a difference."""
    embeddings = [key for key in adapter.config.keys if tensor_names.split(key)[1] in EMBEDDINGS]
    name = base or base_of(adapter.metadata).get("name")
    if not embeddings or isinstance(adapter.metadata.get("peft"), dict) or name is None:
        return False
    module, _ = load_module(resolve_base(name))
    return tied(adaptable_layers(module))
