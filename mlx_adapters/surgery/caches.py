"""What a model computes of a whole text, and what it computes with a cache, as when it generates: the same, mostly.

In some models (Gemma 3n) layers look at the keys and values of an earlier layer, and find them in that layer's cache
only: called without caches, they compute keys and values of their own, from weights that nobody trained. Such a model
is given what stands in for caches wherever it is called without, so that it is trained and judged as it generates.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from mlx_adapters.surgery.calls import intercept, parts
from mlx_adapters.surgery.cuda import hand_over
from mlx_adapters.surgery.padded import PaddedCache
from mlx_adapters.surgery.segments import segmented_caches
from mlx_adapters.surgery.taps import divergence, log_probabilities
from mlx_adapters.system.door import KVCache, make_prompt_cache, mx, nn

Make = Callable[[], list[Any]]  # gives empty caches


def trace(module: nn.Module) -> bool:
    """Build the graph of a short pass, and compute nothing: what does not fit together raises here, not later.

    Whether the pass was given caches: some code takes none, or none of these.
    """
    try:
        module(_tokens(), cache=make_prompt_cache(module))
    except (TypeError, AttributeError):
        module(_tokens())
        return False
    return True


def _tokens() -> mx.array:
    return mx.zeros((1, 3), mx.int32)  # a window of none at all is no window of one token


def compute_as_generated(module: nn.Module) -> None:
    """Give the module what stands in for caches from now on where it is given none, if other layers take part with
    caches. Raises what `trace` does."""
    called: set[int] = set()  # the linear layers that a pass goes through, by id

    def noting(layer: nn.Module) -> Callable[..., Any]:
        def note(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.add(id(layer))
            return original(*args, **kwargs)

        return note

    with ExitStack() as stack:
        for _, layer in parts(module):
            if isinstance(layer, nn.Linear | nn.QuantizedLinear):
                stack.callback(intercept(layer, noting(layer)))
        if not trace(module):
            return
        cached = called.copy()
        called.clear()
        with suppress(Exception):  # what cannot do without is given them, too
            module(_tokens())
    if called != cached:
        intercept(module, _with_stand_ins(module))


def _with_stand_ins(module: nn.Module) -> Callable[..., Any]:
    """Not with caches: a layer that the backward pass computes again would add its keys to them once more."""

    def call(original: Callable[..., Any], tokens: mx.array, cache: Any = None, **keywords: Any) -> Any:
        if cache is None:
            cache = segmented_caches(module, mx.zeros((1, tokens.shape[1]), mx.int32))  # one text, whole
        return original(tokens, cache=cache, **keywords)

    return call


def same_function(logits: mx.array, expected: mx.array) -> bool:
    """Whether two ways to compute the same logits (..., vocabulary) agree: to a hundredth in float32; where 16 bits
    blur them, in what they say (a KL under 0.1 nats in the median of the tokens)."""
    if logits.dtype == mx.float32:
        never_said = mx.isneginf(logits) & mx.isneginf(expected)
        largest = mx.where(mx.isfinite(expected), mx.abs(expected), 0.0).max()
        near = mx.abs(logits - expected) <= 1e-2 * mx.maximum(largest, 1.0)  # (not of a NaN)
        return bool((near | never_said).all().item())
    lost = divergence(log_probabilities(expected), log_probabilities(logits))
    return bool((mx.sort(lost.flatten())[lost.size // 2] < 0.1).item())


def batches(module: nn.Module, make: Make | None = None) -> bool:
    """Whether prompts of several lengths that are decoded together get what each gets alone. Tried on two of them.

    Some caches cannot be merged (llama4's), some of mlx-lm's models expect one offset for all rows (gpt_bigcode), and
    some give the rows' masks to the heads (gemma2), which fails or not as the numbers are. `make` gives empty caches.
    """
    prompts, following = ([5], [6, 7, 8]), mx.array([[9], [10]])
    try:
        both = module(following, cache=read_together(module, prompts, make))
        alone = [
            module(following[i : i + 1], cache=read_prompt(module, prompt, make)) for i, prompt in enumerate(prompts)
        ]
        return both.shape == (2, *alone[0].shape[1:]) and same_function(both, mx.concatenate(alone))
    except Exception:  # mlx-lm's code raises what it likes
        return False


def read_prompt(module: nn.Module, prompt: Sequence[int], make: Make | None = None) -> list[Any]:
    """Caches that hold a prompt."""
    cache = make() if make else make_prompt_cache(module)
    module(mx.array([list(prompt)]), cache=cache)
    return cache


def read_together(module: nn.Module, prompts: Sequence[Sequence[int]], make: Make | None = None) -> list[Any]:
    """Caches of a batch whose rows hold these prompts, each read alone."""
    together, *others = (merged([read_prompt(module, prompt, make)]) for prompt in prompts)
    for other in others:
        for mine, new in zip(together, other, strict=True):
            mine.extend(new)
    return together


def merged(caches: Sequence[list[Any]]) -> list[Any]:
    """Caches of a batch, each of these its row."""
    return [
        (PaddedCache if type(layers[0]) is KVCache else layers[0]).merge(layers) for layers in zip(*caches, strict=True)
    ]


class Text:
    """The caches of a text that was read: its `own`, or row number `row` of those of a batch that it was read in.

    To take a row out and to put it into a batch again are some hundred operations in a model of many layers.
    """

    def __init__(self, own: list[Any] | None = None, batch: Sequence[Any] = (), row: int = 0, rows: int = 0) -> None:
        self._own, self.batch, self.row, self.rows = own, batch, row, rows

    @property
    def own(self) -> list[Any]:
        """Taken out, if need be."""
        if self._own is None:
            self._own = [layer.extract(self.row) for layer in self.batch]
        return self._own

    @property
    def layers(self) -> Sequence[Any]:
        """What holds it, for a model's layers in turn."""
        return self._own if self._own is not None else self.batch


def joined(texts: Sequence[Text]) -> list[Any]:
    """Caches of a batch whose rows are these, which are gone then: it may be the very one that they were read in."""
    batch = texts[0].batch
    whole = len(batch) > 0 and len(texts) == texts[0].rows
    if whole and all(text.batch is batch and text.row == i for i, text in enumerate(texts)):
        return list(batch)
    return merged([text.own for text in texts])


def read_rows(module: nn.Module, texts: Sequence[Text], pieces: Sequence[Sequence[int]]) -> list[Text]:
    """What goes on from these, once each has read its piece, all in one pass. Pieces are padded behind."""
    if len(texts) == 1:
        module(mx.array([list(pieces[0])]), cache=texts[0].own)
        return [Text(texts[0].own)]
    lengths = [len(piece) for piece in pieces]
    padding = [max(lengths) - length for length in lengths]
    rows = joined(texts)
    for layer in rows:
        hand_over(layer.state)
    if any(padding):
        for layer in rows:
            layer.prepare(lengths=lengths, right_padding=padding)
    module(mx.array([[*piece, *[0] * short] for piece, short in zip(pieces, padding, strict=True)]), cache=rows)
    if any(padding):
        for layer in rows:
            layer.finalize()
        if not all(type(layer) is PaddedCache for layer in rows):
            mx.eval([layer.state for layer in rows])  # at once: to take a row out, mlx-lm's look at their padding
    made = [Text(None, rows, i, len(texts)) for i in range(len(texts))]
    if all(type(layer) is PaddedCache for layer in rows):
        return made
    return [Text(text.own) for text in made]


def reads_rows(module: nn.Module, make: Make | None = None) -> bool:
    """Whether `read_rows` gives what each gets alone, after beginnings of several lengths. Tried on three of them."""
    begun, pieces, following = ([5, 6, 7], [8], [9, 10, 11, 12, 13]), ([14], [15, 16, 17, 18], [19, 20]), [[21]] * 3
    try:
        read = read_rows(module, [Text(read_prompt(module, tokens, make)) for tokens in begun], pieces)
        texts = [[*tokens, *piece] for tokens, piece in zip(begun, pieces, strict=True)]
        alone = [read_prompt(module, text, make) for text in texts]
        pairs = zip(following, read, alone, strict=True)
        steps = [(module(mx.array([x]), cache=one.own), module(mx.array([x]), cache=other)) for x, one, other in pairs]
        return all(same_function(*step) for step in steps)
    except Exception:  # mlx-lm's code raises what it likes
        return False
