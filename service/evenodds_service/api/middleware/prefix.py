"""The service under a path of another one: `https://host/evenodds/` instead of a host of its own.

Pages and documentation use relative addresses, so they work under any prefix. Here the prefix is taken off the path,
where a proxy has left it there, and remembered for what needs a whole address. It decides on nothing else: whatever
comes after this sees the path alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_SHOWS = frozenset({"GET", "HEAD"})


class Prefix:
    """Middleware that meets a request first.

    Args:
        root_path: The prefix that the operator names, or the empty string.
        proxies: Networks of proxies whose `X-Forwarded-Prefix` counts instead.
    """

    def __init__(self, app: ASGIApp, *, root_path: str, proxies: Sequence[IPv4Network | IPv6Network]) -> None:
        self._app = app
        self._root_path = root_path
        self._proxies = tuple(proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        prefix = self._forwarded(scope) or self._root_path
        path: str = scope["path"]
        if prefix and path == prefix and scope["method"] in _SHOWS:  # the page's addresses are relative to its folder
            await RedirectResponse(f"{prefix}/", 307)(scope, receive, send)
            return
        if prefix and path.startswith(f"{prefix}/"):
            scope = {**scope, "path": path.removeprefix(prefix)}
            scope.pop("raw_path", None)
        scope.setdefault("state", {})["prefix"] = prefix
        await self._app(scope, receive, send)

    def _forwarded(self, scope: Scope) -> str:
        """The prefix that a trusted proxy names; the empty string where there is none, or one that is no path."""
        given = Headers(scope=scope).get("x-forwarded-prefix", "").rstrip("/")
        client = scope.get("client")
        if not given or client is None or not _PREFIX.fullmatch(given):
            return ""
        try:
            address = ip_address(client[0])
        except ValueError:  # of a Unix socket, which has none
            return ""
        return given if any(address in network for network in self._proxies) else ""
