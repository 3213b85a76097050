"""Every public function and class says what it takes, what it raises and how it is used; docs/python.md shows it."""

import inspect
import re

import pytest
from helpers.public import NAMES, load_script

import mlx_adapters as ma

DOCS = load_script("python_docs")


def documented():
    """(full name, function or class, its parameters) of all that is public, the methods too."""
    for name in NAMES:
        thing = getattr(ma, name)
        if inspect.isclass(thing):
            yield name, thing, list(inspect.signature(thing).parameters) if "__init__" in vars(thing) else []
            for member_name, member in DOCS.members(thing):
                if inspect.isfunction(member):
                    yield f"{name}.{member_name}", member, list(inspect.signature(member).parameters)[1:]
        else:
            yield name, thing, list(inspect.signature(thing).parameters)


DOCUMENTED = {name: (thing, parameters) for name, thing, parameters in documented()}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_docstring_tells_all_parameters_and_known_errors(name):
    thing, parameters = DOCUMENTED[name]
    parts = DOCS.take_apart(thing.__doc__)
    public = [parameter for parameter in parameters if not parameter.startswith("_")]
    assert list(parts.parameters) == public and all(parts.parameters.values())
    for error in re.findall(r"\b[A-Z]\w+Error\b", thing.__doc__):
        assert error in ma.__all__, f"{error} is not public"


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_an_example(name):
    thing = getattr(ma, name)
    derived = inspect.isclass(thing) and issubclass(thing, ma.AdapterError) and thing is not ma.AdapterError
    assert derived or "ma." in DOCS.take_apart(thing.__doc__).example


def test_the_page_shows_the_docstrings_as_they_are():
    assert DOCS.PAGE.read_text() == DOCS.snapshot(), "run scripts/python_docs --write"
    assert sorted(" ".join(DOCS.GROUPS.values()).split()) == sorted(NAMES), "give every name a group"


def test_no_task_takes_more_lines_here_than_elsewhere():
    assert len(DOCS.tasks()) == 10
    for task, codes in DOCS.tasks().items():
        ours, *others = map(DOCS.lines_of, codes)
        assert 0 < ours <= min(filter(None, others)) and len(others) == 3, task


def test_statements_are_counted_and_imports_are_not():
    assert DOCS.lines_of("import a\nx = f(\n    1,\n)\nfor y in x:\n    print(y)\n") == 3
    assert DOCS.lines_of("$ mlx_lm.fuse --model base\n") == 1 and DOCS.lines_of("") == 0
