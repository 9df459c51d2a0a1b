"""/keys and what keys allow: scopes, expiry, rotation without a moment without a key, limits of use."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from service import users
from service.api import gate
from service.models import ApiKey, AuditEntry, User
from service.settings import Settings
from tests.service.site import LINE, Site, open_site


def with_key(site: Site, key: str) -> TestClient:
    return TestClient(site.app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False)


def made(site: Site, **fields: Any) -> tuple[dict[str, Any], TestClient]:
    answer = site.ann.post("/keys", json=fields)
    assert answer.status_code == 201, answer.text
    return answer.json(), with_key(site, answer.json()["key"])


def upload(client: TestClient) -> int:
    return client.post("/datasets", content=LINE, headers={"content-type": "application/jsonl"}).status_code


def test_a_key_is_shown_once_and_kept_as_a_hash(site: Site) -> None:
    told, client = made(site, scope="write")
    assert client.get("/datasets").status_code == 200
    listed = site.ann.get("/keys").json()["data"]
    assert [key["id"] for key in listed] == [told["id"], listed[1]["id"]]
    assert all("key" not in key and "sha256" not in key for key in listed)
    assert told["key"].startswith(told["hint"])
    with site.database.reading() as session:
        assert told["key"] not in str(session.scalars(select(ApiKey.sha256)).all())


def test_k4_a_key_for_looking_changes_nothing(site: Site) -> None:
    _, reader = made(site, scope="read")
    assert reader.get("/datasets").status_code == 200
    assert reader.head(f"/datasets/{site.upload(site.ann)}/content").status_code == 200
    for method, path in [("POST", "/datasets"), ("POST", "/jobs"), ("DELETE", "/datasets/x"), ("POST", "/keys")]:
        answer = reader.request(method, path, json={})
        assert answer.status_code == 403, path
        assert answer.json()["error"]["code"] == "insufficient_scope"
    assert site.ann.get("/users").status_code == 403
    assert site.ann.post("/keys", json={"scope": "admin"}).status_code == 403
    assert site.ann.post("/keys", json={"scope": "root"}).json()["error"]["param"] == "scope"


def test_an_expired_key_opens_nothing_and_looks_like_any_other_bad_one(site: Site) -> None:
    told, client = made(site, expires_in_seconds=100)
    assert 99 < told["expires_at"] - told["created_at"] < 102
    assert client.get("/jobs").status_code == 200
    with site.database.unit_of_work() as session:
        session.execute(update(ApiKey).where(ApiKey.id == told["id"]).values(expires_at=1.0))
    answer = client.get("/jobs")
    assert (answer.status_code, answer.json()) == (401, with_key(site, "luthier_x").get("/jobs").json())
    assert told["id"] not in [key["id"] for key in site.ann.get("/keys").json()["data"]]
    assert site.ann.post(f"/keys/{told['id']}/rotate", json={}).status_code == 404


def test_rotation_leaves_no_moment_without_a_key(site: Site) -> None:
    told, old = made(site, scope="read", expires_in_seconds=1000)
    answer = site.ann.post(f"/keys/{told['id']}/rotate", json={"overlap_seconds": 60})
    assert answer.status_code == 201
    fresh = answer.json()
    assert fresh["scope"] == "read"
    assert 999 < fresh["expires_at"] - fresh["created_at"] < 1002
    new = with_key(site, fresh["key"])
    assert [client.get("/jobs").status_code for client in (old, new)] == [200, 200]
    ends = {key["id"]: key["expires_at"] for key in site.ann.get("/keys").json()["data"]}
    assert ends[told["id"]] - fresh["created_at"] < 62
    with site.database.unit_of_work() as session:
        session.execute(update(ApiKey).where(ApiKey.id == told["id"]).values(expires_at=1.0))
    assert [client.get("/jobs").status_code for client in (old, new)] == [401, 200]
    last = site.ann.post(f"/keys/{fresh['id']}/rotate", json={"overlap_seconds": 0}).json()
    assert [client.get("/jobs").status_code for client in (new, with_key(site, last["key"]))] == [401, 200]


def test_a_key_may_end_itself_and_there_is_a_most_of_them(site: Site) -> None:
    told, client = made(site)
    assert client.delete(f"/keys/{told['id']}").json() == {"id": told["id"], "object": "api_key", "deleted": True}
    assert client.get("/jobs").status_code == 401
    assert site.ann.delete(f"/keys/{told['id']}").status_code == 404
    for _ in range(users.MAX_LIVE_KEYS - 1):
        made(site)
    answer = site.ann.post("/keys", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_many_keys")


def test_the_last_use_is_known_to_the_minute_and_written_once_in_it(site: Site) -> None:
    told, client = made(site)

    def last_use() -> float | None:
        with site.database.reading() as session:
            return session.scalar(select(ApiKey.last_used_at).where(ApiKey.id == told["id"]))

    assert last_use() is None
    client.get("/jobs")
    first = last_use()
    assert first is not None
    for _ in range(3):
        client.get("/jobs")
    assert last_use() == first
    with site.database.unit_of_work() as session:
        session.execute(update(ApiKey).values(last_used_at=first - 61))
    client.get("/jobs")
    again = last_use()
    assert again is not None
    assert again >= first


def test_k3_a_thousand_bad_keys_are_held_up_and_the_owner_is_not(settings: Settings) -> None:
    slow = settings.model_copy(update={"refusals_per_second": 0.5})
    with open_site(slow) as site:
        answers = [with_key(site, f"luthier_{number}").get("/jobs") for number in range(1000)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:30] == [401] * 30
        assert statuses.count(429) > 950
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "rate_limited"
        assert int(refused.headers["retry-after"]) >= 1
        assert site.ann.get("/jobs").status_code == 200  # from the same address
        assert upload(site.ann) == 201
        with site.database.reading() as session:
            told = [row.status for row in session.scalars(select(AuditEntry))]
        # The log is not what fills the disk: refusals beyond the reserve are told once.
        assert told.count(429) == 1
        assert told.count(401) == statuses.count(401)


def test_a_key_that_asks_too_often_is_held_up_alone(settings: Settings) -> None:
    with open_site(settings.model_copy(update={"requests_per_second": 0.5})) as site:
        statuses = [site.ann.get("/jobs").status_code for _ in range(8)]
        assert statuses == [200] * (gate._KEY_BURST_SECONDS // 2) + [429] * 3
        assert site.bob.get("/jobs").status_code == 200
        _, second = 0, site.ann.post("/keys", json={})
        assert second.status_code == 429
        with site.database.reading() as session:
            told = [(row.action, row.status) for row in session.scalars(select(AuditEntry).order_by(AuditEntry.id))]
        assert told == [("GET /jobs", 429), ("POST /keys", 429)]


def test_what_scope_a_key_at_the_console_gets(settings: Settings) -> None:
    with open_site(settings) as site:
        with site.database.unit_of_work() as session:
            key = users.create_key(session, site.ids["ann"], users.KeyRequest(scope="admin"))
        assert with_key(site, key).get("/users").status_code == 200


@pytest.mark.parametrize("fields", [{"expires_in_seconds": 0}, {"expires_in_seconds": 1e12}, {"scope": None}, {"x": 1}])
def test_what_no_key_can_be(shared_site: Site, fields: dict[str, Any]) -> None:
    answer = shared_site.ann.post("/keys", json=fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, next(iter(fields)))


def test_a_key_that_expires_makes_none_that_lasts_longer(site: Site) -> None:
    told, client = made(site, expires_in_seconds=100)
    for asked in ({}, {"expires_in_seconds": 200}):
        answer = client.post("/keys", json=asked)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "outlives_its_maker")
    assert client.post("/keys", json={"expires_in_seconds": 50}).status_code == 201
    lasting, _ = made(site)
    for key_id in (lasting["id"], told["id"]):
        fresh = client.post(f"/keys/{key_id}/rotate", json={})
        assert fresh.status_code == 201
        assert fresh.json()["expires_at"] <= told["expires_at"] + 0.01


def test_a_key_ends_none_of_a_wider_scope(site: Site) -> None:
    with site.database.unit_of_work() as session:
        row, secret = users.issue_key(session, site.ids["ann"], users.KeyRequest(scope="admin"))
    answer = site.ann.delete(f"/keys/{row.id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_scope")
    operator = with_key(site, secret)
    assert operator.get("/users").status_code == 200
    assert operator.delete(f"/keys/{row.id}").status_code == 200


def test_who_is_being_deleted_gets_no_key(site: Site) -> None:
    told, _ = made(site)
    with site.database.unit_of_work() as session:
        session.execute(update(User).where(User.id == site.ids["ann"]).values(deleted_at=1.0))
    for path in ("/keys", f"/keys/{told['id']}/rotate"):
        answer = site.ann.post(path, json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "user_deleted")
