"""What a web page of another site could make a browser do here, and what a browser may do with the replies.

A browser sends requests to any address that a page names, loopback included. The page cannot read the replies (there
are no CORS headers, unless its origin is allowed), but a request that changes something would have done its work. So
what changes something has to say that it is JSON, and may not come from a page of another site. Under DNS rebinding a
page's own name leads here, and only the name in `Host` tells: on loopback, none but loopback's is answered. On another
address probes and scrapes are answered under any name, because Kubernetes and Prometheus call a pod by its address.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evenodds_service.api.middleware.request_log import QUIET_ROUTES
from evenodds_service.api.problems import HTTP_CODES, problem, refusal
from evenodds_service.errors import HostRefused, OriginRefused, ServiceError

ANY_HOST = "*"
_LOOPBACK = re.compile(r"localhost|127(\.\d{1,3}){3}|\[::1\]", flags=re.IGNORECASE)
_ONLY_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_JSON = re.compile(r"application/(json|x-ndjson|[\w.-]+\+json)", flags=re.IGNORECASE)
_SAME_SITE = frozenset({"same-origin", "none"})  # "none": the person at the browser asked, no page did
_DOCS = "/docs"
_REPLY_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_DOCS_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The documentation's own script stands in the page, and nothing that anybody sent does."""


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches what listens on this address."""
    return address == "::1" or _LOOPBACK.fullmatch(address) is not None


class Browsers:
    """Middleware that refuses foreign hosts, foreign pages and bodies that do not say that they are JSON.

    Args:
        hosts: Names that `Host` may have besides loopback's; `*` allows any.
        answers_probes: Whether probes and scrapes are answered whatever the name is.
        origins: Of the pages of other sites that may call, as browsers send them: `https://host:port`.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], answers_probes: bool, origins: Collection[str]) -> None:
        self._app, self._answers_probes = app, answers_probes
        self._hosts = None if ANY_HOST in hosts else frozenset(host.lower() for host in hosts)
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _REPLY_HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"].startswith(_DOCS):
                    headers.setdefault("Content-Security-Policy", _DOCS_POLICY)
            await send(message)

        headers = Headers(scope=scope)
        try:
            if not (self._answers_probes and scope["path"] in QUIET_ROUTES):
                self._check_host(headers)
            if scope["method"] not in _ONLY_READS:
                self._check_origin(headers)
        except ServiceError as error:
            await refusal(Request(scope), error)(scope, receive, send_guarded)
            return
        if scope["method"] not in _ONLY_READS and _has_body(headers):
            given = headers.get("content-type", "")
            if not _JSON.fullmatch(given.partition(";")[0].strip()):
                detail = f"body: send it with Content-Type: application/json, got {given or 'none'}"
                await problem(Request(scope), 415, HTTP_CODES[415], detail)(scope, receive, send_guarded)
                return
        await self._app(scope, receive, send_guarded)

    def _check_host(self, headers: Headers) -> None:
        """Raises HostRefused."""
        if self._hosts is None:
            return
        given = headers.getlist("host")
        for host in given:
            name = re.sub(r":\d*$", "", host.strip()).lower()
            if not _LOOPBACK.fullmatch(name) and name not in self._hosts:
                raise HostRefused(
                    f"Host: {name!r} is not a name of this service, which answers as 127.0.0.1, as localhost and as "
                    "what EVENODDS_ALLOWED_HOSTS of the service lists: call it by one of these, or list the name there"
                )
        if len(given) != 1:
            raise HostRefused(
                f"Host: {len(given)} Host headers were sent, and exactly one is needed: send the name of this service"
            )

    def _check_origin(self, headers: Headers) -> None:
        """Raises OriginRefused. Programs send neither header, and no script in a browser can leave them out."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin.lower() in self._origins:
            return
        if site is not None:
            is_own = site in _SAME_SITE
        else:
            is_own = origin is None or _host_of(origin) == headers.get("host", "").lower()
        if not is_own:
            raise OriginRefused(
                f"Origin: a web page of {origin or 'another site'} may not change anything here: call from the "
                "service's own page or from a program, or list the page's origin in EVENODDS_ALLOWED_ORIGINS of the "
                "service"
            )


def _host_of(origin: str) -> str | None:
    """Host and port of an origin; None where there is none, as in `null`."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
