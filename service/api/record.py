"""What of a request goes into the audit log, written before its answer is sent."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.types import Message, Scope, Send

from service import audit
from service.audit import Entry
from service.users import Principal

_LOOKS = ("GET", "HEAD", "OPTIONS", "TRACE")
_DENIALS = (401, 403, 429)
_MAX_ANSWER_BYTES = 1 << 20
log = logging.getLogger(__name__)


class Record:
    """One request's. Its `send` holds the answer's head back until the row is there, for which it needs the body."""

    def __init__(self, scope: Scope, request_id: str, send: Send) -> None:
        self._scope, self._request_id, self._send = scope, request_id, send
        self._head: Message | None = None
        scope.setdefault("state", {})["record"] = self

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self._is_wanted(message["status"]):
            self._head = message
            return
        if self._head is not None:
            head, self._head = self._head, None
            entry = self._entry(head["status"], message.get("body", b""))
            await anyio.to_thread.run_sync(self._write, entry)
            await self._send(head)
        await self._send(message)

    def append(self, session: Session, status: int, object_id: str) -> None:
        """In the transaction of the change that it tells of."""
        body = json.dumps({"id": object_id}).encode()
        audit.append(session, self._entry(status, body))

    def _is_wanted(self, status: int) -> bool:
        if self._scope["state"].get("recorded", False):
            return False
        if status in _DENIALS:
            return not self._scope["state"].get("unrecorded", False)
        # Without a route nothing was changed, and nobody was asked for a key.
        return self._scope["method"] not in _LOOKS and "endpoint" in self._scope and status != 405

    def _entry(self, status: int, body: bytes) -> Entry:
        caller: Principal | None = self._scope["state"].get("caller")
        route, client = self._scope.get("route"), self._scope.get("client")
        ids = dict.fromkeys([*map(str, self._scope.get("path_params", {}).values()), *_made(status, body)])
        return Entry(
            request_id=self._request_id,
            user_id=None if caller is None else caller.user_id,
            key_id=None if caller is None else caller.key_id,
            address=client[0] if client else "",
            action=f"{self._scope['method']} {getattr(route, 'path', self._scope['path'])}",
            object_id=" ".join(ids) or None,
            status=status,
        )

    def _write(self, entry: Entry) -> None:
        try:
            with self._scope["app"].state.parts.database.of_everybody().unit_of_work() as session:
                audit.append(session, entry)
        except SQLAlchemyError as error:  # what was done is done: the log of the process has to do
            log.error("not in the audit log (%s): %s", type(error).__name__, entry)


@contextmanager
def append_within(request: Request) -> Iterator[Callable[[Session, int, str], None]]:
    """For a route that writes the row itself, in its own transaction: `append`. A block that fails has not recorded."""
    record: Record = request.state.record
    yield record.append
    request.state.recorded = True


def _made(status: int, body: bytes) -> list[str]:
    """The id of what a request has made, out of its answer."""
    if not 200 <= status < 300 or len(body) > _MAX_ANSWER_BYTES or not body.startswith(b"{"):
        return []
    value: Any = json.loads(body).get("id")
    return [value] if isinstance(value, str) else []
