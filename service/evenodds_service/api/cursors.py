"""Where a listing goes on: opaque to callers, and good for the listing and the key that it was given for."""

from __future__ import annotations

import binascii
import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode

from fastapi.exceptions import RequestValidationError

from evenodds_service.storage.store import ApiKey

MOST_CHARACTERS = 512
_SIGNATURE_BYTES = 12


def cursor_at(place: str, *, listing: str, caller: ApiKey | None) -> str:
    """The cursor of what comes after `place` in the listing; the same in every process."""
    content = place.encode()
    return urlsafe_b64encode(_signature(content, listing, caller) + content).decode().rstrip("=")


def place_of(cursor: str | None, *, listing: str, caller: ApiKey | None) -> str | None:
    """What `cursor_at` was given; None for the beginning.

    Raises:
        RequestValidationError: it is no cursor of this listing, or not this caller's.
    """
    if cursor is None:
        return None
    try:
        whole = urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
    except (ValueError, binascii.Error):
        whole = b""
    signature, content = whole[:_SIGNATURE_BYTES], whole[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(content, listing, caller)):
        message = (
            "it was not given as next_cursor by this listing to this caller: leave it out to start from the first page"
        )
        raise RequestValidationError([{"type": "value_error", "loc": ("cursor",), "msg": message}])
    return content.decode()


def _signature(content: bytes, listing: str, caller: ApiKey | None) -> bytes:
    """By what every process knows of the caller's key. Without keys it tells mistakes, and there is nothing to keep."""
    secret = (caller.secret_hash if caller is not None else "").encode()
    return hmac.digest(secret or b"open", listing.encode() + b"\x00" + content, "sha256")[:_SIGNATURE_BYTES]
