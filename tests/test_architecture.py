"""The rooms of the house: who may import whom, who may write, print and spell tensor names."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from mlx_adapters.units import count

PACKAGE = Path(__file__).parent.parent / "mlx_adapters"
# A room imports only from rooms below it here, lazily or not. docs/architecture.md says what each of them is.
ROOMS = [
    "cli",
    "demo",
    "publishing",
    "serving",
    "protocols",
    "answers",
    "benchmarking",
    "adapters",
    "merging",
    "evaluation",
    "fusion",
    "training",
    "calibration",
    "optimization",
    "starts",
    "generation",
    "drafting",
    "data",
    "rows",
    "sources",
    "peft_format",
    "assembly",
    "gguf_format",
    "checkpoints",
    "runtime",
    "prompt_caches",
    "rounding",
    "models",
    "surgery",
    "templates",
    "system",
    "storage",
    "config",
    "display",
    "events",
    "errors",
    "threads",
    "units",
]
ROOM_OF_LAYER = {room: number for number, room in enumerate(reversed(ROOMS))}
# From demo to surgery a room asks these and no others.
ARROWS = {
    "demo": "benchmarking evaluation fusion training data sources",
    "publishing": "benchmarking sources checkpoints",
    "serving": "protocols answers generation sources runtime",
    "protocols": "answers generation rows",
    "answers": "",
    "benchmarking": "evaluation generation data sources",
    "adapters": "evaluation data sources peft_format checkpoints",
    "merging": "evaluation sources",
    "evaluation": "fusion generation data sources surgery",
    "fusion": "calibration data sources peft_format assembly checkpoints",
    "training": "optimization starts data sources",
    "calibration": "data assembly rounding surgery",
    "optimization": "data assembly rounding surgery",
    "starts": "data sources surgery",
    "generation": "drafting sources runtime prompt_caches surgery",
    "drafting": "sources surgery",
    "data": "rows sources",
    "rows": "",
    "sources": "peft_format checkpoints",
    "peft_format": "checkpoints",
    "assembly": "gguf_format checkpoints rounding",
    "gguf_format": "rounding",
    "checkpoints": "",
    "runtime": "surgery",
    "prompt_caches": "surgery",
    "rounding": "",
    "surgery": "",
}
LEAST_FILES, MOST_FILES, MOST_LINES = 3, 9, 300
LONG = {"demo.questions"}  # data
PRINTING = ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write", "rich.print")
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def code_lines(path: Path) -> int:
    """The lines of a file without its docstrings, which tell public names at length."""
    docs = (n.value for n in ast.walk(tree_of(path)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    return len(path.read_text().splitlines()) - sum(doc.end_lineno - doc.lineno + 1 for doc in docs)


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.AST):
    """(imported module's dotted name, whether at module level) of every import."""
    top = set(map(id, ast.iter_child_nodes(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = PACKAGE.parent / node.module.replace(".", "/")
            for alias in node.names:  # `from package import module` imports the module
                is_module = (folder / f"{alias.name}.py").exists() or (folder / alias.name).is_dir()
                yield f"{node.module}.{alias.name}" if is_module else node.module, id(node) in top


def strings(tree: ast.AST):
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs)
    return (n.value for n in constants if isinstance(n.value, str))


def calls(tree: ast.AST):
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def writes(function: str, call: ast.Call) -> bool:
    name = function.rpartition(".")[2]
    if name in ("write_bytes", "save_safetensors", "savez", "save_gguf"):
        return True
    if name == "write_text" and function not in ("files.write_text", "write_text"):
        return True
    modes = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
    text = "".join(str(m.value) for m in modes if isinstance(m, ast.Constant))
    return function in ("open", "io.open", "os.fdopen", "gzip.open") and any(c in text for c in "wax+")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_keeps_to_its_room(path: Path):
    tree, here = tree_of(path), room(path)
    called = list(calls(tree))
    for name, _ in imports(tree):
        assert module(path) == "system.door" or name.split(".")[0] != "mlx_lm", "mlx_lm is imported in door.py only"
        assert here not in ("config", "errors") or name.split(".")[0] != "mlx", "no MLX here"
        if name.startswith("mlx_adapters.") and here not in ("__init__", "__main__"):
            there = name.split(".")[1]
            if there in ROOM_OF_LAYER:
                assert ROOM_OF_LAYER[there] <= ROOM_OF_LAYER[here], f"{here} may not import {there}"
                if here in ARROWS and there in ARROWS and here != there:
                    assert there in ARROWS[here].split(), f"a new arrow between rooms: {here} asks {there}"
    if path.name != "_output.py":
        printing = [function for function, _ in called if function in PRINTING]
        assert not printing, "only cli/_output.py prints"
    if module(path) != "storage.files":
        writing = [function for function, node in called if writes(function, node)]
        assert not writing, "only files.py writes"
    if module(path) != "storage.tensor_names":
        spelled = [s for s in strings(tree) if s in ("lora_a", "lora_b") or s.endswith((".lora_a", ".lora_b"))]
        assert not spelled, "only tensor_names.py spells tensor names"
    else:
        assert not {"os", "pathlib"} & {name for name, *_ in imports(tree)}, "names touch no disk"


def test_every_room_has_a_layer():
    rooms = {room(path) for path in MODULES} - {"__init__", "__main__"}
    assert rooms <= set(ROOM_OF_LAYER), f"give these a layer: {rooms - set(ROOM_OF_LAYER)}"


def test_rooms_and_files_stay_small():
    rooms = Counter(room(path) for path in MODULES if path.name != "__init__.py" and path.parent != PACKAGE)
    large = {name for name, files in rooms.items() if files > MOST_FILES and name != "cli"}
    assert not large, f"more than {MOST_FILES} files: {large}"
    small = {name for name, files in rooms.items() if files < LEAST_FILES}
    assert not small, f"fewer than {LEAST_FILES} files, so no room of its own: {small}"
    long = {module(path) for path in MODULES if code_lines(path) > MOST_LINES} - LONG
    assert not long, f"more than {MOST_LINES} lines: {long}"


def test_the_page_of_the_rooms_names_what_is_there():
    """What docs/architecture.md says is where, is there: every room with its files, every file that it sends one to."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", page, re.M))
    assert list(listed) == [name for name in ROOMS if (PACKAGE / name).is_dir()], "the order of the rooms"
    for name, files in listed.items():
        there = {p.stem for p in (PACKAGE / name).glob("*.py")} - {"__init__"}
        if name != "cli":
            assert set(files.split(", ")) == there, f"docs/architecture.md: the files of {name}/"
    for path in re.findall(r"`((?:\w+/)+[\w.]+)`", page):
        inside, _, name = (path if "." in path else path + ".").rpartition(".")
        if path.startswith(("tests/", "scripts/", "docs/")):
            assert (PACKAGE.parent / path).exists(), path
        else:
            file = PACKAGE / f"{inside}.py"
            assert (file.is_file() and name in file.read_text()) or (PACKAGE / path).is_dir(), path


def test_no_import_cycle_at_module_level():
    graph = {}
    for path in MODULES:
        name = ".".join(("mlx_adapters", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        graph[name] = {n for n, top in imports(tree_of(path)) if top and n.startswith("mlx_adapters.")}
    done, doing = set(), []

    def visit(name: str):
        assert name not in doing, " -> ".join([*doing, name])
        if name in graph and name not in done:
            doing.append(name)
            for other in graph[name]:
                visit(other)
            doing.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_settings_and_names_need_no_mlx():
    names = [f"mlx_adapters.{module(path)}" for path in MODULES if room(path) == "config"]
    names += ["mlx_adapters.sources.references", "mlx_adapters.sources.registry"]
    wanted = ", ".join(name.removesuffix(".__init__") for name in names)
    code = f"import sys, {wanted}; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_things_are_counted_in_good_grammar():
    """`{...} layers` in a text reads "1 layers" sooner or later; `units.count` knows."""
    things = "adapter|batch|checkpoint|core|file|iteration|layer|question|round|row|run|task|trial|variant|weight"
    by_hand = re.compile(rf"\{{(?:len\([^}}]*\)|[\w.]+)\}} (?:[a-z]+ )?(?:{things})(?:e?s)\b")
    by_hand_still = {f"{path.name}: {m[0]}" for path in MODULES for m in by_hand.finditer(path.read_text())}
    assert not by_hand_still
    assert [count(n, "batch") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert count(1, "task") == "1 task" and count(1200, "layer") == "1,200 layers"


def test_shell_scripts_run_on_a_mac_too():
    """There bash is 3.2 and the tools are BSD's; what needs Linux stands behind a check of the system."""
    scripts = [p for p in (PACKAGE.parent / "scripts").iterdir() if p.is_file() and "bash" in p.read_text()[:200]]
    assert len(scripts) >= 5
    lacking = (
        r"\b(?:timeout|nproc|flock|mapfile|readarray|realpath|declare -A|readlink -f|sed -i|grep -P|stat -c|xargs -r)\b"
    )
    for path in scripts:
        text = path.read_text()
        assert not re.search(rf"^[^#\n]*{lacking}|\$\{{\w+(?:,,|\^\^)|&>>|\|&", text, re.M), path.name
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    ci = yaml.safe_load((PACKAGE.parent / ".github" / "workflows" / "ci.yml").read_text())
    for job in ci["jobs"].values():  # without it the scripts take the newest Python of the machine
        (setup,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert job["env"]["PYTHON"] == f"python{setup['python-version']}"


def test_the_tests_mirror_the_package():
    """A room's tests lie in a folder of its name, what they share in helpers/, and no test imports another."""
    tests = Path(__file__).parent
    others = {"fixtures", "helpers", "scripts", "__pycache__"}
    assert {path.name for path in tests.iterdir() if path.is_dir()} - others <= {room(path) for path in MODULES}
    suspect = re.compile(r"^\s*(?:from|import)\b.*\btest", re.M)
    for path in (path for path in tests.rglob("test_*.py") if suspect.search(path.read_text())):
        for name, _ in imports(tree_of(path)):
            assert not re.match(r"(tests\.|.*\btest_)", name), f"{path.relative_to(tests)} imports {name}"


PACKAGE_OF = {"yaml": "pyyaml", "mlx_lm": "mlx-lm", "huggingface_hub": "huggingface-hub"}


def may_be_missing(tree: ast.AST) -> set[str]:
    """What a module imports where it looks whether it is there: the extras, and what a hint names."""
    tries = [n for n in ast.walk(tree) if isinstance(n, ast.Try) and "ImportError" in ast.unparse(n.handlers)]
    return {name.split(".")[0] for node in tries for part in node.body for name, _ in imports(part)}


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    used, always = set(), set()
    for path in MODULES:
        tree = tree_of(path)
        names = {name.split(".")[0] for name, _ in imports(tree)}
        used, always = used | names, always | names - may_be_missing(tree)
    elsewhere = {"mlx_adapters", *sys.stdlib_module_names, "starlette", "uvicorn"}  # serving/ comes with its extra
    assert {PACKAGE_OF.get(name, name) for name in always - elsewhere} <= required
    assert required <= {PACKAGE_OF.get(name, name) for name in used}
