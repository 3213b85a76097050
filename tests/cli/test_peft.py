"""import-peft, export-peft and fuse --from-peft as a user types them."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from click.testing import CliRunner, Result
from helpers.peft import FIXTURES

from mlx_adapters.cli import cli
from mlx_adapters.errors import AdapterError
from mlx_adapters.models.loading import load_model
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.sources.registry import adapter_folder
from mlx_adapters.storage import files

LLAMA = str(FIXTURES / "llama" / "base")


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def test_import_show_and_export(tmp_path: Path):
    result = run("import-peft", str(FIXTURES / "llama" / "rslora"), "--base", LLAMA, "--name", "sql", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["name"] == "sql" and told["config"]["rank"] == 3 and told["base"].endswith("llama/base")
    assert "sql" in run("list").stdout
    result = run("export-peft", "sql", str(tmp_path / "out"), "--base-model", "some/model")
    assert result.exit_code == 0 and "16 tensors" in result.stdout and "some/model" in result.stdout
    before = mx.load(str(FIXTURES / "llama" / "rslora" / "adapter_model.safetensors"))
    after = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    assert before.keys() == after.keys() and all(mx.array_equal(before[k], after[k]) for k in before)


def test_a_refusal_names_the_way_out_and_that_way_works(tmp_path: Path):
    source = FIXTURES / "llama" / "refused" / "modules-to-save"
    result = run("import-peft", str(source), "--base", LLAMA, "--name", "it")
    assert isinstance(result.exception, AdapterError) and "fuse --from-peft" in result.exception.hint
    result = run("fuse", "--from-peft", str(source), "--base", LLAMA, "--no-check", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    expected = mx.load(str(FIXTURES / "llama" / "logits.safetensors"))
    logits = load_model(resolve_base(tmp_path / "out")).logits(expected["input_ids"])
    assert mx.abs(logits - expected["refused/modules-to-save"]).max().item() < 1e-4


def test_from_peft_wants_a_base_and_no_other_adapter(tmp_path: Path):
    source = str(FIXTURES / "llama" / "dora")
    assert run("fuse", "--from-peft", source, str(tmp_path / "out")).exit_code == 2
    assert run("fuse", "--from-peft", source, "--base", LLAMA, "sql", str(tmp_path / "out")).exit_code == 2


def test_a_warning_goes_to_stderr_and_json_stays_one_document():
    source = str(FIXTURES / "llama" / "newer-fields")
    result = run("import-peft", source, "--base", LLAMA, "--name", "it", "--json")
    assert json.loads(result.stdout)["name"] == "it"
    assert "Warning: Settings that this version does not know were ignored: another" in result.stderr


def test_an_import_is_told_in_words():
    result = run("import-peft", str(FIXTURES / "llama" / "dora"), "--base", LLAMA, "--name", "it")
    assert result.stdout.startswith("Imported 'it': dora, rank 4, scale 2, 14 layers, ")


def test_a_name_is_made_by_a_template():
    words = ("import-peft", str(FIXTURES / "llama" / "dora"), "--base", LLAMA, "--name", "sql")
    for version in ("v1", "v2"):
        result = run(*words, "--name-template", "{task}_{base}_{version}", "--json")
        assert json.loads(result.stdout)["name"] == f"sql_base_{version}"


def test_a_tied_embedding_is_tied_on_request_only(tmp_path: Path):
    words = (str(FIXTURES / "qwen2" / "tied-embedding"), "--base", str(FIXTURES / "qwen2" / "base"), "--name", "it")
    assert "--tie" in run("import-peft", *words).exception.hint
    assert run("import-peft", *words, "--tie").exit_code == 0
    assert run("export-peft", "it", str(tmp_path / "out")).exit_code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True and "lm_head" in config["target_modules"]


def test_a_folder_in_the_current_directory_needs_no_dot(tmp_path: Path, monkeypatch):
    shutil.copytree(FIXTURES / "llama" / "dora", tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    assert run("import-peft", "lora", "--base", LLAMA, "--name", "it").exit_code == 0


def test_an_export_whose_base_peft_cannot_load_is_told_in_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("import-peft", str(FIXTURES / "llama" / "rslora"), "--base", LLAMA, "--name", "sql")
    file = adapter_folder("sql") / "adapter_metadata.json"
    for name in (LLAMA, "demo", "/models/mine"):
        metadata = files.read_json(file)
        metadata["peft"]["config"]["base_model_name_or_path"] = name
        files.write_json(file, metadata)
        out = run("export-peft", "sql", str(tmp_path / "out"), "--overwrite")
        (said,) = [line for line in out.stderr.splitlines() if line.startswith("Warning")]
        assert f"'{name}', which is known to this machine only" in said and "--base-model user/name" in said
    out = run("export-peft", "sql", str(tmp_path / "out"), "--overwrite", "--base-model", "some/model")
    assert "Warning" not in out.stderr
