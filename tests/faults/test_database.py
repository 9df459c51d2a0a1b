"""A database that is away, slow, locked, read-only, or whose answers get lost (F3, F8, F9, F10)."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, func, make_url, select, text

from service.models import IdempotencyKey, Job
from service.settings import Settings
from tests.faults import history
from tests.faults.proxy import Proxy
from tests.service import rows
from tests.service.site import Site, open_site


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[Proxy]:
    folder = str(make_url(postgres_url).query["host"])
    with Proxy(Path(folder) / ".s.PGSQL.5432") as proxy:
        yield proxy


@pytest.fixture
def site(postgres_url: str, proxy: Proxy, tmp_path: Path) -> Iterator[Site]:
    """On PostgreSQL behind the proxy; it sweeps at its start and not again."""
    url = make_url(postgres_url).set(host="127.0.0.1", port=proxy.port, query={})
    settings = Settings(data_dir=tmp_path / "data", database_url=str(url), sweep_seconds=3600)
    with open_site(settings) as site:
        yield site


def submit(site: Site, key: str, dataset_id: str) -> httpx.Response:
    asked = {"base_model": rows.BASE_MODEL, "dataset": dataset_id}
    return site.ann.post("/jobs", json=asked, headers={"Idempotency-Key": key})


def is_refused(answer: httpx.Response) -> bool:
    told = answer.json()["error"]
    return (answer.status_code, told["code"]) == (503, "database_unavailable") and int(
        answer.headers["retry-after"]
    ) > 0


def test_f3_the_answer_to_a_commit_is_lost_and_the_retry_finds_the_job(site: Site, proxy: Proxy) -> None:
    dataset_id = rows.add_dataset(site.database, site.ids["ann"])
    proxy.lose_answer(after=b"COMMIT", once_seen=b"INSERT INTO jobs")
    assert is_refused(submit(site, "lost", dataset_id))
    assert proxy.lost_answers == 1
    answer = submit(site, "lost", dataset_id)
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (201, "true")
    with site.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1
    history.check(site.database, keys={"lost": answer.json()["id"]}, at_rest=False)


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_f8_while_the_database_is_away_nothing_is_accepted_and_then_all_goes_on(
    site: Site, proxy: Proxy, how: str
) -> None:
    dataset_id = rows.add_dataset(site.database, site.ids["ann"])
    getattr(proxy, how)()
    if how == "cut":
        assert is_refused(submit(site, "away", dataset_id))
        assert is_refused(site.ann.get("/jobs"))
        proxy.heal()
    began = time.monotonic()
    while (answer := submit(site, "away", dataset_id)).status_code != 201:
        assert is_refused(answer)
        assert time.monotonic() - began < 5
    history.check(site.database, keys={"away": answer.json()["id"]}, at_rest=False)


def test_f8_a_terminated_connection_is_not_an_error_of_ours(site: Site, postgres_server: str) -> None:
    """An operator's pg_terminate_backend, again and again while requests are made."""
    name = make_url(site.settings.database_url).database
    admin = create_engine(postgres_server.format(name="postgres"), isolation_level="AUTOCOMMIT")
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name AND pid <> pg_backend_pid()"
    ended = threading.Event()

    def terminate() -> None:
        with admin.connect() as connection:
            while not ended.wait(0.01):
                connection.execute(text(end), {"name": name})

    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        statuses = {site.ann.get("/jobs").status_code for _ in range(60)}
    finally:
        ended.set()
        thread.join()
        admin.dispose()
    assert statuses <= {200, 503}


def test_f8_a_standby_that_cannot_be_written_to_is_told_as_503(site: Site, postgres_server: str) -> None:
    """What is seen for a moment when a primary has become a standby."""
    dataset_id = rows.add_dataset(site.database, site.ids["ann"])
    name = make_url(site.settings.database_url).database
    admin = create_engine(postgres_server.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    site.database.engine.dispose()
    assert is_refused(submit(site, "standby", dataset_id))
    with admin.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    admin.dispose()
    site.database.engine.dispose()
    assert submit(site, "standby", dataset_id).status_code == 201


def test_f9_a_slow_database_makes_slow_answers_and_no_faults(site: Site, proxy: Proxy) -> None:
    proxy.latency = 0.04  # each way, and a request takes some twenty
    dataset_id = rows.add_dataset(site.database, site.ids["ann"])
    assert submit(site, "slow", dataset_id).status_code == 201


@contextmanager
def locked(site: Site, seconds: float) -> Iterator[None]:
    """`LOCK TABLE jobs` by somebody else, for so long."""
    held = threading.Event()

    def hold() -> None:
        with site.database.engine.begin() as connection:
            connection.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            held.set()
            time.sleep(seconds)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    yield
    thread.join()


def test_f9_a_lock_is_waited_for_and_one_that_stays_is_told_as_503(site: Site) -> None:
    dataset_id = rows.add_dataset(site.database, site.ids["ann"])
    with locked(site, 1):
        assert submit(site, "locked", dataset_id).status_code == 201
    with locked(site, 7):
        began = time.monotonic()
        assert is_refused(submit(site, "locked for long", dataset_id))
        assert time.monotonic() - began < 6.5


def test_f9_a_full_pool_is_waited_for_no_longer_than_two_seconds(site: Site) -> None:
    held = [site.database.engine.connect() for _ in range(30)]
    began = time.monotonic()
    assert is_refused(site.ann.get("/jobs"))
    assert time.monotonic() - began < 4
    for connection in held:
        connection.close()
    assert site.ann.get("/jobs").status_code == 200


@contextmanager
def busy(path: str, seconds: float) -> Iterator[None]:
    """BEGIN IMMEDIATE by another connection, for so long."""
    held = threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        held.set()
        time.sleep(seconds)
        connection.rollback()
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    yield
    thread.join()


def test_f10_a_busy_sqlite_is_waited_for_and_never_a_500(sqlite_site: Site) -> None:
    site = sqlite_site
    dataset_id = rows.add_dataset(site.database, site.ids["ann"])
    path = str(make_url(site.settings.database_url).database)
    with busy(path, 3):
        assert site.ann.get("/jobs").status_code == 200, "readers do not wait"
        assert submit(site, "busy", dataset_id).status_code == 201
    for _ in range(5):
        with site.database.engine.connect() as connection:
            connection.exec_driver_sql("ROLLBACK")
            connection.exec_driver_sql("PRAGMA busy_timeout=100")
    with busy(path, 1):
        assert is_refused(submit(site, "busy for long", dataset_id))
    with site.database.reading() as session:
        assert session.scalars(select(IdempotencyKey.key)).all() == ["busy"]
