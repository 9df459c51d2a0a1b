"""Looks for new events on behalf of all event streams of this process: two queries a round, however many there are.

A thread that lives while somebody follows a job. It gives a follower the next batch only once the last one was taken,
so that a client that does not read costs one batch and no more queries.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sqlalchemy import and_, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.db import Database
from service.models import TERMINAL, Job, JobEvent

POLL_SECONDS = 0.25
BATCH = 200
_JOBS_A_QUERY = 100
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Events in order, and whether they are the last that there will be."""

    events: Sequence[JobEvent]
    ended: bool = False


class Follower:
    """One stream: who it follows and up to where. Belongs to the event loop that made it."""

    def __init__(self, watch: "Watch", job_id: str, seq: int) -> None:
        self.job_id, self.seq = job_id, seq
        self.waiting = False  # for a batch; the watch's thread looks, the loop's writes
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[Batch] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._watch.add(self)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._watch.remove(self)

    async def next(self) -> Batch:
        """The next events, as soon as there are any. May be cancelled and called again."""
        if self._news.empty():
            self.waiting = True
        return await self._news.get()

    def deliver(self, batch: Batch) -> None:
        """From the watch's thread."""
        self.waiting = False
        if batch.events:
            self.seq = batch.events[-1].seq
        try:
            self._loop.call_soon_threadsafe(self._news.put_nowait, batch)
        except RuntimeError:  # the loop has ended, and with it the stream
            self._watch.remove(self)


class Watch:
    """All followers of one process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._followers: set[Follower] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, follower: Follower) -> None:
        with self._lock:
            self._followers.add(follower)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="events", daemon=True)
                self._thread.start()

    def remove(self, follower: Follower) -> None:
        with self._lock:
            self._followers.discard(follower)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._followers:
                    self._thread = None
                    return
                waiting = [follower for follower in self._followers if follower.waiting]
            try:
                self._round(waiting)
            except SQLAlchemyError as error:
                log.warning("event streams end, because the database does not answer: %s", type(error).__name__)
                for follower in waiting:
                    follower.deliver(Batch([], ended=True))  # the clients come back with Last-Event-ID
            except Exception:  # a thread that ended would leave every stream silent
                log.exception("event watch")
            time.sleep(POLL_SECONDS)

    def _round(self, waiting: Sequence[Follower]) -> None:
        for followers in _several(waiting):
            with self._database.reading() as session:
                batches = _look(session, followers)
            for follower, batch in batches:
                follower.deliver(batch)


def _look(session: Session, followers: Sequence[Follower]) -> list[tuple[Follower, Batch]]:
    # The jobs first: a job's last event is written in the transaction that ends it, so an ended job has them all.
    told = select(Job.id, Job.event_seq, Job.state).where(Job.id.in_({follower.job_id for follower in followers}))
    jobs = {row.id: row for row in session.execute(told)}
    fresh = [f for f in followers if f.job_id in jobs and jobs[f.job_id].event_seq > f.seq]
    events = _events(session, fresh)
    found = []
    for follower in followers:
        job = jobs.get(follower.job_id)
        new = [event for event in events[follower.job_id] if event.seq > follower.seq][:BATCH]
        last = new[-1].seq if new else follower.seq
        ended = job is None or (job.state in TERMINAL and last >= job.event_seq)
        if new or ended:
            found.append((follower, Batch(new, ended)))
    return found


def _events(session: Session, followers: Sequence[Follower]) -> defaultdict[str, list[JobEvent]]:
    """The events after each follower's last, by job. Numbers have no gaps, so that a range of them is a limit."""
    events: defaultdict[str, list[JobEvent]] = defaultdict(list)
    if followers:
        spans = {(follower.job_id, follower.seq) for follower in followers}
        wanted = (and_(JobEvent.job_id == id_, JobEvent.seq.between(seq + 1, seq + BATCH)) for id_, seq in spans)
        for event in session.scalars(select(JobEvent).where(or_(*wanted)).order_by(JobEvent.job_id, JobEvent.seq)):
            events[event.job_id].append(event)
    return events


def _several(followers: Iterable[Follower]) -> Iterable[list[Follower]]:
    remaining = iter(followers)
    while some := list(itertools.islice(remaining, _JOBS_A_QUERY)):
        yield some
