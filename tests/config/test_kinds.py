"""Settings that are given in Python are of their kind, or refused by their name before anything begins."""

import inspect
import math
import re
import types
import typing
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.settings_classes import CLASSES

import mlx_adapters as ma
from mlx_adapters import ConfigError, LoraConfig, TemplateConfig, TrainConfig, load_model
from mlx_adapters.config.fusing import FuseOptions
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.config.quantization import Quantization
from mlx_adapters.config.settings import settings_of
from mlx_adapters.config.training import DPO

# Values of every kind: of a setting's own it has some, in range or not, and of all others.
VALUES = [None, True, -1, 0, 4, 1 << 70, 10**400, 0.5, 4.0, math.nan, -math.inf, 4j, Fraction(1, 2), Decimal(4)]
VALUES += ["", "4", "x" * 999, "nan", "q_proj", "\ud800", b"4", Path("x"), object(), int, len, iter(()), {4}, range(1)]
VALUES += [[], [{}], [None], ["x"], [4], [0.5], [[]], (4, "x"), ({"bits": 4},), [np.int8(4)], Quantization(), DPO()]
VALUES += [{}, {"x": "y"}, {4: 4}, {"4": [1]}, {"4": 10**400}, {4: 1, "4": 1}, {"x": None}, {"4": np.float32(1)}]
VALUES += [np.int64(4), np.uint8(0), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("x"), np.arange(2)]
VALUES += [np.array(4), np.array("x"), {"x": np.float32("nan")}]


def fits(value: object, hint: typing.Any) -> bool:
    """Whether it is what the annotation says, its numbers of Python and finite."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, str) and fits(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return type(value) is hint and (hint is int or math.isfinite(value))
    return isinstance(value, origin or hint)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_takes_its_kind_and_refuses_all_others(cls):
    hints, wrong = typing.get_type_hints(cls), []
    for name in settings_of(cls):
        for value in VALUES:
            try:
                good = fits(getattr(cls(**{name: value}), name), hints[name])
            except ConfigError as error:
                words = f"{error.message} {error.hint}".replace(" ", "_")
                good = name.rstrip("s") in words and len(error.message) < 200
            except Exception:
                good = False
            if not good:
                wrong.append((name, value))
    assert not wrong


def test_rows_to_calibrate_on_are_what_reading_them_takes():
    """A data set has no iterator, nor has what is read by its index; `read_data` refuses what it does not know."""
    rows = SimpleNamespace(splits={})
    assert FuseOptions(calibration=rows).calibration is rows


WRONG = {
    "learning_rate": "1e-5",
    "batch_size": 2.0,
    "iterations": True,
    "mask_prompt": "no",
    "packing": None,
    "memory_limit": 12,
    "seed": 1.5,
    "chat_template_args": [],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_kind_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"^{name} cannot be ") as caught:
        TrainConfig(**{name: WRONG[name]})
    assert caught.value.hint.startswith("it must be ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", None), ("rank", "4"), ("target_modules", "q_proj"), ("ranks", [("q_proj", 4)]), ("num_layers", "4")],
)
def test_so_is_one_of_an_adapter(name, value):
    with pytest.raises(ConfigError, match=f"^{name} cannot be "):
        LoraConfig(**{name: value})


def test_one_of_an_objective_too():
    with pytest.raises(ConfigError, match=r"^beta cannot be '0\.1'"):
        DPO(beta="0.1")


def test_numbers_of_NumPy_and_lists_are_what_they_mean():
    training = TrainConfig(batch_size=np.int64(2), learning_rate=np.float32(0.5))
    assert (type(training.batch_size), type(training.learning_rate)) == (int, float)
    assert training == TrainConfig(batch_size=2, learning_rate=0.5)
    lora = LoraConfig(target_modules=["q_proj"], ranks={"q_proj": np.int64(2)})
    assert lora == LoraConfig(target_modules=("q_proj",), ranks={"q_proj": 2})
    assert to_mapping(LoraConfig(scale=2))["scale"] == 2.0


def test_what_is_near_a_choice_is_still_named():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(schedule="cos")
    assert "did you mean 'cosine'" in caught.value.hint


def takers() -> dict[str, tuple[typing.Any, str]]:
    """Every public function and method that takes settings, with the argument that they are."""
    found = {}
    for name in ma.__all__:
        thing = getattr(ma, name)
        functions = {name: thing} if inspect.isfunction(thing) else {}
        if inspect.isclass(thing):
            public = {own: f for own, f in vars(thing).items() if own[0] != "_" and inspect.isfunction(f)}
            functions = {f"{name}.{own}": function for own, function in public.items()}
        for called, function in functions.items():
            for argument, told in inspect.signature(function).parameters.items():
                kinds = set(re.findall(r"\b[A-Z]\w+", str(told.annotation))) - {"None"}
                if len(kinds) == 1 and kinds <= {cls.__name__ for cls in CLASSES}:
                    found[f"{called} {argument}"] = function, argument
    return found


TAKERS = takers()


@pytest.mark.parametrize("taker", TAKERS)
def test_a_mapping_is_no_settings(taker, tiny_model):
    """What else is given is not looked at before."""
    function, argument = TAKERS[taker]
    needed = [name for name, one in inspect.signature(function).parameters.items() if one.default is one.empty]
    given = dict.fromkeys([name for name in needed if name != "options"], "nothing") | {argument: {"rank": 4}}
    own = {"LiveModel": load_model, "Model": load_model, "TemplateConfig": lambda _: TemplateConfig()}
    if "self" in given:
        given["self"] = own[taker.partition(".")[0]](tiny_model())
    with pytest.raises(ConfigError, match=r"The settings cannot be \{") as caught:
        function(**given)
    assert "(...)" in caught.value.hint
