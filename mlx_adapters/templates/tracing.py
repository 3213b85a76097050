"""Rendering a chat template on values that know where they came from.

`render` gives the very text that the template renders, with an account of each character: which field of which
message it came from, or that the template wrote it itself. Three things bring this about. The texts in the messages
are `Traced`. The environment is a copy of the tokenizer's that joins pieces without losing their account, and lets
the result of any other filter or call come from the texts that went in. And the template's tree gets a mark where a
loop takes up a message and where it ends, and around what stands in `{% generation %}`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

from jinja2 import nodes
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from mlx_adapters.system.templates import Bounded, LimitedTemplate
from mlx_adapters.templates.traced import Leaf, Traced, inherited, join, joined, pieces_of

_OWN_ARGUMENTS = ("_loop_vars", "_block_vars", "caller")  # that jinja itself adds to a call
NOT_SAID = frozenset({"role", "name", "weight"})  # fields of a message that are no words of its speaker


class Run(NamedTuple):
    """Characters [start, stop) of a rendering that are those of `leaf` from `offset` on. None as `offset`: they came
    from it in another shape (JSON, upper case)."""

    start: int
    stop: int
    leaf: Leaf
    offset: int | None


class Mark(NamedTuple):
    """Something that happened where `start` characters were written: a "message" was taken up by `loop` (`number` is
    its own), "loop" ended, or "generation" and "end" of it."""

    start: int
    what: str
    loop: int
    number: int


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation: the text, the runs of it that came from messages, and the marks, both in order."""

    text: str
    runs: tuple[Run, ...]
    marks: tuple[Mark, ...]


class Turn(dict[str, Any]):
    """A message that knows its number."""

    __slots__ = ("_number",)
    _number: int


def _inheriting(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # jinja's marks of what is to be passed go along
    def filtered(*args: Any, **kwargs: Any) -> Any:
        return inherited(function(*args, **kwargs), (*args, *kwargs.values()))

    return filtered


class _Tracing(Bounded):
    """The environment of a template, joining and passing on accounts. Made of another by `_tracing`."""

    concat = staticmethod(joined)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call; what it makes of a message's texts came from that message. A macro knows better."""
        if isinstance(__obj, Macro):
            return super().call(__context, __obj, *args, **kwargs)
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ == "join" and args:
            return join(owner, list(args[0]))
        given = (value for name, value in kwargs.items() if name not in _OWN_ARGUMENTS)
        return inherited(super().call(__context, __obj, *args, **kwargs), (owner, *args, *given))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A product, power or format."""
        return inherited(super().call_binop(context, operator, left, right), (left, right))

    def concatenated(self, *parts: Any) -> str:
        """What `~` does."""
        return joined([str(part) for part in parts])

    def taken(self, loop: int, value: Any) -> str:
        """Mark that a loop goes on to `value`, if it is a message."""
        return Traced("", ((0, ("message", loop, value._number), None),)) if type(value) is Turn else ""

    def ended(self, loop: int) -> str:
        """Mark that a loop ends."""
        return Traced("", ((0, ("loop", loop, -1), None),))

    def generation(self, caller: Callable[[], str]) -> str:
        """Mark what stands in `{% generation %}`."""
        begin, end = (Traced("", ((0, (what, -1, -1), None),)) for what in ("generation", "end"))
        return joined((begin, caller(), end))


class _Marking(NodeTransformer):
    """Puts calls of the environment's `taken`, `ended`, `generation` and `concatenated` into a template's tree."""

    def __init__(self) -> None:
        self.loops = 0

    def visit_For(self, node: nodes.For) -> Any:
        """A loop whose variable may be a message."""
        self.generic_visit(node)
        if not isinstance(node.target, nodes.Name):
            return node
        self.loops += 1
        number, variable = nodes.Const(self.loops), nodes.Name(node.target.name, "load")
        node.body.insert(0, nodes.Output([_asked("taken", [number, variable])]))
        return [node, nodes.Output([_asked("ended", [number])])]

    def visit_CallBlock(self, node: nodes.CallBlock) -> Any:
        """`{% generation %}`, as transformers' extension parses it."""
        self.generic_visit(node)
        called = node.call.node
        if isinstance(called, nodes.ExtensionAttribute) and called.name == "_generation_support":
            node.call = _asked("generation", [])
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:
        """`~`."""
        self.generic_visit(node)
        return _asked("concatenated", node.nodes)


def _asked(method: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def _tracing(template: LimitedTemplate) -> LimitedTemplate:
    """The same template in an environment that traces; made once."""
    made: Any = template.traced
    if made is None:
        own = template.environment
        environment = object.__new__(_Tracing)
        environment.__dict__.update(own.__dict__)
        environment.filters = {name: _inheriting(function) for name, function in own.filters.items()}
        environment.filters["join"] = _join_filter(environment.filters["join"])
        tree = _Marking().visit(own.parse(template.source))
        made = ImmutableSandboxedEnvironment.from_string(environment, tree.set_environment(environment))
        template.traced = made
    return made


def _join_filter(usual: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(usual)
    def filtered(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        if attribute is None and not context.autoescape:
            return join(d, [str(part) for part in value])
        return usual(context, value, d, attribute)

    return filtered


def wrapped(messages: Iterable[Mapping[str, Any]]) -> list[Turn]:
    """The messages with numbers and with traced texts, but for who speaks (`NOT_SAID`)."""
    turns = []
    for number, message in enumerate(messages):
        turn = Turn((k, v if k in NOT_SAID else _wrapped(v, number, (k,))) for k, v in message.items())
        turn._number = number
        turns.append(turn)
    return turns


def _wrapped(value: Any, number: int, path: tuple[str | int, ...]) -> Any:
    if isinstance(value, str):
        return Traced(value, ((len(value), Leaf(number, path, value), 0),) if value else ())
    if isinstance(value, Mapping):
        return {key: _wrapped(item, number, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_wrapped(item, number, (*path, i)) for i, item in enumerate(value)]
    return value


def render(template: LimitedTemplate, turns: list[Turn], variables: Mapping[str, Any]) -> Rendering:
    """Render `turns` of `wrapped` with the other variables. Raises what the template raises."""
    return account(_tracing(template).render(variables, messages=turns))


def account(text: str) -> Rendering:
    """The runs and marks of a text."""
    runs: list[Run] = []
    marks, here = [], 0
    for length, source, offset in pieces_of(text):
        if type(source) is Leaf:
            runs.append(Run(here, here + length, source, offset))
        elif source is not None:
            marks.append(Mark(here, *source))
        here += length
    return Rendering(str.__str__(text), tuple(runs), tuple(marks))


def regions(rendering: Rendering) -> dict[int, tuple[int, int]]:
    """Where each message was written, by its number: [start, stop) of the text from when a loop took it up until the
    loop went on. Messages that no loop took up, or for which nothing was written, are not there; of a message that was
    written in several places, the last counts."""
    spans: dict[int, tuple[int, int]] = {}
    open_loops: list[tuple[int, int]] = []  # (loop, message), the innermost last
    ends = [mark.start for mark in rendering.marks[1:]] + [len(rendering.text)]
    for mark, stop in zip(rendering.marks, ends, strict=False):  # an empty template leaves no mark
        loops = [loop for loop, _ in open_loops]
        if mark.what in ("message", "loop") and mark.loop in loops:
            del open_loops[loops.index(mark.loop) :]
        if mark.what == "message":
            open_loops.append((mark.loop, mark.number))
        if open_loops and mark.start < stop:
            number = open_loops[0][1]
            start, end = spans.get(number, (mark.start, mark.start))
            spans[number] = (start if end == mark.start else mark.start, stop)
    return spans
