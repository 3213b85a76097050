"""Train, own, fuse, measure, serve and publish LoRA adapters on MLX.

Public names load on first use, so importing the package is instant. On Linux the import also sees to it that
MLX gets a fast BLAS if there is one, and everywhere that its float32 products are float32 (see `blas`).
"""

from mlx_adapters.system.blas import keep_float32, load_before_mlx

__version__ = "0.1.0"

# Public name -> the module it lives in.
_PUBLIC = {
    "Adapter": "models.adapter",
    "AdapterConfig": "models.adapter",
    "read_adapter": "models.adapter",
    "write_adapter": "models.adapter",
    "LoraConfig": "config.training",
    "Quantization": "config.training",
    "TrainConfig": "config.training",
    "TrainRun": "training.runs",
    "train": "training.runs",
    "estimate": "training.forecast",
    "check_data": "data.checking",
    "split_data": "data.checking",
    "Model": "models.model",
    "Generation": "models.model",
    "LiveModel": "generation.live",
    "load_model": "generation.live",
    "fuse": "fusion.fuse",
    "benchmark": "benchmarking.run",
    "advise": "benchmarking.advice",
    "estimate_inference": "generation.memory",
    "evaluate": "evaluation.evaluate",
    "run_tasks": "evaluation.harness",
    "EvaluationConfig": "evaluation.evaluate",
    "BenchmarkConfig": "benchmarking.schedule",
    "read_report": "benchmarking.measurements",
    "fuse_again": "fusion.fuse",
    "FuseOptions": "config.fusing",
    "FuseResult": "fusion.result",
    "check_fused": "fusion.check",
    "load_adapter": "sources.registry",
    "list_adapters": "sources.registry",
    "import_peft": "adapters.peft_import",
    "export_peft": "adapters.peft_export",
    "PeftExport": "adapters.peft_export",
    "fuse_peft": "fusion.peft",
    "describe": "adapters.inspecting",
    "compare": "adapters.inspecting",
    "verify": "adapters.verifying",
    "verify_all": "adapters.verifying",
    "rename": "adapters.keeping",
    "tag": "adapters.keeping",
    "use": "adapters.keeping",
    "remove": "adapters.keeping",
    "prune": "adapters.keeping",
    "pack": "adapters.packing",
    "add": "adapters.packing",
    "merge": "merging.recipes",
    "subtract": "merging.recipes",
    "scale": "merging.recipes",
    "interpolate": "merging.recipes",
    "extract": "merging.extraction",
    "environment": "system.machine",
    "progress_bar": "display.notebook",
    "publish": "publishing.uploads",
    "download": "sources.downloads",
    "make_card": "publishing.uploads",
    "AdapterError": "errors",
    "ConfigError": "errors",
    "NotFoundError": "errors",
    "ExistsError": "errors",
    "FormatError": "errors",
    "IncompatibleError": "errors",
    "FidelityError": "errors",
    "TrainingError": "errors",
    "ModelError": "errors",
    "StorageError": "errors",
    "HubError": "errors",
}

__all__ = [*sorted(_PUBLIC), "__version__"]

load_before_mlx()
keep_float32()


def __getattr__(name: str) -> object:
    import importlib

    if name not in _PUBLIC:
        raise AttributeError(f"module 'mlx_adapters' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"mlx_adapters.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
