"""JSON values as strangers leave them."""

from hypothesis import strategies as st

ODD = [None, True, -1, 10**400, 1e308, "x", "\ud800", [], [1], {}, {"a": 1}, [[]], [None]]


def places(value, at=()):
    yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*at, key))


def changed(value, at, new):
    if not at:
        return new
    copy = value.copy()
    copy[at[0]] = changed(value[at[0]], at[1:], new)
    return copy


def every_change(value):
    """The value with each of its places made odd in turn, and with each taken away."""
    for number, at in enumerate(list(places(value))):
        yield changed(value, at, ODD[number % len(ODD)])
        yield changed(value, at, ODD[(number * 7 + 3) % len(ODD)])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
