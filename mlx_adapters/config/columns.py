"""Which columns of a data set are meant, where their names do not tell."""

import dataclasses

from mlx_adapters.config.mapping import require


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of columns; None: recognized by the usual names.

    Args:
        prompt: the question, text or a list of messages; it needs `completion`.
        completion: the answer.
        text: text to be trained whole.
        messages: a conversation.

    Raises ConfigError for names that contradict each other.

    Example:
        >>> Columns(prompt="question", completion="reply").given
        {'prompt': 'question', 'completion': 'reply'}
    """

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        both = (self.prompt is None) == (self.completion is None)
        require(both, "A prompt column needs a completion column, and the other way round.", "name both.")
        kinds = [name for name in ("prompt", "text", "messages") if getattr(self, name) is not None]
        require(
            len(kinds) <= 1,
            f"Columns for {' and for '.join(kinds)} contradict each other.",
            "a row is prompt and completion, or text, or messages: name the columns of one.",
        )

    @property
    def given(self) -> dict[str, str]:
        """The names that were given, by what they are for."""
        return {key: name for key, name in dataclasses.asdict(self).items() if name is not None}
