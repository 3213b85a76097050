"""A second task to fuse on: appointments in plain words to JSON, unlike the demo's SQL in words and in answers.

    python scripts/benchmarks/appointments.py data/appointments
    mlx-adapters train demo --data data/appointments --name appointments --mask-prompt --iterations 200 \\
        --learning-rate 6e-4 --schedule linear --max-seq-length 256
    python scripts/benchmarks/fuse.py quality --adapter appointments

Each row has one right answer: who, the date as year-month-day, the time on 24 hours. Names and days are drawn anew
for each row; no wording is in two splits.
"""

import argparse
import json
import random
from datetime import date, timedelta
from pathlib import Path

PROMPT = "Answer with JSON: who, date (year-month-day), time (24 hours)."
FIRST = "Ada Bela Chen Dora Emil Fatima Goran Hana Igor Juno Kofi Lena Milo Nadia Omar Petra Quinn Rosa Sven Tara"
LAST = "Abel Brook Castro Dahl Engel Fisher Grant Hart Ivanov Jensen Kaya Lopez Moreau Novak Okoye Park Reyes"
TITLES = ("Dr. ", "Ms. ", "Mr. ", "", "", "")
WORDINGS = {
    "train": (
        "Meet {who} on {day} at {time}.",
        "Put {who} in my calendar for {day}, {time}.",
        "I see {who} at {time} on {day}.",
        "Book {day} at {time} with {who}.",
        "On {day} at {time} I have an appointment with {who}.",
        "{who}, {day}, {time}.",
        "Please note: {time} with {who}, {day}.",
        "Lunch with {who} is on {day} at {time}.",
        "Call {who} at {time} on {day}.",
        "The dentist, {who}, expects me on {day} at {time}.",
        "Schedule {who} for {time}, {day}.",
        "Remind me of {who} on {day}, {time}.",
    ),
    "valid": (
        "Reserve {time} on {day} for {who}.",
        "{who} comes by on {day} at {time}.",
        "At {time} on {day}: {who}.",
    ),
    "test": (
        "Can you enter {who} at {time} on {day}?",
        "My interview with {who} takes place on {day} at {time}.",
        "For {day} I agreed on {time} with {who}.",
        "{day}, {time}: a visit to {who}.",
    ),
}


def day_and_words(rng: random.Random) -> tuple[date, str]:
    """A day, and one of the ways to say it."""
    day = date(2025, 1, 1) + timedelta(rng.randrange(3 * 365))
    form = rng.choice(("%B {d}, %Y", "{d} %B %Y", "{d}.{m}.%Y", "%a {d} %b %Y"))
    return day, day.strftime(form).format(d=day.day, m=day.month)


def time_and_words(rng: random.Random) -> tuple[str, str]:
    """A time on 24 hours, and one of the ways to say it."""
    hour, minute = rng.randrange(7, 21), rng.choice((0, 15, 30, 45))
    plain, half, short = f"{hour:02}:{minute:02}", "am" if hour < 12 else "pm", (hour - 1) % 12 + 1
    twelve = f"{short} {half}" if minute == 0 else f"{short}:{minute:02} {half}"
    return plain, rng.choice((plain, twelve))


def row(rng: random.Random, split: str) -> dict:
    """One conversation."""
    who = rng.choice(TITLES) + rng.choice(FIRST.split()) + " " + rng.choice(LAST.split())
    (day, day_words), (time, time_words) = day_and_words(rng), time_and_words(rng)
    question = rng.choice(WORDINGS[split]).format(who=who, day=day_words, time=time_words)
    answer = json.dumps({"who": who, "date": day.isoformat(), "time": time})
    turns = (("system", PROMPT), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs=3, default=[600, 80, 120], metavar=("TRAIN", "VALID", "TEST"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    for split, count in zip(WORDINGS, options.rows, strict=True):
        lines = [json.dumps(row(rng, split)) for _ in range(count)]
        (options.out / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
