"""A base model from its folder into memory, in the precision that it computes in.

On a CPU it computes in float32, with quantized layers replaced by dense ones (the same function; MLX's quantized
arithmetic is ten times slower there); on a GPU it stays as stored.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import DTYPES
from mlx_adapters.errors import AdapterError, FormatError, ModelError, refusals
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.models.base import NOT_PACKED, Base
from mlx_adapters.models.dense import (
    compute_dtype,
    dense_class,
    dense_layer,
    dense_weight,
    finer_types,
    first_not_finite,
    is_quantized,
    resize_rows,
    unpack,
)
from mlx_adapters.models.layers import SWITCH, adaptable_layers, named_layers, untie
from mlx_adapters.models.model import Model
from mlx_adapters.models.quantized_check import replace_miscomputed
from mlx_adapters.storage.paths import refuse_pointer
from mlx_adapters.storage.tensor_names import QUANTIZED_LEAVES, WEIGHT, split
from mlx_adapters.surgery.caches import compute_as_generated, trace
from mlx_adapters.surgery.calls import parts
from mlx_adapters.surgery.groups import Origins, reading_into_place
from mlx_adapters.system.door import (
    TRUST_IT,
    load_mlx_model,
    load_tokenizer,
    mx,
    nn,
    trusts_remote_code,
)
from mlx_adapters.system.limits import files_hint, garbage_later, wire_memory
from mlx_adapters.system.machine import on_gpu
from mlx_adapters.templates.habits import check_arguments
from mlx_adapters.threads import end_before_python, overlapping

NOT_ITS_OWN = "are its weights and its config.json of one model? Copy or download both again."
WHOLE_MODEL = "copy or download the whole model."
ROUTED = re.compile(
    r"\w*experts_per_tok\w*|moe_(top_?)?k|top_k(_experts)?"
)  # settings for how many experts a token has


@garbage_later()
def load_model(
    base: Base,
    adapter: Adapter | None = None,
    *,
    dtype: str = "auto",
    dense: bool | None = None,
    any_base: bool = False,
    gradients: bool = False,
    template: TemplateConfig | None = None,
    together: bool | None = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> Model:
    """Load a base model (or a fused folder), with an adapter on it if one is given.

    dtype: "auto" is float32 on a CPU and as stored on a GPU. dense: replace quantized layers by dense ones
    (default: on a CPU). On a GPU, quantized layers that MLX computes wrong there are made dense and named in a
    MiscomputedWarning; with `gradients` also those that it gives wrong gradients. `template`: as for
    `load_tokenizer_of`. `together`: lay the linear layers that share an input below each other as they are read, for
    adapters that are attached later (None: on a GPU). `meanwhile` is called while threads read the weights. Raises
    NotFoundError, HubError, FormatError, ModelError or IncompatibleError.
    """
    require(dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
    together = on_gpu() if together is None else together
    with Origins() as origins:
        module, config = load_module(base)
    unreadable = partial(
        refusals, lambda why: ModelError(f"The weights of '{base.name}' cannot be read: {why}.", WHOLE_MODEL)
    )
    with contextlib.ExitStack() as stack:
        with unreadable():
            set_precision(module, dtype, dense)
            if on_gpu():
                lay_experts_out(module)
            layers = adaptable_layers(module) if together else {}
            finish = stack.enter_context(reading_into_place(module, layers, origins))
        meanwhile()
        tokenizer = load_tokenizer_of(base, template)
        with unreadable():
            groups = finish()
    wrong = set(replace_miscomputed(module, compute_dtype(module), gradients) if on_gpu() else ())
    require_experts(module, base)
    require_numbers(module, base)
    model = Model(module, tokenizer, base, config, template=template or TemplateConfig())
    model.together = {paths: arrays for paths, arrays in groups.items() if wrong.isdisjoint(paths)}
    if adapter is not None:
        model.attach(adapter, any_base)
    return model


def lay_experts_out(module: nn.Module) -> None:
    """Give experts' weights (experts, out, in) rows that lie one after the other, packed ones too.

    Some checkpoints hold them turned: each product would then copy all experts first. Others hold two of them in one
    array: MLX 0.32.4's CUDA build passes over every other half, and takes other experts for those that are meant.
    """
    for _, layer in parts(module):
        if isinstance(layer, SWITCH):
            layer.update({name: mx.contiguous(layer[name]) for name in QUANTIZED_LEAVES if name in layer})


def require_experts(module: nn.Module, base: Base) -> None:
    """Raise ModelError if tokens go to less than one of the experts: mlx-lm's routers would take 0 for all of them."""
    inner = base.config.get("text_config")
    settings = {**base.config, **(inner if isinstance(inner, dict) else {})}
    none = [n for n, value in settings.items() if ROUTED.fullmatch(n) and isinstance(value, int) and value < 1]
    if none and any(isinstance(layer, SWITCH) for _, layer in parts(module)):
        why = f"'{base.name}' sends a token to {settings[none[0]]} experts: '{none[0]}' in its config.json."
        raise ModelError(why, "what does the model's own config.json say? It is at least 1.")


def require_numbers(module: nn.Module, base: Base) -> None:
    """Raise ModelError if the logits of a few tokens are NaN or infinite: so would be all that is made with them."""
    rows = base.vocabulary or 3
    first = rows // 3  # rows that no tokenizer uses lie at the ends
    tokens = mx.arange(first, min(first + 3, rows))[:, None]  # (3, 1): for several in a row CUDA compiles its attention
    logits = np.array(
        module(tokens).astype(mx.float32)
    )  # looked at from the host: a GPU takes longer to get ready for it
    if np.isfinite(logits.max(axis=-1)).all():  # NaN wins; -Inf is a token that is never said
        return
    bad = first_not_finite(dict(tree_flatten(module.parameters())))
    wrong = "is rope_theta, a scale or an epsilon in its config.json wrong?"
    finer = "".join(f" Or try {way}." for way in finer_types(module))
    raise ModelError(
        f"'{base.name}' computes NaN or Inf: " + (f"its '{bad}' holds it." if bad else "its weights are numbers."),
        WHOLE_MODEL if bad else wrong + finer,
    )


def set_precision(module: nn.Module, dtype: str = "auto", dense: bool | None = None) -> None:
    """Give a module the precision that `load_model` promises."""
    if dense if dense is not None else not on_gpu():
        dequantize_layers(module, getattr(mx, "float32" if dtype == "auto" else dtype))
    if dtype != "auto" or not on_gpu():
        module.set_dtype(getattr(mx, "float32" if dtype == "auto" else dtype))


def load_module(base: Base, to_call: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's module with lazy weights, in evaluation mode, and its config. All work with a model begins here.

    Without `to_call` it is for reading its weights: what it needs to compute as it generates is left out.
    """
    wire_memory()
    end_before_python()
    files, config = len(base.weight_files), replace(base, untied=False, rows=None).config

    def refused(why: str) -> AdapterError:
        lacking: list[str] = []
        with contextlib.suppress(AdapterError, OSError):  # what keeps the folder from being read tells less than `why`
            lacking = base.lacking
        why = f"it lacks {', '.join(lacking[:3])}, which its index names" if lacking else why
        packing = config.get("quantization_config") if not config.get("quantization") else None
        packer = packing.get("quant_method") if isinstance(packing, dict) else None
        why = f"its weights, packed by {packer}, are not as mlx-lm reads them ({why})" if packer else why
        own = f"it is code of its own, '{config['model_file']}', that says so." if config.get("model_file") else None
        hint = WHOLE_MODEL if lacking else NOT_PACKED if packer else files_hint(files) or own or NOT_ITS_OWN
        return ModelError(f"mlx-lm cannot load '{base.name}': {why}.", hint)

    with refusals(refused):
        module, config = load_mlx_model(base.folder, config)
        for path, rows in base.appended.items():
            resize_rows(dict(named_layers(module))[path], base.rows or 0, rows)
        if base.untied:
            untie(module)
        if base.parameters:
            _put(module, base.parameters, base.tuned is not None)
        if to_call:
            compute_as_generated(module)
        else:
            trace(module)
    return module, config


def _put(module: nn.Module, parameters: dict[str, mx.array], tuned: bool) -> None:
    """Put these in place of the module's own; where they were trained, in its own types and where it has them."""
    unpack(module, {path for path, leaf in map(split, parameters) if leaf == WEIGHT})
    if tuned:
        own = dict(tree_flatten(module.parameters()))
        for name, array in parameters.items():
            if name not in own or own[name].shape != array.shape:
                raise ValueError(f"its fine-tune has '{name}' {tuple(array.shape)}, which the model has not")
        parameters = {name: array.astype(own[name].dtype) for name, array in parameters.items()}
    module.load_weights(list(parameters.items()), strict=False)


@overlapping
def _quiet() -> Iterator[None]:
    """transformers would say on stderr which of a config's settings it does not know."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load_tokenizer_of(base: Base, template: TemplateConfig | None = None) -> Any:
    """The base's tokenizer, in mlx-lm's wrapper; never from the network.

    With `template`, its chat template is the one named there, and it must know the arguments that are given it. Raises
    FormatError or ConfigError.
    """
    eos, other = base.config.get("eos_token_id"), template.chat_template if template else None
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
        raise FormatError(
            f"eos_token_id of '{base.name}' is {json.dumps(eos)}, which is no token id.",
            "it stands in config.json or generation_config.json: a whole number, or a list of them.",
        )

    def refused(why: str) -> AdapterError:
        if "trust_remote_code" in why:
            return FormatError(
                f"The tokenizer of '{base.name}' is code of its own, which is not run unasked.", TRUST_IT
            )
        for path in base.folder.iterdir():
            refuse_pointer(path)
        again = "copy or download the model's files again."
        try:
            with refusals(ModelError):
                from transformers import AutoConfig  # late: it takes a second

                AutoConfig.from_pretrained(base.tokenizer or base.folder, trust_remote_code=trusts_remote_code())
        except ModelError as error:
            if error.message == why:
                return FormatError(f"transformers cannot read the config.json of '{base.name}': {why}.", again)
        return FormatError(f"The tokenizer of '{base.name}' cannot be loaded: {why}.", again)

    with refusals(refused), _quiet():
        try:
            tokenizer = load_tokenizer(base.tokenizer or base.folder, eos, other)
        except TemplateSyntaxError as error:
            raise FormatError(
                f"The chat template is not valid, line {error.lineno}: {error.message}",
                "mend it, or name another with --chat-template.",
            ) from None
        tokenizer.encode("What is odd in its settings shows here.")
    # It need not warn about long texts: whoever uses it cuts them where the model's limit asks for it.
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True
    if template:
        check_arguments(tokenizer, template.chat_template_args)
    return tokenizer


def dequantize_layers(module: nn.Module, dtype: mx.Dtype) -> None:
    """Replace every quantized layer by a dense one that computes the same function, one after the other."""
    for path, layer in named_layers(module):
        if is_quantized(layer) and dense_class(layer) is not None:
            dense = dense_layer(layer, dense_weight(layer, dtype))
            mx.eval(dense.parameters())
            module.update_modules(tree_unflatten([(path, dense)]))
