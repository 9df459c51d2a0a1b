"""A job's events as they happen: Server-Sent Events, resumable by Last-Event-ID, over when the job is."""

import logging
import re
from collections.abc import AsyncIterator, Iterator

import anyio
from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from service import events, jobs, schemas
from service.api.event_watch import BATCH, Batch, Follower
from service.api.request import Parts
from service.errors import Malformed, TooMany
from service.models import TERMINAL, JobEvent

KEEP_ALIVE_SECONDS = 15.0  # proxies cut connections that are silent for a minute
STALLED_SECONDS = 60.0  # a client that reads nothing for so long is gone; it may come back with Last-Event-ID
MAX_STREAMS = 100  # of one owner in one process
_PIECE = 32 << 10  # characters
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
    batch = await anyio.to_thread.run_sync(_first, parts, owner_id, job_id, seq)
    if batch.ended and not batch.events:
        return Response(status_code=204)
    if parts.streams[owner_id] >= MAX_STREAMS:
        raise TooMany(f"{MAX_STREAMS} event streams are open; close some first")
    parts.streams[owner_id] += 1
    return _CountedStream(parts, owner_id, _messages(parts, job_id, seq, batch))


class _StalledError(Exception):
    """A client that does not read."""


class _CountedStream(StreamingResponse):
    def __init__(self, parts: Parts, owner_id: str, content: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._parts, self._owner_id = parts, owner_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            with anyio.move_on_after(STALLED_SECONDS) as patience:
                await send(message)
            if patience.cancelled_caught:
                raise _StalledError

        try:
            await super().__call__(scope, receive, send_in_time)
        except* _StalledError:
            log.info("an event stream ends, because its client does not read")
        finally:
            self._parts.streams[self._owner_id] -= 1


async def _messages(parts: Parts, job_id: str, seq: int, batch: Batch) -> AsyncIterator[str]:
    last = batch.events[-1].seq if batch.events else seq
    async with Follower(parts.watch, job_id, last) as follower:
        while True:
            for text in _texts(batch):
                yield text
            if batch.ended:
                return
            try:
                with anyio.fail_after(KEEP_ALIVE_SECONDS):
                    batch = await follower.next()
            except TimeoutError:
                batch = Batch([])
                yield ": still here\n\n"


def _texts(batch: Batch) -> Iterator[str]:
    """In pieces that are worth a write, and no larger than what a client that does not read may cost."""
    piece = ""
    for row in batch.events:
        piece += _message(row)
        if len(piece) > _PIECE:
            yield piece
            piece = ""
    if piece:
        yield piece


def _message(row: JobEvent) -> str:
    return f"id: {row.seq}\nevent: {row.type}\ndata: {event(row).model_dump_json()}\n\n"


def _first(parts: Parts, owner_id: str, job_id: str, seq: int) -> Batch:
    """What there is after `seq` already. Raises NotFound: from here on the stream's id is one of the owner's."""
    with parts.database.reading() as session:
        # The job first, as the watch does.
        job = jobs.get(session, owner_id, job_id)
        rows = events.after(session, job_id, seq, BATCH) if job.event_seq > seq else []
    return Batch(rows, job.state in TERMINAL and len(rows) < BATCH)
