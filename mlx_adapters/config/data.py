"""How rows are read, and how conversations are rendered. Imports no MLX."""

import json
from dataclasses import dataclass
from typing import Any

from mlx_adapters.config.mapping import require, shown
from mlx_adapters.config.settings import check, of_kind, setting, settings

# Arguments of a template that are not the user's to give.
RESERVED = {"messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize"}
RESERVED |= {"return_dict", "return_tensors", "chat_template", "padding", "truncation", "max_length"}
RESERVED |= {"self", "return_assistant_tokens_mask", "tokenizer_kwargs"}


def _is_json(text: str | None) -> bool:
    try:
        return text is not None and isinstance(json.loads(text.removeprefix("\ufeff")), dict)
    except (ValueError, RecursionError):
        return False


@settings
@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """How a base's chat template writes conversations. An adapter's own, recorded when it was trained, is the default.

    Raises ConfigError for what is no template, or no argument of one.

    Example:
        >>> ma.TemplateConfig(chat_template_args={"enable_thinking": False}).chat_template is None
        True
    """

    chat_template: str | None = setting(
        None,
        "Jinja file in place of the base's chat template",
        more="In Python: its text.",
        metavar="FILE",
        from_file=True,
    )
    chat_template_args: dict[str, Any] = setting(
        dict,
        "Give the chat template an argument, such as enable_thinking=false",
        more="By name. What a row says in chat_template_kwargs wins.",
        metavar="KEY=VALUE",
    )

    def __post_init__(self) -> None:
        check(self)
        good = self.chat_template is None or "{" in self.chat_template
        require(good, f"chat_template is a template's text, not {shown(self.chat_template)}.", "read the file first.")
        hint = "give the text that stands in it as 'chat_template'."
        require(not _is_json(self.chat_template), "chat_template is JSON, such as a tokenizer's config.", hint)
        for name in self.chat_template_args:
            require(name not in RESERVED, f"The chat template's '{name}' cannot be given by an argument.")

    def over(self, other: "TemplateConfig") -> "TemplateConfig":
        """This one, with the other's settings where it has none.

        Args:
            other: what holds where this one says nothing.

        Example:
            >>> ma.DataConfig(chat_template_args={"enable_thinking": False}).over(ma.DataConfig()).chat_template_args
            {'enable_thinking': False}
        """
        of_kind(TemplateConfig, other)
        template = other.chat_template if self.chat_template is None else self.chat_template
        return TemplateConfig(
            chat_template=template, chat_template_args={**other.chat_template_args, **self.chat_template_args}
        )


@settings
@dataclass(frozen=True, kw_only=True)
class DataConfig(TemplateConfig):
    """Which columns of a data set are meant where their names do not tell, and how its conversations are rendered.

    Raises ConfigError for columns that contradict each other.

    Example:
        >>> ma.DataConfig(prompt_column="question", completion_column="answer").prompt_column
        'question'
    """

    prompt_column: str | None = setting(
        None,
        "Column of prompts, with `completion_column`",
        means="recognized by the usual names",
        more="Text, or lists of messages.",
        metavar="NAME",
    )
    completion_column: str | None = setting(None, "Column of answers, with `prompt_column`", metavar="NAME")
    text_column: str | None = setting(None, "Column of text that is trained whole", metavar="NAME")
    messages_column: str | None = setting(None, "Column of conversations", metavar="NAME")

    @property
    def template(self) -> TemplateConfig:
        """The part that says how conversations are written."""
        return TemplateConfig(chat_template=self.chat_template, chat_template_args=self.chat_template_args)

    def __post_init__(self) -> None:
        super().__post_init__()
        pair = (self.prompt_column is None) == (self.completion_column is None)
        require(pair, "prompt_column needs completion_column, and the other way round.", "name both.")
        kinds = ("prompt_column", "text_column", "messages_column")
        named = [kind for kind in kinds if getattr(self, kind) is not None]
        require(
            len(named) <= 1,
            f"{' and '.join(named)} contradict each other.",
            "a row is prompt and completion, or text, or messages: name the columns of one.",
        )
