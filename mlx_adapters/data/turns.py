"""Which characters of a rendered conversation the model writes when it speaks.

A turn of the assistant's begins where the generation prompt ends and reaches to the token that ends a generation,
included: reasoning, content, every call, whatever the template puts around them. `{% generation %}` marks decide
where a template has them. Else four things are read off the traced rendering (`templates.tracing`):

- where the template wrote the message, from when its loop took it up until it went on;
- which characters are the message's own, and which another message's;
- the prompt: the conversation up to the message is rendered with the generation prompt, and what this adds after the
  last character that is anybody's is found again in the whole. A prompt that says more than the turn shows (an empty
  thought, say) counts as far as both agree;
- the end: the first token after the last own character that stops a generation; else the last special token that the
  template wrote there; else the last of what it wrote there that is not blank.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, takewhile
from typing import Any

import numpy as np

from mlx_adapters.system.templates import Call
from mlx_adapters.templates import tracing
from mlx_adapters.templates.tracing import Rendering, Run

PROMPT = "add_generation_prompt"
ENOUGH = 3  # prompts that end alike, until the next of their kind is taken to end as they do
PROBE = tuple({"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant"))


@dataclass(frozen=True)
class Encoded:
    """A text as tokens. `ids`: (n,) ints; token i stands for characters [starts[i], ends[i]) of `text`."""

    text: str
    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray

    def followed_by(self, end: "Encoded") -> "Encoded":
        """This text and its tokens, and another's behind them."""
        starts, ends = (
            np.concatenate([own, len(self.text) + places])
            for own, places in ((self.starts, end.starts), (self.ends, end.ends))
        )
        return Encoded(self.text + end.text, [*self.ids, *end.ids], starts, ends)

    def from_char(self, char: int) -> int:
        """The first token that reaches beyond `char`."""
        token = int(np.searchsorted(self.ends, char, side="right"))
        while token and self.starts[token - 1] == self.ends[token - 1] == char:  # blank, and its offsets trimmed
            token -= 1
        return token

    def to_char(self, char: int) -> int:
        """One past the last token that begins before `char`."""
        return int(np.searchsorted(self.starts, char, side="left"))


@dataclass(frozen=True)
class Ends:
    """Ids of the tokens that stop a generation, of all special ones, and of all that were added to the vocabulary."""

    stop: frozenset[int]
    special: frozenset[int]
    added: frozenset[int]


@dataclass(frozen=True)
class Said:
    """One turn of the assistant's in a row's tokens: the message's number from 0, the token ranges [start, stop) that
    the model writes (none if the template leaves it out), whether any of its own text is among the row's characters,
    and whether it ends in a token that stops a generation."""

    message: int
    spans: tuple[tuple[int, int], ...]
    reached: bool
    stops: bool


@dataclass(frozen=True)
class Written:
    """A conversation as its template writes it. `prompt(k, flipped)` renders the messages before k with the generation
    prompt, `flipped` with the template's switches (thinking) the other way round; None if the template refuses."""

    messages: Sequence[Mapping[str, Any]] = field(repr=False)
    rendering: Rendering
    prompt: Callable[[int, bool], Rendering | None] = field(repr=False)
    probe: Callable[[], "Written | None"] = field(repr=False)
    endings: dict[tuple[Any, ...], list[str | None]] = field(default_factory=dict, repr=False)  # see `_prompts`

    @cached_property
    def regions(self) -> dict[int, tuple[int, int]]:
        """Where each message was written."""
        return tracing.regions(self.rendering)

    @cached_property
    def marked(self) -> list[tuple[int, int]]:
        """What stands in `{% generation %}`, as [start, stop)."""
        starts = [mark.start for mark in self.rendering.marks if mark.what == "generation"]
        stops = [mark.start for mark in self.rendering.marks if mark.what == "end"]
        return list(zip(starts, stops, strict=False))

    @cached_property
    def _owned(self) -> dict[int, list[Run]]:
        owned: dict[int, list[Run]] = {}
        for run in self.rendering.runs:
            start, stop = self.regions.get(run.leaf.message, (0, len(self.rendering.text)))
            if start <= run.start and run.stop <= stop:
                owned.setdefault(run.leaf.message, []).append(run)
        return owned

    def own(self, message: int) -> list[Run]:
        """The message's own characters, in the place where it was written."""
        return self._owned.get(message, [])

    def between(self, start: int, stop: int) -> Iterator[Run]:
        """The runs that begin in [start, stop)."""
        first = bisect_left(self.rendering.runs, start, key=lambda run: run.start)
        return takewhile(lambda run: run.start < stop, islice(self.rendering.runs, first, None))


def written(call: Call) -> Written | None:
    """The rendering that was seen, traced. None if it comes out otherwise."""
    variables = dict(call.variables)
    turns = tracing.wrapped(variables.pop("messages", ()))
    try:
        rendering = tracing.render(call.template, turns, variables)
    except Exception:  # it takes longer than the template alone, and there are limits
        return None
    return _written(call, turns, rendering, variables) if rendering.text == call.text else None


def _written(call: Call, turns: list[tracing.Turn], rendering: Rendering, variables: Mapping[str, Any]) -> Written:
    def attempt(messages: list[tracing.Turn], changed: Mapping[str, Any]) -> Rendering | None:
        try:
            return tracing.render(call.template, messages, {**variables, **changed})
        except Exception:  # a template may refuse a conversation that stops here
            return None

    def prompt(message: int, flipped: bool) -> Rendering | None:
        switches = {key: not value for key, value in variables.items() if isinstance(value, bool)}
        switches = {key: value for key, value in switches.items() if flipped and key != PROMPT}
        return attempt(turns[:message], {**switches, PROMPT: True}) if switches or not flipped else None

    def probe() -> Written | None:
        messages = tracing.wrapped(PROBE)
        rendering = attempt(messages, {})
        return None if rendering is None else _written(call, messages, rendering, variables)

    return Written(turns, rendering, prompt, probe)


def said(written: Written, encoded: Encoded, messages: Sequence[int], ends: Ends) -> list[Said]:
    """What the model writes of these messages, in tokens."""
    if written.marked:
        return [_by_marks(written, encoded, message, ends) for message in messages]
    prompts = _prompt_ends(written, encoded, messages, ends)
    return [_by_rendering(written, encoded, message, prompts[message], ends) for message in messages]


def _by_marks(written: Written, encoded: Encoded, message: int, ends: Ends) -> Said:
    region = written.regions.get(message)
    own = written.own(message)
    spans = []
    for start, stop in written.marked:
        inside = region[0] <= start < region[1] if region else any(start <= run.start < stop for run in own)
        if inside and start < stop:
            spans.append((encoded.from_char(start), encoded.to_char(stop)))
    return _said(encoded, message, spans, bool(own), ends)


def _by_rendering(written: Written, encoded: Encoded, message: int, prompt: int | None, ends: Ends) -> Said:
    spans = []
    if prompt is not None:
        for number, (first, last) in enumerate(_groups(written, message, prompt)):
            begin = encoded.from_char(prompt) if number == 0 else _resumed(written, encoded, message, first, ends)
            spans.append((begin, _end(written, encoded, message, last, ends)))
    return _said(encoded, message, spans, bool(written.own(message)), ends)


def _said(encoded: Encoded, message: int, spans: list[tuple[int, int]], reached: bool, ends: Ends) -> Said:
    spans = [(start, stop) for start, stop in spans if start < stop]
    last = spans[-1][1] - 1 if spans else 0
    while last and encoded.text[encoded.starts[last] : encoded.ends[last]].isspace():  # marks may hold a line break
        last -= 1
    return Said(message, tuple(spans), reached, bool(spans) and encoded.ids[last] in ends.stop)


def _groups(written: Written, message: int, prompt: int) -> list[tuple[int, int]]:
    """The turn from its prompt on as [start, stop) of own characters, parted where another message's stand between."""
    own = written.own(message)
    last = written.regions[message][1] if message in written.regions else own[-1].stop
    groups, parted = [(prompt, prompt)], False
    for run in written.between(min(prompt, own[0].start) if own else prompt, last):
        if run.leaf.message != message:
            parted = parted or run.start >= prompt
        elif parted:
            groups.append((run.start, run.stop))
            parted = False
        else:
            groups[-1] = (groups[-1][0], max(run.stop, prompt))
    return groups


def _resumed(written: Written, encoded: Encoded, message: int, first: int, ends: Ends) -> int:
    """The token from which a turn goes on after another message's text: what the template closes that with is not
    the turn's."""
    border = max(run.stop for run in written.between(0, first) if run.leaf.message != message)
    tokens = range(encoded.from_char(border), encoded.from_char(first))
    return max((token + 1 for token in tokens if encoded.ids[token] in ends.special), default=encoded.from_char(first))


def _end(written: Written, encoded: Encoded, message: int, last: int, ends: Ends) -> int:
    """One past the last token of a turn, or of a part of it, whose own characters end at `last`."""
    others = (run.start for run in written.between(last, len(encoded.text)) if run.leaf.message != message)
    border = next(others, len(encoded.text))
    stop = min(border, written.regions[message][1]) if message in written.regions else border
    first, after = encoded.to_char(last), encoded.to_char(stop)
    for token in range(first, min(after + 1, len(encoded.ids))):  # the one after may be what stops, as in GLM
        if encoded.ids[token] in ends.stop and encoded.starts[token] < border:
            return token + 1
    special = [token for token in range(first, after) if encoded.ids[token] in ends.special]
    if special:
        return special[-1] + 1
    return encoded.to_char(max(last, len(encoded.text[:stop].rstrip())))


def _prompt_ends(written: Written, encoded: Encoded, messages: Sequence[int], ends: Ends) -> dict[int, int | None]:
    """The character after each turn's generation prompt; None for turns that are not in the text.

    The first of these that finds it: the prompt, whole; what stands whole before other turns of the row, or of an
    example; the prompt as far as it agrees; what so stands before other turns; the turn's own first character.
    """
    edges = {k: _by_prompt(written, k) for k in messages if k in written.regions or written.own(k)}
    headers = _headers(written, edges)

    def look(finder: Callable[[int], int | None]) -> None:
        edges.update({k: finder(k) for k, prompt in edges.items() if prompt is None})

    if None in edges.values():
        headers = headers or _headers_of_probe(written)
        look(lambda k: _by_header(written, k, headers))
        look(lambda k: _by_agreement(written, encoded, k, ends))
        agreed = _headers(written, edges)
        look(lambda k: _by_header(written, k, agreed))
        look(lambda k: written.own(k)[0].start if written.own(k) else _limit(written, k))
    return dict.fromkeys(messages) | {k: _past_header(written, k, end, headers) for k, end in edges.items()}


def _past_header(written: Written, message: int, end: int | None, headers: Sequence[str]) -> int | None:
    """Beyond what stands before other turns, if it stands here too although this prompt does not have it."""
    own = written.own(message)
    for header in headers:
        if end is not None and written.rendering.text.startswith(header, end):
            return end + len(header) if not own or end + len(header) <= own[0].start else end
    return end


def _by_prompt(written: Written, message: int, flipped: bool = False) -> int | None:
    """Where the generation prompt ends, if it stands there whole."""
    for at, rest in _prompts(written, message, flipped):
        if written.rendering.text.startswith(rest, at):
            return at + len(rest)
    return None


def _prompts(written: Written, message: int, flipped: bool) -> Iterator[tuple[int, str]]:
    """(position, what the template writes from there on before the turn): after the last character of a message's.

    Each prompt is a rendering of all that comes before. So after a few that end alike, behind messages of one kind, the
    next is taken to end as they do.
    """
    before = written.messages[message - 1] if message else {}
    known = written.endings.setdefault((flipped, before.get("role"), *before), [])
    limit = _limit(written, message)
    runs = written.rendering.runs[: bisect_left(written.rendering.runs, limit, key=lambda run: run.start)]
    if runs and len(known) >= ENOUGH and known[0] is not None and len(set(known)) == 1:
        yield runs[-1].stop, known[0]
        return
    prompt = written.prompt(message, flipped)
    if prompt is None:
        return
    if not prompt.runs:
        yield 0, prompt.text
        return
    last = prompt.runs[-1]
    for run in reversed(runs):
        if run.leaf == last.leaf and run.stop <= limit and _reach(run) == _reach(last):
            rest = prompt.text[last.stop :]
            known.append(rest if run is runs[-1] else None)
            yield run.stop, rest
            return


def _limit(written: Written, message: int) -> int:
    """A character before which the turn does not begin."""
    if message in written.regions:
        return written.regions[message][0]
    return written.own(message)[0].start


def _reach(run: Run) -> int | None:
    return None if run.offset is None else run.offset + run.stop - run.start


def _headers(written: Written, edges: Mapping[int, int | None]) -> list[str]:
    """What stands before the turns that were found, from where a loop took them up."""
    starts = ((written.regions[k][0], end) for k, end in edges.items() if end is not None and k in written.regions)
    return [written.rendering.text[start:end] for start, end in starts if start < end]


def _headers_of_probe(written: Written) -> list[str]:
    probe = written.probe()
    return [] if probe is None else _headers(probe, {k: _by_prompt(probe, k) for k in (1, 3) if probe.own(k)})


def _by_header(written: Written, message: int, headers: Sequence[str]) -> int | None:
    """After the header that stands in the message's place: before its first own character, if it has any."""
    text, own = written.rendering.text, written.own(message)
    start, stop = written.regions.get(message, (0, len(text)))
    for header in headers:
        at = text.rfind(header, start, own[0].start) if own else text.find(header, start, stop)
        if at >= 0:
            return at + len(header)
    return None


def _by_agreement(written: Written, encoded: Encoded, message: int, ends: Ends) -> int | None:
    """As far as the prompt and the text agree, back to the last line or added token; or where the prompt ends whole
    with the template's switches the other way round (thinking), if that is before."""
    other = _by_prompt(written, message, flipped=True)
    text, limit, own = written.rendering.text, _limit(written, message), written.own(message)
    first = own[0].start if own else len(text)
    for at, rest in _prompts(written, message, False):
        agreed = min(at + agreement(rest, text[at : at + len(rest)]), first)
        if agreed > limit:
            tokens = range(encoded.from_char(limit), encoded.to_char(agreed))
            borders = [int(encoded.ends[token]) for token in tokens if encoded.ids[token] in ends.added]
            borders = [b for b in (*borders, text.rfind("\n", limit, agreed) + 1) if limit < b <= agreed]
            agreed = max(borders, default=agreed)
            return agreed if other is None else min(agreed, other)
    return other


def agreement(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
