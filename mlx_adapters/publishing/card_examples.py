"""How a model card shows to load what is published, by the libraries that can."""

from collections.abc import Callable

from mlx_adapters.publishing.subject import Subject


def example_of(subject: Subject) -> Callable[[str, str], str]:
    """The Markdown for a repository and its base, as a function of both."""
    examples = {"adapter": _use_adapter, "peft": _use_peft, "gguf": _use_gguf}
    return examples.get(subject.kind) or (_use_transformers if subject.transformers else _use_model)


def _use_adapter(repo: str, base: str) -> str:
    return f"""With [mlx-lm](https://github.com/ml-explore/mlx-lm):

```python
from huggingface_hub import snapshot_download
from mlx_lm import generate, load

model, tokenizer = load("{base}", adapter_path=snapshot_download("{repo}"))
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True)
print(generate(model, tokenizer, prompt=prompt))
```

With mlx_adapters:

```shell
mlx-adapters generate "..." --adapter {repo}
mlx-adapters fuse {repo} out/fused --bits 4
mlx-adapters export-peft {repo} out/peft    # for PEFT and transformers
```"""


def _use_peft(repo: str, base: str) -> str:
    return f"""With [PEFT](https://huggingface.co/docs/peft):

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```

On MLX: `mlx-adapters import-peft {repo} --base {base}`."""


def _use_model(repo: str, base: str) -> str:
    return f"""With [mlx-lm](https://github.com/ml-explore/mlx-lm):

```python
from mlx_lm import generate, load

model, tokenizer = load("{repo}")
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "..."}}], add_generation_prompt=True)
print(generate(model, tokenizer, prompt=prompt))
```

With mlx_adapters: `mlx-adapters generate "..." --base {repo}`."""


def _use_transformers(repo: str, base: str) -> str:
    return f"""With [transformers](https://huggingface.co/docs/transformers):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{repo}"), AutoTokenizer.from_pretrained("{repo}")
```"""


def _use_gguf(repo: str, base: str) -> str:
    return f"With [llama.cpp](https://github.com/ggml-org/llama.cpp): `llama-cli -hf {repo}`."
