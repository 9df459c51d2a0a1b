"""Many processes, one queue: 600 jobs, 6 workers, some of which die and some of which come back from the dead.

A history checker decides: every job ends once, by the epoch that was claimed last, and every effect of an older epoch
was refused.
"""

import multiprocessing
import os
import random
import time
from collections import Counter

from sqlalchemy import func, insert, select

from service import leases
from service.db import Database
from service.leases import Claim, Fenced
from service.models import TERMINAL, Adapter, Job, JobEvent, new_id
from tests.service import rows

JOBS, WORKERS, LEASE_SECONDS = 600, 6, 2.0
CRASH, ZOMBIE = 0.03, 0.05


def test_600_jobs_on_6_processes_end_once_each(database: Database, database_url: str) -> None:
    add_jobs(database)
    context = multiprocessing.get_context("spawn")
    with context.Pool(WORKERS) as pool:
        histories = pool.starmap(work, [(database_url, seed) for seed in range(WORKERS)])
    history = Counter[str]()
    for part in histories:
        history.update(part)
    with database.reading() as session:
        states = dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).all())
        adapters = session.execute(select(Adapter.job_id, Adapter.epoch)).all()
        epochs = dict(session.execute(select(Job.id, Job.epoch)).all())
        events = session.execute(select(JobEvent.job_id, JobEvent.seq, JobEvent.epoch).order_by(JobEvent.seq)).all()
        attempts = session.scalar(select(func.sum(Job.attempt)))
    # With 8 % losses an attempt, a job that is lost three times in a row is rare, and then it has failed.
    assert set(states) <= {"succeeded", "failed"}
    assert sum(states.values()) == JOBS
    assert states["succeeded"] == len(adapters) == len({job_id for job_id, _ in adapters})
    assert states["succeeded"] == history["published"] + history["zombie in time"]
    assert all(epochs[job_id] == epoch for job_id, epoch in adapters)
    assert history["crashed"] > 0
    assert history["zombie"] > 0
    assert history["zombie refused"] > 0
    assert history["zombie refused"] + history["zombie in time"] == history["zombie"]
    assert attempts == history["published"] + history["crashed"] + history["zombie"] + history["too slow"]
    sequences: dict[str, list[tuple[int, int]]] = {}
    for job_id, seq, epoch in events:
        sequences.setdefault(job_id, []).append((seq, epoch))
    for told in sequences.values():
        assert [seq for seq, _ in told] == list(range(1, len(told) + 1))
        assert [epoch for _, epoch in told] == sorted(epoch for _, epoch in told)


def add_jobs(database: Database) -> None:
    owner_id, base_model_id = rows.add_user(database), rows.add_base_model(database)
    values = {"owner_id": owner_id, "kind": "train", "name": "job", "spec": {}, "base_model_id": base_model_id}
    with database.unit_of_work() as session:
        session.execute(insert(Job), [{"id": new_id("job"), **values} for _ in range(JOBS)])


def work(url: str, seed: int) -> dict[str, int]:
    """One worker process, until every job has ended. A crash is a claim that is dropped without a word."""
    random_ = random.Random(seed)  # noqa: S311
    database = Database(url, pool_size=2)
    history: Counter[str] = Counter()
    zombies: list[tuple[float, Claim]] = []
    lives = 0
    while not ended(database):
        while zombies and zombies[0][0] < time.monotonic():
            history[wake(database, zombies.pop(0)[1])] += 1
        with database.unit_of_work() as session:
            # A dead worker's slot stays taken until the reaper frees it: its successor has another.
            claim = leases.claim(session, f"worker-{seed}", f"host:{os.getpid()}:{lives}", LEASE_SECONDS)
        if claim is None:
            with database.unit_of_work() as session:
                leases.reap(session)
            time.sleep(0.05)
            continue
        fate = random_.random()
        if fate < CRASH + ZOMBIE:
            history["crashed" if fate < CRASH else "zombie"] += 1
            lives += 1
            if fate >= CRASH:
                zombies.append((time.monotonic() + 1.5 * LEASE_SECONDS, claim))
            continue
        history["published" if publish(database, claim) else "too slow"] += 1
    for _, claim in zombies:
        history[wake(database, claim)] += 1
    database.close()
    return dict(history)


def wake(database: Database, claim: Claim) -> str:
    """A zombie goes on, long after its lease; it may publish only if nobody has reaped the job yet."""
    return "zombie in time" if publish(database, claim) else "zombie refused"


def ended(database: Database) -> bool:
    with database.reading() as session:
        return session.scalar(select(Job.id).where(Job.state.not_in(TERMINAL)).limit(1)) is None


def publish(database: Database, claim: Claim) -> bool:
    """Start and end the job; False when the epoch has moved on."""
    try:
        with database.unit_of_work() as session:
            leases.start(session, claim)
        with database.unit_of_work() as session:
            result = leases.Result(
                prefix=f"adapters/{claim.job_id}/e{claim.epoch}", files=[],
                digest="d" * 64, rank=1, metrics={},
            )  # fmt: skip
            leases.succeed(session, claim, result)
    except Fenced:
        return False
    return True
