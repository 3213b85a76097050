"""A loaded base with any number of adapters: `load_model` gives this.

Everything a `Model` does, and: adapters by name, switching, weighted mixtures, answers that are bound to the
adapter they were begun with, a temporary merge. Threads may share a model: they take turns step by step, and
each answer keeps its own adapter and its own random numbers.
"""

import contextlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting, Sampling, SamplingOptions
from mlx_adapters.config.settings import of_kind
from mlx_adapters.drafting import one_token
from mlx_adapters.drafting.drafts import Drafter, load_drafter
from mlx_adapters.errors import AdapterError, IncompatibleError
from mlx_adapters.generation.batching import texts_of
from mlx_adapters.generation.decoding import Generation, Prompt, PromptCache, Response, decode, gathered, ids_of
from mlx_adapters.generation.requests import Request
from mlx_adapters.generation.sampling import Choose, LogitsProcessor, Sampler, stop_tokens
from mlx_adapters.models.adapter import Adapter, AdapterLike, equal_files, template_of, version_of
from mlx_adapters.models.base import BaseLike
from mlx_adapters.models.layers import check_fits, check_made_for
from mlx_adapters.models.loading import load_model as load_plain_model
from mlx_adapters.models.model import Model
from mlx_adapters.prompt_caches.files import read_cache, write_cache
from mlx_adapters.prompt_caches.layers import count_of, shortened
from mlx_adapters.prompt_caches.quantized import new_layers, reaching, require_quantizable
from mlx_adapters.runtime.attached import Attached, Selection, same
from mlx_adapters.runtime.factors import get_ready
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.lookup import load_adapter, plain
from mlx_adapters.system.door import mx
from mlx_adapters.units import count

log = logging.getLogger("mlx_adapters.generation.live")


@dataclass(frozen=True)
class AdapterInfo:
    """One attached adapter. `weight` is how strongly it is at work, None if it is not."""

    name: str
    type: str
    rank: int
    layers: int
    bytes: int
    weight: float | None


@dataclass(frozen=True)
class _Origin:
    """What an adapter was attached by, and which version of its files was read."""

    reference: str
    any_base: bool
    version: tuple[Any, ...] | None


class LiveModel(Model):
    """A base model that many adapters share: they are attached, put to work, mixed and taken off while it stays loaded.

    `load_model` makes it. Its weights are never changed, so that the base is always back to the bit.

    Args:
        plain: the loaded base.

    Example:
        >>> model = ma.load_model("demo")
        >>> model.attach("sql"), model.attach("chat", use=False)
        ('sql', 'chat')
        >>> model.use({"sql": 0.7, "chat": 0.3})
        >>> with model.using("chat"):
        ...     text = model.generate("List the Physics courses.", max_tokens=8).text
        >>> model.use(None)
    """

    def __init__(self, plain: Model) -> None:
        super().__init__(plain.module, plain.tokenizer, plain.base, plain.config, template=plain.template)
        self.pool = AdapterPool(self.module, together=plain.together)
        self.pool.gone = partial(one_token.forget, self.module)
        self.kv: CacheQuantization | None = None
        self.drafter: Drafter | None = None
        self._origins: dict[str, _Origin] = {}

    def __repr__(self) -> str:
        at_work = ", ".join(f"{one.name}: {one.weight:g}" for one in self.adapters if one.weight is not None) or "none"
        return f"LiveModel({self.base.name!r}, {count(len(self.pool.attached), 'adapter')}, at work: {at_work})"

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """All attached adapters, oldest first."""
        weights = {entry: weight for entry, weight in self.pool.selection}
        return tuple(
            AdapterInfo(entry.name, config.type, config.rank, len(config.keys), entry.nbytes, weights.get(entry))
            for entry in self.pool.attached.values()
            for config in [entry.adapter.config]
        )

    def attach(  # type: ignore[override]
        self, adapter: AdapterLike, any_base: bool = False, *, name: str | None = None, use: bool = True
    ) -> str:
        """Add an adapter and put it to work; its name.

        Args:
            adapter: what `load_adapter` takes.
            any_base: take one that was trained on another base.
            name: what it is called here, in place of an older one of that name; None: its own name, if it has one.
            use: put it to work at once.

        Raises NotFoundError, FormatError or IncompatibleError; then nothing was changed.
        """
        return self._attach(load_adapter(adapter), plain(adapter), any_base, name, use)

    def _attach(self, adapter: Adapter, given: Adapter | str, any_base: bool, name: str | None, use: bool) -> str:
        entry = self._add(adapter, any_base, name, spent=not isinstance(given, Adapter))
        self._origins.pop(entry.name, None)
        if not isinstance(given, Adapter):  # one that was given in memory is what it holds
            self._origins[entry.name] = _Origin(given, any_base, version_of(adapter))
        if use:
            self.pool.select(((entry, 1.0),))
            self.adapter = entry.adapter
        return entry.name

    def _add(self, adapter: Adapter, any_base: bool, name: str | None, spent: bool = False) -> Attached:
        check_fits(adapter, self.pool.layers, f"'{self.base.name}'")
        if not any_base:
            check_made_for(adapter, self.base.name, self.base.fingerprint)
        return self.pool.add(name or self._own_name(adapter), adapter, spent)

    def _own_name(self, adapter: Adapter) -> str:
        """The adapter's name; of one that has none, one that no other has here."""
        if adapter.metadata.get("name") or adapter.folder:
            return adapter.name
        names = [adapter.name, *(f"{adapter.name} ({number + 2})" for number in range(len(self.pool.attached)))]
        return next(name for name in names if name not in self.pool.attached)

    def detach(self, name: str | None = None) -> None:
        """Take an adapter off and forget it. Once all are off, the base is as it was.

        Args:
            name: of an attached adapter; None: all of them.
        """
        for each in [name] if name is not None else list(self.pool.attached):
            self.pool.remove(each)
        self._note_selection()

    def use(self, adapter: str | Mapping[str, float] | None, scale: float = 1.0) -> None:
        """Put attached adapters to work.

        Args:
            adapter: the name of one, names and weights of several ({"a": 0.7, "b": 0.3}), or None: the base alone. One
                that was attached by a reference and replaced since is read anew, and a warning is logged.
            scale: a factor on the whole update.
        """
        with self.pool.lock:
            self._renew(adapter)
            self.pool.select(self.pool.choose(adapter, scale))
            self._note_selection()

    def _renew(self, wanted: str | Mapping[str, float] | None) -> None:
        """Read the adapters anew that were attached by a reference and whose files are others now, and say so."""
        for name in [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, Mapping) else ():
            origin, entry = self._origins.get(name), self.pool.attached.get(name)
            if origin is None or entry is None or version_of(entry.adapter) == origin.version:
                continue
            try:
                loaded = load_adapter(origin.reference)
                renewed = self._add(loaded, origin.any_base, name)
            except AdapterError as error:
                log.warning("'%s' goes on with the weights that were attached. %s", name, error.message)
                continue
            self._origins[name] = replace(origin, version=version_of(loaded))
            if not equal_files(renewed.adapter, entry.adapter):
                log.warning("'%s' was replaced since it was attached: its new weights are read.", name)

    @property
    def own_template(self) -> TemplateConfig:
        """How the adapters at work were trained to see conversations, if all agree."""
        own = [template_of(entry.adapter) for entry, _ in self.pool.selection]
        if not own:
            return self.base.template
        return own[0] if all(one == own[0] for one in own) else TemplateConfig()

    def _note_selection(self) -> None:
        selection = self.pool.selection
        self.adapter = selection[0][0].adapter if len(selection) == 1 else None

    @contextlib.contextmanager
    def using(self, adapter: AdapterLike | Mapping[str, float] | None, scale: float = 1.0) -> Iterator["LiveModel"]:
        """The adapter at work inside the block only.

        Args:
            adapter: as for `use`; one that is not attached yet is attached for the block.
            scale: a factor on the whole update.
        """
        with self.pool.lock:
            temporary = None
            if (isinstance(adapter, str) and adapter in self.pool.attached) or isinstance(adapter, Mapping | None):
                self._renew(adapter)
                chosen = self.pool.choose(adapter, scale)
            else:
                loaded = load_adapter(adapter)
                temporary = self._add(loaded, False, f"{loaded.name} ({len(self.pool.attached)})")
                chosen = ((temporary, scale),)
            try:
                with self.pool.applied(chosen):
                    self._note_selection()
                    yield self
            finally:
                if temporary is not None and temporary.alive:
                    self.pool.remove(temporary.name)
                self._note_selection()

    def fuse_in_place(self, adapter: str | Mapping[str, float], scale: float = 1.0) -> None:
        """Merge attached adapters into dense copies of their layers, for the base's own speed.

        The base is kept beside them, so this costs memory; `unfuse`, or any other choice of adapter, brings
        it back to the bit.

        Args:
            adapter: as for `use`.
            scale: a factor on the whole update.
        """
        self.pool.fuse(self.pool.choose(adapter, scale))
        self._note_selection()

    def unfuse(self) -> None:
        """Undo `fuse_in_place`; the adapters stay at work, beside the base."""
        with self.pool.lock:
            self.pool.unfuse()
            self.pool.select(self.pool.selection)

    def new_layers(self) -> list[Any]:
        """An empty cache of mlx-lm's; with guesses, which are taken back, in few bits from the first token on."""
        return new_layers(self.module, self.kv if self.drafter is None else reaching(self.kv, 1 << 60))

    def new_cache(self) -> PromptCache:
        """An empty cache for `stream(cache=...)`, bound to the adapters that are at work now."""
        return PromptCache(self.new_layers(), self.pool.selection, self.new_layers)

    def going_on(self, cache: PromptCache | None, token_ids: Sequence[int]) -> tuple[PromptCache, Sequence[int]]:
        """What of the cache a prompt can go on from, and the rest of the prompt, one token at least, for `stream`.

        Args:
            cache: of an earlier prompt, or None. One that was made with other adapters is of no use.
            token_ids: the whole prompt.

        Example:
            >>> model = ma.load_model("demo")
            >>> cache, rest = model.going_on(None, model.encode("List the Physics courses."))
            >>> answer = list(model.stream(rest, cache=cache, max_tokens=4))
            >>> cache, rest = model.going_on(cache, [*cache.tokens, *model.encode(" And these?", raw=True)])
        """
        if cache is None or not same(cache.selection, self.pool.selection):
            return self.new_cache(), token_ids
        begun = cache.beginning(token_ids[:-1])
        return begun, token_ids[len(begun.tokens) :]

    def save_cache(self, cache: PromptCache, path: Path | str) -> None:
        """Write a cache to a file in mlx-lm's format, whole or not at all, with what it was made with.

        Args:
            cache: what `stream` filled.
            path: the file, which it replaces.

        Raises StorageError, or FormatError for a model whose caches mlx-lm's format has no place for.
        """
        layers = shortened(cache.layers, len(cache.tokens), self.new_layers) or cache.layers  # without room to grow
        write_cache(Path(path), layers, cache.tokens, self._made_with(cache.selection), str(self.base.folder))

    def load_cache(self, path: Path | str) -> PromptCache:
        """The cache in a file of `save_cache`, for the adapters that are at work now.

        Args:
            path: the file.

        Raises NotFoundError, FormatError; ModelError for a token that the model has not; IncompatibleError if it was
        made with another base, other adapters or in another precision.
        """
        selection = self.pool.selection
        layers, tokens = read_cache(Path(path), self.module, self.kv, self._made_with(selection))
        self.checked_ids(tokens or [0])
        return PromptCache(layers, selection, self.new_layers, tokens)

    def _made_with(self, selection: Selection) -> dict[str, Any]:
        adapters = [[entry.digest(), weight] for entry, weight in selection]
        kv = to_mapping(self.kv) if self.kv else None
        return {"base": self.base.fingerprint, "adapters": adapters, "dtype": str(self.pool.dtype), "kv": kv}

    def logits(self, token_ids: list[int] | mx.array) -> mx.array:
        """What the model expects after each token, evaluated, so that a later switch cannot reach it.

        Args:
            token_ids: as for `Model.logits`, and so are the shapes.

        Raises ModelError as `checked_ids` does.
        """
        with self.pool.lock:
            logits = super().logits(token_ids)
            mx.eval(logits)
            return logits

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        raw: bool = False,
        cache: PromptCache | list[Any] | None = None,
        sampler: Choose | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        **options: Unpack[SamplingOptions],
    ) -> Generator[Response]:
        """The steps of an answer as they are made. Other streams and switches do not change this one.

        Args:
            prompt: a text, token ids, or a conversation's messages (mappings with "role" and "content").
            sampling: how tokens are chosen.
            raw: leave the chat template out.
            cache: of `new_cache`, or mlx-lm's prompt cache: what came before. It grows by prompt and answer.
            sampler: chooses the tokens instead: log-probabilities (1, vocabulary) to a token id (1,), as mlx-lm's do.
            logits_processors: change the logits before: token ids so far (n,) and logits (1, vocabulary) to logits.
            options: fields of `Sampling` that differ from `sampling`, such as max_tokens=64.

        Raises ModelError; ConfigError for a wrong option; IncompatibleError if `cache` was made with other adapters,
        or its adapter is detached.
        """
        how, selection = of_kind(Sampling, sampling).changed(options), self.pool.selection  # type: ignore[arg-type]
        bound = cache if isinstance(cache, PromptCache) else None
        chosen = Sampler(how, sampler, logits_processors, self.tokenizer, bound.tokens if bound is not None else ())
        if bound is not None and not same(bound.selection, selection):
            raise IncompatibleError("This cache was made with another adapter.", "take a new one: new_cache().")
        layers: Any = bound.layers if bound is not None else cache
        before = len(bound.tokens) if bound is not None else (count_of(layers) or 0) if layers else 0
        ids = self.checked_ids(ids_of(self, prompt, raw), before)
        drafts = self.drafter.begin(bound.tokens if bound is not None else ()) if self.drafter else None
        steps = self.pool.steps(selection, decode(self, ids, chosen, before, layers, drafts, self.kv))
        return steps if bound is None else bound.noted(ids.tolist(), steps, exactly=self.drafter is None)

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        raw: bool = False,
        cache: PromptCache | None = None,
        sampler: Choose | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """The answer to a prompt.

        Args:
            prompt: a text, token ids, or a conversation's messages (mappings with "role" and "content").
            sampling: how tokens are chosen.
            raw: leave the chat template out.
            cache: as for `stream`.
            sampler: as for `stream`.
            logits_processors: as for `stream`.
            options: fields of `Sampling` that differ from `sampling`, such as max_tokens=64.

        Raises ModelError, or ConfigError for a wrong option.
        """
        how = of_kind(Sampling, sampling).changed(options)  # type: ignore[arg-type]
        steps = self.stream(prompt, how, raw=raw, cache=cache, sampler=sampler, logits_processors=logits_processors)
        return gathered(steps, stop_tokens(how, self.tokenizer))

    def generate_batch(
        self,
        prompts: Sequence[tuple[Prompt, str | None]],
        sampling: Sampling | None = None,
        *,
        raw: bool = False,
        max_batch: int = 16,
        sampler: Choose | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        **options: Unpack[SamplingOptions],
    ) -> list[str]:
        """The answers to all prompts, decoded together, each with its own adapter.

        One after another where mlx-lm's code for the model does not take them together (docs/architectures.md).

        Args:
            prompts: pairs of a prompt, as for `generate`, and the name of an attached adapter, or None: the base.
            sampling: how tokens are chosen, in each answer anew.
            raw: leave the chat template out.
            max_batch: most prompts that are decoded at a time.
            sampler: as for `stream`.
            logits_processors: as for `stream`.
            options: fields of `Sampling` that differ from `sampling`, such as max_tokens=64.

        Raises ModelError, or ConfigError for a wrong option.
        """
        chosen = of_kind(Sampling, sampling).changed(options)  # type: ignore[arg-type]
        adapters = {name: None if name is None else self.pool.get(name) for _, name in prompts}
        own = {name: self.template_for(entry.adapter if entry else None) for name, entry in adapters.items()}
        ids = [self.checked_ids(ids_of(self, prompt, raw, own[name])).tolist() for prompt, name in prompts]
        requests = [
            Request(
                prompt,
                adapters[name],
                self.room(len(prompt), chosen.max_tokens),
                Sampler(chosen, sampler, logits_processors, self.tokenizer),
                stop_tokens(chosen, self.tokenizer),
            )
            for prompt, (_, name) in zip(ids, prompts, strict=True)
        ]
        with self.pool.lock:
            return texts_of(self, self.pool, requests, max_batch, chosen, self.kv, self.drafter)


def load_model(
    base: BaseLike,
    adapter: AdapterLike | None = None,
    *,
    dtype: str = "auto",
    dense: bool | None = None,
    any_base: bool = False,
    template: TemplateConfig | None = None,
    drafting: Drafting | None = None,
    kv: CacheQuantization | None = None,
) -> LiveModel:
    """Load a base model (or a fused folder) once, for any number of adapters.

    Args:
        base: "demo", a folder or a Hub id.
        adapter: one to attach and put to work at once.
        dtype: to compute in; "auto": float32 on a CPU, as stored on a GPU.
        dense: replace quantized layers by dense ones, which compute the same function; None: on a CPU.
        any_base: take an adapter that was trained on another base.
        template: the chat template and its arguments; None: as the adapter at work was trained, else the base's own.
        drafting: what guesses tokens, which the model checks; None: nothing.
        kv: keep keys and values in few bits; None: as they are computed.

    Raises NotFoundError, HubError, FormatError, ModelError, IncompatibleError; ConfigError for an argument that the
    chat template does not read.

    Example:
        >>> model = ma.load_model("demo", "sql")
        >>> answer = model.generate("List the Physics courses.", max_tokens=8)
        >>> answer.prompt_tokens > 0
        True
    """
    template, drafting = of_kind(TemplateConfig, template), of_kind(Drafting, drafting)
    kv = of_kind(CacheQuantization, kv)
    if adapter is not None:
        get_ready()
    wanted, loaded = [] if adapter is None else [adapter], list[Adapter]()
    plainly = partial(load_plain_model, dtype=dtype, dense=dense, template=template, together=None)
    model = LiveModel(plainly(resolve_base(base), meanwhile=lambda: loaded.extend(map(load_adapter, wanted))))
    if kv.kv_bits is not None:
        require_quantizable(model.module, kv, str(model.config.get("model_type")))
        model.kv = kv
    model.drafter = load_drafter(drafting, model, dtype)
    if adapter is not None:
        model._attach(loaded.pop(), plain(adapter), any_base, None, use=True)
    return model
