"""Who may ask, and what may come in with a question."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from pathlib import Path

KEYS_VARIABLE = "ULTRA_API_KEYS"


class ApiKeys:
    """The keys that open the endpoint, kept as digests; without any key it is open to all."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def admit(self, authorization: str | None) -> bool:
        """Return whether an `Authorization: Bearer KEY` header opens the endpoint.

        Every key is compared, each in constant time, so the answer's delay tells nothing.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def load_keys(path: str = "") -> ApiKeys:
    """Return the keys of a file, one a line, or of ULTRA_API_KEYS, separated by commas.

    Raises:
        ValueError: for a file that names no key, which would leave the endpoint open.
    """
    if path:
        keys = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise ValueError(f"{path} names no API key")
        return ApiKeys(keys)
    return ApiKeys(
        [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    )


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """Return the content of a base64 data URL, whatever kind it claims to be.

    Raises:
        ValueError: for any other address, nothing is ever fetched; for one over `max_bytes`,
            before it is decoded; and for broken base64.
    """
    head, comma, content = url.partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        raise ValueError("only data URLs (data:image/jpeg;base64,...) are read, nothing is fetched")
    if len(content) > -(-max_bytes // 3) * 4:
        raise ValueError(f"more than the {max_bytes} bytes that are let in")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("its base64 cannot be decoded") from None
