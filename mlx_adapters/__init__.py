"""Train, own, fuse, measure, serve and publish LoRA adapters on MLX.

Public names load on first use, so importing the package is instant. On Linux the import also sees to it that
MLX gets a fast BLAS if there is one, and everywhere that its float32 products are float32 (see `blas`).
"""

from mlx_adapters.system.blas import keep_float32, load_before_mlx

TYPE_CHECKING = False  # type checkers take it for `typing`'s, whose import costs more than all the rest here
if TYPE_CHECKING:  # what editors and type checkers read
    from mlx_adapters.adapters.adding import add as add
    from mlx_adapters.adapters.inspecting import compare as compare
    from mlx_adapters.adapters.inspecting import describe as describe
    from mlx_adapters.adapters.keeping import prune as prune
    from mlx_adapters.adapters.keeping import remove as remove
    from mlx_adapters.adapters.keeping import rename as rename
    from mlx_adapters.adapters.keeping import tag as tag
    from mlx_adapters.adapters.keeping import use as use
    from mlx_adapters.adapters.packing import pack as pack
    from mlx_adapters.adapters.peft_export import PeftExport as PeftExport
    from mlx_adapters.adapters.peft_export import export_peft as export_peft
    from mlx_adapters.adapters.peft_import import import_peft as import_peft
    from mlx_adapters.adapters.verifying import verify as verify
    from mlx_adapters.adapters.verifying import verify_all as verify_all
    from mlx_adapters.benchmarking.advice import advise as advise
    from mlx_adapters.benchmarking.reports import read_report as read_report
    from mlx_adapters.benchmarking.run import BenchmarkInterrupted as BenchmarkInterrupted
    from mlx_adapters.benchmarking.run import benchmark as benchmark
    from mlx_adapters.benchmarking.schedule import BenchmarkConfig as BenchmarkConfig
    from mlx_adapters.config.data import DataConfig as DataConfig
    from mlx_adapters.config.data import TemplateConfig as TemplateConfig
    from mlx_adapters.config.evaluating import EvaluationConfig as EvaluationConfig
    from mlx_adapters.config.fusing import FuseOptions as FuseOptions
    from mlx_adapters.config.quantization import CacheQuantization as CacheQuantization
    from mlx_adapters.config.quantization import Quantization as Quantization
    from mlx_adapters.config.sampling import Drafting as Drafting
    from mlx_adapters.config.sampling import Sampling as Sampling
    from mlx_adapters.config.training import DPO as DPO
    from mlx_adapters.config.training import KTO as KTO
    from mlx_adapters.config.training import ORPO as ORPO
    from mlx_adapters.config.training import SFT as SFT
    from mlx_adapters.config.training import LoraConfig as LoraConfig
    from mlx_adapters.config.training import SimPO as SimPO
    from mlx_adapters.config.training import TrainConfig as TrainConfig
    from mlx_adapters.data.checking import check_data as check_data
    from mlx_adapters.data.checking import split_data as split_data
    from mlx_adapters.demo.catalog import write_demo_data as write_demo_data
    from mlx_adapters.display.notebook import progress_bar as progress_bar
    from mlx_adapters.errors import AdapterError as AdapterError
    from mlx_adapters.errors import ConfigError as ConfigError
    from mlx_adapters.errors import ExistsError as ExistsError
    from mlx_adapters.errors import FidelityError as FidelityError
    from mlx_adapters.errors import FormatError as FormatError
    from mlx_adapters.errors import HubError as HubError
    from mlx_adapters.errors import IncompatibleError as IncompatibleError
    from mlx_adapters.errors import ModelError as ModelError
    from mlx_adapters.errors import NotFoundError as NotFoundError
    from mlx_adapters.errors import StorageError as StorageError
    from mlx_adapters.errors import TrainingError as TrainingError
    from mlx_adapters.evaluation.evaluate import evaluate as evaluate
    from mlx_adapters.evaluation.harness import run_tasks as run_tasks
    from mlx_adapters.events import CheckpointSaved as CheckpointSaved
    from mlx_adapters.events import Event as Event
    from mlx_adapters.events import Note as Note
    from mlx_adapters.events import Progress as Progress
    from mlx_adapters.events import Stop as Stop
    from mlx_adapters.events import TrainReport as TrainReport
    from mlx_adapters.events import ValidationReport as ValidationReport
    from mlx_adapters.fusion.check import check_fused as check_fused
    from mlx_adapters.fusion.fuse import fuse as fuse
    from mlx_adapters.fusion.fuse import fuse_again as fuse_again
    from mlx_adapters.fusion.peft import fuse_peft as fuse_peft
    from mlx_adapters.fusion.result import FuseResult as FuseResult
    from mlx_adapters.generation.decoding import Generation as Generation
    from mlx_adapters.generation.decoding import Response as Response
    from mlx_adapters.generation.live import LiveModel as LiveModel
    from mlx_adapters.generation.live import load_model as load_model
    from mlx_adapters.generation.memory import KnownModel as KnownModel
    from mlx_adapters.generation.memory import estimate_inference as estimate_inference
    from mlx_adapters.generation.memory import known_models as known_models
    from mlx_adapters.generation.wrapping import wrap_model as wrap_model
    from mlx_adapters.merging.extraction import extract as extract
    from mlx_adapters.merging.recipes import interpolate as interpolate
    from mlx_adapters.merging.recipes import merge as merge
    from mlx_adapters.merging.recipes import scale as scale
    from mlx_adapters.merging.recipes import subtract as subtract
    from mlx_adapters.models.adapter import Adapter as Adapter
    from mlx_adapters.models.adapter import read_adapter as read_adapter
    from mlx_adapters.models.adapter import write_adapter as write_adapter
    from mlx_adapters.models.metadata import AdapterConfig as AdapterConfig
    from mlx_adapters.models.model import Model as Model
    from mlx_adapters.publishing.uploads import make_card as make_card
    from mlx_adapters.publishing.uploads import publish as publish
    from mlx_adapters.sources.downloads import download as download
    from mlx_adapters.sources.lookup import load_adapter as load_adapter
    from mlx_adapters.sources.registry import list_adapters as list_adapters
    from mlx_adapters.system.door import trusting_remote_code as trusting_remote_code
    from mlx_adapters.system.machine import environment as environment
    from mlx_adapters.training.forecast import estimate as estimate
    from mlx_adapters.training.runs import plan_training as plan_training
    from mlx_adapters.training.runs import train as train
    from mlx_adapters.training.state import TrainPlan as TrainPlan
    from mlx_adapters.training.state import TrainRun as TrainRun

__version__ = "0.2.0"

# Public name -> the module it lives in.
_PUBLIC = {
    "Adapter": "models.adapter",
    "AdapterConfig": "models.metadata",
    "read_adapter": "models.adapter",
    "write_adapter": "models.adapter",
    "DataConfig": "config.data",
    "LoraConfig": "config.training",
    "TemplateConfig": "config.data",
    "Quantization": "config.quantization",
    "TrainConfig": "config.training",
    "SFT": "config.training",
    "DPO": "config.training",
    "ORPO": "config.training",
    "SimPO": "config.training",
    "KTO": "config.training",
    "TrainPlan": "training.state",
    "TrainRun": "training.state",
    "plan_training": "training.runs",
    "train": "training.runs",
    "Stop": "events",
    "Event": "events",
    "Progress": "events",
    "Note": "events",
    "TrainReport": "events",
    "ValidationReport": "events",
    "CheckpointSaved": "events",
    "estimate": "training.forecast",
    "check_data": "data.checking",
    "split_data": "data.checking",
    "write_demo_data": "demo.catalog",
    "Model": "models.model",
    "Generation": "generation.decoding",
    "Response": "generation.decoding",
    "CacheQuantization": "config.quantization",
    "Drafting": "config.sampling",
    "Sampling": "config.sampling",
    "LiveModel": "generation.live",
    "load_model": "generation.live",
    "wrap_model": "generation.wrapping",
    "fuse": "fusion.fuse",
    "benchmark": "benchmarking.run",
    "BenchmarkInterrupted": "benchmarking.run",
    "advise": "benchmarking.advice",
    "estimate_inference": "generation.memory",
    "KnownModel": "generation.memory",
    "known_models": "generation.memory",
    "evaluate": "evaluation.evaluate",
    "run_tasks": "evaluation.harness",
    "EvaluationConfig": "config.evaluating",
    "BenchmarkConfig": "benchmarking.schedule",
    "read_report": "benchmarking.reports",
    "fuse_again": "fusion.fuse",
    "FuseOptions": "config.fusing",
    "FuseResult": "fusion.result",
    "check_fused": "fusion.check",
    "load_adapter": "sources.lookup",
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
    "add": "adapters.adding",
    "merge": "merging.recipes",
    "subtract": "merging.recipes",
    "scale": "merging.recipes",
    "interpolate": "merging.recipes",
    "extract": "merging.extraction",
    "environment": "system.machine",
    "trusting_remote_code": "system.door",
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


if not TYPE_CHECKING:  # to a type checker there are the names above and no others

    def __getattr__(name: str) -> object:
        import importlib

        if name not in _PUBLIC:
            raise AttributeError(f"module 'mlx_adapters' has no attribute '{name}'")
        value = getattr(importlib.import_module(f"mlx_adapters.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
