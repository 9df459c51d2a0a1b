"""How much one user may have: exactly so much, also when a hundred ask at once."""

import threading
from typing import Any

import pytest
from sqlalchemy import event, func, insert, select, text, update

from service import datasets, jobs, leases, quotas
from service.db import Database
from service.errors import NotFound, TooMany
from service.models import Adapter, Job, User, new_id
from service.quotas import Limits
from service.settings import Settings
from service.storage import Storage, open_storage
from tests.service import rows


@pytest.fixture
def owner(database: Database) -> str:
    rows.add_base_model(database)
    return rows.add_user(database)


def limit(database: Database, owner: str, **limits: int) -> None:
    with database.unit_of_work() as session:
        session.execute(update(User).where(User.id == owner).values(**limits))


def submit(database: Database, owner: str) -> str:
    job = Job(kind="train", name="job", spec={}, base_model_id=rows.BASE_MODEL)
    with database.unit_of_work() as session:
        return jobs.submit(session, owner, lambda: job)[0].id


def test_s8_a_hundred_at_once_get_exactly_what_is_left(database: Database, owner: str) -> None:
    limit(database, owner, max_unfinished_jobs=10)
    start, refused = threading.Barrier(20), []

    def five() -> None:
        start.wait()
        for _ in range(5):
            try:
                submit(database, owner)
            except TooMany as error:
                refused.append(error)

    threads = [threading.Thread(target=five) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 90
    assert {(error.status, error.code, error.retry_after) for error in refused} == {(429, "too_many_jobs", 30)}
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 10


def test_what_has_ended_makes_room_and_others_have_their_own(database: Database, owner: str) -> None:
    limit(database, owner, max_unfinished_jobs=1)
    job_id = submit(database, owner)
    with pytest.raises(TooMany, match="1 jobs have not ended"):
        submit(database, owner)
    submit(database, rows.add_user(database, "bob"))
    with database.unit_of_work() as session:
        jobs.pause(session, owner, job_id)
    with pytest.raises(TooMany):
        submit(database, owner)  # a paused job has not ended
    with database.unit_of_work() as session:
        jobs.cancel(session, owner, job_id)
    submit(database, owner)


def test_the_settings_hold_for_who_has_no_limit_of_their_own(database_url: str, database: Database, owner: str) -> None:
    settings = Settings(database_url=database_url, max_unfinished_jobs=2, max_running_jobs=3, max_stored_bytes=4)
    limited = Database(database_url, info=Limits.of(settings).info)
    for _ in range(2):
        submit(limited, owner)
    with pytest.raises(TooMany):
        submit(limited, owner)
    limit(database, owner, max_unfinished_jobs=3)
    submit(limited, owner)
    limited.close()


def test_one_who_is_being_deleted_begins_nothing(database: Database, owner: str) -> None:
    limit(database, owner, deleted_at=1)
    with pytest.raises(NotFound):
        submit(database, owner)


def claim(database: Database, slot: str) -> leases.Claim | None:
    with database.unit_of_work() as session:
        return leases.claim(session, "worker", slot, 60)


def test_as_many_at_work_as_may_be_and_then_the_next_owner(database: Database, owner: str) -> None:
    limit(database, owner, max_running_jobs=2)
    for _ in range(4):
        rows.add_job(database, owner)
    other = rows.add_job(database)
    claims = [claim(database, f"slot:{index}") for index in range(5)]
    assert [found and found.owner_id == owner for found in claims] == [True, True, False, None, None]
    assert claims[2] is not None
    assert claims[2].job_id == other
    assert claims[0] is not None
    with database.unit_of_work() as session:
        leases.cancelled(session, claims[0])
    found = claim(database, "slot:5")
    assert found is not None
    assert found.owner_id == owner


def test_workers_at_the_same_moment_do_not_pass_the_limit(database: Database, owner: str) -> None:
    limit(database, owner, max_running_jobs=3)
    for _ in range(16):
        rows.add_job(database, owner)
    start, found = threading.Barrier(8), list[Any]()

    def work(index: int) -> None:
        start.wait()
        found.extend(claim(database, f"slot:{index}:{round_}") for round_ in range(4))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([claim for claim in found if claim is not None]) == 3


def store(database: Database, storage: Storage, settings: Settings, owner: str, content: bytes) -> str:
    with datasets.Upload(settings) as upload:
        upload.write(content)
        return datasets.add(database, storage, owner, "d", upload.finish()).id


def test_bytes_of_datasets_and_results_count_until_they_are_deleted(
    database: Database, database_url: str, owner: str, settings: Settings
) -> None:
    storage = open_storage(settings.storage_url)
    line = b'{"prompt": "a", "completion": "b"}\n'
    limit(database, owner, max_stored_bytes=3 * len(line))
    dataset_id = store(database, storage, settings, owner, line * 2)
    with pytest.raises(TooMany, match="bytes") as refused:
        store(database, storage, settings, owner, line * 2)
    assert refused.value.retry_after == 3600
    assert refused.value.code == "too_many_bytes"
    assert len(list(storage.keys("datasets"))) == 1
    job_id = submit(database, owner)
    found = claim(database, "slot")
    assert found is not None
    files = [{"name": "a", "size": len(line) - 1, "sha256": ""}]
    with database.unit_of_work() as session:
        leases.start(session, found)
        leases.succeed(session, found, leases.Result(prefix="p", files=files, digest="d", rank=1, metrics={}))
    with database.reading() as session:
        assert session.scalar(select(Adapter.bytes).where(Adapter.job_id == job_id)) == len(line) - 1
        assert quotas.stored_bytes(session, owner) == 3 * len(line) - 1
    submit(database, owner)  # one byte is left
    limit(database, owner, max_stored_bytes=3 * len(line) - 2)
    with pytest.raises(TooMany):
        submit(database, owner)  # would leave more
    with database.unit_of_work() as session:
        datasets.delete(session, owner, dataset_id)
    submit(database, owner)


def test_counting_reads_none_of_the_jobs_that_have_ended(postgres_url: str) -> None:
    database = Database(postgres_url)
    owner, base_model_id = rows.add_user(database), rows.add_base_model(database)
    values = {"owner_id": owner, "kind": "train", "name": "job", "spec": {}, "base_model_id": base_model_id}
    with database.unit_of_work() as session:
        ended = {"state": "succeeded", "finished_at": 1.0, **values}
        session.execute(insert(Job), [{"id": new_id("job"), **ended} for _ in range(2000)])
    asked = list[tuple[str, Any]]()
    event.listen(database.engine, "before_cursor_execute", lambda *call: asked.append((call[2], call[3])))
    with database.reading() as session:
        session.execute(text("ANALYZE jobs"))
        assert quotas.unfinished(session, owner) == 0
        statement, parameters = asked[-1]
        plan = session.connection().exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars().all()
    assert "ix_jobs_unfinished" in "\n".join(plan)
    database.close()
