"""Hold GGUF files against real llama.cpp: the same probabilities of all tokens, the same tokens for hard strings.

    python scripts/check_gguf.py write out/gguf-check [NAME ...]    (with mlx; tests/ on the path)
    python scripts/check_gguf.py read out/gguf-check                (with xllamacpp, a build of llama.cpp)
    python scripts/check_gguf.py lock tests/fixtures/gguf_layouts.json    (with mlx, once `read` has passed)

A tiny model of each architecture and of its variants (tests/helpers/gguf_models.py) in each of the file's types, a
tiny llama for each way of cutting up text that llama.cpp has a name for, with and without BOS, and the embedded model.
`read` prints a table: the largest difference of log probabilities (of all tokens above e^-25, after 1 to 70 tokens),
the largest KL in nats, strings alike, whether the chat template and the ends are the same. f32 tells whether the
function is the same; in other types llama.cpp rounds its inputs too, to 8 bits in the quantized ones, so KL counts.
`lock` writes down where each number of the tiny models went, which the tests hold.
"""

import json
import math
import subprocess
import sys
import urllib.request
from pathlib import Path

LENGTHS = (1, 7, 33, 70)


def write(out: Path, names: list[str]) -> None:
    sys.path.insert(0, "tests")
    from helpers.gguf_models import GGUF_MODELS, TOKENIZERS, write_for_llama_cpp

    for name in names or [*GGUF_MODELS, *TOKENIZERS, "demo"]:
        try:
            for kind in write_for_llama_cpp(out / name, name, LENGTHS):
                print(name, kind, flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


def lock(out: Path, names: list[str]) -> None:
    sys.path.insert(0, "tests")
    from helpers.gguf_models import GGUF_MODELS, layout_of

    lines = [f"{json.dumps(name)}: {json.dumps(layout_of(name))}" for name in sorted(GGUF_MODELS)]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def ask(url: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def read_one(place: Path) -> dict:
    """What llama.cpp says of one file, in a process of its own: it ends the process for what it does not like."""
    import xllamacpp

    expected = json.loads((place / "expected.json").read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path = str(place / "model.gguf")
    settings.port, settings.n_ctx, settings.n_parallel, settings.warmup = 0, 512, 1, False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    url, off, kl, alike = server.listening_address, 0.0, 0.0, 0
    for prompt, wanted in zip(expected["prompts"], expected["logprobs"], strict=True):
        body = {"prompt": prompt, "n_predict": 1, "n_probs": len(wanted), "temperature": 0, "cache_prompt": False}
        body["logit_bias"] = [[expected["ascii"], 1000]]  # (nothing is told of half a character)
        (said,) = ask(url, "/completion", body)["completion_probabilities"]
        values = {entry["id"]: entry["logprob"] for entry in said["top_logprobs"]}
        near = [(value, values.get(i, -99.0)) for i, value in enumerate(wanted) if value > -25]
        off = max([off, *(abs(a - b) for a, b in near)])
        kl = max(kl, sum(math.exp(a) * (a - b) for a, b in near))
    given = {"add_special": True, "parse_special": True}
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        alike += ask(url, "/tokenize", {"content": text, **given})["tokens"] == ids
    chat = ask(url, "/apply-template", {"messages": expected["chat"]})["prompt"] == expected["rendered"]
    ended = [
        ask(url, "/completion", {"prompt": [5], "n_predict": 3, "temperature": 0, "logit_bias": [[end, 1000]]})
        for end in expected["ends"]
    ]
    stops = all(answer["stop_type"] == "eos" for answer in ended)
    return {"off": off, "kl": kl, "alike": alike, "texts": len(expected["texts"]), "chat": chat, "stops": stops}


def read(out: Path, names: list[str]) -> None:
    failed = False
    for place in sorted(path.parent for path in out.glob("*/*/expected.json")):
        if names and place.parent.name not in names:
            continue
        done = subprocess.run([sys.executable, __file__, "one", str(place)], capture_output=True, text=True)
        line = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""
        told = json.loads(line) if line.startswith("{") else {}
        if not told:
            errors = [x for x in done.stderr.splitlines() if "rror" in x or "assert" in x.lower()]
            print(f"| {place.parent.name} | {place.name} | {' '.join(errors[:2])[:200]} | ! |", flush=True)
            failed = True
            continue
        words = f"{told['alike']} of {told['texts']}" if told["texts"] else "-"
        chat = " and ".join(x for x in ("chat", "stops") if told[x]) or "neither"
        right = told["off"] <= 0.02 if place.name == "f32" else told["kl"] <= 0.03
        right = right and told["alike"] >= told["texts"] - 5 and told["chat"] and told["stops"]
        failed |= not right
        figures = (f"{told['off']:.1e}", f"{told['kl']:.1e}", words, chat, "" if right else "!")
        print(f"| {' | '.join((place.parent.name, place.name, *figures))} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    verb, folder, *names = sys.argv[1:]
    if verb == "one":
        print(json.dumps(read_one(Path(folder))))
    else:
        {"write": write, "read": read, "lock": lock}[verb](Path(folder).resolve(), names)
