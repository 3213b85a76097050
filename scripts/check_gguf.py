"""Hold GGUF files against real llama.cpp: the same probabilities of all tokens, the same tokens for hard strings.

    python scripts/check_gguf.py write out/gguf-check [NAME ...]    (with mlx; tests/ on the path)
    python scripts/check_gguf.py read out/gguf-check                (with xllamacpp, a build of llama.cpp)

A tiny model of each architecture and of its variants (tests/helpers/gguf_models.py) in each of the file's types, a tiny
llama for each way of cutting up text that llama.cpp has a name for, with and without BOS, and the embedded model.
`read` prints a table and fails where a log probability is off by more than the type may be.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

LENGTHS = (1, 7, 33, 70)
BOUND = {"f32": 2e-3, "q4_1": 3e-2, "q8_0": 0.15, "keep": 3e-2, "f16": 3e-2, "bf16": 0.3, "q5_1": 3e-2}


def write(out: Path, names: list[str]) -> None:
    sys.path.insert(0, "tests")
    from helpers.gguf_models import GGUF_MODELS, write_for_llama_cpp

    for name in names or GGUF_MODELS:
        try:
            for kind in write_for_llama_cpp(out / name, name, LENGTHS):
                print(name, kind, flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


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
    url, off, alike = server.listening_address, 0.0, 0
    for prompt, wanted in zip(expected["prompts"], expected["logprobs"], strict=True):
        body = {"prompt": prompt, "n_predict": 1, "n_probs": len(wanted), "temperature": 0, "cache_prompt": False}
        body["logit_bias"] = [[expected["ascii"], 1000]]  # (nothing is told of half a character)
        (said,) = ask(url, "/completion", body)["completion_probabilities"]
        found = {entry["id"]: entry["logprob"] for entry in said["top_logprobs"]}
        near = [i for i, value in enumerate(wanted) if value > -25]
        off = max([off, *(abs(found.get(i, -99) - wanted[i]) for i in near)])
    given = {"add_special": True, "parse_special": True}
    for text, ids in zip(expected["texts"], expected["ids"], strict=True):
        alike += ask(url, "/tokenize", {"content": text, **given})["tokens"] == ids
    return {"off": off, "alike": alike, "texts": len(expected["texts"])}


def read(out: Path, names: list[str]) -> None:
    failed = False
    for place in sorted(path.parent for path in out.glob("*/*/expected.json")):
        if names and place.parent.name not in names:
            continue
        done = subprocess.run([sys.executable, __file__, "one", str(place)], capture_output=True, text=True)
        line = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "{}"
        told = json.loads(line) if line.startswith("{") else {}
        if not told:
            errors = [x for x in done.stderr.splitlines() if "error" in x.lower() or "assert" in x.lower()]
            print(f"| {place.parent.name} | {place.name} | does not load: {' '.join(errors[:2])[:200]} |", flush=True)
        else:
            print(
                f"| {place.parent.name} | {place.name} | {told['off']:.1e} | {told['alike']} of {told['texts']} |",
                flush=True,
            )
        failed |= not told or told["off"] > BOUND.get(place.name, 3e-2) or told["alike"] < told["texts"]
    sys.exit(failed)


if __name__ == "__main__":
    verb, folder, *names = sys.argv[1:]
    if verb == "one":
        print(json.dumps(read_one(Path(folder))))
    else:
        {"write": write, "read": read}[verb](Path(folder).resolve(), names)
