"""Who may call: API keys, their scopes, the runs that they are bound to, and their limits.

A secret is shown once and stored as a hash. A process keeps the keys in memory for `KEYS_SECONDS`, so a revoked key
works for that much longer at most. Limits count in each process on its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from evenodds_service.api.problems import refusal
from evenodds_service.errors import (
    KeyInvalid,
    KeyMissing,
    RateLimited,
    RunForbidden,
    ScopeMissing,
    ServiceError,
    StoreUnavailable,
)
from evenodds_service.runtime.decisions import run_of
from evenodds_service.storage.store import ApiKey, Scope, Store

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Send
    from starlette.types import Scope as AsgiScope

logger = logging.getLogger(__name__)

PREFIX = "eo_"
KEYS_SECONDS = 2.0
USES_SECONDS = 60.0
"""How exactly a key's last use is kept."""

_OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json", "/"})
_OPEN_FOLDERS = ("/page/", "/docs-files/")
"""Say nothing of any run: they ask for no key."""

_CHAT_PATH = "/v1/chat/completions"
_READS = frozenset({"/predict", "/allocate", "/budget", _CHAT_PATH})
"""POSTs that store nothing."""


def new_secret() -> str:
    """256 random bits, recognisable as a key of this service in a leak scanner."""
    return PREFIX + secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    """What is stored. The secret has too many random bits to be guessed, so a plain hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


def now() -> datetime:
    """The present time."""
    return datetime.now(timezone.utc)


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """The keys that stand, by the hash of a secret.

    Attributes:
        read_at: When the read of them began, by the ring's clock.
        unread: Why they are older than they should be, if they are.
    """

    keys: Mapping[str, ApiKey]
    read_at: float
    unread: StoreUnavailable | None = None


class KeyRing:
    """The keys of the database, read anew every few seconds, and what each has used of its rate.

    Args:
        clock: Seconds that never go back.
        now: The present time, aware, for keys that expire.
    """

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.monotonic, now: Callable[[], datetime] = now
    ) -> None:
        self._store = store
        self._clock = clock
        self._now = now
        self._used: dict[str, float] = {}  # key -> when its use was kept
        self._noting: set[asyncio.Future[None]] = set()
        self._lock = threading.Lock()
        self._known = _Known({}, -math.inf)
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> requests left, as of

    async def check(self, secret: str | None, method: str, path: str) -> ApiKey:
        """The key of this secret, if it may make such a call.

        Raises:
            AccessRefused: the key is missing or not valid, or may not make this call.
            StoreUnavailable: the database does not answer, and the keys were never read or lack this one.
        """
        if not secret:
            raise KeyMissing(
                "this service requires an API key: send `Authorization: Bearer eo_...` "
                "(`evenodds keys create` makes one)"
            )
        known = self._known
        if self._clock() - known.read_at > KEYS_SECONDS:
            known = await run_in_threadpool(self._read)
        given, found = hash_of(secret), None
        for stored, key in known.keys.items():  # all of them, whichever matches: the time tells nothing
            if hmac.compare_digest(given, stored):
                found = key
        if found is None and known.unread is not None:
            raise known.unread  # it may have been made since: "not valid" would be a guess
        if found is None:
            raise KeyInvalid("this API key is not valid here, or was revoked: ask for a new one")
        if found.expires_at is not None and found.expires_at <= self._now():
            raise KeyInvalid(f"key {found.name!r} expired on {found.expires_at:%Y-%m-%d}: ask for a new one")
        if self._clock() - self._used.get(found.name, -math.inf) > USES_SECONDS:
            self._used[found.name] = self._clock()
            # Beside the request, which waits for no write.
            noting = asyncio.ensure_future(run_in_threadpool(self._note_use, found.name))
            self._noting.add(noting)
            noting.add_done_callback(self._noting.discard)
        needed = scope_of(method, path)
        if needed not in found.scopes:
            raise ScopeMissing(
                f"{method} {path} needs the scope {needed!r}, key {found.name!r} has {', '.join(sorted(found.scopes))}",
            )
        self._count(found)
        return found

    def _read(self) -> _Known:
        """What is known now: as of this call, or newer where another read began later and was answered sooner."""
        began = self._clock()  # a key revoked while a slow database answers must not live longer for it
        keys, unread = None, None
        try:
            standing = [key for key in self._store.api_keys() if key.revoked_at is None]
            keys = {secret: key for key in standing for secret in (key.secret_hash, key.second_hash) if secret}
        except StoreUnavailable as error:
            if self._known.read_at == -math.inf:
                raise
            unread = error
        with self._lock:
            if began >= self._known.read_at:  # what was read before still holds where nothing could be read
                self._known = replace(self._known, unread=unread) if keys is None else _Known(keys, began)
            return self._known

    def _note_use(self, name: str) -> None:
        try:
            self._store.note_key_uses([name], now=self._now())
        except StoreUnavailable as error:
            logger.info("last use of key %r not kept: %s", name, error)

    def _count(self, key: ApiKey) -> None:
        """A bucket that holds the requests of one minute and fills evenly."""
        limit = key.requests_per_minute
        if limit is None:
            return
        with self._lock:
            now = self._clock()
            left, since = self._buckets.get(key.name, (float(limit), now))
            left = min(float(limit), left + (now - since) * limit / 60.0)
            if left < 1.0:
                self._buckets[key.name] = (left, now)
                wait = math.ceil((1.0 - left) * 60.0 / limit)
                raise RateLimited(
                    f"key {key.name!r} may make {limit} requests a minute, and has made them: wait {wait} s",
                    retry_after_seconds=wait,
                )
            self._buckets[key.name] = (left - 1.0, now)


def scope_of(method: str, path: str) -> Scope:
    """`read` for what stores nothing, `admin` for what destroys, `write` for the rest."""
    if method in ("GET", "HEAD", "OPTIONS") or path in _READS:
        return "read"
    return "admin" if method == "DELETE" else "write"


class Access:
    """Lets nobody in without a key that may make the call. Sits inside what gives every request its id."""

    def __init__(self, app: ASGIApp, ring: KeyRing) -> None:
        self._app = app
        self._ring = ring

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or scope["path"].startswith(_OPEN_FOLDERS):
            await self._app(scope, receive, send)
            return
        try:
            key = await self._ring.check(_secret_of(scope), scope["method"], scope["path"])
        except ServiceError as error:
            await refusal(Request(scope), error)(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key"] = key
        await self._app(scope, receive, send)


def _secret_of(scope: AsgiScope) -> str | None:
    kind, _, secret = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None


async def run_is_allowed(request: Request) -> None:
    """A key that is bound to certain runs may name no other, neither in the path nor in the body.

    What is about all runs (`/metrics`) is not for such a key.

    Raises:
        RunForbidden: the call names another run.
    """
    key = _api_key(request)
    if key is None or key.runs == "*":
        return
    if request.url.path == "/metrics":
        raise RunForbidden(
            f"key {key.name!r} is bound to runs {key.runs!r}, and /metrics shows all runs: use a key without --runs"
        )
    named = [request.path_params.get("run")]
    if request.method == "PUT" or (request.method == "POST" and named == [None]):
        try:
            body = await request.json()  # parsed already, unless it came under another name than JSON
        except (ValueError, RecursionError):
            return  # the route refuses it, as it does what is no object
        if isinstance(body, dict):
            named += [body.get("run"), body.get("fork_of")]
            if isinstance(body.get("decision_id"), str):
                named.append(run_of(body["decision_id"]))
            if request.url.path == _CHAT_PATH:
                named.append(str(body.get("model")).partition(":")[0])
    for run in named:
        if isinstance(run, str) and not may_touch(key, run):
            raise RunForbidden(f"key {key.name!r} is bound to runs {key.runs!r}, not to {run!r}")


def may_touch(key: ApiKey | None, run: str) -> bool:
    """Whether the key is bound to the run; without keys everybody is."""
    return key is None or fnmatchcase(run, key.runs)


def _api_key(request: Request) -> ApiKey | None:
    return getattr(request.state, "api_key", None)


Caller = Annotated[ApiKey | None, Depends(_api_key)]
