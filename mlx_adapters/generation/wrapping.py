"""A model that mlx-lm has loaded, as one of ours: adapters at work in it, and nothing loaded twice."""

from typing import Any

from mlx.utils import tree_flatten

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.generation.live import LiveModel
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.model import Model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage.tensor_names import ADAPTER_LEAVES, split
from mlx_adapters.surgery.caches import compute_as_generated
from mlx_adapters.system.door import TokenizerWrapper, nn


def wrap_model(module: nn.Module, tokenizer: Any, base: BaseLike) -> LiveModel:
    """Put adapters to work in a model that `mlx_lm.load` gave. It stays in the precision that mlx-lm loaded.

    Args:
        module: mlx-lm's model, without adapter layers.
        tokenizer: mlx-lm's or transformers' tokenizer of it.
        base: what it was loaded from: a folder or a Hub id, against which adapters are held.

    Raises NotFoundError, HubError or FormatError for the base; IncompatibleError for a model that has an adapter on
    it; ConfigError for what is no model.

    Example:
        >>> import mlx_lm
        >>> loaded = ma.load_model("demo")
        >>> module, tokenizer = mlx_lm.load(str(loaded.base.folder))[:2]
        >>> model = ma.wrap_model(module, tokenizer, "demo")
        >>> model.attach("sql")
        'sql'
    """
    require(isinstance(module, nn.Module) and hasattr(module, "layers"), "The first argument is no model of mlx-lm.")
    on = [name for name, _ in tree_flatten(module.parameters()) if split(name)[1] in ADAPTER_LEAVES]
    if on:
        raise IncompatibleError(f"The model has an adapter on it ('{on[0]}').", "load it without adapter_path.")
    its_base = resolve_base(base)
    compute_as_generated(module)
    module.eval()
    wrapped = tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)
    return LiveModel(Model(module, wrapped, its_base, its_base.config))
