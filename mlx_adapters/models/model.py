"""A base model in memory: put an adapter on it, ask what it expects."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.settings import of_kind
from mlx_adapters.errors import ModelError
from mlx_adapters.models.adapter import Adapter, template_of
from mlx_adapters.models.base import Base
from mlx_adapters.models.dense import finer_types
from mlx_adapters.models.layers import attach, check_fits, check_made_for, detach
from mlx_adapters.surgery.blocks import by_block, find_body
from mlx_adapters.surgery.groups import Arrays
from mlx_adapters.system.door import mx, nn
from mlx_adapters.system.limits import LONGEST_TEXT
from mlx_adapters.templates.fitting import Fitted, rendered


def prompt_tokens(text: str, tokenizer: Any) -> list[int]:
    """A text that is to be gone on with, in tokens: with what the tokenizer puts before it (BOS), and not with the EOS
    that some put behind every text (`add_eos_token`), after which there is nothing to say."""
    tokens = list(tokenizer.encode(text))
    if tokens[-1:] != [tokenizer.eos_token_id]:
        return tokens
    own = list(tokenizer.encode(text, add_special_tokens=False))
    return tokens if own and tokens[-len(own) :] == own else tokens[:-1]


@dataclass(repr=False)
class Model:
    """A loaded base model with at most one adapter on it.

    Args:
        module: mlx-lm's model.
        tokenizer: mlx-lm's tokenizer.
        base: where it comes from.
        config: its config.json.
        adapter: the one that is on.
        template: how conversations are written; what it leaves open is as the adapter was trained.

    Example:
        >>> model = ma.load_model("demo")
        >>> ids = model.encode("List the Physics courses.")
        >>> model.logits(ids).shape == (len(ids), model.vocabulary)
        True
    """

    module: nn.Module
    tokenizer: Any
    base: Base
    config: dict[str, Any]
    adapter: Adapter | None = field(default=None)
    template: TemplateConfig = field(default=TemplateConfig())
    together: dict[tuple[str, ...], Arrays] = field(default_factory=dict, init=False)  # see `reading_into_place`

    def __repr__(self) -> str:
        return f"Model({self.base.name!r}, adapter={self.adapter.name if self.adapter else None!r})"

    def attach(self, adapter: Adapter, any_base: bool = False) -> None:
        """Put an adapter on, in place of the one that is on. When this raises, nothing was changed.

        Args:
            adapter: the one to put on.
            any_base: take one that was trained on another base.

        Raises IncompatibleError if it does not fit.
        """
        check_fits(adapter, self.module, f"'{self.base.name}'")
        if not any_base:
            check_made_for(adapter, self.base.name, self.base.fingerprint)
        detach(self.module)
        attach(self.module, adapter)
        self.adapter = adapter

    def detach(self) -> None:
        """Take the adapter off."""
        detach(self.module)
        self.adapter = None

    @cached_property
    def vocabulary(self) -> int:
        """How many token ids the model has a row for; another id would read foreign memory."""
        return self.base.vocabulary or len(self.tokenizer)

    @property
    def positions(self) -> int | None:
        """See `Base.positions`."""
        return self.base.positions

    def room(self, prompt_tokens: int, max_tokens: int) -> int:
        """How many of `max_tokens` the model's context has room for; the last one is never read.

        Args:
            prompt_tokens: tokens before the answer.
            max_tokens: tokens wanted.

        Raises ModelError if it has none: beyond its context a model writes nonsense.
        """
        context = self.base.context
        if context is None:
            return max_tokens
        if prompt_tokens > context:
            raise ModelError(
                f"The prompt has {prompt_tokens} tokens; the model's context has {context}.",
                "shorten it, or begin a new conversation.",
            )
        return min(max_tokens, context - prompt_tokens + 1)

    def checked_ids(self, ids: Sequence[int] | mx.array, before: int = 0) -> mx.array:
        """The token ids as an int32 array of the same shape.

        Args:
            ids: (tokens,) or (rows, tokens).
            before: tokens that were read already.

        Raises ModelError for none, for what is no id of the model's, and for more than it has positions.
        """
        array = np.asarray(ids)
        if array.size == 0:
            raise ModelError("The prompt is empty.", "write something to continue.")
        if array.dtype.kind not in "iu":
            raise ModelError(f"A prompt must be token ids from 0 to {self.vocabulary - 1}.", "or a text.")
        self.base.check_tokens(array, "The prompt")
        if self.positions is not None and before + array.shape[-1] > self.positions:
            tokens = before + array.shape[-1]
            raise ModelError(
                f"The prompt has {tokens} tokens; the model has {self.positions} positions.", "shorten it."
            )
        return mx.array(array.astype(np.int32))

    @property
    def own_template(self) -> TemplateConfig:
        """How the adapter at work was trained to see conversations."""
        return self.template_for(self.adapter)

    def template_for(self, adapter: Adapter | None) -> TemplateConfig:
        """How an adapter was trained to see conversations.

        Args:
            adapter: one of this base; None: what was fused into the base counts.
        """
        return self.base.template if adapter is None else template_of(adapter)

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template, which says how a conversation is written."""
        own = getattr(self.tokenizer, "has_chat_template", False)
        return bool(own or self.template.over(self.own_template).chat_template)

    def encode(self, prompt: str, raw: bool = False, own: TemplateConfig | None = None) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: the text.
            raw: take it as it is, not through the chat template as the user's turn.
            own: as for `encode_chat`.

        Raises ModelError.
        """
        if self.has_template and not raw:
            return self.encode_chat([{"role": "user", "content": prompt}], own=own)
        _require_text(prompt)
        return prompt_tokens(prompt, self.tokenizer)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None = None,
        *,
        template: TemplateConfig | None = None,
        own: TemplateConfig | None = None,
    ) -> list[int]:
        """Token ids of a conversation up to the answer that is to come, through the chat template.

        Args:
            messages: mappings with "role" and "content".
            tools: what the template is to say of tools.
            template: how it is written; what this leaves open is as the model's `template` says.
            own: what both leave open; None: as the adapter at work was trained.

        Raises ModelError for what the template refuses and for what is not valid Unicode.
        """
        _require_text(json.dumps([messages, tools], ensure_ascii=False))
        own = self.own_template if own is None else own
        chosen = of_kind(TemplateConfig, template).over(self.template).over(own)
        other = {} if chosen.chat_template is None else {"chat_template": chosen.chat_template}

        def render(form: Fitted) -> list[int]:
            return list(
                self.tokenizer.apply_chat_template(
                    form.messages,
                    tools=form.tools,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=False,
                    **other,
                    **chosen.chat_template_args,
                )
            )

        try:
            return rendered(messages, tools, self.tokenizer, render, template=chosen.chat_template)[1]
        except Exception as error:  # a template may raise what it likes
            raise ModelError(
                f"The chat template refuses this conversation: {error}.", "give another with --chat-template."
            ) from None

    def embedding(self, token_ids: list[int] | mx.array) -> mx.array:
        """The mean of the last hidden state, (width,) float32, not normalized.

        Args:
            token_ids: (tokens,) of one sequence.

        Raises ModelError as `checked_ids` does, for NaN or Inf, and for a model whose layers and head are one.
        """
        body = find_body(self.module)
        if body is None:
            raise ModelError(
                f"'{self.base.name}' tells no hidden state: its layers and its head are one.", "take another base."
            )
        hidden = body(self.checked_ids(token_ids)[None])  # (1, tokens, width)
        vector = hidden[0].astype(mx.float32).mean(axis=0)
        if not mx.isfinite(vector).all().item():
            raise no_numbers(self.module, *names_of(self))
        return vector

    def logits(self, token_ids: list[int] | mx.array) -> mx.array:
        """What the model expects after each token, in the type that it computes in.

        Args:
            token_ids: (tokens,) of one sequence, or (rows, tokens) of a batch; (tokens, vocabulary) or (rows, tokens,
                vocabulary) comes back.

        Raises ModelError as `checked_ids` does.
        """
        ids = self.checked_ids(token_ids)
        call = by_block(self.module)
        return call(ids[None])[0] if ids.ndim == 1 else call(ids)


def names_of(model: Model) -> tuple[str, str | None]:
    """The base's, and the adapter's that is on."""
    return model.base.name, model.adapter.name if model.adapter else None


def no_numbers(module: nn.Module, base: str, adapter: str | None) -> ModelError:
    """What to raise where the logits of `module` are NaN or infinite; base and adapter by their names."""
    finer = finer_types(module)
    if adapter is None:
        hint = "are its weights whole?" + "".join(f" Or try {way}." for way in finer)
        return ModelError(f"'{base}' computes NaN or Inf.", hint)
    ways = ", ".join([*finer, "an earlier checkpoint, or a weaker one: 'mlx-adapters scale'"])
    return ModelError(f"'{base}' with '{adapter}' computes NaN or Inf.", f"try {ways}.")


def _require_text(text: str) -> None:
    """Raise ModelError for half a surrogate pair, as a file that is not UTF-8 leaves it: no tokenizer takes that; and
    for a text that no memory would hold in tokens."""
    if len(text) > LONGEST_TEXT:
        raise ModelError(
            f"The prompt has {len(text):,} characters, more than the {LONGEST_TEXT:,} that one may have.", "shorten it."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ModelError("The prompt is not valid Unicode.", "is its file UTF-8?") from None
