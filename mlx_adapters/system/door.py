"""The door to mlx-lm: the one place that imports it, says which parts we rely on and checks that they are there.

Importing mlx-lm sets the process's limit of open files; it is raised here instead. Everything else in this package
imports these names from here.
"""

import contextlib
import importlib
import importlib.util
import inspect
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jinja2 import Template, TemplateSyntaxError

from mlx_adapters.errors import ModelError
from mlx_adapters.storage.paths import glob_there
from mlx_adapters.system.gpu_kernels import bounded_sqrt, cumsum
from mlx_adapters.system.limits import raise_open_files
from mlx_adapters.system.templates import Bounded, template_in

TESTED = "0.32"
FP8_SCALES = "weight_scale_inv"  # the leaf of such a checkpoint's tensors


@contextlib.contextmanager
def _unchanged_limits() -> Iterator[None]:
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


@contextlib.contextmanager
def _without_reporting() -> Iterator[None]:
    """mlx-lm's trainer imports services that its users may have, and a broken one would break everything here."""
    absent = [name for name in ("wandb", "swanlab") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: not to be imported
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


try:
    with _unchanged_limits(), _without_reporting(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlx.core as mx
        import mlx.nn as nn
        from mlx_lm import utils as mlx_lm_utils
        from mlx_lm.convert import mixed_quant_predicate_builder
        from mlx_lm.generate import TextStateMachine, generate_step, make_text_state_machine
        from mlx_lm.models import base as attention
        from mlx_lm.models import gated_delta, recurrent_gemma, ssm
        from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache
        from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP
        from mlx_lm.tokenizer_utils import TokenizerWrapper, _infer_tool_parser
        from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
        from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
        from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS, _get_classes, load_config, load_model
        from transformers.utils import chat_template_utils
except ImportError as error:
    raise ModelError(
        f"mlx and mlx-lm {TESTED}.x are needed, but importing them failed: {error}.",
        f'run \'pip install "mlx-lm=={TESTED}.*"\' (on Linux also "mlx[cpu]=={TESTED}.*" or "mlx[cuda13]").',
    ) from error


def _check() -> None:
    for package in ("mlx", "mlx-lm"):
        if not version(package).startswith(TESTED + "."):
            raise ModelError(
                f"This version works with {package} {TESTED}.x, but {version(package)} is installed.",
                f"run 'pip install \"{package}=={TESTED}.*\"'.",
            )
    relied_on = {
        load_model: ("lazy", "strict", "model_config", "trust_remote_code"),
        mlx_lm_utils.load_tokenizer: ("tokenizer_config_extra", "eos_token_ids"),
        **{kind.from_base: ("r", "scale", "dropout") for kind in (LoRALinear, DoRALinear, LoRAEmbedding)},
        LoRASwitchLinear.from_base: ("r", "scale", "dropout"),
        attention.quantized_scaled_dot_product_attention: ("q_keys", "q_values", "scale", "mask", "group_size", "bits"),
        generate_step: ("prompt", "max_tokens", "sampler", "logits_processors", "prompt_cache"),
    }
    for function, names in relied_on.items():
        if missing := set(names) - set(inspect.signature(function).parameters):
            raise ModelError(
                f"mlx-lm {version('mlx-lm')} changed '{function.__qualname__}': no parameter {sorted(missing)}.",
                f"install the tested version: 'pip install \"mlx-lm=={TESTED}.2\"'.",
            )
    if not {"ImmutableSandboxedEnvironment", "_compile_jinja_template"} <= vars(chat_template_utils).keys():
        raise ModelError(
            f"transformers {version('transformers')} renders chat templates in a way that is not known here.",
            "install an older one: 'pip install \"transformers<6\"'.",
        )


_load: Callable[..., Any] = mx.load
loads_noted_by: ContextVar[Callable[[Any, Any], None]] = ContextVar("loads_noted_by", default=lambda file, arrays: None)


def _noted_load(file: Any, *arguments: Any, **options: Any) -> Any:
    """`mx.load`, whose arrays are told to `loads_noted_by`; mlx-lm's own calls of it, too."""
    arrays = _load(file, *arguments, **options)
    loads_noted_by.get()(file, arrays)
    return arrays


_check()
raise_open_files()
mx.cumsum, mx.load, mlx_lm_utils.glob = cumsum, _noted_load, SimpleNamespace(glob=glob_there)  # type: ignore[attr-defined]
recurrent_gemma.mx = SimpleNamespace(**vars(mx) | {"sqrt": bounded_sqrt})  # of 1 - a², which may be 0
chat_template_utils.ImmutableSandboxedEnvironment = Bounded  # the sandbox of chat templates, with limits

_trusting: ContextVar[bool] = ContextVar("trusting_remote_code", default=False)
TRUST_IT = "read that code, and pass --trust-remote-code to run it (in Python: 'with ma.trusting_remote_code():')."


def trusts_remote_code() -> bool:
    """Whether such code is run now."""
    return _trusting.get()


@contextlib.contextmanager
def trusting_remote_code(trust: bool = True) -> Iterator[None]:
    """Within the block, code that a model's folder brings along is run: its `model_file`, its tokenizer's `auto_map`.

    No setting in a file turns this on. That code can do whatever you can; read it first.

    Args:
        trust: False forbids it again.

    Example:
        >>> with ma.trusting_remote_code():
        ...     model = ma.load_model("demo")
    """
    token = _trusting.set(trust)
    try:
        yield
    finally:
        _trusting.reset(token)


def load_mlx_model(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's module with lazy weights, and its config."""
    module, config = load_model(folder, lazy=True, model_config=config, trust_remote_code=trusts_remote_code())
    _complete(module)
    return module, config


def _complete(module: nn.Module) -> None:
    """Give the parts of a model whose code forgot `nn.Module.__init__` what that sets (RecurrentGemma)."""
    for part in module.modules():
        if "_no_grad" not in vars(part):
            vars(part).update(vars(nn.Module()) | vars(part))


def load_tokenizer(folder: Path, eos_token_ids: Any, chat_template: str | None = None) -> TokenizerWrapper:
    """The folder's tokenizer, with another chat template if one is given. Raises jinja2.TemplateSyntaxError for it.

    Its own are one text: mlx-lm looks for tool calls in no others, and reads none that a processor has alone.
    Without being told, transformers asks on stdin whether to run code of the folder's.
    """
    extra: dict[str, Any] = {"trust_remote_code": trusts_remote_code()}
    if chat_template is not None:
        compile_chat_template(chat_template)
        extra["chat_template"] = chat_template
    tokenizer = mlx_lm_utils.load_tokenizer(folder, extra, eos_token_ids=eos_token_ids)
    if chat_template is not None:
        tokenizer._chat_template = None  # mlx-lm's own code for a kind of model would come first
    elif tokenizer._chat_template is None and not isinstance(tokenizer.chat_template, str):
        with contextlib.suppress(TemplateSyntaxError):  # it is told when it is used
            return load_tokenizer(folder, eos_token_ids, own) if (own := template_in(folder)) else tokenizer
    return tokenizer


@dataclass(frozen=True)
class ToolParser:
    """mlx-lm's parser of one model's tool calls: `parse(text, tools)` reads what is between `start` and `end`.

    It gives {"name", "arguments"} or a list of these, and raises what it likes. `end` "": the end of the answer.
    """

    start: str
    end: str
    parse: Callable[[str, Any], Any]


def tool_parser_of(tokenizer: TokenizerWrapper, template: str | None = None) -> ToolParser | None:
    """The parser that mlx-lm chooses for this tokenizer, or would for it with another chat template."""
    if template in (None, tokenizer.chat_template) and tokenizer.has_tool_calling:
        return ToolParser(tokenizer.tool_call_start, tokenizer.tool_call_end, tokenizer.tool_parser)
    read = tokenizer.chat_template if template is None else template
    name = _infer_tool_parser(SimpleNamespace(chat_template=read, get_vocab=tokenizer.get_vocab))
    if name is None:
        return None
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return ToolParser(module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def compile_chat_template(text: str) -> Template:
    """A chat template as transformers compiles it. Raises jinja2.TemplateSyntaxError."""
    return chat_template_utils._compile_jinja_template(text)


def make_module(config: dict[str, Any], folder: Path = Path()) -> nn.Module:
    """mlx-lm's model of this config, unquantized and with weights that nothing computes until they are read.

    `folder`: where a `model_file` of the config lies.
    """
    file = config.get("model_file")
    model, arguments = _get_classes(config) if file is None else _own_classes(folder / file)
    return model(arguments.from_dict(config))


def _own_classes(file: Path) -> tuple[Any, Any]:
    """(Model, ModelArgs) of a model's own code, as mlx-lm runs it."""
    if not trusts_remote_code():
        raise ValueError(f"'{file.name}' is code of the model's own")
    spec = importlib.util.spec_from_file_location("custom_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model, module.ModelArgs


def fetched_by_mlx_lm(name: str) -> bool:
    """Whether `mlx_lm.load` fetches a file of this name from a repository: what it loads is among those."""
    return any(fnmatch(name, pattern) for pattern in DEFAULT_ALLOW_PATTERNS)


UNNAMED = "what its config does not name (mlx-lm's own settings stand under 'quantization')"


def packed_by(config: Mapping[str, Any]) -> str | None:
    """The program that packed a checkpoint's weights by the word of its config, if mlx-lm does not unpack them.

    mlx-lm passes such checkpoints over in silence until the names of their tensors fit nothing. What it does unpack is
    named in its code: of the loader or, for FP8 in blocks, of the model itself.
    """
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if config.get("quantization") or not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    if method == "fp8":
        blocks = settings.get("scale_fmt") == "ue8m0" and settings.get("weight_block_size") == [32, 32]
        model, _ = _get_classes(dict(config))
        known = blocks or FP8_SCALES in inspect.getsource(inspect.getmodule(model))  # type: ignore[arg-type]
    else:
        known = f'"{method}"' in inspect.getsource(load_model)
    try:  # it reads some of a packer's forms; AWQ packs eight outputs into a number, GPTQ eight inputs
        if method == "compressed-tensors":
            mlx_lm_utils._compressed_tensors_quantization(settings)
        if method in ("awq", "gptq"):
            weight = mx.zeros((8, 1) if method == "awq" else (1, 8), mx.int32)
            one = {"x.qweight": weight, "x.scales": mx.ones((1, 8))}
            mlx_lm_utils._transform_awq_weights(one, {**settings, "group_size": 8})
    except Exception:
        return f"{method} ({settings.get('format', settings.get('bits'))})"
    return None if known else str(method or UNNAMED)


def logits_shape(config: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """(1, 1, vocabulary): the shape of what a model of this config says to one token. Nothing is computed."""
    return tuple(make_module(config, folder)(mx.zeros((1, 1), mx.int32)).shape)


def sanitize_of(module: nn.Module) -> Callable[[dict[str, mx.array]], dict[str, mx.array]]:
    """What mlx-lm makes of a checkpoint's tensors for this model of `make_module`.

    It may be called again: some take layers out of their model.
    """
    if not hasattr(module, "sanitize"):
        return dict
    parts = [(part, dict(part)) for _, part in module.named_modules() if hasattr(part, "sanitize")]

    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        try:
            return module.sanitize(weights)
        finally:
            for part, children in parts:
                dict.update(part, children)

    return sanitize


def harness_model(module: nn.Module, tokenizer: TokenizerWrapper, batch_size: int) -> Any:
    """mlx-lm's model for lm-evaluation-harness, made of a model that is loaded already."""
    with _unchanged_limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlx_lm import evaluate

    load, evaluate.load = evaluate.load, lambda *_, **__: (module, tokenizer)
    try:
        return evaluate.MLXLM("", batch_size=batch_size)
    finally:
        evaluate.load = load


__all__ = [
    "BatchKVCache",
    "DoRAEmbedding",
    "DoRALinear",
    "KVCache",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRASwitchLinear",
    "QuantizedSwitchLinear",
    "SwitchGLU",
    "SwitchLinear",
    "SwitchMLP",
    "TRUST_IT",
    "TextStateMachine",
    "TokenizerWrapper",
    "ToolParser",
    "compile_chat_template",
    "fetched_by_mlx_lm",
    "gated_delta",
    "generate_step",
    "harness_model",
    "load_config",
    "load_mlx_model",
    "load_tokenizer",
    "loads_noted_by",
    "logits_shape",
    "make_module",
    "make_prompt_cache",
    "make_text_state_machine",
    "mixed_quant_predicate_builder",
    "mx",
    "nn",
    "packed_by",
    "sanitize_of",
    "ssm",
    "tool_parser_of",
    "trusting_remote_code",
    "trusts_remote_code",
]
