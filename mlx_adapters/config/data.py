"""How rows are read. Imports no MLX."""

import dataclasses
from typing import Any

from mlx_adapters.config.mapping import require

COLUMNS = ("prompt", "completion", "text", "messages")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which columns of a data set are meant where their names do not tell, and what its chat template is given.

    Args:
        prompt_column: the question, text or a list of messages; it needs `completion_column`.
        completion_column: the answer.
        text_column: text to be trained whole.
        messages_column: a conversation.
        chat_template_args: what the chat template is given beside the conversation; a row's own win.

    Raises ConfigError for columns that contradict each other.
    """

    prompt_column: str | None = None
    completion_column: str | None = None
    text_column: str | None = None
    messages_column: str | None = None
    chat_template_args: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        both = (self.prompt_column is None) == (self.completion_column is None)
        require(both, "prompt_column needs completion_column, and the other way round.", "name both.")
        kinds = [f"{kind}_column" for kind in ("prompt", "text", "messages") if kind in self.columns]
        require(
            len(kinds) <= 1,
            f"{' and '.join(kinds)} contradict each other.",
            "a row is prompt and completion, or text, or messages: name the columns of one.",
        )

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are named, by what they are for."""
        named = {kind: getattr(self, f"{kind}_column") for kind in COLUMNS}
        return {kind: name for kind, name in named.items() if name is not None}
