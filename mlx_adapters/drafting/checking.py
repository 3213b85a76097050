"""One text, written with guesses: a step reads the last token and some guesses, and keeps what was right."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from mlx_adapters.drafting.drafts import Drafts
from mlx_adapters.drafting.guessing import PREFILL_TOKENS, Choose
from mlx_adapters.drafting.rewinding import Mark
from mlx_adapters.system.door import mx, nn


def drafted_steps(
    prompt: Sequence[int],
    module: nn.Module,
    cache: list[Any],
    drafts: Drafts,
    choose: Callable[[Sequence[int], mx.array], tuple[int, mx.array]],
    foresee: Callable[[], Choose],
    max_tokens: int,
) -> Generator[tuple[int, mx.array]]:
    """What mlx-lm's `generate_step` gives, with guesses: the tokens one by one, with their log-probabilities.

    When it is left early the cache holds the prompt and the tokens given out but the last, or fewer.

    Args:
        prompt: tokens that are not in the cache yet.
        cache: the module's; it grows.
        choose: the next token and its log-probabilities (vocabulary,), by the tokens so far and logits (1, vocabulary).
        foresee: gives a function that will choose as `choose` does, for the guesses.
        max_tokens: how many are given out.
    """
    tokens, start = list(prompt), 0
    while start < len(tokens) - 1:
        piece = tokens[start : min(start + PREFILL_TOKENS, len(tokens) - 1)]
        module(mx.array([piece]), cache=cache)
        mx.eval([layer.state for layer in cache])
        start += len(piece)
    unread, made = tokens[-1:], 0
    while made < max_tokens:
        # After a guess that caches could not drop, the right ones are read again, by themselves.
        guess = drafts.guess(tokens, max_tokens - made - 1, foresee()) if len(unread) == 1 else []
        read = [*unread, *guess]
        mark = Mark(cache, len(read)) if guess else None
        logits = module(mx.array([read]), cache=cache)[:, len(unread) - 1 :]  # (1, guesses + 1, vocabulary)
        right = 0
        try:
            for place in range(len(guess) + 1):
                token, logprobs = choose(tokens, logits[:, place])
                tokens.append(token)
                made += 1
                was_right = place < len(guess) and token == guess[place]
                right += was_right
                drafts.accepted += was_right
                yield token, logprobs
                if not was_right:
                    break
        finally:
            again = mark.back(len(read), len(guess) - right) if mark is not None else 0
        if guess:
            drafts.note(len(guess), right)
        unread = [*read[:again], tokens[-1]]
