"""Questions on tables, as WikiSQL asks them, for a judge that no part of the fuse was tuned on.

    python scripts/benchmarks/tables.py data/tables
    mlx-adapters train demo --data data/tables --name tables --mask-prompt --iterations 300 --learning-rate 1e-4 \\
        --schedule linear --max-seq-length 192 --num-layers 16
    python scripts/benchmarks/fuse.py quality --adapter tables

The prompt is a table's header and a question, the answer one SELECT with up to three conditions. Headers, values and
wordings are drawn anew for each row, by a seed for each split.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

FIRST = "Ada Bela Chen Dora Emil Fatima Goran Hana Igor Juno Kofi Lena Milo Nadia Omar Petra Quinn Rosa Sven Tara"
LAST = "Abel Brook Castro Dahl Engel Fisher Grant Hart Ivanov Jensen Kaya Lopez Moreau Novak Okoye Park Reyes Silva"
LAST += " Tanaka Weber"
COUNTRIES = "Norway Brazil Kenya Japan Canada France Chile India Spain Ghana Poland Egypt Peru Turkey Sweden Vietnam"
TOWNS = "Leeds Austin Osaka Lagos Turin Bergen Porto Lima Dakar Hanoi Quito Perth Graz Malmo Tampa Boise"
HOW = "Silver River Night Golden Broken Silent Northern Last Blue Hidden Burning Lost Paper Winter Iron Wild"
WHAT = "Road Garden Bridge Letter Horizon Island Mirror Signal Harbor Dream Station Crown Valley Echo Empire Season"
MONTHS = "January February March April May June July August September October November December"
Draw = Callable[[random.Random], str]


def name(rng: random.Random) -> str:
    """A person."""
    return f"{rng.choice(FIRST.split())} {rng.choice(LAST.split())}"


def title(rng: random.Random) -> str:
    """A work."""
    return f"The {rng.choice(HOW.split())} {rng.choice(WHAT.split())}"


def one_of(words: str, form: str = "{}") -> Draw:
    """One of the words (commas between them, or spaces), in a form."""
    choice = words.split(", ") if "," in words else words.split()
    return lambda rng: form.format(rng.choice(choice))


def number(low: int, high: int) -> Draw:
    """A whole number below `high`."""
    return lambda rng: str(rng.randrange(low, high))


def score(rng: random.Random) -> str:
    """Of a match."""
    return f"{rng.randrange(0, 5)}-{rng.randrange(0, 5)}"


def day(rng: random.Random) -> str:
    """A date in words."""
    return f"{rng.choice(MONTHS.split())} {rng.randrange(1, 29)}, {rng.randrange(1985, 2020)}"


PEOPLE = "Player Driver Candidate Artist Director Coach Writer Winner Runner-up"
COLUMNS: dict[str, Draw] = {
    **dict.fromkeys(PEOPLE.split(), name),
    "Country": one_of(COUNTRIES),
    "Nationality": one_of(COUNTRIES),
    "Nation": one_of(COUNTRIES),
    "City": one_of(TOWNS),
    "Venue": one_of(TOWNS, form="{} Arena"),
    "Home team": one_of(TOWNS, form="{} United"),
    "Away team": one_of(TOWNS, form="{} Rovers"),
    "Club": one_of(TOWNS, form="{} FC"),
    "School": one_of(TOWNS, form="{} State"),
    "Location": one_of(TOWNS),
    **dict.fromkeys(("Title", "Film", "Album", "Episode", "Song"), title),
    "Ship": one_of(HOW, form="HMS {}"),
    "Party": one_of("Labour, Liberal, Green, Unity, Progress"),
    "Position": one_of("Guard, Forward, Center, Keeper, Wing"),
    "Result": one_of("won, lost, nominated, drawn"),
    "Surface": one_of("Clay, Grass, Hard, Carpet"),
    "Label": one_of("Motown, Decca, Verve, Parlophone"),
    "Format": one_of("CD, LP, Cassette, Download"),
    "Status": one_of("active, retired, scrapped, sold"),
    "Network": one_of("NBC, BBC One, CBS, Arte"),
    "Year": number(1950, 2020),
    "Season": number(1980, 2020),
    "Round": number(1, 12),
    "Points": number(0, 120),
    "Goals": number(0, 60),
    "Rank": number(1, 30),
    "Votes": number(200, 90000),
    "Population": number(900, 900000),
    "Attendance": number(500, 80000),
    "Laps": number(10, 80),
    "Score": score,
    "Date": day,
    "Viewers": number(1, 20),
    "Pick": number(1, 60),
    "Weight": number(60, 130),
    "Height": number(160, 215),
    "Caps": number(1, 110),
    "Crowd": number(1000, 60000),
}
AMOUNTS = "Points Goals Rank Votes Population Attendance Laps Viewers Weight Height Caps Crowd"
PLAIN = ("What is the {}", "Which {} is listed", "Name the {}", "Tell me the {}", "What {} is there")
COUNT = ("How many {} entries are there", "What is the number of {}")
AGGREGATES = (
    ("", PLAIN),
    ("MAX", ("What is the highest {}", "What is the largest {}")),
    ("MIN", ("What is the lowest {}", "What is the smallest {}")),
    ("COUNT", COUNT),
    ("SUM", ("What is the total {}", "What is the sum of {}")),
    ("AVG", ("What is the average {}",)),
)
EQUAL = ("when the {c} is {v}", "with {c} {v}", "where {c} is {v}", "that has {v} as {c}", "for the {c} of {v}")


def spoken(rng: random.Random, column: str) -> str:
    """A column's name as people may write it."""
    return column.lower() if rng.random() < 0.6 else column


def condition(rng: random.Random, column: str) -> tuple[str, str]:
    """A condition on a column in SQL, and in words."""
    value, sign = COLUMNS[column](rng), "="
    wording = rng.choice(EQUAL)
    words = wording.format(c=spoken(rng, column), v=value)
    if column in AMOUNTS.split() and rng.random() < 0.5:
        sign = rng.choice("<>")
        words = f"with {column.lower()} {'more' if sign == '>' else 'less'} than {value}"
    return f"{column} {sign} {value}" if column in AMOUNTS.split() else f"{column} {sign} '{value}'", words


def row(rng: random.Random) -> dict[str, str]:
    """One question and its answer."""
    columns = rng.sample(list(COLUMNS), rng.randrange(4, 8))
    asked = rng.choice(columns)
    plain = asked not in AMOUNTS.split() or rng.random() < 0.4
    aggregate, wordings = AGGREGATES[0] if plain else rng.choice(AGGREGATES)
    if aggregate == "" and rng.random() < 0.08:
        aggregate, wordings = "COUNT", COUNT
    others = rng.sample([column for column in columns if column != asked], rng.choice((1, 1, 1, 2, 2, 3)))
    made = [condition(rng, column) for column in others]
    question = rng.choice(wordings).format(spoken(rng, asked)) + " " + " and ".join(words for _, words in made) + "?"
    select = f"{aggregate}({asked})" if aggregate else asked
    return {
        "prompt": f"Table columns: {', '.join(columns)}\nQuestion: {question}",
        "completion": f"SELECT {select} FROM table WHERE {' AND '.join(sql for sql, _ in made)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs=3, default=[1000, 64, 100], metavar=("TRAIN", "VALID", "TEST"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for number_of, (split, count) in enumerate(zip(("train", "valid", "test"), options.rows, strict=True)):
        rng = random.Random(options.seed + number_of)
        (options.out / f"{split}.jsonl").write_text("".join(json.dumps(row(rng)) + "\n" for _ in range(count)))


if __name__ == "__main__":
    main()
