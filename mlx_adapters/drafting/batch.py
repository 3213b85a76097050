"""The caches of the rows that are decoded together, and how the model is called with them.

One row alone stays in its own cache, as it was read; on CUDA its steps are compiled (see `one_token`), once that was
done before or some tokens were written. With a second one, they become rows of one cache for each layer.
"""

from collections.abc import Sequence
from typing import Any

from mlx_adapters.drafting import one_token
from mlx_adapters.surgery.caches import Text, joined, merged
from mlx_adapters.surgery.cuda import hand_over
from mlx_adapters.surgery.padded import give_room
from mlx_adapters.system.door import KVCache, mx, nn


class Batch:
    """Rows come with `join` and go with `keep`. Who does anything else with `layers` settles them before."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers: list[Any] = []
        self.alone = True  # `layers` are one row's own
        self._one: one_token.OneToken | None = None

    def __call__(self, tokens: mx.array, written: int) -> mx.array:
        """Logits (rows, vocabulary) after the rows' next tokens (rows,); `written` were already, by one row alone."""
        call = self._compiled(written) if self.alone and one_token.serves() else self.module
        return call(tokens[:, None], cache=self.layers)[:, -1]

    def _compiled(self, written: int) -> Any:
        if self._one is None and written > 0 and all(type(layer) is KVCache for layer in self.layers):
            for layer in self.layers:
                give_room(layer)
            self._one = one_token.OneToken(self.module, after=0)
        if self._one is None:
            return self.module
        if self._one.is_compiled or written >= one_token.WORTH_TOKENS:
            return self._one
        self._one.finish()  # what is at work may have changed
        return self.module

    def settle(self) -> None:
        """Let the one row's cache have all tokens that were read."""
        if self._one is not None:
            self._one.finish()

    def _change(self) -> None:
        """Other rows come."""
        self.settle()
        self._one = None

    def join(self, texts: Sequence[Text]) -> None:
        """Take rows in, as they were read."""
        self._change()
        if not self.layers:
            self.alone = len(texts) == 1
            self.layers = texts[0].own if self.alone else joined(texts)
        else:
            self.layers, self.alone = merged([self.layers]) if self.alone else self.layers, False
            for mine, more in zip(self.layers, joined(texts), strict=True):
                mine.extend(more)
        self._hand_over()

    def row(self, number: int) -> list[Any]:
        """The cache of one row."""
        self.settle()
        return self.layers if self.alone else [layer.extract(number) for layer in self.layers]

    def keep(self, rows: Sequence[int]) -> None:
        """Let all others go."""
        self._change()
        if not rows:
            self.clear()
        elif not self.alone:
            which = mx.array(rows)
            for layer in self.layers:
                layer.filter(which)
            self._hand_over()

    def _hand_over(self) -> None:
        for layer in self.layers:
            hand_over(layer.state)

    def clear(self) -> None:
        """Let all rows go, whatever came of the last step."""
        self.layers, self._one = [], None
