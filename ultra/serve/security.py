"""Who may ask, and what may come in with a question.

    python -m ultra.serve.security    prints a new key, once, and the line that lets it in

Keys are kept as digests, so that whoever reads the file or the environment cannot ask. They are 256
random bits, which is why one round of SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

KEYS_VARIABLE = "ULTRA_API_KEYS"
_ENTRY = re.compile(r"sha256:([0-9a-f]{64})(\s.*)?")


class ApiKeys:
    """The keys that open the endpoint; without any it is open to all.

    Args:
        digests: what `digest_key` returns of each.
    """

    def __init__(self, digests: Sequence[str]) -> None:
        self._digests = [digest.encode() for digest in digests]

    def admit(self, authorization: str | None) -> bool:
        """Return whether an `Authorization: Bearer KEY` header opens the endpoint.

        Every key is compared, each in constant time, so the answer's delay tells nothing.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        digest = digest_key(key.strip()).encode()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def digest_key(key: str) -> str:
    """Return `sha256:` and the hexadecimal digest of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def load_keys(path: str = "") -> ApiKeys:
    """Return the keys of a file, or of ULTRA_API_KEYS.

    Both hold digests: the file one a line, with any text behind it, and # before a comment; the
    variable separates them by commas.

    Raises:
        ValueError: for an entry that is no digest, which is not told, and for a file or variable
            with something in it but no key, which would leave the endpoint open.
    """
    if path:
        source, entries = path, Path(path).read_text(encoding="utf-8").splitlines()
    else:
        source, entries = KEYS_VARIABLE, os.environ.get(KEYS_VARIABLE, "").split(",")
    digests = []
    for number, entry in enumerate(map(str.strip, entries), 1):
        if not entry or entry.startswith("#"):
            continue
        if not (found := _ENTRY.fullmatch(entry)):
            raise ValueError(
                f"{source}: entry {number} is not sha256: and 64 hexadecimal digits; "
                "python -m ultra.serve.security makes a key and its entry"
            )
        digests.append(f"sha256:{found[1]}")
    if (path or any(entries)) and not digests:
        raise ValueError(f"{source} names no API key")
    return ApiKeys(digests)


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


def main() -> None:
    """Print a new key and its entry."""
    key = secrets.token_urlsafe(32)
    sys.stdout.write(f"key, for who asks    {key}\nentry, for api_keys  {digest_key(key)}\n")


if __name__ == "__main__":
    main()
