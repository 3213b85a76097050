"""Whoever reads a name while it is changed sees it as it was before, or as it is after: at whatever moment."""

import contextlib
import functools
import itertools
import json
import sys
import tarfile
import threading
from dataclasses import replace

import pytest
from helpers.adapters import make_adapter, make_run
from helpers.training_tools import write_data

from mlx_adapters import LoraConfig, TrainConfig, train
from mlx_adapters.adapters import inspecting, keeping, packing
from mlx_adapters.models import adapter as adapters
from mlx_adapters.models import metadata
from mlx_adapters.sources import lookup, registry
from mlx_adapters.storage import files, paths, replacing, temporaries, tensor_files
from mlx_adapters.training import state as states
from mlx_adapters.training.folder import RunFolder
from mlx_adapters.training.recipe import read_recipe

READ_IN = {module.__file__ for module in (adapters, inspecting, metadata, packing, registry, replacing, tensor_files)}

WRITERS = (keeping, files, paths, registry, replacing, states, temporaries)
WRITTEN_IN = {module.__file__ for module in WRITERS}
PURE = {"genexpr>", "listcomp>", "dictcomp>", "setcomp>", "lambda>", "half", "text", "fit", "fit_fields", "is_number"}


def recorded(record):
    return tuple(json.dumps(record.get(name)) for name in ("tags", "iteration", "sha256", "chosen_by"))


def loaded():
    adapter = lookup.load_adapter("sql")
    return adapter.config.rank, adapter.config.scale, adapter.fingerprint, *recorded(adapter.metadata)


def listed():
    (entry,) = registry.list_adapters()
    return entry.problem, entry.rank, entry.scale, entry.size_bytes, *recorded(entry.metadata)


def described():
    details = inspecting.describe("sql")
    saved = [(c.iteration, c.validation_loss, c.in_use) for c in details.checkpoints]
    losses = json.dumps(details.metadata.get("validation_losses"))
    return details.rank, details.scale, details.layers, saved, losses, *recorded(details.metadata)


def packed(tmp_path):
    with tarfile.open(packing.pack("sql", tmp_path / "sql.tar.gz", overwrite=True).path) as pack:
        members = {member.name.partition("/")[2]: pack.extractfile(member).read() for member in pack}
    (tmp_path / "weights").write_bytes(members["adapters.safetensors"])
    config, record = (json.loads(members[f"adapter_{name}.json"]) for name in ("config", "metadata"))
    return config["lora_parameters"]["scale"], files.sha256(tmp_path / "weights"), record.get("iteration")


def at_call(number, interrupt, files_of=READ_IN):
    """Interrupts the block at the start of the `number`th call in these files; `.came`: whether there were so many."""

    class Interrupted:
        came, seen = False, 0

        def __enter__(self):
            sys.setprofile(self.look)
            return self

        def __exit__(self, *_):
            sys.setprofile(None)

        def look(self, frame, event, _):
            code = frame.f_code
            if event == "call" and code.co_filename in files_of and code.co_name.lstrip("<_") not in PURE:
                self.seen += 1
                if self.seen == number:
                    sys.setprofile(None)
                    self.came = True
                    interrupt()

    return Interrupted()


def changes_of(how, base):
    """Two changes of "sql", each of which undoes the other."""
    if how == "use":
        make_run(base, "sql")
        return [lambda: keeping.use("sql@100"), lambda: keeping.use("sql@200")]
    if how == "killed":  # a use that never came to its record
        folder = make_run(base, "sql")
        chosen = [folder / f"{iteration:07d}_adapters.safetensors" for iteration in (100, 300)]
        return [lambda path=path: files.copy_file(path, folder / "adapters.safetensors") for path in chosen]
    if how == "refresh":  # a run whose best checkpoint is another one
        settings = TrainConfig(iterations=4, batch_size=2, save_every=2, eval_every=2)
        run = train(base, write_data(paths.home() / "rows"), name="sql", lora=LoraConfig(rank=2), training=settings)
        folder = RunFolder(run.best, run.folder, read_recipe(run.folder), contextlib.ExitStack(), begun=True)
        ended = states.read_state(run.folder, 4)
        return [lambda best=best: folder.refresh(replace(ended, best_iteration=best)) for best in (2, 4)]
    if how == "record":  # as a run writes it that goes on
        record = make_run(base, "sql") / "adapter_metadata.json"
        known = [[[i, loss + add] for i, loss in files.read_json(record)["validation_losses"]] for add in (0, 1)]
        versions = [files.read_json(record) | {"validation_losses": losses} for losses in known]
        return [lambda v=v: files.write_json(record, v) for v in versions]
    versions = [make_adapter(base, seed=seed, rank=seed, factor=seed) for seed in (1, 2)]
    versions = [replace(v, metadata=v.metadata | {"tags": [f"t{i}"]}) for i, v in enumerate(versions)]
    return [lambda v=v: registry.register(v, "sql", overwrite=True) for v in versions]


READS = (loaded, listed, described, packed)


ALL = [(read, how) for read in READS for how in ("overwrite", "use")]


@pytest.mark.parametrize("read, how", [*ALL, (described, "record"), (loaded, "killed"), (described, "killed")])
def test_a_change_in_the_middle_of_a_reading(how, read, tiny_model, tmp_path):
    reading = read if read is not packed else lambda: packed(tmp_path)
    changes, allowed = changes_of(how, tiny_model("llama")), []
    for change in changes:
        change()
        allowed.append(reading())
    assert allowed[0] != allowed[1]
    for number in itertools.count(1, 1 if read in (loaded, listed) else 3):
        with at_call(number, changes[number % 2 - 1]) as changing:
            seen = reading()
        assert seen in allowed, f"at call {number}"
        if not changing.came:
            break
    assert number > 20


@pytest.mark.parametrize(
    "read, how", [*(pair for pair in ALL if pair[0] is not packed), (loaded, "refresh"), (described, "refresh")]
)
def test_a_reading_in_the_middle_of_a_change(how, read, tiny_model):
    """In another thread; where it waits for the end of the change, this goes on."""
    changes, allowed = changes_of(how, tiny_model("llama")), []
    for change in changes:
        change()
        allowed.append(read())

    def beside(seen):
        reader = threading.Thread(target=lambda: seen.append(read()))
        reader.start()
        reader.join(0.05)
        readers.append(reader)

    for number in itertools.count(1, 3):
        seen, readers = [], []
        with at_call(number, functools.partial(beside, seen), WRITTEN_IN) as reading:
            changes[number % 2 - 1]()
        for reader in readers:
            reader.join()
        assert len(seen) == len(readers) and all(one in allowed for one in seen), f"at call {number}"
        if not reading.came:
            break
    assert number > 20
