"""A job's events as they happen: Server-Sent Events, resumable by Last-Event-ID, over when the job is."""

import logging
import re
from collections.abc import AsyncIterator, Sequence

import anyio
from fastapi import Response
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from service import events, jobs, schemas
from service.api.request import Parts
from service.errors import Malformed, TooMany
from service.models import TERMINAL, JobEvent

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0  # proxies cut connections that are silent for a minute
MAX_STREAMS = 100  # of one owner in one process
_BATCH = 200
log = logging.getLogger(__name__)


def event(row: JobEvent) -> schemas.Event:
    return schemas.Event(
        seq=row.seq,
        job=row.job_id,
        type=row.type,  # type: ignore[arg-type]
        level=row.level,  # type: ignore[arg-type]
        message=row.message,
        data=row.data,
        created_at=row.created_at,
    )


def resume_after(last_event_id: str | None, after: int) -> int:
    """Where a stream begins. Raises Malformed for a Last-Event-ID that this service never gave out."""
    if last_event_id is None:
        return after
    if not re.fullmatch(r"\d{1,15}", last_event_id):
        raise Malformed("Last-Event-ID: expected the number of an event", param="Last-Event-ID")
    return int(last_event_id)


async def open_stream(parts: Parts, owner_id: str, job_id: str, seq: int) -> Response:
    """All events after number `seq`; 204, which tells an EventSource to stop asking, when there can be none.

    Raises:
        NotFound: no such job of this owner.
        TooMany: this owner has as many streams open as one may have.
    """
    batch, ended = await anyio.to_thread.run_sync(_poll, parts, owner_id, job_id, seq)
    if ended and not batch:
        return Response(status_code=204)
    if parts.streams[owner_id] >= MAX_STREAMS:
        raise TooMany(f"{MAX_STREAMS} event streams are open; close some first")
    parts.streams[owner_id] += 1
    return _CountedStream(parts, owner_id, _messages(parts, owner_id, job_id, seq, batch, ended))


class _CountedStream(StreamingResponse):
    def __init__(self, parts: Parts, owner_id: str, content: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._parts, self._owner_id = parts, owner_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._parts.streams[self._owner_id] -= 1


async def _messages(
    parts: Parts, owner_id: str, job_id: str, seq: int, batch: Sequence[JobEvent], ended: bool
) -> AsyncIterator[str]:
    silence = 0.0
    while True:
        for row in batch:
            yield f"id: {row.seq}\nevent: {row.type}\ndata: {event(row).model_dump_json()}\n\n"
            seq, silence = row.seq, 0.0
        if ended:
            return
        if not batch:
            await anyio.sleep(POLL_SECONDS)
            silence += POLL_SECONDS
        if silence >= KEEP_ALIVE_SECONDS:
            yield ": still here\n\n"
            silence = 0.0
        try:
            batch, ended = await anyio.to_thread.run_sync(_poll, parts, owner_id, job_id, seq)
        except SQLAlchemyError as error:
            log.warning("an event stream ends, because the database does not answer: %s", type(error).__name__)
            return  # the client comes back with Last-Event-ID


def _poll(parts: Parts, owner_id: str, job_id: str, seq: int) -> tuple[list[JobEvent], bool]:
    """The next events after `seq`, and whether they are the last there will be."""
    with parts.database.reading() as session:
        # The job first: its last event is written in the transaction that ends it, so an ended job has them all.
        job = jobs.get(session, owner_id, job_id)
        batch = events.after(session, job_id, seq, _BATCH) if job.event_seq > seq else []
    return batch, job.state in TERMINAL and len(batch) < _BATCH
