"""`doctor`: hosts are asked as `mlx.launch` reaches them; ssh is replaced by a program that runs the command here."""

import json
import os
import stat
import sys

import pytest
from click.testing import CliRunner
from helpers.training_tools import write_data

from mlx_adapters.cli import cli
from mlx_adapters.demo import hosts
from mlx_adapters.errors import FormatError, NotFoundError

FAKE_SSH = """#!/bin/bash
while [ "$1" = -o ]; do shift 2; done
host=$1; shift
[ "$host" = gone ] && { echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255; }
[ "$host" = stale ] && cd "$STALE" && set -- "${1#*; }"
exec bash -c "$*"
"""


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(FAKE_SSH)
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    write_data(tmp_path / "here" / "data")
    write_data(tmp_path / "stale" / "data", seed=1)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STALE", str(tmp_path / "stale"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.chdir(tmp_path / "here")
    return ["--base", str(tiny_model()), "--data", "data"]


def test_equal_hosts_are_equal(place):
    result = CliRunner().invoke(cli, ["doctor", "--hosts", "127.0.0.1,mac-b", *place, "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 0 and document["differences"] == []
    first, second = document["hosts"]
    assert first["facts"] == second["facts"] and {"mlx", "base", "data, train"} <= first["facts"].keys()
    assert (first["host"], second["host"]) == ("127.0.0.1", "mac-b")


def test_what_differs_and_who_is_gone_is_named(place, tmp_path):
    listed = [{"ssh": "127.0.0.1", "ips": ["10.0.0.1"]}, {"ssh": "stale"}, {"ssh": "gone"}]
    (tmp_path / "hosts.json").write_text(json.dumps({"hosts": listed, "backend": "ring"}))
    result = CliRunner().invoke(cli, ["doctor", "--hostfile", str(tmp_path / "hosts.json"), *place])
    assert result.exit_code == 1
    assert "'stale' differs from '127.0.0.1': data, train (13 rows " in result.stderr
    assert "'gone' cannot be asked: ssh: connect to host gone port 22: No route to host" in result.stderr
    assert "mlx_adapters" in result.stdout and "base" in result.stdout


def test_a_host_without_the_base_says_so(place):
    facts = hosts.ask_hosts(["mac-b"], ["--base", "./none"]).hosts[0]
    assert facts.error and facts.error.startswith("Error: There is no model at './none'")


def test_this_machine_alone_and_wrong_hosts(place, tmp_path):
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    assert result.exit_code == 0 and len(json.loads(result.stdout)["hosts"]) == 1
    assert CliRunner().invoke(cli, ["doctor", "--hosts", "a,"]).exit_code != 0
    with pytest.raises(NotFoundError, match="cannot be read"):
        hosts.read_hosts(None, tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"hosts": 5}')
    with pytest.raises(FormatError, match="no host file of mlx"):
        hosts.read_hosts(None, tmp_path / "odd.json")
