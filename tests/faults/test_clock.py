"""Clocks that are an hour off, jump or run backwards decide nothing: only the database's counts (F18)."""

import ast
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from service import leases
from service.db import Database, now
from service.models import Job
from tests.service import rows

ROOT = Path(__file__).parents[2]
# What the machine's own clock may say: how old a file of this machine is, and the time in an id.
_OWN_CLOCK = {"service/datasets.py", "service/scratch.py", "service/models.py"}


@pytest.mark.parametrize("skew", [3600.0, -3600.0, 86_400.0 * 365])
def test_f18_a_clock_that_is_off_moves_no_lease(
    database: Database, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    true = time.time
    kept, lost = rows.add_job(database), rows.add_job(database)
    monkeypatch.setattr(time, "time", lambda: true() + skew)
    with database.unit_of_work() as session:
        claims = [leases.claim(session, "w", slot, 60) for slot in ("a", "b")]
        assert all(claims)
        for claim in claims:
            assert claim is not None
            leases.start(session, claim)
            leases.renew(session, claim, 60)
    with database.unit_of_work() as session:
        assert leases.reap(session) == []
        session.execute(update(Job).where(Job.id == lost).values(lease_until=now() - 1))
    monkeypatch.setattr(time, "time", lambda: true() - skew)  # and it jumps
    with database.unit_of_work() as session:
        assert leases.reap(session) == [lost]
        assert session.get_one(Job, kept).state == "running"
        left = session.get_one(Job, kept).lease_until or 0.0
    assert 50 < left - true() < 61


def test_f18_leases_and_queues_never_ask_the_machines_clock() -> None:
    asking = set()
    for package in ("service", "worker"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                match node:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time")):
                        asking.add(path.relative_to(ROOT).as_posix())
                    case ast.Call(func=ast.Attribute(value=ast.Name(id="datetime"), attr="now" | "utcnow")):
                        asking.add(path.relative_to(ROOT).as_posix())
    assert not {path for path in asking if path.startswith("worker")}
    for path in ("service/leases.py", "service/jobs.py", "service/sweep.py", "service/queue.py", "service/events.py"):
        assert path not in asking - _OWN_CLOCK
