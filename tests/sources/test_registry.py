"""Named adapters: finding, naming, choosing, removing, alone and against other processes and kills."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.adapters import make_adapter, make_mlx_lm_folder, make_run
from helpers.odd_values import json_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_adapters.adapters import keeping
from mlx_adapters.errors import ConfigError, ExistsError, FormatError, NotFoundError, TrainingError
from mlx_adapters.models.adapter import read_adapter
from mlx_adapters.sources import lookup, registry
from mlx_adapters.storage import files, locks, paths

TESTS = Path(__file__).parents[1]


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


def test_list_filters_by_base_and_tag_and_reads_what_is_there(base, tiny_model):
    make_run(base, "sql")
    registry.register(make_adapter(tiny_model("qwen3")), "chat")
    keeping.tag("chat", ["prod"])
    sql = registry.list_adapters(base=str(base))
    assert [e.name for e in sql] == ["sql"]
    assert (sql[0].iterations, sql[0].iteration, sql[0].best_validation_loss, sql[0].rank) == (
        (100, 200, 300),
        200,
        1.0,
        4,
    )
    assert sql[0].problem is None and sql[0].size_bytes > 0
    assert [e.name for e in registry.list_adapters(tag="prod")] == ["chat"]
    assert [e.name for e in registry.list_adapters()] == ["chat", "sql"]


DAMAGE = {
    "no weights": lambda f: (f / "adapters.safetensors").unlink(),
    "cut weights": lambda f: os.truncate(f / "adapters.safetensors", 1000),
    "random weights": lambda f: (f / "adapters.safetensors").write_bytes(os.urandom(500)),
    "no config": lambda f: (f / "adapter_config.json").unlink(),
    "config no JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "config a list": lambda f: (f / "adapter_config.json").write_text("[1]"),
    "config of nothing": lambda f: (f / "adapter_config.json").write_text("{}"),
    "config of text": lambda f: (f / "adapter_config.json").write_text('{"lora_parameters": "x", "model": 3}'),
    "metadata no JSON": lambda f: (f / "adapter_metadata.json").write_bytes(b"\xff\xfe"),
    "config a folder": lambda f: ((f / "adapter_config.json").unlink(), (f / "adapter_config.json").mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_entry_is_reported_and_hides_nothing(base, how):
    make_run(base, "good")
    DAMAGE[how](make_run(base, "bad"))
    bad, good = registry.list_adapters()
    assert bad.problem and not good.problem
    keeping.remove("bad")
    assert registry.names() == ["good"]


KEYS = ["name", "base", "tags", "sha256", "iteration", "date", "status", "best_validation_loss", "validation_losses"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(st.sampled_from(KEYS), json_values), config=json_values, parameters=json_values)
def test_any_json_in_an_entry_is_read_or_reported(home, metadata, config, parameters):
    folder = registry.adapter_folder("odd")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_metadata.json").write_text(json.dumps(metadata))
    (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": parameters, "model": config}))
    (entry,) = registry.list_adapters()
    assert entry.problem  # there are no weights
    assert isinstance(entry.created, str | None) and isinstance(entry.base, str | None)
    keeping.best_iteration(entry)


def test_a_folder_of_plain_mlx_lm_is_an_adapter_as_it_is(base, home):
    make_mlx_lm_folder(base, registry.adapter_folder("plain"))
    (entry,) = registry.list_adapters(base=str(base))
    assert (entry.name, entry.rank, entry.scale, entry.iterations, entry.problem) == ("plain", 4, 2.0, (100, 200), None)
    adapter = lookup.load_adapter("plain@100")
    assert adapter.metadata["source"] == "mlx-lm" and adapter.metadata["training"]["learning_rate"] == 1e-5
    keeping.tag("plain", ["old"])
    assert registry.list_adapters()[0].tags == ("old",) and lookup.load_adapter("plain").base_name == str(base)


def test_rename_moves_everything_and_the_new_name_counts(base):
    make_run(base, "sql")
    keeping.tag("sql", ["prod"])
    assert keeping.rename("sql", "queries").iterations == (100, 200, 300)
    assert registry.names() == ["queries"] and lookup.load_adapter("queries@100").name == "queries@100"
    make_run(base, "sql")
    with pytest.raises(ExistsError):
        keeping.rename("sql", "queries")
    with pytest.raises(ConfigError):
        keeping.rename("sql", "../out")
    with pytest.raises(NotFoundError):
        keeping.rename("nobody", "somebody")
    with pytest.raises(ConfigError, match="already"):
        keeping.rename("sql", "sql")


def test_tags_are_added_and_removed(base):
    make_run(base, "sql")
    assert keeping.tag("sql", ["prod", "v2"]) == ("prod", "v2")
    assert keeping.tag("sql", ["best"], remove=["prod", "never"]) == ("best", "v2")
    with pytest.raises(ConfigError, match="cannot be a tag"):
        keeping.tag("sql", ["two words"])


def test_use_decides_what_the_bare_name_means(base):
    folder = make_run(base, "sql")
    entry = keeping.use("sql@100")
    assert entry.iteration == 100
    assert lookup.load_adapter("sql").fingerprint == lookup.load_adapter("sql@100").fingerprint
    recorded = registry.checksums_of(entry.metadata)["adapters.safetensors"]
    assert recorded == files.sha256(folder / "0000100_adapters.safetensors")
    assert files.sha256(folder / "0000200_adapters.safetensors") != recorded, "the other checkpoint is untouched"
    with pytest.raises(NotFoundError, match="no checkpoint 700") as caught:
        keeping.use("sql@700")
    assert "100, 200, 300" in caught.value.hint
    with pytest.raises(ConfigError, match="names no checkpoint"):
        keeping.use("sql")
    os.truncate(folder / "0000300_adapters.safetensors", 400)
    with pytest.raises(FormatError):
        keeping.use("sql@300")
    assert lookup.load_adapter("sql").fingerprint == lookup.load_adapter("sql@100").fingerprint


def test_prune_keeps_the_best_the_last_and_the_one_in_use(base):
    folder = make_run(base, "sql", losses=[(i, abs(i - 300) + 1.0) for i in range(100, 900, 100)])
    keeping.use("sql@100")
    before = paths.size_on_disk(folder)
    planned = keeping.prune("sql", keep_last=2, dry_run=True)
    assert paths.size_on_disk(folder) == before
    done = keeping.prune("sql", keep_last=2)
    assert done == planned and done.iterations == (200, 400, 500, 600)
    assert done.freed_bytes == before - paths.size_on_disk(folder) > 0
    assert registry.read_entry(folder).iterations == (100, 300, 700, 800)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["0000100", "0000300", "0000700", "0000800"]
    for iteration in (None, 100, 300, 700, 800):
        read_adapter(folder, iteration)
    assert keeping.prune("sql", keep_best=False, keep_last=0).iterations == (300, 700, 800)
    assert lookup.load_adapter("sql").metadata["iteration"] == 100


def test_remove_takes_an_adapter_or_one_checkpoint(base):
    make_run(base, "sql")
    assert keeping.remove("sql@100").iterations == (100,)
    with pytest.raises(ConfigError, match="means this checkpoint"):
        keeping.remove("sql@200")
    with pytest.raises(NotFoundError):
        keeping.remove("sql@100")
    assert keeping.remove("sql").whole and registry.names() == []
    with pytest.raises(NotFoundError):
        keeping.remove("sql")
    for outside in ("./sql", "user/repo"):
        with pytest.raises(ConfigError, match="not in the registry"):
            keeping.remove(outside)


def test_an_adapter_that_is_being_trained_is_left_alone(base):
    make_run(base, "sql")
    with locks.lock_file(registry.adapter_folder("sql")):  # as a run holds it
        for change in (
            lambda: keeping.rename("sql", "other"),
            lambda: keeping.remove("sql"),
            lambda: keeping.prune("sql"),
            lambda: keeping.use("sql@100"),
            lambda: keeping.tag("sql", ["x"]),
            lambda: registry.register(make_adapter(base), "sql", overwrite=True),
        ):
            with pytest.raises(TrainingError, match="is being trained"):
                change()
    assert registry.read_entry(registry.adapter_folder("sql")).iterations == (100, 200, 300)


def test_name_templates(base):
    today = time.strftime("%Y%m%d")
    assert keeping.fill_template("{task}_{version}_{date}", "data/sql") == f"sql_v1_{today}"
    registry.register(make_adapter(base), f"sql_v1_{today}")
    assert keeping.fill_template("{task}_{version}_{date}", "sql") == f"sql_v2_{today}"
    assert keeping.fill_template("{base}-r{rank}", "x", base="org/Qwen3 0.6B", rank=8) == "Qwen3-0.6B-r8"
    for bad in ("{tsk}", "{task.__class__}", "{task!r}", "{task:>9}", "{", "{}", "/{task}", "", "{0}"):
        with pytest.raises(ConfigError):
            keeping.fill_template(bad, "sql")


# -- several processes ----------------------------------------------------------------------------------


def start(home: Path, code: str, *arguments: str) -> subprocess.Popen:
    prelude = f"import sys; sys.path[:0] = [{str(TESTS.parent)!r}, {str(TESTS)!r}]\n"
    environment = os.environ | {"MLX_ADAPTERS_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


REGISTER = """
from helpers.adapters import make_adapter
from mlx_adapters.adapters import keeping as housekeeping
from mlx_adapters.sources import registry
from mlx_adapters.errors import ExistsError
adapter, who = make_adapter(sys.argv[1], seed=int(sys.argv[2])), sys.argv[2]
won = 0
for i in range(12):
    registry.register(adapter, f"own-{who}-{i}")
    try:
        registry.register(adapter, f"shared-{i}"); won += 1
    except ExistsError:
        pass
    housekeeping.tag("common", [f"t{who}-{i}"])
print(won, flush=True)
"""


def test_two_processes_at_once_lose_nothing(base, home):
    registry.register(make_adapter(base), "common")
    workers = [start(home, REGISTER, str(base), who) for who in "12"]
    results = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    assert sum(int(result[0]) for result in results) == 12, "each shared name was won once"
    entries = {entry.name: entry for entry in registry.list_adapters()}
    assert len(entries) == 1 + 3 * 12 and not any(entry.problem for entry in entries.values())
    assert set(entries["common"].tags) == {f"t{who}-{i}" for who in "12" for i in range(12)}
    fingerprints = {who: lookup.load_adapter(f"own-{who}-0").fingerprint for who in "12"}
    for i in range(12):
        assert lookup.load_adapter(f"shared-{i}").fingerprint in fingerprints.values()


OVERWRITE = """
from helpers.adapters import make_adapter
from mlx_adapters.adapters import keeping as housekeeping
from mlx_adapters.sources import registry
adapters = [make_adapter(sys.argv[1], seed=seed) for seed in (1, 2)]
print("ready", flush=True)
while True:
    for adapter in adapters:
        registry.register(adapter, "sql", overwrite=True)
        housekeeping.rename("sql", "moved")
        housekeeping.rename("moved", "sql")
        housekeeping.tag("sql", ["a"])
"""


def test_a_kill_at_any_moment_leaves_one_whole_adapter(base, home):
    allowed = {make_adapter(base, seed=seed).fingerprint for seed in (1, 2)}
    rng = random.Random(0)
    for _ in range(4):
        worker = start(home, OVERWRITE, str(base))
        assert worker.stdout.readline().strip() == "ready"
        time.sleep(0.05 + 0.2 * rng.random())
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        (entry,) = registry.list_adapters()
        assert entry.problem is None and lookup.load_adapter(entry.name).fingerprint in allowed
        if entry.name == "moved":
            keeping.rename("moved", "sql")
    registry.register(make_adapter(base, seed=1), "sql", overwrite=True)


def test_the_loss_shown_is_that_of_the_checkpoint_in_use(tmp_path):
    losses = {"validation_losses": [[4, 3.5], [8, 3.11]]}
    entry = registry.Entry("a", tmp_path, iteration=4, best_validation_loss=3.11, metadata=losses)
    assert entry.validation_loss == 3.5
    assert dataclasses.replace(entry, iteration=6).validation_loss is None
    assert dataclasses.replace(entry, metadata={}).validation_loss == 3.11
