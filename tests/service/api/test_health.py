"""/healthz and /readyz, and how a failing part shows."""

import shutil
import signal
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from service.settings import Settings
from tests.servers import Valkey
from tests.service import rows
from tests.service.site import LINE, open_site


def test_ready_with_every_part(sqlite_url: str, broker: Valkey, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=sqlite_url, broker_url=broker.url)
    with open_site(settings) as site:
        assert site.client().get("/healthz").json() == {"status": "ok"}
        answer = site.client().get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (200, "ready")
        assert answer.json()["parts"] == {"database": "ok", "storage": "ok", "broker": "ok"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGSTOP])
def test_without_the_broker_it_serves_all_the_same(
    sqlite_url: str, broker: Valkey, tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.health._PATIENCE_SECONDS", 0.5)
    settings = Settings(data_dir=tmp_path / "data", database_url=sqlite_url, broker_url=broker.url)
    assert broker.process is not None
    broker.process.send_signal(how)
    if how is signal.SIGTERM:
        broker.process.wait()
    try:
        with open_site(settings) as site:
            answer = site.client().get("/readyz")
            assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
            dataset_id = rows.add_dataset(site.database, site.ids["ann"])
            asked = {"base_model": rows.BASE_MODEL, "dataset": dataset_id}
            assert site.ann.post("/jobs", json=asked).status_code == 201
            broker.process.send_signal(signal.SIGCONT)
    finally:
        broker.process.send_signal(signal.SIGCONT)


def test_without_the_object_store_it_is_not_ready(settings: Settings) -> None:
    with open_site(settings) as site:
        shutil.rmtree(settings.data_dir / "objects")
        answer = site.client().get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
        assert answer.json()["parts"]["storage"] != "ok"
        assert site.client().get("/healthz").status_code == 200


def test_a_database_that_is_down_is_told_as_503(postgres_server: str, postgres_url: str, tmp_path: Path) -> None:
    name = make_url(postgres_url).database
    admin = create_engine(postgres_server.format(name="postgres"), isolation_level="AUTOCOMMIT")

    def allow_connections(allowed: bool) -> None:
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}"))
            if not allowed:
                end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                connection.execute(text(end), {"name": name})

    with open_site(Settings(data_dir=tmp_path / "data", database_url=postgres_url)) as site:
        allow_connections(False)
        for answer in (
            site.ann.get("/jobs"),
            site.ann.post("/jobs", json={"base_model": "x", "dataset": "y"}),
            site.ann.post("/datasets", content=LINE, headers={"content-type": "text/plain"}),
        ):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) > 0
            error = answer.json()["error"]
            assert (error["code"], error["category"]) == ("database_unavailable", "platform")
            assert "psycopg" not in answer.text
        assert site.client().get("/readyz").json()["status"] == "unavailable"
        assert site.client().get("/healthz").status_code == 200
        allow_connections(True)
        assert site.ann.get("/jobs").status_code == 200
    admin.dispose()


def test_a_full_pool_is_told_as_503_soon(postgres_url: str, tmp_path: Path) -> None:
    with open_site(Settings(data_dir=tmp_path / "data", database_url=postgres_url)) as site:
        held = [site.database.engine.connect() for _ in range(30)]
        answer = site.ann.get("/jobs")
        for connection in held:
            connection.close()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        assert site.ann.get("/jobs").status_code == 200
