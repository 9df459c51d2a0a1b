"""Sweeps that are many, or alone and dead; wakes that come ten times (F14, F34)."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import redis
from sqlalchemy import select, update

from service import leases, queue
from service.db import Database, now
from service.models import Job, JobEvent, OutboxMessage
from tests.faults import history
from tests.servers import Valkey
from tests.service import rows

JOBS, SWEEPS = 40, 3


def at_once(count: int, act: Callable[[], Any]) -> list[Any]:
    """What `act` gave in so many threads that begin together."""
    results: list[Any] = []
    barrier = threading.Barrier(count)

    def run() -> None:
        barrier.wait()
        results.append(act())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_f34_three_reapers_reap_each_lost_job_once(database: Database) -> None:
    jobs = [rows.add_job(database, rows.add_user(database, f"u{number}")) for number in range(JOBS)]
    with database.unit_of_work() as session:
        for number in range(JOBS):
            assert leases.claim(session, "w", f"slot-{number}", 60)
        session.execute(update(Job).values(lease_until=now() - 1))

    def reap() -> list[str]:
        with database.unit_of_work() as session:
            return leases.reap(session)

    reaped = Counter(job_id for ids in at_once(SWEEPS, reap) for job_id in ids)
    assert reaped == Counter(jobs)
    with database.reading() as session:
        found = session.scalars(select(Job)).all()
        assert {(job.state, job.epoch, job.lost_without_progress) for job in found} == {("queued", 2, 1)}
        lost = session.scalars(select(JobEvent.job_id).where(JobEvent.message.contains("lost"))).all()
    assert Counter(lost) == Counter(jobs)
    history.check(database, at_rest=False)


def test_f34_three_relays_send_everything_and_nothing_is_left(database: Database, broker: Valkey) -> None:
    """A message may be sent by two of them, and means no more than once."""
    with database.unit_of_work() as session:
        for number in range(JOBS):
            queue.enqueue(session, f"job-{number}")
    celery = queue.make_celery(broker.url)
    at_once(SWEEPS, lambda: queue.relay(database, celery))
    with database.reading() as session:
        assert session.scalars(select(OutboxMessage.id)).all() == []
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        assert JOBS <= int(client.llen("luthier")) <= SWEEPS * JOBS  # type: ignore[arg-type]


def test_f14_ten_wakes_of_one_job_on_four_workers_give_one_claim(database: Database) -> None:
    """What a wake does is a claim: the row decides, and all others find nothing, also when the job has ended."""
    job_id = rows.add_job(database)
    slots = iter(f"slot-{number}" for number in range(100))

    def wake() -> leases.Claim | None:
        with database.unit_of_work() as session:
            return leases.claim(session, "w", next(slots), 60)

    claims = [claim for claim in at_once(10, wake) if claim is not None]
    assert [claim.job_id for claim in claims] == [job_id]
    with database.unit_of_work() as session:
        leases.start(session, claims[0])
        result = leases.Result(prefix="adapters/x", files=[], digest="d", rank=1, metrics={})
        leases.succeed(session, claims[0], result)
    assert at_once(10, wake) == [None] * 10
    history.check(database)
