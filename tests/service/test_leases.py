"""The state machine, on both databases: every transition, and everything that a stale epoch must not do."""

from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service import jobs, leases
from service.db import Database, now
from service.leases import Claim, Fenced, Progress, Result
from service.models import Adapter, Checkpoint, Job, JobEvent, OutboxMessage
from tests.service import rows

LEASE = 60.0


def claimed(database: Database, slot: str = "cpu:1") -> Claim:
    with database.unit_of_work() as session:
        claim = leases.claim(session, "worker-1", slot, LEASE)
    assert claim is not None
    return claim


def running(database: Database, slot: str = "cpu:1") -> Claim:
    claim = claimed(database, slot)
    with database.unit_of_work() as session:
        leases.start(session, claim)
    return claim


def job_of(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return session.get_one(Job, job_id)


def expire(database: Database, job_id: str) -> None:
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))


def reap(database: Database) -> list[str]:
    with database.unit_of_work() as session:
        return leases.reap(session)


def result(**metrics: Any) -> Result:
    return Result(
        prefix="adapters/x/e1",
        files=[{"name": "a", "size": 1, "sha256": "0" * 64}],
        digest="d" * 64,
        rank=4,
        metrics={"steps": 3, **metrics},
    )


def publish(session: Session, claim: Claim) -> None:
    leases.succeed(session, claim, result())


def test_claims_go_by_priority_then_age_and_raise_the_epoch(database: Database) -> None:
    first, second, urgent = (rows.add_job(database) for _ in range(3))
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == urgent).values(priority=-1))
    order = [claimed(database, f"cpu:{number}") for number in range(3)]
    assert [claim.job_id for claim in order] == [urgent, first, second]
    assert {claim.epoch for claim in order} == {1}
    with database.unit_of_work() as session:
        assert leases.claim(session, "worker-1", "cpu:9", LEASE) is None


def test_a_device_runs_one_job_by_the_databases_word(database: Database) -> None:
    rows.add_job(database)
    waiting = rows.add_job(database)
    claimed(database, "host:cuda:0")
    with database.unit_of_work() as session:
        assert leases.claim(session, "worker-2", "host:cuda:0", LEASE) is None
    assert job_of(database, waiting).state == "queued"
    assert job_of(database, waiting).epoch == 0


def test_a_job_that_waits_for_its_backoff_is_not_claimed(database: Database) -> None:
    job_id = rows.add_job(database)
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=now() + 60))
        assert leases.claim(session, "worker-1", "cpu:1", LEASE) is None


def test_renewing_keeps_the_lease_and_tells_the_progress(database: Database) -> None:
    rows.add_job(database)
    claim = running(database)
    expire(database, claim.job_id)
    points = ({"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25})
    with database.unit_of_work() as session:
        told = Progress(phase="training", step=2, total_steps=9, eta_seconds=7.5, points=points)
        assert leases.renew(session, claim, LEASE, told) is None
    assert reap(database) == []
    job = job_of(database, claim.job_id)
    assert (job.phase, job.step, job.total_steps, job.eta_seconds) == ("training", 2, 9, 7.5)
    with database.reading() as session:
        metrics = session.scalars(select(JobEvent).where(JobEvent.type == "metrics").order_by(JobEvent.seq)).all()
    assert [event.data for event in metrics] == list(points)


def test_publishing_makes_one_adapter_and_ends_the_job(database: Database) -> None:
    rows.add_job(database)
    claim = running(database)
    with database.unit_of_work() as session:
        publish(session, claim)
    with database.reading() as session:
        adapter = session.scalars(select(Adapter)).one()
        job = session.get_one(Job, claim.job_id)
    assert (adapter.job_id, adapter.epoch, adapter.owner_id) == (claim.job_id, claim.epoch, claim.owner_id)
    assert (job.state, job.lease_until, job.worker_id, job.device_slot) == ("succeeded", None, None, None)
    with pytest.raises(Fenced), database.unit_of_work() as session:
        publish(session, claim)


@pytest.mark.parametrize("act", ["start", "renew", "checkpoint", "succeed", "fail", "retry", "release", "warn"])
def test_a_stale_epoch_changes_nothing(database: Database, act: str) -> None:
    rows.add_job(database)
    stale = running(database)
    expire(database, stale.job_id)
    assert reap(database) == [stale.job_id]
    current = running(database)
    assert current.epoch == stale.epoch + 2
    before = snapshot(database)
    actions = {
        "start": lambda session: leases.start(session, stale),
        "renew": lambda session: leases.renew(session, stale, LEASE, Progress(step=99)),
        "checkpoint": lambda session: leases.add_checkpoint(session, stale, 5, "p", "0" * 64),
        "succeed": lambda session: publish(session, stale),
        "fail": lambda session: leases.fail(session, stale, "c", "user", "m"),
        "retry": lambda session: leases.retry(session, stale, "c", "m"),
        "release": lambda session: leases.release(session, stale),
        "warn": lambda session: leases.warn(session, stale, "hello"),
    }
    with pytest.raises(Fenced), database.unit_of_work() as session:
        actions[act](session)
    assert snapshot(database) == before


def snapshot(database: Database) -> list[list[tuple[object, ...]]]:
    with database.reading() as session:
        tables = ("jobs", "job_events", "checkpoints", "adapters", "outbox")
        return [[tuple(map(str, row)) for row in session.execute(text(f"SELECT * FROM {name}"))] for name in tables]  # noqa: S608


def test_a_lost_job_is_queued_again_and_fails_after_three_losses_without_progress(database: Database) -> None:
    job_id = rows.add_job(database)
    for loss in (1, 2, 3):
        running(database)
        expire(database, job_id)
        assert reap(database) == [job_id]
        assert job_of(database, job_id).lost_without_progress == loss
    job = job_of(database, job_id)
    assert (job.state, job.error_code, job.error_category) == ("failed", "worker_lost", "platform")
    assert job.finished_at is not None


def test_a_newer_checkpoint_forgives_losses(database: Database) -> None:
    job_id = rows.add_job(database)
    for step in (5, 10, 15, 20):
        claim = running(database)
        with database.unit_of_work() as session:
            leases.add_checkpoint(session, claim, step, f"jobs/{job_id}/e{claim.epoch}/s{step}", "0" * 64)
        expire(database, job_id)
        reap(database)
    assert job_of(database, job_id).state == "queued"
    with database.reading() as session:
        assert [checkpoint.step for checkpoint in leases.checkpoints(session, job_id)] == [20, 15, 10, 5]


def test_a_lost_attempt_waits_before_the_next_and_longer_each_time(database: Database) -> None:
    job_id = rows.add_job(database)
    waits = []
    for _ in range(2):
        claim = running(database)
        with database.unit_of_work() as session:
            leases.retry(session, claim, "process_died", "the process was killed")
            waits.append(session.scalar(select(Job.run_after - now()).where(Job.id == job_id)))
            session.execute(update(Job).where(Job.id == job_id).values(run_after=now()))
    assert 3 < waits[0] < 6 < waits[1] < 11
    claim = running(database)
    with database.unit_of_work() as session:
        leases.retry(session, claim, "process_died", "the process was killed")
    job = job_of(database, job_id)
    assert (job.state, job.error_code) == ("failed", "process_died")
    assert "the process was killed" in str(job.error_message)


def test_a_released_job_is_queued_at_once_and_counts_nothing(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    with database.unit_of_work() as session:
        leases.release(session, claim)
        assert session.scalar(select(OutboxMessage.job_id)) == job_id
    job = job_of(database, job_id)
    assert (job.state, job.lost_without_progress, job.epoch) == ("queued", 0, claim.epoch + 1)
    assert claimed(database).job_id == job_id


def test_a_failure_says_why(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = claimed(database)
    with database.unit_of_work() as session:
        leases.fail(session, claim, "diverged", "user", "lower the rate")
    job = job_of(database, job_id)
    assert (job.state, job.error_code, job.error_category) == ("failed", "diverged", "user")
    assert job.error_message == "lower the rate"


def test_a_failure_may_leave_an_adapter(database: Database) -> None:
    job_id = rows.add_job(database)
    claim, left = running(database), result(best_step=3)
    for _ in range(2):  # the answer to the first may be lost
        with database.unit_of_work() as session:
            leases.fail(session, claim, "diverged", "user", "lower the rate", left)
    with database.reading() as session:
        adapter = session.scalars(select(Adapter)).one()
    assert (adapter.id, adapter.job_id, adapter.metrics["best_step"]) == (left.id, job_id, 3)
    assert job_of(database, job_id).state == "failed"
    assert told(database, job_id)[-2:] == ["The last good adapter was kept", "Failed: lower the rate"]


def test_a_failure_after_a_cancel_leaves_nothing(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    with database.unit_of_work() as session:
        jobs.cancel(session, claim.owner_id, job_id)
    with database.unit_of_work() as session:
        leases.fail(session, claim, "diverged", "user", "lower the rate", result())
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Adapter)) == 0
    assert job_of(database, job_id).state == "cancelled"


def told(database: Database, job_id: str) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)))


def test_a_success_tells_what_the_owner_should_know(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    with database.unit_of_work() as session:
        leases.succeed(session, claim, result(stopped_early=True, overfitting_epoch=1.5, best_step=2))
    assert told(database, job_id)[-4:] == [
        "Stopped early after step 3: the validation loss did not fall any more",
        "The adapter is that of step 2, where the validation loss was lowest",
        "Overfitting began at epoch 1.50: from there on the validation loss rose while the training loss fell",
        "Succeeded",
    ]


def test_a_skipped_step_is_a_warning(database: Database) -> None:
    rows.add_job(database)
    claim = running(database)
    points = ({"step": 1, "loss": 2.5}, {"step": 2, "skipped": True}, {"step": 2, "validation_loss": 2.25})
    with database.unit_of_work() as session:
        leases.renew(session, claim, LEASE, Progress(points=points))
    with database.reading() as session:
        metrics = session.scalars(select(JobEvent).where(JobEvent.type == "metrics").order_by(JobEvent.seq)).all()
    assert [(event.level, event.message) for event in metrics] == [
        ("info", "Step 1: loss 2.5000"),
        ("warn", "Step 2 was skipped: its loss or its gradient was not finite"),
        ("info", "Step 2: validation loss 2.2500"),
    ]


@pytest.mark.parametrize("ending", ["cancelled", "fail", "retry", "release", "reap"])
def test_a_cancel_that_was_accepted_never_ends_otherwise(database: Database, ending: str) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    with database.unit_of_work() as session:
        assert jobs.cancel(session, claim.owner_id, job_id).state == "cancelling"
    with pytest.raises(Fenced), database.unit_of_work() as session:
        publish(session, claim)
    if ending == "reap":
        expire(database, job_id)
        reap(database)
    else:
        arguments = {"fail": ("c", "user", "m"), "retry": ("c", "m")}.get(ending, ())
        with database.unit_of_work() as session:
            getattr(leases, ending)(session, claim, *arguments)
    job = job_of(database, job_id)
    assert (job.state, job.error_code, job.lease_until) == ("cancelled", None, None)


def test_events_are_numbered_without_gaps(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    with database.unit_of_work() as session:
        leases.warn(session, claim, "one")
        leases.warn(session, claim, "two")
    with Session(database.engine) as undone:
        leases.warn(undone, claim, "never")
    with database.unit_of_work() as session:
        publish(session, claim)
    with database.reading() as session:
        events = session.scalars(select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)).all()
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.message for event in events][-3:] == ["one", "two", "Succeeded"]


@pytest.mark.parametrize(
    "values",
    [
        {"state": "running"},  # without a lease
        {"lease_until": 1.0},  # a lease on a queued job
        {"finished_at": 1.0},  # an end of a queued job
        {"state": "succeeded"},  # an end without its time
        {"state": "elsewhere"},
    ],
)
def test_the_database_refuses_impossible_rows(database: Database, values: dict[str, object]) -> None:
    job_id = rows.add_job(database)
    with pytest.raises(IntegrityError), database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def test_a_checkpoint_belongs_to_its_epoch(database: Database) -> None:
    rows.add_job(database)
    claim = running(database)
    with database.unit_of_work() as session:
        leases.add_checkpoint(session, claim, 4, "jobs/x/e1/s4", "a" * 64)
    with database.reading() as session:
        checkpoint = session.scalars(select(Checkpoint)).one()
    assert (checkpoint.step, checkpoint.epoch, checkpoint.manifest_sha256) == (4, claim.epoch, "a" * 64)


def test_what_is_asked_for_again_is_told_once(database: Database) -> None:
    """As workers and clients do when the answer to a commit was lost."""
    rows.add_job(database)
    claim = claimed(database)
    for _ in range(2):
        with database.unit_of_work() as session:
            leases.start(session, claim)
    started_at = job_of(database, claim.job_id).started_at
    states = []
    for _ in range(2):
        with database.unit_of_work() as session:
            states.append(jobs.cancel(session, claim.owner_id, claim.job_id).state)
    assert states == ["cancelling", "cancelling"]
    assert job_of(database, claim.job_id).started_at == started_at
    with database.reading() as session:
        told = session.scalars(select(JobEvent.message).order_by(JobEvent.seq)).all()
    assert told[1:] == ["Running", "Cancel requested"]
