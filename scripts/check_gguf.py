"""Hold GGUF files against real llama.cpp: the same tokens for hard strings, the same next tokens.

    python scripts/check_gguf.py write out/gguf-check    (with mlx; tests/ on the path)
    python scripts/check_gguf.py read out/gguf-check     (with xllamacpp, a build of llama.cpp)

A tiny llama for each way of cutting up text that llama.cpp has a name for, with and without BOS, and the embedded
model. Measured with xllamacpp on Linux: all 108 strings alike, but for combining marks on "tekken" (105)
and "gpt-4o" (107), which llama.cpp approximates.
"""

import json
import sys
import urllib.request
from pathlib import Path


def write(out: Path) -> None:
    sys.path.insert(0, "tests")
    from helpers.adapters import make_adapter
    from helpers.gguf_tokenizers import own_spelling, retokenize
    from helpers.tiny_models import build_model

    import mlx_adapters as ma
    from mlx_adapters.assembly.gguf_tokenizer import PRE_TOKENIZERS, hard_strings
    from mlx_adapters.generation.live import load_model
    from mlx_adapters.sources.bases import resolve_base
    from mlx_adapters.sources.demo_base import demo_base_folder

    for pre in PRE_TOKENIZERS:
        for bos in (False, True):
            folder = build_model(out / f"{pre.name}-{'bos' if bos else 'bare'}" / "base", "llama")
            retokenize(folder, own_spelling(pre.name), ignore_merges=pre.ignore_merges, bos=bos)
    bases = [*sorted(out.glob("*/base")), demo_base_folder()]
    for base in bases:
        place = base.parent if base.name == "base" else out / "demo"
        options = ma.FuseOptions(check=False, format="gguf")
        adapter = make_adapter(base)
        ma.fuse(base, adapter, place / "gguf", quantization="none", dtype="float32", options=options)
        model = load_model(resolve_base(base), adapter)
        special = list(model.tokenizer.all_special_tokens)
        texts = hard_strings(special)
        ids = [list(model.tokenizer.encode(text)) for text in texts]
        nearest = [model.generate(i, max_tokens=8).token_ids for i in ids[:5]]
        (place / "expected.json").write_text(json.dumps({"texts": texts, "ids": ids, "answers": nearest}))
        print(place.name, len(texts), "strings")


def ask(url: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def read(out: Path) -> None:
    import xllamacpp

    failed = False
    for place in sorted(path.parent for path in out.glob("*/expected.json")):
        expected = json.loads((place / "expected.json").read_text())
        settings = xllamacpp.CommonParams()
        settings.model.path = str(place / "gguf" / "model.gguf")
        settings.port, settings.n_ctx, settings.n_parallel, settings.warmup = 0, 512, 1, False
        server = xllamacpp.Server(settings)
        url = server.listening_address
        given = {"add_special": True, "parse_special": True}
        ids = [ask(url, "/tokenize", {"content": text, **given})["tokens"] for text in expected["texts"]]
        different = [text for text, a, b in zip(expected["texts"], ids, expected["ids"], strict=True) if a != b]
        said = [
            ask(url, "/completion", {"prompt": i, "n_predict": 8, "temperature": 0, "return_tokens": True})
            for i in expected["ids"][:5]
        ]
        same = sum(s["tokens"][: len(a)] == a for s, a in zip(said, expected["answers"], strict=True))
        failed |= bool(different) or same < 5
        print(
            f"{place.name}: {len(ids) - len(different)} of {len(ids)} strings, {same} of 5 answers alike", different[:5]
        )
        del server
    sys.exit(failed)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]).resolve())
