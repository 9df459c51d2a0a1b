"""Around every request: its id, a line in the log, its time for Prometheus, and a span."""

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs, metrics, traces
from service.models import new_id

log = logging.getLogger(__name__)
_GIVEN_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._-]{7,63}")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_PROBES = ("/healthz", "/readyz")


class Observed:
    """The outermost layer: it sees what the others answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        method = scope["method"] if scope["method"] in _METHODS else "other"

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Until the answer begins: streams last as long as their clients like.
                seconds = time.perf_counter() - began
                metrics.HTTP_SECONDS.labels(method, _route(scope), str(status)).observe(seconds)
            await send(message)

        request_id = _header(scope, b"x-request-id", _GIVEN_ID) or new_id("request")
        parent = _header(scope, b"traceparent", re.compile(rb"[0-9a-f-]{55}"))
        with logs.about(request_id=request_id), traces.span(method, parent) as span:
            try:
                await self._app(scope, receive, send_seen)
            finally:
                route = _route(scope)
                span.name(f"{method} {route}", {"http.route": route, "http.response.status_code": status})
                if status >= 500:
                    span.fault()
                _write(scope, method, route, status, time.perf_counter() - began)


def _write(scope: Scope, method: str, route: str, status: int, seconds: float) -> None:
    level = logging.DEBUG if route in _PROBES else logging.INFO
    if not log.isEnabledFor(level):
        return
    caller = scope.get("state", {}).get("caller")
    facts = {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
    facts |= {} if caller is None else {"user_id": caller.user_id, "key_id": caller.key_id}
    facts |= {name: value for name, value in scope.get("path_params", {}).items() if name.endswith("_id")}
    log.log(level, "%s %s: %d", method, route, status, extra={"facts": facts})


def _route(scope: Scope) -> str:
    """The route's pattern; what fits none is one name, so that clients cannot make up labels."""
    return str(getattr(scope.get("route"), "path", "none"))


def _header(scope: Scope, name: bytes, pattern: re.Pattern[bytes]) -> str | None:
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode() if len(values) == 1 and pattern.fullmatch(values[0]) else None
