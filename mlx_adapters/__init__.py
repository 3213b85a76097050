"""Train, own, fuse, measure, serve and publish LoRA adapters on MLX.

Public names load on first use, so importing the package is instant. On Linux the import also sees to it that
MLX gets a fast BLAS if there is one, and everywhere that its float32 products are float32 (see `blas`).
"""

from mlx_adapters.blas import keep_float32, load_before_mlx

__version__ = "0.1.0"

# Public name -> the module it lives in.
_PUBLIC = {
    "Adapter": "adapter",
    "AdapterConfig": "adapter",
    "read_adapter": "adapter",
    "write_adapter": "adapter",
    "LoraConfig": "config",
    "Quantization": "config",
    "TrainConfig": "config",
    "TrainRun": "training.runs",
    "train": "training.runs",
    "estimate": "training.memory",
    "check_data": "training.checking",
    "split_data": "training.checking",
    "Model": "model",
    "Generation": "model",
    "LiveModel": "runtime.live",
    "load_model": "runtime.live",
    "fuse": "fusion.fuse",
    "benchmark": "benchmarking.run",
    "advise": "benchmarking.advice",
    "estimate_inference": "benchmarking.forecast",
    "evaluate": "evaluation.evaluate",
    "run_tasks": "evaluation.harness",
    "EvaluationConfig": "evaluation.evaluate",
    "BenchmarkConfig": "benchmarking.plan",
    "read_report": "benchmarking.report",
    "fuse_again": "fusion.fuse",
    "FuseOptions": "fusion.options",
    "FuseResult": "fusion.result",
    "check_fused": "fusion.check",
    "load_adapter": "registry",
    "list_adapters": "registry",
    "import_peft": "peft_format",
    "export_peft": "peft_format",
    "PeftExport": "peft_format",
    "fuse_peft": "peft_format.fusing",
    "describe": "inspecting",
    "compare": "inspecting",
    "verify": "verifying",
    "verify_all": "verifying",
    "rename": "housekeeping",
    "tag": "housekeeping",
    "use": "housekeeping",
    "remove": "housekeeping",
    "prune": "housekeeping",
    "pack": "packing",
    "add": "packing",
    "merge": "merging.recipes",
    "subtract": "merging.recipes",
    "scale": "merging.recipes",
    "interpolate": "merging.recipes",
    "extract": "merging.extraction",
    "environment": "machine",
    "progress_bar": "display",
    "publish": "hub.uploads",
    "download": "hub.downloads",
    "make_card": "hub.uploads",
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
