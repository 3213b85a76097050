"""Values as JSON, and JSON that a terminal can show."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any


def json_for(text: str, encoding: str) -> str:
    """JSON in which what a terminal obeys, or an encoding lacks, is written as \\uXXXX."""
    text = re.sub(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=2)


def plain(value: Any) -> Any:
    """A dataclass, path, tuple or number as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
