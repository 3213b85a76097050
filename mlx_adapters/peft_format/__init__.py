"""PEFT adapters in and out: the format of Hugging Face's peft, which most adapters on the Hub are in.

`import_peft` makes an MLX adapter that computes what PEFT computes, or says why there is none; `export_peft`
makes a folder that PEFT loads; `fusing.fuse_peft` fuses even what no MLX adapter can hold. Names of tensors
and modules are spelled in `tensor_names`.
"""

from mlx_adapters.peft_format.exporting import PeftExport, export_peft
from mlx_adapters.peft_format.importing import import_peft

__all__ = ["PeftExport", "export_peft", "import_peft"]
