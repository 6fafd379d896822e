"""What the client raises. Everything it raises is in this tree.

    EvenOddsError
    ├── ConfigurationError    the client cannot be built or used like this
    ├── InvalidRequest        the call does not keep to the contract; the faulty call was not sent
    ├── TransportError        no reply: the connection broke on the way
    │   ├── Unreachable       no connection: nothing was sent
    │   └── TimedOut          no reply in time; the service may have done the work
    ├── ProblemError          the service replied with an error
    │   ├── Unauthorized      401: no API key, or none that is valid
    │   ├── Forbidden         403: the API key may not do this
    │   ├── NotFound          404: no such run or prompt
    │   ├── Conflict          409: the call contradicts what the service holds
    │   ├── TooLarge          413: more than one call may carry
    │   ├── Invalid           422: malformed request
    │   ├── RateLimited       429: the API key made too many requests
    │   └── ServerError       500 and above: the service failed
    │       └── Unavailable   503: the service cannot answer now
    └── ReplyInvalid          a reply that this client does not understand

Errors survive pickling, so that they may cross process boundaries. This module knows no HTTP library.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 5
"""Most faults that a message lists; the attribute `errors` holds all."""


class EvenOddsError(Exception):
    """Root of all errors of the client."""


class ConfigurationError(EvenOddsError):
    """The client cannot be built or used like this."""


class InvalidRequest(EvenOddsError):
    """The call does not keep to the wire contract and was not sent.

    Attributes:
        call: Name of the method that was called.
        errors: One line per fault; each names the item, the fault and the value.
    """

    def __init__(self, call: str, errors: Sequence[str]) -> None:
        super().__init__(call, tuple(errors))
        self.call = call
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return f"{self.call} was not sent: {_joined(self.errors)}"


class TransportError(EvenOddsError):
    """No reply: the connection broke on the way. The service may or may not have done the work.

    Attributes:
        method: HTTP method.
        path: Path of the request, percent-encoded.
        reason: What went wrong, and where to.
        request_id: Id of the request, as sent in X-Request-ID.
        attempts: How often the call was tried.
    """

    SUMMARY = "connection broken"

    def __init__(self, method: str, path: str, reason: str, request_id: str, attempts: int) -> None:
        super().__init__(method, path, reason, request_id, attempts)
        self.method = method
        self.path = path
        self.reason = reason
        self.request_id = request_id
        self.attempts = attempts

    def __str__(self) -> str:
        tries = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        what = f"{self.SUMMARY} after {tries}: {self.reason}"
        return f"{self.method} {self.path}: {what} (request {self.request_id})"


class Unreachable(TransportError):
    """No connection: nothing was sent. Is the service running at the base URL?"""

    SUMMARY = "service unreachable"


class TimedOut(TransportError):
    """No reply in time. The service may have done the work; repeating the call is safe."""

    SUMMARY = "timed out"


class ProblemError(EvenOddsError):
    """The service replied with an error.

    Attributes:
        method: HTTP method.
        path: Path of the request, percent-encoded.
        status: HTTP status, 400 or above.
        code: Stable code of the error; `http_<status>` if the reply has none, for example a proxy's.
        detail: The fault in words.
        request_id: Id that the reply carries, else the one that was sent.
        errors: One line per fault, where there are several.
    """

    def __init__(
        self,
        method: str,
        path: str,
        status: int,
        code: str,
        detail: str,
        request_id: str,
        errors: Sequence[str] = (),
    ) -> None:
        super().__init__(method, path, status, code, detail, request_id, tuple(errors))
        self.method = method
        self.path = path
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.errors = tuple(errors)

    def __str__(self) -> str:
        lines = f" [{_joined(self.errors)}]" if self.errors else ""
        return f"{self.method} {self.path}: {self.status} {self.code}: {self.detail}{lines} (request {self.request_id})"


class Unauthorized(ProblemError):
    """401: the service asks for an API key, or this one is not valid (any more)."""


class Forbidden(ProblemError):
    """403: the API key may not do this."""


class NotFound(ProblemError):
    """404: no such run or prompt."""


class Conflict(ProblemError):
    """409: the call contradicts what the service holds."""


class TooLarge(ProblemError):
    """413: more than one call may carry. Send fewer items."""


class Invalid(ProblemError):
    """422: the service found the request malformed."""


class RateLimited(ProblemError):
    """429: the API key made too many requests. Nothing was done; repeating the call is safe.

    Attributes:
        retry_after: Seconds to wait before the next call, as the service asks; None where it does not say.
    """

    retry_after: float | None = None


class ServerError(ProblemError):
    """500 and above: the service failed. The request id finds the cause in its log."""


class Unavailable(ServerError):
    """503: the service cannot answer now."""


class ReplyInvalid(EvenOddsError):
    """A reply that this client does not understand: another service at the base URL, or a newer contract.

    Attributes:
        method: HTTP method.
        path: Path of the request, percent-encoded.
        status: HTTP status of the reply.
        reason: What was not understood.
        request_id: Id that the reply carries, else the one that was sent.
    """

    def __init__(self, method: str, path: str, status: int, reason: str, request_id: str) -> None:
        super().__init__(method, path, status, reason, request_id)
        self.method = method
        self.path = path
        self.status = status
        self.reason = reason
        self.request_id = request_id

    def __str__(self) -> str:
        return (
            f"{self.method} {self.path}: reply {self.status} not understood: {self.reason} "
            f"(request {self.request_id}); check the base URL and the versions of client and service"
        )


def _joined(lines: Sequence[str]) -> str:
    more = len(lines) - SHOWN
    return "; ".join(lines[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
