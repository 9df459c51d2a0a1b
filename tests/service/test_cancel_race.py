"""A cancel and a publication at the same moment, again and again: one wins, and everybody is told the same."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from service import jobs, leases
from service.db import Database
from service.errors import Conflict
from service.leases import Claim, Fenced
from service.models import Adapter, Job
from tests.service import rows
from tests.service.test_leases import LEASE, publish


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
def test_of_a_cancel_and_a_publication_one_wins(database: Database, count: int) -> None:
    owner, base = rows.add_user(database), rows.add_base_model(database)
    with database.unit_of_work() as session:
        for number in range(count):
            session.add(Job(id=f"job-{number:04}", owner_id=owner, kind="train", name="n", spec={}, base_model_id=base))
    start = threading.Barrier(2)

    def cancelled(claim: Claim) -> bool:
        start.wait()
        try:
            with database.unit_of_work() as session:
                jobs.cancel(session, owner, claim.job_id)
        except Conflict:
            return False
        return True

    def published(claim: Claim) -> bool:
        start.wait()
        try:
            with database.unit_of_work() as session:
                publish(session, claim)
        except Fenced:
            return False
        return True

    won = {True: 0, False: 0}
    with ThreadPoolExecutor(2) as threads:
        for _ in range(count):
            with database.unit_of_work() as session:
                claim = leases.claim(session, "worker-1", "cpu:1", LEASE)
                assert claim is not None
                leases.start(session, claim)
            ends = threads.submit(cancelled, claim), threads.submit(published, claim)
            was_cancelled, was_published = ends[0].result(), ends[1].result()
            assert was_cancelled is not was_published, claim.job_id
            won[was_cancelled] += 1
            if was_cancelled:
                with database.unit_of_work() as session:
                    leases.cancelled(session, claim)
    with database.reading() as session:
        ended = dict(session.execute(select(Job.state, Job.id.in_(select(Adapter.job_id))).distinct()).all())
    assert ended.items() <= {"succeeded": True, "cancelled": False}.items()
    assert min(won.values()) > 0, "a race that one side always wins shows nothing"
