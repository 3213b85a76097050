"""What is written with guesses is what is written without, to the token, on caches of every kind."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import random_adapter
from helpers.drafts import Prompter, a_module

from mlx_adapters.config.sampling import Drafting, Sampling
from mlx_adapters.drafting.checking import drafted_steps
from mlx_adapters.drafting.drafts import Drafts
from mlx_adapters.drafting.guessing import SmallModel
from mlx_adapters.generation.live import load_model
from mlx_adapters.generation.sampling import Sampler
from mlx_adapters.system.door import generate_step, make_prompt_cache

PROMPT = [5, 9, 2, 77, 31, 8, 9, 2, 77]
TOKENS, SEEDS = 40, 200
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "presence_penalty": 0.5, "min_tokens": 5}
# Windows that have come round (8 tokens), chunks, recurrent states, caches in pairs.
CACHES = ["llama", "gemma3_text", "gemma4_text", "qwen3_5", "falcon_h1", "mamba"]
CACHES += ["llama4", "deepseek_v3", "recurrent_gemma", "longcat_flash"]


def plainly(module, how):
    sampler = Sampler(Sampling(**how))
    processors = [sampler.process] if sampler.processors else None
    return list(
        generate_step(mx.array(PROMPT), module, max_tokens=TOKENS, sampler=sampler, logits_processors=processors)
    )


def drafted(module, how, drafts, cache=None):
    sampler = Sampler(Sampling(**how))
    cache = make_prompt_cache(module) if cache is None else cache
    return drafted_steps(PROMPT, module, cache, drafts, sampler.step, sampler.foresee, TOKENS)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_equal_to_the_token(name, how):
    module = a_module(name)
    wanted = plainly(module, how)
    drafts = Drafts([Prompter(PROMPT + [token for token, _ in wanted], wrong=0.25)], 4)
    drawn = list(drafted(module, how, drafts))
    assert [token for token, _ in drawn] == [token for token, _ in wanted]
    assert 0.3 < drafts.accepted / drafts.guessed < 0.9
    for (_, one), (_, other) in zip(drawn, wanted, strict=True):
        assert mx.abs(mx.exp(one) - mx.exp(other)).max().item() < 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "qwen3_5"])
@pytest.mark.parametrize("stopped_after", [1, 6, 17])
def test_a_cache_that_is_left_early_goes_on(name, stopped_after):
    """It holds no wrong guess, whichever token the answer was left at."""
    module = a_module(name)
    wanted = [token for token, _ in plainly(module, {})]
    cache = make_prompt_cache(module)
    steps = drafted(module, {}, Drafts([Prompter(PROMPT + wanted, wrong=0.25)], 4), cache)
    written = [next(steps)[0] for _ in range(stopped_after)]
    steps.close()
    told = [layer.offset for layer in cache if hasattr(layer, "offset")]
    assert len(set(told)) == 1 and told[0] <= len(PROMPT) + stopped_after and written == wanted[:stopped_after]
    rest = mx.array([(PROMPT + wanted)[told[0] : len(PROMPT) + stopped_after + 1]])
    assert mx.argmax(module(rest, cache=cache)[0, -1]).item() == wanted[stopped_after + 1]


@pytest.mark.parametrize("name", ["llama", "gemma4_text", "qwen3_5"])
@pytest.mark.parametrize("how", [{}, {"temperature": 1.3, "min_p": 0.01, "seed": 3}], ids=["greedy", "sampled"])
def test_a_model_guesses_itself(name, how, tiny_model):
    """It draws from the random numbers of the token to come, so that all it guesses is right."""
    module = a_module(name)
    plain = load_model(tiny_model("llama"))
    plain.module = module
    wanted = [token for token, _ in plainly(module, how)]
    drafts = Drafts([SmallModel(plain, 512)], 5)
    assert [token for token, _ in drafted(module, how, drafts)] == wanted
    assert drafts.guessed == drafts.accepted >= TOKENS // 2


def test_a_smaller_model_and_lookup_with_an_adapter(tiny_model):
    folder = tiny_model("llama")
    plain = load_model(folder)
    adapter = random_adapter(plain, scale=0.2)
    wanted, counts = {}, {}
    for how in ("greedy", "sampled"):
        options = {"max_tokens": 30, "ignore_eos": True} | ({} if how == "greedy" else {"temperature": 0.8, "seed": 5})
        plain.use(None)
        wanted[how] = [plain.generate("one two one two", **options).token_ids]
        with plain.using(adapter):
            wanted[how].append(plain.generate("one two one two", **options).token_ids)
        for drafting in (Drafting(prompt_lookup=True), Drafting(draft_model=folder, draft_tokens=3)):
            model = load_model(folder, drafting=drafting)
            first = model.generate("one two one two", **options)
            with model.using(adapter):
                second = model.generate("one two one two", **options)
            assert [first.token_ids, second.token_ids] == wanted[how]
            counts[how, drafting.prompt_lookup] = first, second
    first, second = counts["sampled", False]
    assert first.accepted_tokens == first.guessed_tokens > 0 and second.accepted_tokens <= second.guessed_tokens


def test_the_distribution_is_the_models():
    """Chi-square over seeds of a token whose guess is always the same one."""
    module = a_module("llama")
    expected, counts = np.array(mx.softmax(module(mx.array([PROMPT]))[0, -1] / 0.4)), np.zeros(512)
    likely = int(expected.argmax())
    for seed in range(SEEDS):
        steps = drafted(module, {"temperature": 0.4, "seed": seed}, Drafts([Prompter([*PROMPT, likely, 1], 0)], 2))
        counts[next(steps)[0]] += 1
    often = expected * SEEDS > 5
    p, drawn = np.append(expected[often], expected[~often].sum()), np.append(counts[often], counts[~often].sum())
    chi_square = ((drawn - SEEDS * p) ** 2 / (SEEDS * p)).sum()
    assert len(p) > 3 and chi_square < len(p) - 1 + 3 * np.sqrt(2 * (len(p) - 1))
