"""Whether a record was made on this machine.

An adapter says what it was trained on, and fusing reads that data again. A stranger's adapter may name any path or data
set, so training signs what it records with a secret that lies in the home folder and never leaves it.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
from typing import Any

from mlx_adapters.errors import AdapterError
from mlx_adapters.storage import files, paths

KEY_FILE = "machine.key"


def signature(text: str) -> str | None:
    """What proves that this machine recorded `text`; None where no secret can be kept. Makes it if there is none."""
    path = paths.home() / KEY_FILE
    with contextlib.suppress(OSError, UnicodeError, AdapterError):
        if not path.is_file():
            files.write_text(path, secrets.token_hex(32))
            os.chmod(path, 0o600)
        return _signed(path.read_text(encoding="utf-8"), text)
    return None


def made_here(text: str, signed: Any) -> bool:
    """Whether `signed` is this machine's signature of `text`; whatever else it is, it is not."""
    with contextlib.suppress(OSError, UnicodeError):
        key = (paths.home() / KEY_FILE).read_text(encoding="utf-8")
        return isinstance(signed, str) and hmac.compare_digest(_signed(key, text).encode(), signed.encode())
    return False


def _signed(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()
