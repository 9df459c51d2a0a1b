"""Hostile callers, K1 to K6."""

import pytest

from service import users
from tests.service.api.hostile import check
from tests.service.site import Site

KEYS = [
    None, "", "Bearer", "Bearer ", "Bearer x", "Bearer luthier_", "Bearer luthier_" + "x" * 43, "Basic luthier_x",
    "Bearer " + "x" * 10_000, "Bearer luthier_ü", "Bearer luthier_' OR 1=1--", "Bearer \x7f", "luthier_x",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=[f"K1 {str(key)[:30]!a}" for key in KEYS])
def test_keys(shared_site: Site, key: str | None) -> None:
    headers = {} if key is None else {b"Authorization": key.encode()}
    answer = shared_site.client().get("/jobs", headers=headers)
    error = check(answer, 401)
    assert error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.text == shared_site.client().get("/jobs").text


def test_k1_no_route_but_the_open_ones_answers_without_a_key(shared_site: Site) -> None:
    stranger = shared_site.client()
    for path, operations in shared_site.app.openapi()["paths"].items():
        for method in operations:
            status = stranger.request(method, path).status_code
            assert status == (200 if path in ("/healthz", "/readyz") else 401), (method, path)


def test_k2_a_key_in_the_query_is_refused(shared_site: Site) -> None:
    key = shared_site.keys["ann"]
    for query in (f"api_key={key}", f"x={key.replace('_', '%5F')}"):
        error = check(shared_site.ann.get(f"/jobs?{query}"), 400, message="Authorization")
        assert key not in error["message"]


def test_k1_a_revoked_key_opens_nothing(sqlite_site: Site) -> None:
    with sqlite_site.database.unit_of_work() as session:
        for key, _ in users.keys(session):
            users.revoke_key(session, key.id)
    check(sqlite_site.ann.get("/jobs"), 401)
