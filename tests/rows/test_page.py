"""docs/data.md: every example on it is read, and means what the page says."""

import json
import re
from pathlib import Path

from mlx_adapters.rows.files import READERS
from mlx_adapters.rows.row import RawRow
from mlx_adapters.rows.shapes import ANSWERS, QUESTIONS
from mlx_adapters.rows.splits import NAMES

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ROWS = [json.loads(text) for text in re.findall(r"```json\n(.*?)\n```", PAGE)]


def test_every_example_is_read():
    shapes = [RawRow(row, "the page").canonical for row in ROWS]
    assert [shape.shape for shape in shapes] == [
        "messages",
        "ShareGPT ('conversations')",
        "'prompt' and 'completion'",
        "'prompt' and 'completion' of messages",
        "Alpaca",
        "'question' and 'answer'",
        "preferences",
        "text",
    ]
    assert shapes[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert [m["role"] for m in shapes[1].messages] == ["system", "user", "assistant"]
    assert shapes[3].weights == (0, 1) and shapes[4].prompt == "Add.\n\n2, 3"


def test_the_page_names_what_is_known():
    names = {word for words in NAMES.values() for word in words}
    assert all(
        f"`{name}`" in PAGE
        for name in {*READERS, *names, *QUESTIONS, *ANSWERS} - {"prompt", "completion", "input", "reply"}
    )
