"""What the rows became belongs to a run: its template, its tokens and the date that a template prints."""

import json
import shutil
from datetime import datetime

import pytest
from helpers.tiny_models import CHAT_TEMPLATE
from helpers.training_tools import cut_after, outcome, write_data
from transformers.utils import chat_template_utils

from mlx_adapters import LoraConfig, TrainConfig, train
from mlx_adapters.errors import IncompatibleError
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage import files

LORA = LoraConfig(rank=2, scale=2.0, target_modules=("q_proj",))
TRAINING = TrainConfig(iterations=6, batch_size=3, learning_rate=0.01, eval_every=2, save_every=2)
DATED = "{{ strftime_now('%d %b %Y at %f') }}{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


@pytest.fixture
def base(tiny_model, tmp_path):
    return shutil.copytree(tiny_model(), tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def change(path, **values):
    files.write_json(path, json.loads(path.read_text()) | values)


def stop(base, data, name="cut"):
    with cut_after(3):
        train(base, data, name=name, lora=LORA, training=TRAINING)


def swapped(text):
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    ids = dict(zip(vocabulary, [*list(vocabulary.values())[1:], 0], strict=True))
    return json.dumps(tokenizer | {"model": tokenizer["model"] | {"vocab": ids}})


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        ("chat_template.jinja", lambda text: text + " Arr!", "the base's chat template"),
        ("tokenizer.json", swapped, "the tokens of split 'train'; the tokens of split 'valid'"),
        ("config.json", lambda text: json.dumps(json.loads(text) | {"rope_theta": 123.0}), "the base model's config"),
    ],
)
def test_another_template_tokenizer_or_config_is_named(name, changed, told, base, data):
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    stop(base, data)
    before = (base / name).read_text()
    (base / name).write_text(changed(before))
    with pytest.raises(IncompatibleError, match=told):
        train(name="cut", resume=True)
    (base / name).write_text(before)
    assert train(name="cut", resume=True).final.iteration == 6


def test_other_tokens_of_the_same_rows_are_named(base, data, monkeypatch):
    from mlx_adapters.data import tokenizing as rows

    stop(base, data)
    plain = rows._plain_conversation
    with monkeypatch.context() as patch:
        patch.setattr(rows, "_plain_conversation", lambda *a: (plain(*a)[0], plain(*a)[1][1:]))
        with pytest.raises(IncompatibleError, match="the tokens of split 'train'; the tokens of split 'valid'"):
            train(name="cut", resume=True)
    assert train(name="cut", resume=True).final.iteration == 6


def test_a_template_that_prints_the_date_prints_that_of_the_start(base, data):
    (base / "chat_template.jinja").unlink(missing_ok=True)
    change(base / "tokenizer_config.json", chat_template=DATED)
    clock = chat_template_utils.datetime
    stop(base, data)
    train(name="cut", resume=True)
    recipe = files.read_json(adapter_folder("cut") / "recipe.json")
    assert datetime.fromisoformat(recipe["started"]).date() == datetime.now().date()
    train(base, data, name="later", lora=LORA, training=TRAINING)
    later = files.read_json(adapter_folder("later") / "recipe.json")
    assert later["text"]["rows"] != recipe["text"]["rows"]  # to the microsecond another date
    assert later["text"]["chat_template"] == recipe["text"]["chat_template"]
    assert chat_template_utils.datetime is clock


def test_a_run_of_an_older_version_goes_on(base, data):
    stop(base, data)
    path = adapter_folder("cut") / "recipe.json"
    added = ("text", "started", "base_config")
    files.write_json(path, {key: value for key, value in files.read_json(path).items() if key not in added})
    train(name="cut", resume=True)
    assert files.read_json(path).keys() >= set(added)
    train(base, data, name="whole", lora=LORA, training=TRAINING)
    ours, whole = outcome(adapter_folder("cut")), outcome(adapter_folder("whole"))
    assert ours["adapters.safetensors"] == whole["adapters.safetensors"]
