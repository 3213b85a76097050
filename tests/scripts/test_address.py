"""The repository's address stands in one place, and everything that names it agrees."""

import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "address"))
address, files, LINES = SCRIPT["address"], SCRIPT["files"], SCRIPT["LINES"]


@pytest.fixture
def copies(tmp_path):
    for name in LINES:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_what_names_the_address_agrees():
    assert files(address()) == {ROOT / name: (ROOT / name).read_text() for name in LINES}


def test_one_line_sets_it_everywhere(copies):
    for url in ("https://example.org/us/mlx_adapters", "https://other.example/them/fork", None):
        for path, text in files(url, copies).items():
            path.write_text(text)
        assert address(copies) == url
        assert all((url or "example") in path.read_text() for path in files(url, copies) if url)
        assert all(path.read_text() == text for path, text in files(url, copies).items())
        assert not url or f"`git+{url}`" in (copies / "README.md").read_text()
    assert "example" not in "".join((copies / name).read_text() for name in ("CITATION.cff", "mkdocs.yml"))


def test_a_file_without_a_place_for_it_is_named(copies):
    (copies / "README.md").write_text("# mlx_adapters\n")
    with pytest.raises(ValueError, match=r"README\.md has no place"):
        files("https://example.org/us/mlx_adapters", copies)
