"""What mlx-lm's users type, and the line to type here."""

import re
import shlex
from collections.abc import Sequence

# Of each command: mlx-lm's option -> what stands for it, {} being its value; "<1>" puts that first after the command,
# "<2>" second. Nothing at all where it is not needed. A text that begins with a capital is told after the line.
_MODEL = {"--model": "<1> {}"}
_ASKED = {
    "--model": "--base {}",
    "--adapter-path": "--adapter {}",
    "--temp": "--temperature {}",
    "--system-prompt": "--system {}",
    "--extra-eos-token": "--extra-eos {}",
    "--use-default-chat-template": "",
    "--chat-template-config": "Of --chat-template-config's JSON, each KEY: VALUE is a --chat-template-arg KEY=VALUE.",
    "--chat-template-args": "Of --chat-template-args' JSON, each KEY: VALUE is a --chat-template-arg KEY=VALUE.",
    "--verbose": "Memory and speed are in --json.",
    "--image": "Pictures are not read.",
    "--prefill-response": "What an answer begins with cannot be given; with --raw the prompt is gone on from.",
    "--min-tokens-to-keep": "",
    "--prefill-step-size": "",
    "--max-kv-size": "The context is kept whole.",
    "--prompt-cache-file": "--prompt-cache {}",
    "--num-draft-tokens": "--draft-tokens {}",
    "--quantize-activations": "Inputs are not quantized.",
}
HABITS: dict[str, dict[str, str]] = {
    "train": {
        **_MODEL,
        "--train": "",
        "--fine-tune-type": "--type {}",
        "--iters": "--iterations {}",
        "--val-batches": "--eval-batches {}",
        "--steps-per-report": "--report-every {}",
        "--steps-per-eval": "--eval-every {}",
        "--grad-accumulation-steps": "--grad-accumulation {}",
        "--resume-adapter-file": "--init-from {}",
        "--adapter-path": "--name {}",
        "--test": "A test split is judged afterwards: mlx-adapters eval base NAME --data DATA.",
        "--test-batches": "The rows to judge are counted by eval's --max-rows.",
        "-c": "--config {}",
        "--clear-cache-threshold": "",
        "--project-name": "A run is reported under the adapter's name.",
    },
    "fuse": {
        "--model": "--base {}",
        "--adapter-path": "<1> {}",
        "--save-path": "<2> {}",
        "--dequantize": "--bits none",
        "--export-gguf": "--format gguf",
        "--gguf-path": "The file lies in the folder OUT.",
        "--upload-repo": "A model is uploaded afterwards: mlx-adapters publish OUT USER/REPO.",
    },
    "generate": {
        **_ASKED,
        "--ignore-chat-template": "--raw",
        "--prompt": "<1> {}",
        "-p": "<1> {}",
        "-m": "--max-tokens {}",
    },
    "chat": {**_ASKED, "--pipeline": "A model is not spread over machines."},
    "serve": {
        **_MODEL,
        "--adapter-path": "--adapter {}",
        "--allowed-origins": "--cors-origin {}",
        "--log-level": "Requests are logged with --access-log FILE.",
        "--temp": "Sampling is each request's own: temperature, top_p and so on.",
        "--top-p": "Sampling is each request's own: temperature, top_p and so on.",
        "--top-k": "Sampling is each request's own: temperature, top_p and so on.",
        "--min-p": "Sampling is each request's own: temperature, top_p and so on.",
        "--use-default-chat-template": "",
        "--chat-template-args": _ASKED["--chat-template-args"],
        "--decode-concurrency": "--max-batch {}",
        "--prompt-concurrency": "",
        "--prefill-step-size": "",
        "--prompt-cache-size": "Prompts are kept up to --prompt-cache-mb.",
        "--prompt-cache-bytes": "Prompts are kept up to --prompt-cache-mb.",
        "--quantized-kv-start": "A cache of few bits is one from the first token on.",
        "--num-draft-tokens": "--draft-tokens {}",
        "--pipeline": "A model is not spread over machines; several servers go behind a proxy.",
    },
}
# mlx-lm's programs that are called otherwise here.
PROGRAMS = {"lora": "train", "server": "serve", "cache_prompt": "generate", "evaluate": "eval", "upload": "publish"}


def in_our_words(command: str, arguments: Sequence[str]) -> str | None:
    """The line to type for a command line with options of mlx-lm's in it, and remarks; None if there are none.

    Example:
        >>> in_our_words("train", ["--model", "demo", "--train", "--iters", "100", "--data", "rows"])
        'mlx-adapters train demo --iterations 100 --data rows'
    """
    habits, ours, remarks, rest = HABITS.get(command, {}), dict[str, str](), list[str](), list[str]()
    words = [word for text in arguments for word in _parts(text, habits)]
    known = False
    while words:
        word = words.pop(0)
        if word not in habits:
            rest.append(word)
            continue
        known = True
        told = habits[word]
        value = words.pop(0) if word not in _WITHOUT_VALUE and words else ""
        if told[:1].isupper():
            remarks.append(told)
        elif place := re.match(r"<(\d)> ", told):
            ours[place[1]] = value
        elif told:
            rest += [part.format(value) for part in told.split()]
    if not known:
        return None
    line = shlex.join(["mlx-adapters", command, *(ours[place] for place in sorted(ours)), *rest])
    return " ".join([line + ("." if remarks else ""), *remarks])


_WITHOUT_VALUE = {
    "--train",
    "--test",
    "--dequantize",
    "--export-gguf",
    "--ignore-chat-template",
    "--use-default-chat-template",
    "--quantize-activations",
    "--pipeline",
}


def _parts(text: str, habits: dict[str, str]) -> list[str]:
    """`--name=value` of mlx-lm's as two words."""
    name, equals, value = text.partition("=")
    return [name, value] if equals and name in habits else [text]
