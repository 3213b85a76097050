"""Models whose tokens differ, and guessers that know what comes."""

import mlx.core as mx
import numpy as np
from helpers.tiny_configs import make_model, tiny_config
from mlx.utils import tree_map


class Prompter:
    """Guesses what is known to come, with a share of wrong tokens."""

    def __init__(self, text, wrong, seed=1):
        self.text, self.wrong, self.random = text, wrong, np.random.default_rng(seed)

    def guess(self, tokens, most, choose):
        known = self.text[len(tokens) : len(tokens) + most]
        wrong = self.random.random(len(known)) < self.wrong
        return [token ^ 1 if bad else token for token, bad in zip(known, wrong, strict=True)]


def a_module(name, **changed):
    """A tiny model that says many tokens: one with fresh weights says hardly any."""
    mx.random.seed(3)
    module = make_model(tiny_config(name) | changed)
    module.update(tree_map(lambda a: a if a.ndim < 2 else mx.random.normal(a.shape) * 0.2, module.parameters()))
    module.eval()
    return module
