"""Pausing, resuming, and giving way, by the rows: on both databases, for every transition there is."""

from typing import Any

import pytest
from sqlalchemy import func, select, text, update

from service import jobs, leases, preemption
from service.db import Database, now
from service.errors import Conflict, NotFound
from service.leases import Claim, Fenced
from service.models import STATES, Job, OutboxMessage
from tests.service import rows
from tests.service.test_leases import LEASE, claimed, expire, job_of, publish, reap, running, told

PATIENCE = 30.0


def pause(database: Database, job_id: str) -> Job:
    with database.unit_of_work() as session:
        return jobs.pause(session, job_of(database, job_id).owner_id, job_id)


def resume(database: Database, job_id: str) -> Job:
    with database.unit_of_work() as session:
        return jobs.resume(session, job_of(database, job_id).owner_id, job_id)


def wish(database: Database, claim: Claim) -> leases.Wish | None:
    with database.unit_of_work() as session:
        return leases.renew(session, claim, LEASE)


def release(database: Database, claim: Claim) -> None:
    with database.unit_of_work() as session:
        leases.release(session, claim)


def messages_sent(database: Database, job_id: str) -> int:
    with database.reading() as session:
        counted = select(func.count()).select_from(OutboxMessage).where(OutboxMessage.job_id == job_id)
        return session.scalar(counted) or 0


def test_a_queued_job_rests_at_once_and_nobody_takes_it(database: Database) -> None:
    job_id = rows.add_job(database)
    assert jobs.status(pause(database, job_id)) == "paused"
    with database.unit_of_work() as session:
        assert leases.claim(session, "worker-1", "cpu:1", LEASE) is None
    assert jobs.status(resume(database, job_id)) == "queued"
    assert messages_sent(database, job_id) == 1
    assert claimed(database).job_id == job_id
    assert told(database, job_id)[:2] == ["Paused", "Resumed"]


def test_a_running_job_drains_and_stays_down_until_it_is_resumed(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    assert wish(database, claim) is None
    assert jobs.status(pause(database, job_id)) == "pausing"
    assert wish(database, claim) == "drain"
    with database.unit_of_work() as session:
        leases.add_checkpoint(session, claim, 7, "p", "0" * 64)
    release(database, claim)
    job = job_of(database, job_id)
    assert (jobs.status(job), job.lost_without_progress, job.epoch) == ("paused", 0, claim.epoch + 1)
    assert messages_sent(database, job_id) == 0
    with pytest.raises(Fenced):
        wish(database, claim)
    resume(database, job_id)
    again = running(database)
    assert (again.job_id, wish(database, again)) == (job_id, None)
    assert [event for event in told(database, job_id) if event[:5] in ("Pause", "Resum")] == [
        "Pause requested", "Paused", "Resumed",
    ]  # fmt: skip


def test_asking_twice_changes_nothing(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    pause(database, job_id)
    before = told(database, job_id)
    pause(database, job_id)
    assert told(database, job_id) == before
    resume(database, job_id)
    after = told(database, job_id)
    resume(database, job_id)
    assert told(database, job_id) == after
    assert (jobs.status(job_of(database, job_id)), wish(database, claim)) == ("running", None)


def test_a_pause_that_was_taken_back_in_time_leaves_the_job_in_the_queue(database: Database) -> None:
    """The worker has begun to drain, and gives back a job that nobody wants paused any more."""
    job_id = rows.add_job(database)
    claim = running(database)
    pause(database, job_id)
    resume(database, job_id)
    release(database, claim)
    assert jobs.status(job_of(database, job_id)) == "queued"


def test_a_job_that_ends_before_it_could_pause_has_ended(database: Database) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    pause(database, job_id)
    with database.unit_of_work() as session:
        publish(session, claim)
    assert jobs.status(job_of(database, job_id)) == "succeeded"
    for act in (pause, resume):
        with pytest.raises(Conflict, match="already succeeded"):
            act(database, job_id)


@pytest.mark.parametrize("how", ["retry", "uncounted retry", "reap"])
def test_a_worker_lost_while_pausing_leaves_the_job_paused(database: Database, how: str) -> None:
    job_id = rows.add_job(database)
    claim = running(database)
    pause(database, job_id)
    if how == "reap":
        expire(database, job_id)
        assert reap(database) == [job_id]
    else:
        with database.unit_of_work() as session:
            leases.retry(session, claim, "process_died", "it was killed", counted=how == "retry")
    job = job_of(database, job_id)
    assert (job.state, job.lost_without_progress) == ("paused", 0 if how == "uncounted retry" else 1)
    resume(database, job_id)
    assert running(database).job_id == job_id  # at once, whatever the backoff was


def test_the_third_loss_ends_a_job_that_was_to_pause(database: Database) -> None:
    job_id = rows.add_job(database)
    with database.unit_of_work() as session:
        session.execute(update(Job).values(lost_without_progress=2))
    running(database)
    pause(database, job_id)
    expire(database, job_id)
    reap(database)
    assert job_of(database, job_id).state == "failed"


@pytest.mark.parametrize("state", ["paused", "pausing"])
def test_a_cancel_works_while_paused_and_while_pausing(database: Database, state: str) -> None:
    job_id = rows.add_job(database)
    claim = running(database) if state == "pausing" else None
    assert jobs.status(pause(database, job_id)) == state
    with database.unit_of_work() as session:
        jobs.cancel(session, job_of(database, job_id).owner_id, job_id)
    for act in (pause, resume):
        with pytest.raises(Conflict, match="cancelled"):
            act(database, job_id)
    if claim is not None:
        assert wish(database, claim) == "cancel"
        release(database, claim)  # it had drained before it learnt of the cancel
    assert job_of(database, job_id).state == "cancelled"


def test_what_the_api_had_taken_rests_when_it_is_handed_over(database: Database) -> None:
    job_id = rows.add_job(database)
    with database.unit_of_work() as session:
        job = session.get_one(Job, job_id)
        leases.take(job, "the API", LEASE)
        session.flush()
        claim = leases.taken(job)
    pause(database, job_id)
    with database.unit_of_work() as session:
        leases.hand_over(session, claim)
    assert job_of(database, job_id).state == "paused"


def test_nobody_pauses_the_jobs_of_others(database: Database) -> None:
    job_id, stranger = rows.add_job(database), rows.add_user(database, "bob")
    for act in (jobs.pause, jobs.resume):
        with pytest.raises(NotFound), database.unit_of_work() as session:
            act(session, stranger, job_id)
    assert job_of(database, job_id).state == "queued"


@pytest.mark.parametrize("state", STATES)
def test_every_status_finds_the_jobs_that_have_it(database: Database, state: str) -> None:
    """The filter of lists and the status that is shown are two ways to say one thing."""
    owner = rows.add_user(database)
    for wished in (None, 1.0):
        values: dict[str, Any] = {"state": state, "pause_requested_at": wished}
        if state in ("claimed", "running", "cancelling"):
            values["lease_until"] = 1.0
        elif state in ("succeeded", "failed", "cancelled"):
            values["finished_at"] = 1.0
        rows.add_job(database, owner, **values)
    with database.reading() as session:
        shown = [(job.id, jobs.status(job)) for job in jobs.page(session, owner, None, 9)[0]]
        for status in ("queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"):
            found = [job.id for job in jobs.page(session, owner, None, 9, status=status)[0]]  # type: ignore[arg-type]
            assert found == [job_id for job_id, its in shown if its == status], status


# Giving way.


def waiting(database: Database, priority: int, seconds: float = 100) -> str:
    """A queued job that has waited for so long."""
    job_id = rows.add_job(database, priority=priority)
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=now() - seconds))
    return job_id


def preempt(database: Database) -> str | None:
    with database.unit_of_work() as session:
        return preemption.preempt(session, PATIENCE)


def test_a_training_gives_way_to_a_job_of_higher_priority(database: Database) -> None:
    low = rows.add_job(database)
    claim = running(database)
    urgent = waiting(database, priority=-1)
    assert preempt(database) == low
    assert wish(database, claim) == "drain"
    assert preempt(database) is None  # one at a time: it may be all it takes
    release(database, claim)
    job = job_of(database, low)
    assert (job.state, job.lost_without_progress, job.preemptions) == ("queued", 0, 1)
    assert "Gave way to a job of higher priority; queued again" in told(database, low)
    assert [claimed(database, f"cpu:{number}").job_id for number in (1, 2)] == [urgent, low]


@pytest.mark.parametrize(
    ("why_not", "priority", "seconds", "values"),
    [
        ("the same priority", 0, 100, {}),
        ("a lower priority", 5, 100, {}),
        ("it has only just come", -1, 5, {}),
        ("a merge would begin again", -1, 100, {"kind": "merge"}),
        ("it gave way often enough", -1, 100, {"preemptions": preemption.MAX_PREEMPTIONS}),
        ("it pauses already", -1, 100, {"pause_requested_at": 1.0}),
        ("it is being cancelled", -1, 100, {"state": "cancelling"}),
    ],
)
def test_nobody_gives_way_without_need(
    database: Database, why_not: str, priority: int, seconds: float, values: dict[str, Any]
) -> None:
    job_id = rows.add_job(database)
    running(database)
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(worker_id="worker-1", **values))
    waiting(database, priority, seconds)
    assert preempt(database) is None, why_not


def test_a_paused_job_makes_nobody_give_way(database: Database) -> None:
    rows.add_job(database)
    running(database)
    pause(database, waiting(database, priority=-1))
    assert preempt(database) is None


def test_the_training_that_loses_least_gives_way(database: Database) -> None:
    priorities = {"middle": 1, "old": 2, "young": 2}
    by_name = {name: rows.add_job(database, priority=priority) for name, priority in priorities.items()}
    for number in range(3):
        running(database, f"cpu:{number}")
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == by_name["old"]).values(started_at=now() - 1000))
    waiting(database, priority=0)
    assert preempt(database) == by_name["young"]


def test_two_jobs_cannot_take_the_device_from_each_other_for_ever(database: Database) -> None:
    """Not even when somebody turns the priorities round each time."""
    jobs_of_two = [waiting(database, priority=0), waiting(database, priority=0)]
    turns = 0
    for _ in range(20):
        current = running(database)
        other = next(job_id for job_id in jobs_of_two if job_id != current.job_id)
        with database.unit_of_work() as session:
            jobs.prioritise(session, other, -1)
            jobs.prioritise(session, current.job_id, 1)
        if preempt(database) is None:
            break
        release(database, current)
        turns += 1
    assert turns == 2 * preemption.MAX_PREEMPTIONS


def test_a_preemption_ends_with_the_attempt_that_was_asked(database: Database) -> None:
    rows.add_job(database)
    claim = running(database)
    waiting(database, priority=-1)
    assert preempt(database) == claim.job_id
    expire(database, claim.job_id)
    reap(database)
    again = [running(database, f"cpu:{number}") for number in (1, 2)]
    assert [wish(database, each) for each in again] == [None, None]


# Workers of the release before, on this schema: the texts of their statements, with the values written in.

_OLD = {
    "claim": "WITH candidate AS (SELECT jobs.id AS id FROM jobs WHERE jobs.state = 'queued' AND jobs.run_after <= {now}"
    " ORDER BY jobs.priority, jobs.run_after, jobs.id LIMIT 1{lock}) UPDATE jobs SET state='claimed', epoch=(jobs.epoch"
    " + 1), attempt=(jobs.attempt + 1), worker_id='old', device_slot='old:cpu', lease_until=({now} + 60.0),"
    " phase='claimed' FROM candidate WHERE jobs.id = candidate.id AND jobs.state = 'queued' RETURNING jobs.id",
    "start": "UPDATE jobs SET state='running', started_at=coalesce(jobs.started_at, {now}) WHERE jobs.id = :id AND"
    " jobs.epoch = :epoch AND jobs.state IN ('claimed', 'running') RETURNING jobs.id",
    "renew": "UPDATE jobs SET lease_until=({now} + 60.0) WHERE jobs.id = :id AND jobs.epoch = :epoch AND jobs.state IN"
    " ('claimed', 'running', 'cancelling') RETURNING jobs.id",
    "release": "UPDATE jobs SET state='queued', epoch=(jobs.epoch + 1), worker_id=NULL, device_slot=NULL,"
    " lease_until=NULL, phase=NULL, eta_seconds=NULL, announced_at={now} WHERE jobs.id = :id AND jobs.epoch = :epoch"
    " AND jobs.state IN ('claimed', 'running', 'cancelling') RETURNING jobs.id",
    "succeed": "UPDATE jobs SET state='succeeded', worker_id=NULL, device_slot=NULL, lease_until=NULL, phase=NULL,"
    " eta_seconds=NULL, finished_at={now} WHERE jobs.id = :id AND jobs.epoch = :epoch AND jobs.state IN ('running')"
    " RETURNING jobs.id",
    "reap": "WITH expired AS (SELECT jobs.id AS id FROM jobs WHERE jobs.lease_until < {now}{lock}) UPDATE jobs SET"
    " state=CASE WHEN (jobs.cancel_requested_at IS NOT NULL) THEN 'cancelled' WHEN (jobs.lost_without_progress + 1 >="
    " 3) THEN 'failed' ELSE 'queued' END, epoch=(jobs.epoch + 1), worker_id=NULL, device_slot=NULL, lease_until=NULL,"
    " lost_without_progress=(jobs.lost_without_progress + 1), phase=NULL, eta_seconds=NULL, finished_at=CASE WHEN"
    " (jobs.cancel_requested_at IS NOT NULL OR jobs.lost_without_progress + 1 >= 3) THEN {now} END FROM expired WHERE"
    " jobs.id = expired.id RETURNING jobs.id",
    "submit": "INSERT INTO jobs (id, owner_id, kind, name, spec, base_model_id, dataset_id, validation_dataset_id,"
    " recipe_digest, state, priority, run_after, epoch, attempt, worker_id, device_slot, lease_until,"
    " cancel_requested_at, lost_without_progress, phase, step, total_steps, eta_seconds, event_seq, error_code,"
    " error_category, error_message, created_at, started_at, finished_at, announced_at, purged_at) SELECT 'job-old',"
    " owner_id, 'train', 'job', spec, base_model_id, NULL, NULL, NULL, 'queued', 0, {now}, 0, 0, NULL, NULL, NULL,"
    " NULL, 0, NULL, 0, NULL, NULL, 0, NULL, NULL, NULL, {now}, NULL, NULL, {now}, NULL FROM jobs WHERE id = :id"
    " RETURNING id",
}  # fmt: skip


def old(database: Database, verb: str, **values: object) -> str | None:
    postgres = {"now": "extract(epoch from clock_timestamp())::double precision", "lock": " FOR UPDATE SKIP LOCKED"}
    sqlite = {"now": "((julianday('now') - 2440587.5) * 86400.0)", "lock": ""}
    with database.unit_of_work() as session:
        statement = text(_OLD[verb].format(**sqlite if database.is_sqlite else postgres))
        changed: str | None = session.execute(statement, values).scalar()
    return changed


def test_a_worker_of_the_release_before_runs_a_job_on_this_schema(database: Database) -> None:
    job_id = rows.add_job(database)
    assert old(database, "claim") == job_id
    for verb in ("start", "renew", "release"):
        assert old(database, verb, id=job_id, epoch=1) == job_id, verb
    assert old(database, "claim") == job_id
    for verb in ("start", "succeed"):
        assert old(database, verb, id=job_id, epoch=3) == job_id, verb
    assert job_of(database, job_id).state == "succeeded"
    assert old(database, "submit", id=job_id) == "job-old"
    assert running(database).job_id == "job-old"  # and the newer worker takes what the older API accepted


@pytest.mark.parametrize("how", ["release", "reap"])
def test_a_pause_is_not_lost_on_a_worker_of_the_release_before(database: Database, how: str) -> None:
    job_id = rows.add_job(database)
    assert old(database, "claim") == job_id
    pause(database, job_id)
    assert old(database, "renew", id=job_id, epoch=1) == job_id  # it does not know the wish, and trains on
    expire(database, job_id)
    assert old(database, how, id=job_id, epoch=1) == job_id
    assert job_of(database, job_id).state == "queued"
    with database.unit_of_work() as session:
        assert leases.claim(session, "worker-1", "cpu:1", LEASE) is None
    reap(database)
    assert (job_of(database, job_id).state, told(database, job_id)[-1]) == ("paused", "Paused")
    assert old(database, "claim") is None
    resume(database, job_id)
    assert old(database, "claim") == job_id
