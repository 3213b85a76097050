"""The embedded data: text-to-SQL over a made-up course catalog, as chat rows and an SQLite file.

Rows are bare question and query, about 60 tokens: the adapter learns the catalog's schema by heart, and with 2
CPU cores every token of a training run counts. Everything is drawn with a fixed seed, so the files are the same
on every machine.
"""

import json
import random
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_adapters.demo import questions
from mlx_adapters.demo.questions import PATTERNS, SPLITS, Pattern
from mlx_adapters.storage import files, paths
from mlx_adapters.storage.replacing import Output

DATABASE_FILE = "catalog.sqlite"
DATA_OUTPUT = Output("train.jsonl", r"(valid|test)\.jsonl|catalog\.sqlite")
ROWS = {"train": 600, "valid": 80, "test": 80}
# What a model without the adapter is told, so that it has a chance.
SCHEMA_PROMPT = (
    "Answer with one SQLite query. courses(title dept teacher credits seats) departments(name building budget) "
    "instructors(name dept hired) prerequisites(course requires)"
)
SCHEMA = """
CREATE TABLE departments (name TEXT PRIMARY KEY, building TEXT, budget INTEGER);
CREATE TABLE instructors (name TEXT PRIMARY KEY, dept TEXT REFERENCES departments, hired INTEGER);
CREATE TABLE courses (title TEXT PRIMARY KEY, dept TEXT REFERENCES departments,
                      teacher TEXT REFERENCES instructors, credits INTEGER, seats INTEGER);
CREATE TABLE prerequisites (course TEXT REFERENCES courses, requires TEXT REFERENCES courses);
"""

# department: building, budget, instructors, courses in the order in which one takes them
DEPARTMENTS: dict[str, tuple[str, int, str, str]] = {
    "Physics": ("North Hall", 90, "Adams Okafor Lindgren", "Mechanics Waves Optics Quantum Relativity"),
    "Biology": ("North Hall", 85, "Chen Silva Haddad", "Cells Genetics Ecology Botany Evolution"),
    "History": ("River House", 40, "Baker Novak Moreau", "Egypt Rome Vikings Empires Revolutions"),
    "Music": ("Park Studio", 35, "Ito Rossi Bell", "Harmony Rhythm Opera Jazz Composition"),
    "Math": ("South Tower", 60, "Khan Weber Young", "Algebra Geometry Calculus Logic Topology"),
    "Art": ("Park Studio", 30, "Diaz Laurent Green", "Drawing Painting Ceramics Photography Sculpture"),
    "Economics": ("South Tower", 70, "Patel Jones Fischer", "Trade Markets Banking Taxation Development"),
    "Geography": ("River House", 45, "Evans Turner Quist", "Maps Rivers Climate Cities Oceans"),
}


@dataclass(frozen=True)
class CatalogQuestion:
    """A question, its gold query and where it comes from."""

    text: str
    sql: str
    split: str
    pattern: str
    template: str

    def row(self) -> dict:
        """The chat row of a JSONL file."""
        turns = (("user", self.text), ("assistant", self.sql))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}


def build_catalog() -> sqlite3.Connection:
    """The catalog as an SQLite database in memory: 8 departments, 24 instructors, 40 courses."""
    rng = random.Random(7)
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA)
    seats = rng.sample(range(12, 100), 5 * len(DEPARTMENTS))  # no two alike: "the most seats" has one answer
    for name, (building, budget, teachers, titles) in DEPARTMENTS.items():
        connection.execute("INSERT INTO departments VALUES (?, ?, ?)", (name, building, budget * 1000))
        staff, courses = teachers.split(), titles.split()
        for teacher in staff:
            connection.execute("INSERT INTO instructors VALUES (?, ?, ?)", (teacher, name, rng.randrange(2000, 2020)))
        for i, title in enumerate(courses):
            teacher = rng.choice(staff[:2])  # the third is on leave and teaches nothing
            row = (title, name, teacher, rng.randrange(1, 6), seats.pop())
            connection.execute("INSERT INTO courses VALUES (?, ?, ?, ?, ?)", row)
            for earlier in rng.sample(courses[:i], min(i, rng.randrange(3))):
                connection.execute("INSERT INTO prerequisites VALUES (?, ?)", (title, earlier))
    connection.commit()
    return connection


def slot_values() -> dict[str, list[tuple[str, str]]]:
    """What may stand in each slot of a template: (words in the question, SQL)."""

    def same(names: Iterator[str] | list[str]) -> list[tuple[str, str]]:
        return [(name, name) for name in sorted(set(names))]

    return {
        "dept": same(list(DEPARTMENTS)),
        "building": same([building for building, *_ in DEPARTMENTS.values()]),
        "teacher": same([name for _, _, names, _ in DEPARTMENTS.values() for name in names.split()]),
        "title": same([name for *_, names in DEPARTMENTS.values() for name in names.split()]),
        "size": questions.SIZES,
        "measure": questions.MEASURES,
        "order": questions.ORDERS,
        "hired": questions.HIRED,
        "key": questions.KEYS,
        "fact": questions.FACTS,
        "most": questions.MOST,
        "count": questions.COUNTS,
    }


def demo_questions() -> dict[str, list[CatalogQuestion]]:
    """The questions of each split. No template and no row is in two splits, and no answer is empty."""
    catalog, slots = build_catalog(), slot_values()
    return {split: _draw(split, catalog, slots) for split in SPLITS}


def _draw(split: str, catalog: sqlite3.Connection, slots: dict[str, list[tuple[str, str]]]) -> list[CatalogQuestion]:
    """Go round the patterns, taking a new question of each, until the split is full; then shuffle."""
    rng = random.Random(f"catalog {split}")
    streams = [_stream(pattern, split, catalog, slots, rng) for pattern in PATTERNS if getattr(pattern, split)]
    drawn: list[CatalogQuestion] = []
    while len(drawn) < ROWS[split]:
        drawn += [question for stream in streams if (question := next(stream, None))]
    drawn = drawn[: ROWS[split]]
    rng.shuffle(drawn)
    return drawn


def _stream(
    pattern: Pattern,
    split: str,
    catalog: sqlite3.Connection,
    slots: dict[str, list[tuple[str, str]]],
    rng: random.Random,
) -> Iterator[CatalogQuestion]:
    """Endless different questions of one pattern (finite where the slots are few)."""
    seen: set[str] = set()
    templates = getattr(pattern, split)
    for attempt in range(2000):
        template = templates[attempt % len(templates)]
        chosen = {slot: rng.choice(slots[slot]) for slot in re.findall(r"{(\w+)}", pattern.sql)}
        text = template.format(**{slot: words for slot, (words, _) in chosen.items()})
        sql = pattern.sql.format(**{slot: code for slot, (_, code) in chosen.items()})
        if text not in seen and _has_answer(catalog, sql):
            seen.add(text)
            yield CatalogQuestion(text, sql, split, pattern.name, template)


def _has_answer(catalog: sqlite3.Connection, sql: str) -> bool:
    rows = catalog.execute(sql).fetchall()
    return bool(rows) and rows != [(0,)]


def write_demo_data(folder: str | Path, overwrite: bool = False) -> Path:
    """Write the demo's data, questions about a made-up course catalog with their SQL, and the catalog; the folder.

    train.jsonl, valid.jsonl and test.jsonl hold conversations, catalog.sqlite what the score `sqlite` asks.

    Args:
        folder: the folder to make.
        overwrite: replace the data that an earlier call wrote there.

    Raises ExistsError or StorageError; then nothing is written.

    Example:
        >>> folder = ma.write_demo_data("data/catalog")
        >>> sorted(path.name for path in folder.iterdir())
        ['catalog.sqlite', 'test.jsonl', 'train.jsonl', 'valid.jsonl']
    """
    folder = paths.expanded(folder)
    with files.atomic_folder(folder, overwrite, DATA_OUTPUT) as temporary:
        for split, drawn in demo_questions().items():
            lines = (json.dumps(question.row(), ensure_ascii=False) for question in drawn)
            files.write_text(temporary / f"{split}.jsonl", "\n".join(lines) + "\n")
        with files.atomic_file(temporary / DATABASE_FILE) as stream:
            stream.write(build_catalog().serialize())
    return folder
