"""What a server is told: addresses, limits, splits. Checked before anything is loaded."""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_adapters.config.mapping import require
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


@dataclass(frozen=True)
class ServeSettings:
    """Limits and switches of a server. Sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_adapters: int = 8
    max_adapter_bytes: int | None = None
    max_batch: int = 16
    max_queue: int = 256
    max_tokens: int = 4096
    max_body_bytes: int = 1 << 20
    max_seconds: float = 300.0
    write_seconds: float = 30.0
    allow_load: bool = False
    splits: tuple[TrafficSplit, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_adapters", "max_batch", "max_queue", "max_tokens", "max_body_bytes"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        for seconds in (self.max_seconds, self.write_seconds):
            require(0 < seconds <= MAX_SECONDS, f"times must be above 0 and at most {MAX_SECONDS:,} seconds.")
        require(0 <= self.port < 65536, f"port must be between 0 and 65535, not {self.port}.")
        require(
            is_loopback(self.host) or len(self.api_keys) > 0,
            f"Listening on '{self.host}' needs an API key.",
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
