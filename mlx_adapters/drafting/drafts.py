"""What guesses for a model, as the settings say, and for one text as it went so far."""

from collections.abc import Sequence
from typing import Any

from mlx_adapters.config.sampling import Drafting
from mlx_adapters.drafting.guessing import Choose, Guesser, Lookup, SmallModel
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.models.loading import load_model
from mlx_adapters.models.model import Model
from mlx_adapters.sources.bases import resolve_base

ALLOWED_MISSES = 2  # guesses in a row that may be all wrong before some steps go without
LONGEST_REST = 31  # steps


class Drafts:
    """The guesses for one text: more at a time while they are right, fewer when not, none for a while after misses.

    Args:
        guessers: the first that has a guess gives it.
        most: guesses at a time.
        earlier: tokens before the text, which are in its cache.
    """

    def __init__(self, guessers: Sequence[Guesser], most: int, earlier: Sequence[int] = ()) -> None:
        self._guessers, self._most, self._length, self._earlier = guessers, most, most, earlier
        self._misses = self._rest = 0
        self.guessed = self.accepted = 0

    def guess(self, tokens: Sequence[int], room: int, choose: Choose) -> list[int]:
        """Tokens that may follow `tokens`, at most `room`. `choose`: as for `Guesser.guess`."""
        if self._rest:
            self._rest -= 1
            return []
        most = min(self._length, room)
        if most < 1:
            return []
        text = [*self._earlier, *tokens] if self._earlier else tokens
        guess = next(filter(None, (one.guess(text, most, choose) for one in self._guessers)), [])
        self.guessed += len(guess)
        return guess

    def note(self, guessed: int, right: int) -> None:
        """Learn what came of a guess: how many of its tokens were right."""
        self._misses = self._misses + 1 if right == 0 else 0
        self._rest = min(2 ** max(self._misses - ALLOWED_MISSES, 0) - 1, LONGEST_REST)
        self._length = min(2 * self._length, self._most) if right == guessed else right + 1


class Drafter:
    """Guesses for the texts of one model.

    Args:
        settings: say by what.
        vocabulary: the width of the model's logits.
        small: the second model, if there is one.
    """

    def __init__(self, settings: Drafting, vocabulary: int, small: Model | None = None) -> None:
        self.settings, self._vocabulary, self._small = settings, vocabulary, small
        self.most = settings.draft_tokens

    def begin(self, earlier: Sequence[int] = ()) -> Drafts:
        """For a new text, after the tokens of an `earlier` one that are in its cache."""
        guessers: list[Guesser] = [Lookup()] if self.settings.prompt_lookup else []
        if self._small is not None:
            guessers.append(SmallModel(self._small, self._vocabulary))
        return Drafts(guessers, self.most, earlier)


def load_drafter(settings: Drafting, model: Model, dtype: str = "auto") -> Drafter | None:
    """What guesses for `model`; None if the settings ask for nothing. `dtype` as for `load_model`.

    Raises NotFoundError, HubError, FormatError or ModelError for the second model; IncompatibleError if its tokens are
    others.
    """
    small = None
    if settings.draft_model is not None:
        small = load_model(resolve_base(settings.draft_model), dtype=dtype)
        check_tokens(small.tokenizer, model.tokenizer, small.base.name, model.base.name)
    return Drafter(settings, model.vocabulary, small) if settings.drafts else None


def check_tokens(small: Any, main: Any, small_name: str, main_name: str) -> None:
    """Raise IncompatibleError if two tokenizers give a text other token ids; one may have more special ones."""
    ours, theirs = ({token: text for text, token in one.get_vocab().items()} for one in (main, small))
    other = next((token for token in sorted(ours.keys() & theirs.keys()) if ours[token] != theirs[token]), None)
    if other is None and len(ours.keys() & theirs.keys()) > 0.9 * max(len(ours), len(theirs)):
        return
    what = "" if other is None else f": token {other} is {theirs[other]!r} there and {ours[other]!r} here"
    raise IncompatibleError(
        f"'{small_name}' cannot guess for '{main_name}', its tokens are others{what}.",
        "take a smaller model of the same family, with the same tokenizer.",
    )
