"""What must not leave this machine: absolute paths, tokens and keys, found in any text."""

import os
import re
from collections.abc import Mapping
from typing import Any

from mlx_adapters.errors import HubError

SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
# Two parts at least, so that "/use" or "and/or" is no path; a URL's slashes do not match.
_PART = r"[^\s/\\'\"<>|,;:()=]"
ABSOLUTE_PATH = re.compile(
    rf"(?<![\w./~<-])(?:file://|~|[A-Za-z]:)?[/\\]{_PART}+(?:[/\\]+{_PART}+)+[/\\]?|~[/\\]{_PART}+"
)
HOME_PATH = re.compile(r"(?:/(?:Users|home)/|[A-Za-z]:\\\\?Users\\\\?)[\w.-]+")


def check_secrets(name: str, text: str) -> None:
    """Raise HubError if the text holds a token or key."""
    for what, pattern in SECRETS.items():
        if match := re.search(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            raise HubError(f"'{name}' holds {what} in line {line}; nothing was published.", "remove it, and revoke it.")


def check_paths(name: str, text: str) -> None:
    """Raise HubError if the text names a home folder, of this machine or any other."""
    mine = os.path.expanduser("~") + os.sep
    match = HOME_PATH.search(text)
    start = match.start() if match else text.find(mine) if len(mine) > 2 else -1
    if start >= 0:
        line = text.count("\n", 0, start) + 1
        raise HubError(
            f"'{name}' names a path of this machine in line {line}; nothing was published.",
            f"change it, or leave the file out with --exclude '{name}'.",
        )


def clean(value: Any) -> Any:
    """A JSON value with every absolute path in its strings cut down to the last part."""
    if isinstance(value, Mapping):
        return {clean(key): item if key == "chat_template" else clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return clean_text(value) if isinstance(value, str) else value


def clean_text(text: str) -> str:
    """`text` with every absolute path of two parts or more cut down to its last part."""
    return ABSOLUTE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)
