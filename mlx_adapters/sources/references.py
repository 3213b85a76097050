"""How a reference is spelled. What exists goes first: `lookup.reference_of` knows that, and asks here for the rest.

`NAME` and `NAME@ITERATION` (or `@best`, `@last`) are the registry's, a path starts with `.`, `/` or `~` (with
`@ITERATION` for a checkpoint),
`user/repo[/folder][@revision]` is on the Hub.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from mlx_adapters.config.mapping import require
from mlx_adapters.errors import ConfigError
from mlx_adapters.storage import paths
from mlx_adapters.storage.tensor_names import ADAPTER_FILE, CONFIG_FILE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ITERATION = re.compile(r"[0-9]{1,18}|best|last")
CHECKPOINT = re.compile(rf"(.+)@({ITERATION.pattern})")
HUB = re.compile(r"([A-Za-z0-9][\w.-]*/\w[\w.-]*)((?:/\w[\w.-]*)*)(?:@([\w./-]+))?")

PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([\w.-]+))?.*"
)


@dataclass(frozen=True, repr=False)
class Reference:
    """A parsed reference. `target` is a name, a path or a Hub id; `subfolder` where in a repository it lies.

    `iteration`: of a checkpoint, or "best" or "last".
    """

    kind: Literal["name", "path", "hub"]
    target: str
    iteration: int | str | None = None
    revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        suffix = self.revision if self.kind == "hub" else self.iteration
        place = f"{self.target}/{self.subfolder}" if self.subfolder else self.target
        if self.kind == "path" and not paths.is_path(place):
            place = f"./{place}"
        return place if suffix is None else f"{place}@{suffix}"

    def __repr__(self) -> str:
        return f"Reference('{self}')"

    @property
    def reference(self) -> str:
        """It as text."""
        return str(self)

    @property
    def own_name(self) -> str:
        """What an adapter that comes from there is called, if nobody says otherwise."""
        last = self.target.rstrip("/").rpartition("/")[2]
        return f"{last}-{self.subfolder.replace('/', '-')}" if self.subfolder else last


def below(reference: Reference, subfolder: str | None) -> Reference:
    """The reference to a folder of a repository, named beside it. Raises ConfigError if it names one already."""
    if subfolder is None or reference.kind != "hub":
        return reference
    require(reference.subfolder is None, "Name the folder in the repository once: in its id or with --subfolder.")
    return parse_reference(str(replace(reference, subfolder=subfolder.strip("/"))))


def check_name(name: str) -> str:
    """Return `name` if it can name an adapter, else raise ConfigError."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' cannot be an adapter's name.",
            "use up to 100 letters, digits, '.', '_' and '-'; begin with a letter or digit.",
        )
    return name


def of_page(text: str) -> str | None:
    """How the repository is spelled whose page on the Hub has this address; None for another text."""
    match = PAGE.fullmatch(text)
    return match and match[1] + (f"@{match[2]}" if match[2] not in (None, "main") else "")


def hub_id(text: str) -> tuple[str, str | None] | None:
    """(repository, revision) that `user/repo[@revision]` means; None for another spelling."""
    match = HUB.fullmatch(text)
    return (match[1], match[3]) if match and not match[2] else None


def parse_reference(text: str) -> Reference:
    """Parse NAME, NAME@ITERATION, a path, or user/repo[/folder][@revision]. Raises ConfigError.

    A path to an adapter's config or weights means the folder that they lie in.
    """
    text = text and (text.removesuffix(f"/{CONFIG_FILE}").removesuffix(f"/{ADAPTER_FILE}") or "/")
    if paths.is_path(text):
        match = CHECKPOINT.fullmatch(text)
        return Reference("path", match[1], _iteration(match[2])) if match else Reference("path", text)
    if hub := HUB.fullmatch(text):
        return Reference("hub", hub[1], revision=hub[3], subfolder=hub[2].strip("/") or None)
    if "/" in text:
        page = of_page(text)
        hint = "'mlx-adapters list' shows the names; a repository of the Hub is 'user/repo'."
        hint = f"write '{page}' for the repository of that page." if page else hint
        raise ConfigError(f"There is no folder '{text}', and no name and no repository is spelled so.", hint)
    name, at, iteration = text.partition("@")
    if at and not ITERATION.fullmatch(iteration):
        raise ConfigError(
            f"'{text}' is no reference: after '@' comes an iteration, 'best' or 'last'.", f"for example '{name}@600'."
        )
    return Reference("name", check_name(name), _iteration(iteration) if at else None)


def _iteration(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
