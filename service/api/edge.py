"""The edge of the HTTP face: what holds for every request, whatever its route."""

import logging
from collections.abc import Collection, Sequence
from urllib.parse import unquote_to_bytes, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.api.errors import answer
from service.api.record import Record
from service.errors import HeadersTooLarge, Malformed, NotFound, ServiceError, UnsupportedMedia

MAX_HEADER_BYTES = 32 << 10
log = logging.getLogger(__name__)


class Edge:
    """Answers with the request's id, refuses what no route takes, and gives unforeseen faults the one error shape."""

    def __init__(self, app: ASGIApp, allowed_hosts: Collection[str] = ()) -> None:
        self._app = app
        self._hosts = allowed_hosts  # none: any

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = logs.request_id()
        record = Record(scope, request_id, send)
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                marks = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", []), *marks]
            await record.send(message)

        try:
            refused = _refusal(scope) or self._unknown_host(scope)
            if refused is None:
                await self._app(scope, receive, send_marked)
            else:
                await answer(refused)(scope, receive, send_marked)
        except Exception:
            log.exception("%s: %s %r failed", request_id, scope["method"], scope["path"])
            if started:
                raise  # the server cuts the connection, so that nobody takes the part for the whole
            fault = ServiceError(f"something went wrong here; the logs tell more about {request_id}")
            await answer(fault)(scope, receive, send_marked)

    def _unknown_host(self, scope: Scope) -> ServiceError | None:
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1 or (not hosts and scope["http_version"] != "1.0"):
            return Malformed("a request names one Host")
        if self._hosts and _name(hosts) not in self._hosts:
            return Malformed("the Host is none of those that are served here", code="unknown_host")
        return None


def _name(hosts: Sequence[str]) -> str | None:
    """Without port and brackets; None where it is none."""
    try:
        return urlsplit(f"//{hosts[0]}").hostname if hosts else None
    except ValueError:
        return None


def _refusal(scope: Scope) -> ServiceError | None:
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
        return HeadersTooLarge(f"the headers are longer than {MAX_HEADER_BYTES} bytes")
    if not scope["path"].isprintable():
        return NotFound("no such path")
    # Queries end up in logs and histories; a key that was sent in one should be replaced.
    if b"luthier_" in unquote_to_bytes(scope["query_string"]):
        return Malformed("an API key never goes into the URL; send it as 'Authorization: Bearer …'")
    if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in scope["headers"]):
        return UnsupportedMedia("compressed bodies are not read; send the bytes as they are")
    return None
