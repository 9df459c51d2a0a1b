"""The migration to paused jobs, forth and back, over rows that other rows refer to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import text, update
from sqlalchemy.exc import IntegrityError

import migrations
from service.db import Database
from service.models import Job
from tests.conftest import postgres_database
from tests.service import rows
from tests.service.test_leases import claimed, job_of

_SQLITE = "SELECT sql FROM sqlite_master WHERE tbl_name = 'jobs' AND sql IS NOT NULL ORDER BY name"
_POSTGRES = (
    "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'jobs'::regclass "
    "UNION ALL SELECT indexdef FROM pg_indexes WHERE tablename = 'jobs' ORDER BY 1"
)


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without any table."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'luthier.db'}")
        yield database
        database.close()
        return
    with postgres_database(request.getfixturevalue("postgres_server"), "template1") as url:
        database = Database(url)
        yield database
        database.close()


def move(database: Database, revision: str, *, back: bool = False) -> None:
    url = database.engine.url.render_as_string(hide_password=False)
    (command.downgrade if back else command.upgrade)(migrations._config(url), revision)


def rules(database: Database) -> list[str]:
    """The table's constraints and indexes as the database has them."""
    with database.reading() as session:
        return list(session.scalars(text(_SQLITE if database.is_sqlite else _POSTGRES)))


def test_jobs_keep_their_rows_and_rules_forth_and_back(empty: Database) -> None:
    move(empty, "0003")
    before = rules(empty)
    move(empty, "head")
    job_id = rows.add_job(empty)
    claimed(empty)  # writes an event, which refers to the job
    with empty.unit_of_work() as session:
        values = {"state": "paused", "lease_until": None, "worker_id": None, "device_slot": None}
        session.execute(update(Job).where(Job.id == job_id).values(**values))
    with pytest.raises(IntegrityError), empty.unit_of_work() as session:
        session.execute(update(Job).values(state="elsewhere"))
    assert migrations.check(empty.engine.url.render_as_string(hide_password=False)) == []
    move(empty, "0003", back=True)
    assert rules(empty) == before
    with empty.reading() as session:
        assert session.execute(text("SELECT state FROM jobs")).scalars().all() == ["queued"]
        assert session.execute(text("SELECT count(*) FROM job_events")).scalar() == 1
    with pytest.raises(IntegrityError), empty.unit_of_work() as session:
        session.execute(text("UPDATE jobs SET state = 'paused'"))
    move(empty, "head")
    assert job_of(empty, job_id).preemptions == 0
