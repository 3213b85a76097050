"""What a server is told: addresses, limits, splits. Checked before anything is loaded."""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_adapters.config.mapping import require, shown
from mlx_adapters.config.settings import check, setting, settings
from mlx_adapters.errors import ConfigError
from mlx_adapters.sources.references import NAME

MAX_SECONDS = 1_000_000


@dataclass(frozen=True)
class TrafficSplit:
    """An A/B test: a name that stands for several adapters, each for its share of the users."""

    name: str
    arms: tuple[tuple[str, float], ...]

    def choose(self, user: str) -> str:
        """The arm of this user: always the same one, by a hash of the split's name and the user's."""
        digest = hashlib.sha256(f"{self.name}\0{user}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64 * sum(share for _, share in self.arms)
        for arm, share in self.arms:
            point -= share
            if point < 0:
                return arm
        return self.arms[-1][0]


def parse_split(text: str) -> TrafficSplit:
    """Parse "test=a:0.5,b:0.5". Raises ConfigError."""
    name, _, rest = text.partition("=")
    arms = [re.fullmatch(r"([^:,]+):([0-9.]+)", part) for part in rest.split(",")]
    if not NAME.fullmatch(name) or not all(arms):
        raise ConfigError(f"'{text}' is no split.", 'write it as "test=a:0.5,b:0.5".')
    try:
        shares = tuple((arm[1], float(arm[2])) for arm in arms if arm)
    except ValueError:
        raise ConfigError(f"'{text}' has a share that is no number.") from None
    require(len({arm for arm, _ in shares}) == len(shares), f"'{text}' names an arm twice.")
    require(all(share > 0 for _, share in shares), f"'{text}' has a share that is not above 0.")
    return TrafficSplit(name, shares)


@settings
@dataclass(frozen=True)
class ServeSettings:
    """Limits and switches of a server. Sizes in bytes, times in seconds.

    Raises ConfigError for a value out of range.
    """

    host: str = setting("127.0.0.1", "Other than loopback needs `api_key_file`")
    port: int = setting(8080, "0: any free one", at_least=0, at_most=65535)
    api_keys: tuple[str, ...] = setting((), "Keys that may ask, one a line", secret=True)
    max_adapters: int = setting(16, "In memory at once", at_least=1)
    max_adapter_bytes: int | None = setting(None, "Memory for adapters", means="no limit", at_least=1)
    prompt_cache_bytes: int | None = setting(
        None, "Memory for prompts and answers that need not be read again", means="a tenth of the memory", at_least=0
    )
    max_batch: int = setting(16, "Rows decoded together", at_least=1)
    max_queue: int = setting(256, "Waiting; more get 429", at_least=1)
    max_tokens: int = setting(4096, "Longest answer", at_least=1)
    max_body_bytes: int = setting(1 << 20, "Longest request", at_least=1)
    max_seconds: float = setting(300.0, "For one request", above=0, at_most=MAX_SECONDS)
    write_seconds: float = setting(30.0, "For a client to take what was written", above=0, at_most=MAX_SECONDS)
    header_seconds: float = setting(
        15.0, "For a client to say what it wants, and for a connection that nobody uses", above=0, at_most=MAX_SECONDS
    )
    max_connections: int = setting(
        1000, "Connections at once; more are closed, also where the process may not open as many files", at_least=1
    )
    drain_seconds: float = setting(
        0.0,
        "After a signal to stop, answer on for so long while /health/ready says no, so that a proxy asks others",
        at_least=0,
        at_most=MAX_SECONDS,
    )
    key_rate: int | None = setting(None, "Requests that each key may ask in a minute", means="no limit", at_least=1)
    key_requests: int | None = setting(None, "Requests of each key at once", means="no limit", at_least=1)
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Name by which clients may call this server, such as that of a proxy before it; *: any",
        repeated=True,
        metavar="NAME",
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "Origin whose pages may ask this server, such as http://localhost:3000; *: any",
        repeated=True,
        metavar="ORIGIN",
    )
    access_log: Path | None = setting(None, "Append a line for each request to this file", metavar="FILE")
    access_log_json: bool = setting(False, "Write these lines as JSON")
    allow_load: bool = setting(False, "Let POST and DELETE /v1/adapters load registered adapters")
    lenient: bool = setting(
        False, "Ignore unknown fields of requests instead of refusing them, and say so in the header X-Ignored-Fields"
    )
    splits: tuple[TrafficSplit, ...] = setting(
        (), "A name that sends each user to one of several adapters, always the same (repeatable)"
    )

    def __post_init__(self) -> None:
        check(self)
        require(
            is_loopback(self.host) or len(self.api_keys) > 0,
            f"Listening on {shown(self.host)} needs an API key.",
            "pass --api-key-file FILE, or keep --host 127.0.0.1.",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_names(base: str, adapters: Sequence[str], splits: Sequence[TrafficSplit]) -> None:
    """Raise ConfigError for a name used twice or an arm that does not exist."""
    require(
        base.isprintable() and base.strip() != "", f"{base!r} cannot be the base's name.", "choose one with --name."
    )
    names = [base, *adapters, *(split.name for split in splits)]
    for name in names:
        require(names.count(name) == 1, f"The name '{name}' is used twice.", "rename one: --adapter NAME=REF.")
    for split in splits:
        for arm, _ in split.arms:
            require(
                arm in (base, *adapters),
                f"Split '{split.name}' names '{arm}', which is not served.",
                f"serve it too: --adapter {arm}.",
            )
