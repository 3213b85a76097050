"""Packs: deterministic to write, safe to read; folders and files of strangers."""

import gzip
import io
import json
import os
import tarfile
import zlib

import mlx.core as mx
import pytest
from helpers.adapters import make_adapter, make_mlx_lm_folder, make_run
from helpers.odd_values import json_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_adapters.adapters import keeping
from mlx_adapters.adapters.adding import add
from mlx_adapters.adapters.packing import pack
from mlx_adapters.adapters.verifying import verify
from mlx_adapters.errors import AdapterError, ConfigError, ExistsError, FormatError, NotFoundError
from mlx_adapters.merging.recipes import scale
from mlx_adapters.models.adapter import read_adapter
from mlx_adapters.sources import lookup, registry
from mlx_adapters.storage import files, unpacking


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama")


def archive(path, members, mode="w:gz", format=tarfile.USTAR_FORMAT):
    """A .tar.gz of (name or TarInfo, bytes)."""
    with tarfile.open(path, mode, format=format) as tar:
        for info, content in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members_of(folder):
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()]


def left_behind(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".mlx-adapters-tmp-")]


# -- round trips --------------------------------------------------------------------------------------


def test_a_pack_has_the_same_bytes_each_time_and_comes_back_equal(base, tmp_path):
    folder = make_run(base, "sql")
    first = pack("sql", tmp_path / "a.tar.gz", checkpoints=True)
    os.utime(folder / "adapter_config.json", (1, 1))
    again = pack("sql", tmp_path / "b.tar.gz", checkpoints=True)
    assert first.sha256 == again.sha256 and first.files == again.files
    added = add(first.path, name="copy")
    assert (added.kind, added.name, added.iterations) == ("adapter", "copy", (100, 200, 300))
    for iteration in (None, 100, 200, 300):
        assert read_adapter(added.folder, iteration).fingerprint == read_adapter(folder, iteration).fingerprint
    assert lookup.load_adapter("copy").metadata["validation_losses"]
    assert verify("copy").sound
    with tarfile.open(first.path) as tar:
        assert tar.getnames() == [f"sql/{name}" for name in first.files]


def test_an_adapter_in_memory_is_packed_as_it_is_there(base, tmp_path):
    make_run(base, "sql")
    named = lookup.load_adapter("sql")
    changed = scale("sql", 0.5)
    for adapter, own in ((named, "sql"), (changed, changed.name), (lookup.load_adapter("sql@100"), "sql")):
        target = tmp_path / f"{len(list(tmp_path.iterdir()))}.tar.gz"
        with tarfile.open(pack(adapter, target).path) as tar:
            assert {name.partition("/")[0] for name in tar.getnames()} == {own}
        back = add(target, name=target.name.partition(".")[0] + "x")
        assert read_adapter(back.folder).fingerprint == adapter.fingerprint
        with pytest.raises(ExistsError):
            pack(adapter, target)
    with pytest.raises(ConfigError, match="in memory has no checkpoints"):
        pack(named, tmp_path / "x.tar.gz", checkpoints=True)
    assert pack(named.folder, tmp_path / "by-folder.tar.gz").files
    assert not left_behind(tmp_path)


def test_a_checkpoint_is_packed_as_what_the_bare_name_means(base, tmp_path):
    make_run(base, "sql")
    packed = pack("sql@100", tmp_path / "early.tar.gz")
    assert packed.files == ("adapter_config.json", "adapter_metadata.json", "adapters.safetensors")
    added = add(str(packed.path))
    assert added.name == "early" and added.iterations == ()
    assert lookup.load_adapter("early").fingerprint == lookup.load_adapter("sql@100").fingerprint
    assert lookup.load_adapter("early").metadata["iteration"] == 100


def test_a_model_is_packed_and_unpacked_into_a_folder(base, tmp_path):
    (tmp_path / "model").mkdir()
    for name, content in members_of(base):
        (tmp_path / "model" / name).write_bytes(content)
    (tmp_path / "model" / "modeling.py").write_text("import os")
    events = []
    packed = pack(str(tmp_path / "model"), tmp_path / "model.tgz", on_event=events.append)
    assert "modeling.py" not in packed.files and any("modeling.py" in getattr(e, "text", "") for e in events)
    with pytest.raises(ConfigError, match="is a model"):
        add(packed.path)
    assert add(packed.path, out=tmp_path / "out").kind == "model"
    assert dict(members_of(tmp_path / "out")) == dict(members_of(base))
    assert registry.names() == []


def test_a_folder_of_plain_mlx_lm_is_taken_in(base, tmp_path):
    source = make_mlx_lm_folder(base, tmp_path / "plain")
    (source / "train.jsonl").write_text("{}")
    added = add(source)
    assert added.name == "plain" and added.iterations == (100, 200)
    theirs, kept = (json.loads((f / "adapter_config.json").read_text()) for f in (source, added.folder))
    assert tuple(kept["lora_parameters"].pop("keys")) == lookup.load_adapter("plain").config.keys
    del theirs["lora_parameters"]["keys"]
    assert kept == theirs
    assert not (added.folder / "train.jsonl").exists()
    assert lookup.load_adapter("plain").metadata["training"]["iters"] == 200
    assert verify("plain").sound
    os.truncate(source / "adapters.safetensors", 0)
    assert verify("plain").sound, "the registry holds a copy"


def test_add_copies_into_a_folder_and_refuses_to_overwrite(base, tmp_path):
    source = make_mlx_lm_folder(base, tmp_path / "plain")
    add(str(source), name="one")
    with pytest.raises(ExistsError):
        add(str(source), name="one")
    add(str(source), name="one", overwrite=True)
    assert add(str(source), out=tmp_path / "elsewhere").name is None
    assert read_adapter(tmp_path / "elsewhere").metadata["source"] == "mlx-lm"
    with pytest.raises(ConfigError, match="not both"):
        add(str(source), name="x", out=tmp_path / "y")


# -- refusals -----------------------------------------------------------------------------------------


def link(kind, target):
    info = tarfile.TarInfo("adapters.safetensors")
    info.type, info.linkname = kind, target
    return info


def big(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


HOSTILE = {
    "parent": [("../escaped.json", b"{}")],
    "parent inside": [("sql/../../escaped.json", b"{}")],
    "absolute": [("/tmp/escaped.json", b"{}")],
    "deep": [("a/b/escaped.json", b"{}")],
    "backslash": [("..\\escaped.json", b"{}")],
    "only a parent": [("..", b"{}")],
    "symbolic link": [(link(tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "hard link": [(link(tarfile.LNKTYPE, "../../escaped"), b"")],
    "device": [(link(tarfile.CHRTYPE, ""), b"")],
    "pipe": [(link(tarfile.FIFOTYPE, ""), b"")],
    "pickle": [("sql/adapters.bin", b"\x80\x04.")],
    "torch pickle": [("optimizer.pt", b"\x80\x04.")],
    "twice": [("a.json", b"{}"), ("a.json", b"[]")],
    "twice by folders": [("x/a.json", b"{}"), ("y/a.json", b"[]")],
    "control characters": [("a\n\x1b[2J.json", b"{}")],
    "nothing": [],
    "nothing of use": [("README.md", b"hello")],
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(home, tmp_path, how):
    path = archive(tmp_path / "evil.tar.gz", HOSTILE[how])
    before = sorted(tmp_path.rglob("*"))
    for target in ({"name": "evil"}, {"out": tmp_path / "out"}):
        with pytest.raises(FormatError) as caught:
            add(path, **target)
        assert caught.value.message.isprintable()
    assert registry.names() == [] and not left_behind(tmp_path)
    assert [p for p in sorted(tmp_path.rglob("*")) if "home" not in p.parts] == before


def test_long_names_of_the_newer_tar_formats_are_refused(tmp_path):
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = archive(tmp_path / f"{number}.tar.gz", [("x" * 300 + ".json", b"{}")], format=kind)
        with pytest.raises(FormatError):
            add(path)


def test_times_of_the_newer_tar_format_do_no_harm(base, tmp_path):
    folder = make_run(base, "sql")
    members = []
    for name, content in members_of(folder):
        info = tarfile.TarInfo("./sql/" + name)
        info.mtime = 1234567890.25
        members.append((info, content))
    members += [("./sql/._adapters.safetensors", b"Mac OS X"), ("./sql/loss.png", b"png")]
    assert add(archive(tmp_path / "bsd.tar.gz", members, format=tarfile.PAX_FORMAT)).iterations == (100, 200, 300)


def test_bombs_are_refused_before_they_unfold(tmp_path, monkeypatch):
    zeros = gzip.compress(bytes(200 << 20), 9)
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress(big("a.safetensors", 200 << 20)) + zeros)
    with pytest.raises(FormatError, match="more than it may"):
        add(path)
    path.write_bytes(gzip.compress(big("a.safetensors", 8 << 30)))
    with pytest.raises(FormatError, match="more than it may"):
        add(path)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 150 << 20
    path.write_bytes(gzip.compress(header.tobuf(tarfile.USTAR_FORMAT)) + zeros)
    with pytest.raises(FormatError):
        add(path)
    ok = archive(tmp_path / "large.tar.gz", [("a.json", os.urandom(3 << 20))])
    with pytest.raises(FormatError, match="more than it may"):
        add(ok, max_bytes=1 << 20)
    monkeypatch.setattr(unpacking, "MAX_FILES", 20)
    with pytest.raises(FormatError, match="more than 20 entries"):
        add(archive(tmp_path / "many.tar.gz", [(f"{i}.json", b"") for i in range(30)]))
    assert not left_behind(tmp_path)


def test_a_damaged_archive_is_refused(base, tmp_path):
    make_run(base, "sql")
    good = pack("sql", tmp_path / "good.tar.gz").path.read_bytes()
    bad = tmp_path / "bad.tar.gz"
    flipped = bytearray(gzip.decompress(good))
    flipped[5] ^= 1
    wrong_sum = bytearray(good)
    wrong_sum[-6] ^= 1
    goes_on = gzip.compress(gzip.decompress(good) + bytes(4 << 20))
    halves = (b"", b"no archive", good[: len(good) // 2], good[:-4])
    for content in (*halves, bytes(wrong_sum), gzip.compress(bytes(flipped)), goes_on):
        bad.write_bytes(content)
        with pytest.raises(FormatError):
            add(bad)
    assert registry.names() == ["sql"]


def test_contents_are_held_to_the_standard_of_our_own(base, tmp_path):
    source = make_mlx_lm_folder(base, tmp_path / "plain")
    whole = dict(members_of(source))

    def refused(error=FormatError, **changes):
        for name, content in (whole | changes).items():
            (source / name).unlink(missing_ok=True)
            if content is not None:
                (source / name).write_bytes(content)
        with pytest.raises(error) as folder_error:
            add(source, name="x")
        members = [(n, c) for n, c in (whole | changes).items() if c is not None]
        with pytest.raises(AdapterError):
            add(archive(tmp_path / "x.tar.gz", members), name="x")
        assert registry.names() == []
        return str(folder_error.value.message) + str(folder_error.value.hint)

    nan = dict(read_adapter(source).weights)
    nan["model.layers.1.self_attn.q_proj.lora_b"] = mx.full((4, 64), float("nan"))
    mx.save_safetensors(str(tmp_path / "nan.safetensors"), nan)
    assert "NaN" in refused(**{"adapters.safetensors": (tmp_path / "nan.safetensors").read_bytes()})
    assert "NaN" in refused(**{"0000100_adapters.safetensors": (tmp_path / "nan.safetensors").read_bytes()})
    assert "whole safetensors" in refused(**{"adapters.safetensors": whole["adapters.safetensors"][:-9]})
    peft = json.dumps({"peft_type": "LORA", "r": 8}).encode()
    assert "import-peft" in refused(**{"adapter_config.json": peft})
    full = json.dumps({"fine_tune_type": "full"}).encode()
    assert "extract" in refused(**{"adapter_config.json": full})
    assert "no adapter_config.json" in refused(**{"adapter_config.json": None})
    wrong = json.dumps({"sha256": {"adapters.safetensors": "0" * 64}}).encode()
    assert "record names" in refused(**{"adapter_metadata.json": wrong})


def test_an_error_names_what_the_user_named(base, tmp_path):
    folder = make_mlx_lm_folder(base, tmp_path / "given")
    weights = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(weights[:-8])
    with pytest.raises(FormatError, match=f"'{folder}/adapters.safetensors'"):
        add(folder, name="it")
    tensors = {name: array * mx.nan for name, array in make_adapter(base).weights.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    with pytest.raises(FormatError, match="Adapter 'it' holds NaN"):
        add(folder, name="it")


def test_a_source_whose_own_name_is_no_adapters_name_asks_for_one(base, tmp_path):
    make_run(base, "sql")
    pack("sql", tmp_path / "my é.tar.gz")
    with pytest.raises(ConfigError, match="'my é' cannot be") as caught:
        add(tmp_path / "my é.tar.gz")
    assert "--name" in caught.value.hint
    assert add(tmp_path / "my é.tar.gz", name="mine").name == "mine"


def test_what_is_not_there_or_not_a_source(base, tmp_path):
    make_run(base, "sql")
    (tmp_path / "file.zip").write_bytes(b"PK")
    for source, error in {
        "sql": ConfigError,
        "./nowhere": NotFoundError,
        str(tmp_path / "none.tar.gz"): NotFoundError,
        str(tmp_path / "file.zip"): ConfigError,
        "~nobody-here/x": NotFoundError,
        "./x@100": ConfigError,
    }.items():
        with pytest.raises(error):
            add(source)
    with pytest.raises(NotFoundError, match="neither an adapter nor a model"):
        pack(str(tmp_path), tmp_path / "x.tar.gz")
    with pytest.raises(ConfigError, match=r"\.tar\.gz"):
        pack("sql", tmp_path / "x.zip")
    with pytest.raises(NotFoundError):
        pack("nobody", tmp_path / "x.tar.gz")
    (tmp_path / "there.tar.gz").write_bytes(b"")
    with pytest.raises(ExistsError):
        pack("sql", tmp_path / "there.tar.gz")
    source = make_mlx_lm_folder(base, tmp_path / "linked")
    (source / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="is a link"):
        add(source)


# -- fuzz ---------------------------------------------------------------------------------------------

ODD_TEXT = st.sampled_from(
    ["~nobody/x", "a" * 5000, "\0", "../..", "/", "user/repo", "demo", ".", "é", "{}", "user/repo@x"]
)
ODD = json_values | ODD_TEXT
FUZZ = settings(max_examples=400, suppress_health_check=list(HealthCheck))


def mutate(folder, config, parameters, metadata, edits):
    """Overwrite settings of an adapter folder and bytes of its weights."""
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values["lora_parameters"] |= parameters
    path.write_text(json.dumps(values | config))
    path = folder / "adapter_metadata.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | metadata))
    weights = bytearray((folder / "adapters.safetensors").read_bytes())
    for place, value in edits:
        weights[place % len(weights)] = value
    (folder / "adapters.safetensors").write_bytes(weights)


configs = st.dictionaries(
    st.sampled_from(["fine_tune_type", "num_layers", "lora_parameters", "model", "peft_type"]), ODD, max_size=2
)
parameters = st.dictionaries(st.sampled_from(["rank", "scale", "dropout", "keys"]), ODD, max_size=2)
metadatas = st.dictionaries(
    st.sampled_from(["name", "base", "sha256", "iteration", "tags", "date", "training", "validation_losses"]),
    ODD | st.fixed_dictionaries({"name": ODD, "fingerprint": ODD}),
    max_size=3,
)
edits = st.lists(st.tuples(st.integers(0, 1200) | st.integers(0, 10**6), st.integers(0, 255)), max_size=4)


@pytest.fixture
def fuzzed(base, tmp_path):
    """A function that makes one small fresh folder after the other."""
    count = iter(range(10**6))
    template = make_mlx_lm_folder(base, tmp_path / "template", iterations=(100,))
    (template / "0000100_adapters.safetensors").unlink()
    contents = members_of(template)

    def fresh(parent):
        folder = parent / f"f{next(count)}"
        folder.mkdir(parents=True)
        for name, content in contents:
            (folder / name).write_bytes(content)
        return folder

    return fresh


@FUZZ
@given(config=configs, parameters=parameters, metadata=metadatas, edits=edits)
def test_fuzzed_folders_are_added_whole_or_refused(fuzzed, tmp_path, config, parameters, metadata, edits):
    folder = fuzzed(tmp_path / "sources")
    mutate(folder, config, parameters, metadata, edits)
    try:
        added = add(folder)
    except AdapterError as error:
        assert error.message
        assert not registry.adapter_folder(folder.name).exists()
    else:
        assert lookup.load_adapter(added.name).check()
        keeping.remove(added.name)


@FUZZ
@given(config=configs, parameters=parameters, metadata=metadatas, edits=edits)
def test_fuzzed_entries_are_verified_and_listed(fuzzed, tmp_path, config, parameters, metadata, edits):
    folder = fuzzed(registry.adapters_folder())
    mutate(folder, config, parameters, metadata, edits)
    result = verify(folder.name)
    assert result.checks and result.sound == (not result.problems)
    assert registry.read_entry(folder).name == folder.name
    try:
        lookup.load_adapter(folder.name)
        assert next(check for check in result.checks if check.what == "tensors").sound
    except AdapterError:
        assert not result.sound
    files.remove(folder)


@FUZZ
@given(data=st.data())
def test_fuzzed_archives_are_added_whole_or_refused(fuzzed, tmp_path, data):
    folder = fuzzed(tmp_path / "sources")
    plain = tmp_path / f"{folder.name}.tar"
    archive(plain, [(f"x/{name}", content) for name, content in members_of(folder)], mode="w")
    content = bytearray(plain.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 599) | st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    packed = bytearray(zlib.compress(bytes(content), 1, wbits=31))
    if data.draw(st.booleans()):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"{folder.name}.tar.gz"
    path.write_bytes(packed)
    try:
        added = add(path)
    except AdapterError as error:
        assert error.message and not registry.adapter_folder(folder.name).exists()
    else:
        keeping.remove(added.name)
    plain.unlink(), path.unlink()
