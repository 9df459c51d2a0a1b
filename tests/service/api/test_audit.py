"""The audit log: exactly one row for each change and each denial, by whom, to what, and nobody changes it."""

import re
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, make_url, select, text, update
from sqlalchemy.exc import DBAPIError

from migrations import roles
from service import audit, users
from service.audit import Entry
from service.db import Database
from service.models import AuditEntry
from service.settings import Settings
from tests.service import rows
from tests.service.belongings import CALLS, belongings
from tests.service.site import LINE, Site, open_site


def entries(site: Site) -> list[AuditEntry]:
    with site.database.reading() as session:
        return list(session.scalars(select(AuditEntry).order_by(AuditEntry.id)))


def test_every_changing_operation_writes_one_row_and_looking_none(settings: Settings, tmp_path: Path) -> None:
    with open_site(settings.model_copy(update={"webhooks": True})) as site:
        rows.add_base_model(site.database, "tuned", digest="c" * 64)
        with site.database.unit_of_work() as session:
            key = users.create_key(session, site.ids["bob"], users.KeyRequest(scope="admin"))
        operator = TestClient(site.app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False)
        for operation, call in CALLS.items():
            method, path = operation.split()
            ids = belongings(site, site.ids["ann"], tmp_path)
            client, before = operator if call.operators else site.ann, len(entries(site))
            url = re.sub(r"\{(\w+)\}", lambda match, ids=ids: ids.get(match[1], rows.BASE_MODEL), path)
            told: dict[str, Any] = {"json": None if call.body is None else call.body(ids)}
            if call.content is not None:
                told = {"content": call.content, "headers": {"content-type": "application/jsonl"}}
            answer = client.request(method, url, **told)
            new = entries(site)[before:]
            if method == "GET":
                assert new == [], operation
                continue
            assert len(new) == 1, (operation, [row.action for row in new])
            row = new[0]
            assert (row.action, row.status) == (operation, answer.status_code)
            assert row.user_id == site.ids["bob" if call.operators else "ann"]
            assert row.request_id == answer.headers["x-request-id"]
            assert row.address == "testclient"
            for name in re.findall(r"\{(\w+)\}", path):
                assert ids[name] in str(row.object_id), operation
            if answer.status_code < 300 and isinstance(answer.json().get("id"), str):
                assert answer.json()["id"] in str(row.object_id), operation
            if operation == "DELETE /users/{user_id}":
                break  # the last one: ann is gone


def test_denials_are_told_of_whoever_makes_them(site: Site) -> None:
    with site.database.unit_of_work() as session:
        key = users.create_key(session, site.ids["ann"], users.KeyRequest(scope="read"))
    reader = TestClient(site.app, headers={"Authorization": f"Bearer {key}"})
    statuses = [
        site.client().get("/jobs").status_code,  # no key
        site.client().post("/jobs", json={}).status_code,
        reader.post("/jobs", json={}).status_code,
        site.ann.get("/users").status_code,
        site.ann.delete("/datasets/dataset-0").status_code,
        site.ann.post("/jobs", content=b"{", headers={"content-type": "application/json"}).status_code,
        site.ann.get("/jobs/job-0").status_code,  # looking in vain is no denial
        site.ann.get("/nowhere").status_code,
        site.ann.post("/jobs/x/fly").status_code,
        site.ann.put("/jobs").status_code,
    ]
    assert statuses == [401, 401, 403, 403, 404, 400, 404, 404, 404, 405]
    told = [(row.action, row.status, row.user_id == site.ids["ann"], row.object_id) for row in entries(site)]
    assert told == [
        ("GET /jobs", 401, False, None), ("POST /jobs", 401, False, None), ("POST /jobs", 403, True, None),
        ("GET /users", 403, True, None), ("DELETE /datasets/{dataset_id}", 404, True, "dataset-0"),
        ("POST /jobs", 400, True, None),
    ]  # fmt: skip


def test_who_reads_it(site: Site) -> None:
    site.ann.post("/keys", json={})
    site.bob.post("/keys", json={})
    site.client().get("/jobs")
    (own,) = site.ann.get("/audit").json()["data"]
    assert (own["user"], own["action"], own["status"]) == (site.ids["ann"], "POST /keys", 201)
    assert own["target"].startswith("key-")
    with site.database.unit_of_work() as session:
        key = users.create_key(session, site.ids["bob"], users.KeyRequest(scope="admin"))
    operator = TestClient(site.app, headers={"Authorization": f"Bearer {key}"})
    told = operator.get("/audit", params={"limit": 2}).json()
    assert [row["status"] for row in told["data"]] == [401, 201]
    rest = operator.get("/audit", params={"after": told["last_id"]}).json()
    assert [row["id"] for row in rest["data"]] == [own["id"]]


def add(database: Database, **fields: Any) -> None:
    entry = {"request_id": "r", "user_id": None, "key_id": None, "address": "a", "action": "x", "object_id": None}
    with database.unit_of_work() as session:
        audit.append(session, Entry(**entry | {"status": 200} | fields))


def test_lines_cannot_be_forged(database: Database) -> None:
    forged = "x\r\n2026-01-01 DELETE /users ok\u202e\u0085"
    add(database, action=forged, object_id=forged, address=forged, request_id=forged)
    with database.reading() as session:
        row = session.scalars(select(AuditEntry)).one()
    for value in (row.action, row.object_id, row.address, row.request_id):
        assert value is not None
        assert value.isprintable()
        assert value.isascii()
        assert "\\r\\n" in value


@pytest.mark.parametrize("statement", [update(AuditEntry).values(status=0), delete(AuditEntry)])
def test_nobody_changes_or_removes_a_row(database: Database, statement: Any) -> None:
    add(database)
    with pytest.raises(DBAPIError, match="only added to"), database.unit_of_work() as session:
        session.execute(statement)
    with database.reading() as session:
        assert session.scalars(select(AuditEntry.status)).all() == [200]


def test_a_change_is_in_the_log_before_its_answer_is_sent(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    append = audit.append

    def late(session: Any, entry: Entry) -> None:
        seen.append(entry.status)
        append(session, entry)

    monkeypatch.setattr(audit, "append", late)
    answer = sqlite_site.ann.post("/datasets", content=LINE, headers={"content-type": "text/plain"})
    assert seen == [answer.status_code] == [201]


@pytest.fixture
def logins(postgres_url: str) -> dict[str, str]:
    roles.provision(postgres_url, "an api password of the test's", "a worker password of the test's")
    roles.provision(
        postgres_url, "an api password of the test's", "a worker password of the test's"
    )  # as often as liked
    url = make_url(postgres_url)
    return {
        role: url.set(drivername="postgresql", username=role).render_as_string() for role in (roles.API, roles.WORKER)
    }


@pytest.mark.parametrize(
    ("role", "statement"),
    [
        (roles.API, "UPDATE audit_log SET status = 0"),
        (roles.API, "DELETE FROM audit_log"),
        (roles.API, "TRUNCATE audit_log"),
        (roles.API, "ALTER TABLE audit_log DISABLE TRIGGER ALL"),
        (roles.API, "ALTER TABLE jobs DISABLE ROW LEVEL SECURITY"),
        (roles.API, "DROP POLICY of_the_caller ON jobs"),
        (roles.API, "CREATE TABLE mine (id int)"),
        (roles.API, "SET ROLE luthier"),
        (roles.WORKER, "SELECT * FROM api_keys"),
        (roles.WORKER, "SELECT * FROM audit_log"),
        (roles.WORKER, "INSERT INTO users (id, name, created_at) VALUES ('u', 'u', 1)"),
        (roles.WORKER, "DELETE FROM users"),
        (roles.WORKER, "UPDATE users SET max_running_jobs = 0"),
    ],
)
def test_what_the_logins_of_postgresql_may_not(logins: dict[str, str], role: str, statement: str) -> None:
    with psycopg.connect(logins[role]) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())


def test_without_an_owner_the_logins_see_nothing(logins: dict[str, str], postgres_url: str) -> None:
    database = Database(postgres_url)
    job_id = rows.add_job(database)
    with psycopg.connect(logins[roles.API]) as connection:
        assert connection.execute("SELECT id FROM jobs").fetchall() == []
        connection.execute("SELECT set_config('luthier.owner', '*', true)")
        assert connection.execute("SELECT id FROM jobs").fetchall() == [(job_id,)]
    with database.reading() as session:
        assert session.execute(text("SELECT count(*) FROM pg_policies")).scalar_one() >= 13
        unprotected = text(
            "SELECT relname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid WHERE relkind = 'r' "
            "AND attname IN ('owner_id', 'user_id') AND NOT (relrowsecurity AND relforcerowsecurity)"
        )
        assert session.scalars(unprotected).all() == []
    database.close()
