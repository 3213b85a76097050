"""Ways to fuse, ours and mlx-lm's; each function here runs in a fresh process, started by `in_process`.

`mlx_lm.gptq`, `awq` and `dwq` load their calibration text from the network. Here they get our calibration rows, by
their own Python functions, with arithmetic in float32: quantized and 16-bit arithmetic takes hours on a CPU. gptq
and awq get the rows joined and cut into pieces of 512 tokens, as they do with their own text; dwq gets them as rows.
"""

import json
import subprocess
import sys
from pathlib import Path

WORKER = """
import json, os, sys, time
import mlx_adapters
import mlx.core as mx
import mlx_lm.fuse, mlx_adapters.fusion.fuse  # what both need is not timed
from mlx_adapters.system.conditions import process_memory
sys.path.insert(0, {scripts!r})
import fuse_ways
arguments = json.loads(sys.argv[1])
function = getattr(fuse_ways, arguments.pop("function"))
mx.reset_peak_memory()
started, worked = time.perf_counter(), sum(os.times()[:4])  # with those of its child processes
value = function(**arguments)
seconds, cpu_seconds = time.perf_counter() - started, sum(os.times()[:4]) - worked
peak = process_memory()["peak_resident_bytes"]
result = dict(seconds=seconds, cpu_seconds=cpu_seconds, mlx_peak=mx.get_peak_memory(), process_peak=peak, value=value)
print("RESULT " + json.dumps(result))
"""


class WayFailed(Exception):
    """A way did not come to its end; the text says why."""


def in_process(function, limit=None, **arguments):
    """Run one of this file's functions in a fresh process: seconds of its work, memory, and what it returned.

    After `limit` seconds it is stopped and has failed.
    """
    code = WORKER.format(scripts=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, json.dumps({"function": function, **arguments})]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise WayFailed(f"not done after {limit:,.0f} s") from None
    results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        raise WayFailed(f"exit {run.returncode}: {lines[-1] if lines else 'no message'}")
    return json.loads(results[0].removeprefix("RESULT "))


def dense_base(base, out, bits=None, group_size=64):
    """The base unquantized in bfloat16; with `bits`, quantized from that by mlx-lm's own quantizer."""
    from mlx_lm.utils import quantize_model

    from mlx_adapters.models.loading import dequantize_layers, load_module
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.system.door import mx

    its_base = resolve_base(base)
    module, config = load_module(its_base)
    dequantize_layers(module, mx.bfloat16)
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    if bits:
        module.set_dtype(mx.bfloat16)
        module, config = quantize_model(module, config, group_size, bits)
    _save(its_base, module, config, out)


def light_adapter(base, adapter, out, most):
    """The adapter scaled so that no layer's update is more than `most` of the weight's norm; returns the factor."""
    from dataclasses import replace

    import mlx.core as mx

    from mlx_adapters.assembly.weights import BaseWeights, Updates
    from mlx_adapters.models.adapter import write_adapter
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.sources.lookup import load_adapter

    given, source = load_adapter(adapter), BaseWeights.of(load_module(resolve_base(base))[0])
    updates, shares = Updates(((given, 1.0),)), []
    for path in given.config.keys:
        weight = source.rows(path, 0, source.layers[path].weight.shape[0])
        shares.append((mx.linalg.norm(source.fused(path, updates) - weight) / mx.linalg.norm(weight)).item())
    factor = most / max(shares)
    write_adapter(replace(given, config=replace(given.config, scale=given.config.scale * factor)), Path(out))
    return factor


def ours(base, adapter, out, precision="keep", dtype="auto", **options):
    """mlx_adapters.fuse; its check is left out unless asked for, because all methods are judged alike."""
    from mlx_adapters.config.fusing import FuseOptions
    from mlx_adapters.config.quantization import Quantization
    from mlx_adapters.fusion.fuse import fuse

    if isinstance(precision, list):
        precision = Quantization(*precision)
    options = FuseOptions(**({"check": False} | options))
    fuse(base, adapter, out, quantization=precision, dtype=dtype, options=options, any_base=True)


def mlx_lm_fuse(base, adapter, out, dequantize=False):
    """The command `mlx_lm.fuse`."""
    from mlx_lm import fuse

    flags = ["--dequantize"] if dequantize else []
    sys.argv = ["mlx_lm.fuse", "--model", base, "--adapter-path", adapter, "--save-path", out, *flags]
    fuse.main()


def convert(model, out, group_size):
    """The command `mlx_lm.convert -q`."""
    from mlx_lm.convert import convert as mlx_lm_convert

    mlx_lm_convert(model, out, quantize=True, q_group_size=group_size, q_bits=4)


def _dense(model, calibration, rows):
    """The fused, unquantized model in float32, and the tokens of our calibration rows."""
    from mlx_adapters.calibration.texts import choose_text
    from mlx_adapters.models.loading import load_model
    from mlx_adapters.sources.bases import resolve_base

    loaded = load_model(resolve_base(model), dtype="float32", dense=True)
    text = choose_text(calibration, [], loaded.tokenizer, rows, 64)
    return loaded, [row for row, _ in text.calibration]


def _pieces(rows, length=512):
    import mlx.core as mx
    import numpy as np

    tokens = np.concatenate(rows)
    count = max(1, len(tokens) // length)
    return mx.array(tokens[: count * length].reshape(count, -1))


def _save(base, module, config, out):
    import mlx.core as mx
    from mlx_lm.utils import save_config, save_model

    from mlx_adapters.assembly.writing import copy_companions

    module.set_dtype(mx.bfloat16)
    save_model(out, module)
    save_config(config, Path(out) / "config.json")
    copy_companions(base, Path(out))


def gptq(model, out, group_size, calibration, rows):
    """mlx_lm.gptq's function at 4 bits for every layer."""
    from mlx_lm.quant.gptq import gptq_quantize

    loaded, data = _dense(model, calibration, rows)
    module, quantization = gptq_quantize(loaded.module, _pieces(data), 4, group_size, 4, group_size)
    _save(loaded.base, module, {**loaded.config, "quantization": quantization}, out)


def awq(model, out, group_size, calibration, rows):
    """mlx_lm.awq's function at 4 bits for every layer, with its default search."""
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    loaded, data = _dense(model, calibration, rows)
    config, sizes = AWQ_MODEL_CONFIGS[loaded.config["model_type"]], {"embed_bits": 4, "embed_group_size": group_size}
    awq_quantize(loaded.module, _pieces(data), config, bits=4, group_size=group_size, **sizes)
    _save(loaded.base, loaded.module, update_config(loaded.module, dict(loaded.config)), out)


def dwq(model, out, group_size, calibration, rows, rate):
    """mlx_lm.dwq's function: scales and biases learn the unquantized model's predictions, in batches of 4."""
    import copy

    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx.utils import tree_unflatten
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.utils import quantize_model

    loaded, data = _dense(model, calibration, rows)
    student, config = quantize_model(copy.deepcopy(loaded.module), dict(loaded.config), group_size, 4)
    packed = {path: layer for path, layer in student.named_modules() if hasattr(layer, "bits")}
    learning = {path: _learning(layer) for path, layer in packed.items()}
    student.update_modules(tree_unflatten(list(learning.items())))
    batches = [(row.tolist(), 0) for row in data]
    held = max(4, len(batches) // 8)
    optimizer = optimizers.Adam(learning_rate=rate, bias_correction=True)
    dwq_quantize(
        student,
        lambda batch, index, split: loaded.module(batch),
        optimizer,
        batches[held:],
        batches[:held],
        batch_size=4,
        max_seq_length=513,
        seed=123,
        dtype=mx.float32,
    )
    for path, layer in packed.items():
        layer.scales, layer.biases = learning[path].scales, learning[path].biases
    student.update_modules(tree_unflatten(list(packed.items())))
    _save(loaded.base, student, config, out)


def _learning(layer):
    """A quantized layer's function for dwq to train: a CPU multiplies dequantized weights 20 times faster."""
    import mlx.core as mx
    import mlx.nn as nn

    class Learning(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "scales", "biases", "bias"):
                if name in layer:
                    self[name] = layer[name]
            self.bits, self.group_size, self.mode = layer.bits, layer.group_size, layer.mode
            self.freeze()

        def dense(self):
            return mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)

        def as_linear(self, x):
            return x @ self.dense().T

        def __call__(self, x):
            if isinstance(layer, nn.QuantizedEmbedding):
                return self.dense()[x]
            return self.as_linear(x) + self.bias if "bias" in self else self.as_linear(x)

    return Learning()


def score(model, data, questions, adapter=None):
    """(right answers, questions), decoded greedily: what queries return if the data has a database, else the text."""
    from mlx_adapters.data.datasets import read_data
    from mlx_adapters.evaluation.scores import greedy_answers, parse_score
    from mlx_adapters.evaluation.scores import questions as as_questions
    from mlx_adapters.models.loading import load_model
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.sources.lookup import load_adapter

    test = read_data(data).rows("test")
    count = min(questions, len(test))
    loaded = load_model(resolve_base(model), load_adapter(adapter) if adapter else None, any_base=True)
    asked = as_questions([test[i * len(test) // count] for i in range(count)], loaded)
    answers = greedy_answers(loaded, [question.prompt for question in asked], max_tokens=64, batch_size=40)
    judge = parse_score("sqlite" if list(Path(data).glob("*.sqlite")) else "exact", data)
    return sum(judge(a, q.expected, q.row.values) for a, q in zip(answers, asked, strict=True)), count


SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def random_model(out, bits, **config):
    """A llama of random weights (by default SmolLM2's widths) and an adapter on all its linear layers."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    import mlx.core as mx
    from helpers.tiny_models import build_model

    from mlx_adapters.config.training import LoraConfig
    from mlx_adapters.models.adapter import Adapter, write_adapter
    from mlx_adapters.models.layers import adaptable_layers, expected_shapes, resolve_target_modules
    from mlx_adapters.models.loading import load_module
    from mlx_adapters.models.metadata import AdapterConfig
    from mlx_adapters.sources.bases import resolve_base

    build_model(Path(out) / "plain", "llama", **({"dtype": "bfloat16"} | SMOLLM2 | config))
    dense_base(str(Path(out) / "plain"), str(Path(out) / "base"), bits)
    base = resolve_base(Path(out) / "base")
    module = load_module(base)[0]
    keys = resolve_target_modules(module, LoraConfig())
    adapter = AdapterConfig(8, 20.0, keys)
    shapes = {key: expected_shapes(adaptable_layers(module)[key], adapter) for key in keys}
    weights = {f"{key}.{leaf}": 0.01 * mx.random.normal(shape) for key in keys for leaf, shape in shapes[key].items()}
    write_adapter(Adapter(adapter, weights, {"name": "random", "base": base.record()}), Path(out) / "adapter")
