"""What keeps promises when somebody died: messages sent again, leases reaped, leftovers removed."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service import leases, queue, sweep
from service.db import Database, now
from service.models import Adapter, Job, OutboxMessage, new_id
from service.settings import Settings
from service.storage import Storage, open_storage
from service.sweep import Sweep
from tests.servers import Valkey
from tests.service import rows


@pytest.fixture
def own(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "own", sweep_seconds=3600, rewake_seconds=30)


@pytest.fixture
def local(own: Settings) -> Storage:
    return open_storage(own.storage_url)


@pytest.fixture
def celery(broker: Valkey) -> Celery:
    return queue.make_celery(broker.url)


@pytest.fixture
def sweeper(own: Settings, database: Database, local: Storage, celery: Celery) -> Iterator[Sweep]:
    sweeper = Sweep(own, database, local, celery)
    sweeper._quiet_until = 0.0
    yield sweeper
    sweeper.stop()


def waiting(broker: Valkey) -> int:
    """Messages in the broker's queue."""
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        return int(client.llen("luthier"))  # type: ignore[arg-type]


def unsent(database: Database) -> int:
    with database.reading() as session:
        return len(session.scalars(select(OutboxMessage.id)).all())


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_message_follows_the_commit_at_once(database: Database, broker: Valkey, sweeper: Sweep) -> None:
    sweeper.start()
    job_id = rows.add_job(database)
    with database.unit_of_work() as session:
        queue.enqueue(session, job_id)
    until(lambda: waiting(broker) == 1)
    until(lambda: unsent(database) == 0)


def test_nothing_is_sent_for_what_was_rolled_back(database: Database, broker: Valkey, sweeper: Sweep) -> None:
    queue.outbox_filled.clear()
    with Session(database.engine) as undone:
        queue.enqueue(undone, "job-0")
        undone.flush()
    assert not queue.outbox_filled.is_set()
    sweeper.once()
    assert waiting(broker) == 0


def test_a_dead_broker_loses_nothing(database: Database, broker: Valkey, sweeper: Sweep) -> None:
    broker.stop()
    with database.unit_of_work() as session:
        queue.enqueue(session, new_id("job"))
    sweeper.once()
    assert unsent(database) == 1
    broker.start()
    sweeper.once()
    assert waiting(broker) == 1


def test_a_job_that_waits_for_long_is_announced_again(database: Database, broker: Valkey, sweeper: Sweep) -> None:
    old, young, later = rows.add_job(database), rows.add_job(database), rows.add_job(database)
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id.in_((old, later))).values(announced_at=now() - 31))
        session.execute(update(Job).where(Job.id == later).values(run_after=now() + 60))
    for _ in range(2):
        sweeper.once()
    sweeper.once()
    assert waiting(broker) == 1
    with database.reading() as session:
        assert session.get_one(Job, young).announced_at <= session.get_one(Job, old).announced_at


def test_after_an_outage_healthy_workers_renew_before_anything_is_reaped(
    database: Database, sweeper: Sweep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = rows.add_job(database)
    with database.unit_of_work() as session:
        assert leases.claim(session, "w", "cpu:1", 60)
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))
    with monkeypatch.context() as outage, caplog.at_level(logging.WARNING):
        outage.setattr(leases, "reap", raise_operational_error)
        sweeper.once()
    assert "does not answer" in caplog.text
    sweeper.once()
    with database.reading() as session:
        assert session.get_one(Job, job_id).state == "claimed"
    monkeypatch.setattr(sweeper, "_quiet_until", 0.0)
    sweeper.once()
    with database.reading() as session:
        assert session.get_one(Job, job_id).state == "queued"


def test_a_process_that_has_just_started_reaps_nothing_for_one_lease(
    own: Settings, database: Database, local: Storage, celery: Celery
) -> None:
    """It may have started at the end of an outage, when every lease looks expired."""
    job_id = rows.add_job(database)
    with database.unit_of_work() as session:
        assert leases.claim(session, "w", "cpu:1", 60)
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))
    for lease_seconds, state in ((60.0, "claimed"), (0.01, "queued")):
        sweeper = Sweep(own.model_copy(update={"lease_seconds": lease_seconds}), database, local, celery)
        time.sleep(0.02)
        sweeper.once()
        with database.reading() as session:
            assert session.get_one(Job, job_id).state == state


def raise_operational_error(*_: object) -> None:
    raise OperationalError("SELECT 1", {}, Exception("the server closed the connection"))


def test_objects_of_deleted_adapters_and_of_ended_jobs_go(
    sqlite_database: Database, local: Storage, tmp_path: Path
) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x")
    sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    job_id = rows.add_job(sqlite_database)
    prefix = f"adapters/{job_id}/e3"
    for key in (f"jobs/{job_id}/e1/s5/state.json", f"adapters/{job_id}/e1/part", f"{prefix}/whole"):
        local.put_file(key, file, sha256)
    with sqlite_database.unit_of_work() as session:
        claim = leases.claim(session, "w", "cpu:1", 60)
        assert claim is not None
        leases.start(session, claim)
        result = leases.Result(id="adapter-1", prefix=prefix, files=[], digest="d", rank=1, metrics={})
        leases.succeed(session, claim, result)
    sweep.purge_leftovers(sqlite_database, local, grace_seconds=60)
    assert len(list(local.keys("jobs"))) == 1
    sweep.purge_leftovers(sqlite_database, local, grace_seconds=-1)
    assert list(local.keys("jobs")) == []
    assert list(local.keys("adapters")) == [f"{prefix}/whole"]
    with sqlite_database.unit_of_work() as session:
        session.execute(update(Adapter).values(deleted_at=now()))
    sweep.purge_deleted(sqlite_database, local)
    assert list(local.keys("adapters")) == []
    with sqlite_database.reading() as session:
        assert session.scalar(select(Adapter.purged_at)) is not None
        assert session.scalar(select(Job.purged_at)) is not None
