"""Counters, gauges and histograms in Prometheus' text format."""

import threading
from collections import defaultdict
from collections.abc import Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
PREFIX = "mlx_adapters_"

# name -> (type, help, buckets of a histogram)
METRICS: dict[str, tuple[str, str, Sequence[float]]] = {
    "requests_total": ("counter", "Requests by model and outcome.", ()),
    "refusals_total": ("counter", "Requests that got an error instead of an answer, by HTTP status.", ()),
    "prompt_tokens_total": ("counter", "Tokens of prompts, by model.", ()),
    "cached_tokens_total": ("counter", "Tokens of prompts that were known and not read, by model.", ()),
    "guessed_tokens_total": ("counter", "Tokens that were guessed (--draft-model, --prompt-lookup), by model.", ()),
    "accepted_tokens_total": ("counter", "Guessed tokens that were right, by model.", ()),
    "completion_tokens_total": ("counter", "Tokens written, by model.", ()),
    "time_to_first_token_seconds": ("histogram", "From arrival to the first token.", SECONDS),
    "time_per_output_token_seconds": ("histogram", "Mean time between the tokens of an answer.", SECONDS),
    "batch_size": ("histogram", "Rows of each decode step.", SIZES),
    "adapter_loads_total": ("counter", "Adapters brought into memory.", ()),
    "adapter_evictions_total": ("counter", "Adapters put out of memory to make room.", ()),
    "queue_length": ("gauge", "Requests that wait for a place in the batch.", ()),
    "running": ("gauge", "Rows in the batch now.", ()),
    "adapters_resident": ("gauge", "Adapters in memory.", ()),
    "adapter_bytes": ("gauge", "Bytes of the adapters in memory.", ()),
    "prompt_cache_bytes": ("gauge", "Bytes of prompts and answers that are kept.", ()),
    "memory_active_bytes": ("gauge", "Bytes that MLX holds.", ()),
    "memory_peak_bytes": ("gauge", "The most bytes MLX has held.", ()),
}

# Under these names vLLM's dashboards find them.
ALIASES = {
    "prompt_tokens_total": "vllm:prompt_tokens_total",
    "cached_tokens_total": "vllm:prefix_cache_hits_total",
    "completion_tokens_total": "vllm:generation_tokens_total",
    "guessed_tokens_total": "vllm:spec_decode_num_draft_tokens_total",
    "accepted_tokens_total": "vllm:spec_decode_num_accepted_tokens_total",
    "time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "time_per_output_token_seconds": "vllm:time_per_output_token_seconds",
    "queue_length": "vllm:num_requests_waiting",
    "running": "vllm:num_requests_running",
}


class Metrics:
    """All metrics of a server; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(lambda: defaultdict(float))
        self._histograms: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = {}

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Count up."""
        with self._lock:
            self._values[name][tuple(sorted(labels.items()))] += amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name][tuple(sorted(labels.items()))] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Put a value into a histogram."""
        buckets = METRICS[name][2]
        with self._lock:
            cells = self._histograms.setdefault((name, tuple(sorted(labels.items()))), [0.0] * (len(buckets) + 2))
            for i, bound in enumerate(buckets):
                cells[i] += value <= bound
            cells[-2] += 1
            cells[-1] += value

    def text(self) -> str:
        """The page that Prometheus reads."""
        lines: list[str] = []
        with self._lock:
            for name, (kind, explanation, buckets) in METRICS.items():
                lines += self._lines(PREFIX + name, name, kind, explanation, buckets)
                if name in ALIASES:
                    lines += self._lines(ALIASES[name], name, kind, explanation, buckets)
        return "\n".join(lines) + "\n"

    def _lines(self, called: str, name: str, kind: str, explanation: str, buckets: Sequence[float]) -> list[str]:
        lines = [f"# HELP {called} {explanation}", f"# TYPE {called} {kind}"]
        lines += [f"{called}{_labels(key, called)} {_number(value)}" for key, value in self._values[name].items()]
        for (of, key), cells in self._histograms.items():
            if of != name:
                continue
            bounds = [*(f"{bound:g}" for bound in buckets), "+Inf"]
            lines += [
                f"{called}_bucket{_labels((*key, ('le', bound)), called)} {_number(count)}"
                for bound, count in zip(bounds, cells, strict=False)
            ]
            lines += [
                f"{called}_count{_labels(key, called)} {_number(cells[-2])}",
                f"{called}_sum{_labels(key, called)} {_number(cells[-1])}",
            ]
        return lines


def _number(value: float) -> str:
    """Every digit: a counter that is rounded seems to stand still."""
    return str(int(value)) if value == int(value) else repr(value)


def _labels(pairs: Sequence[tuple[str, str]], called: str) -> str:
    """The labels of a line; vLLM calls the model `model_name`."""
    model = "model" if called.startswith(PREFIX) else "model_name"
    pairs = [(model if key == "model" else key, value) for key, value in pairs]

    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    return "{" + ",".join(f'{key}="{escaped(value)}"' for key, value in pairs) + "}" if pairs else ""
