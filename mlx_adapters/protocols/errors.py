"""A refusal, as OpenAI's API writes it."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from mlx_adapters.errors import AdapterError

LONGEST = 2000  # characters of a message: it may repeat what was sent


class ApiError(Exception):
    """A refusal with an HTTP status and the body that OpenAI's API gives."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        message = message if len(message) <= LONGEST else message[:LONGEST] + " ..."
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def public(message: str) -> str:
    """What clients are told: of a path on this machine its last part.

    >>> public("'/home/me/adapters/sql/adapters.safetensors' is cut short.")
    "'adapters.safetensors' is cut short."
    """
    return re.sub(r"'[~/][^']*/([^'/]+)'", r"'\1'", message)


@contextlib.contextmanager
def told_as(param: str | None = None, longest: int = 400) -> Iterator[None]:
    """Turn this package's errors into refusals of `param`, or of the whole."""
    try:
        yield
    except AdapterError as error:
        raise ApiError(400, error.message[:longest], param=param) from None
