"""How often a request asks the database: what decides how many requests a second there can be."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from service.settings import Settings
from tests.service import rows
from tests.service.site import Site, open_site


@pytest.fixture
def site(postgres_url: str, tmp_path: Path) -> Iterator[Site]:
    """It sweeps at its start and not again."""
    with open_site(Settings(data_dir=tmp_path / "data", database_url=postgres_url, sweep_seconds=3600)) as site:
        assert site.ann.get("/jobs").status_code == 200  # notes the key's use; the next ones do not
        yield site


@contextmanager
def asked() -> Iterator[list[str]]:
    """Every round trip in this block but those of the sweep, which relays what was written."""
    told: list[str] = []

    def note(sql: str) -> None:
        if threading.current_thread().name != "sweep":
            told.append(sql.split("\n")[0])

    def statement(_connection: object, _cursor: object, sql: str, *_: object) -> None:
        note(sql)

    def ended(_connection: object) -> None:
        note("end")

    listeners = (("before_cursor_execute", statement), ("commit", ended), ("rollback", ended))
    for name, listener in listeners:
        event.listen(Engine, name, listener)
    try:
        yield told
    finally:
        for name, listener in listeners:
            event.remove(Engine, name, listener)


def test_a_job_is_got_with_two_queries_in_two_transactions(site: Site) -> None:
    job_id = site.train()
    with asked() as told:
        assert site.ann.get(f"/jobs/{job_id}").status_code == 200
    begins = [sql for sql in told if sql.startswith("BEGIN; ")]
    queries = [sql for sql in told if sql.startswith("SELECT")]
    assert (len(begins), len(queries), len(told)) == (2, 2, 6), told


def test_a_job_is_submitted_in_one_transaction_that_writes_and_tells_the_audit_log(site: Site) -> None:
    dataset_id = rows.add_dataset(site.database, site.ids["ann"])
    asks = {"base_model": rows.BASE_MODEL, "dataset": dataset_id}
    with asked() as told:
        answer = site.ann.post("/jobs", json=asks, headers={"Idempotency-Key": "once"})
    assert answer.status_code == 201
    assert told[-2].startswith("INSERT INTO audit_log"), told
    assert told[-1] == "end", told
    assert len([sql for sql in told if sql.startswith("BEGIN; ")]) == 2, told  # the key's check, and the work
    assert not [sql for sql in told if sql.startswith("UPDATE")], told
    assert len(told) <= 18, told
