"""Requests that no honest client sends: each gets a 4xx in the one error shape, and the service goes on."""

import gzip
from typing import Any

import httpx2
import pytest

from tests.service import rows
from tests.service.site import Site

JSON = "application/json"
# name: (content type, body, status, what the message says)
BODIES: dict[str, tuple[str, bytes, int, str]] = {
    "J1 NaN": (JSON, b'{"base_model": "x", "dataset": "y", "training": {"learning_rate": NaN}}', 422, "NaN"),
    "J1 Infinity": (JSON, b'{"training": {"learning_rate": -Infinity}}', 422, "Infinity"),
    "J2 overflow": (JSON, b'{"training": {"learning_rate": 1e400}}', 422, "too large"),
    "J3 half a surrogate pair": (JSON, b'{"name": "\\ud800"}', 422, "surrogate"),
    "J4 NUL": (JSON, b'{"name": "a\\u0000b"}', 422, "NUL"),
    "J5 nested arrays": (JSON, b"[" * 100_000, 400, "JSON"),
    "J6 nested objects": (JSON, b'{"a":' * 900 + b"1" + b"}" * 900, 422, "32 levels"),
    "J7 digits": (JSON, b'{"training": {"epochs": ' + b"9" * 5000 + b"}}", 400, "5000 digits"),
    "J8 a huge integer": (JSON, b'{"base_model": "x", "dataset": "y", "training": {"epochs": 1%030d}}' % 0, 422,
                          "training.epochs"),
    "J9 duplicate keys": (JSON, b'{"dataset": "a", "dataset": "b"}', 400, "twice"),
    "J10 owner_id": (JSON, b'{"base_model": "x", "dataset": "y", "owner_id": "user-1"}', 422, "owner_id: unknown"),
    "J10 state": (JSON, b'{"base_model": "x", "dataset": "y", "state": "succeeded"}', 422, "state: unknown"),
    "J11 true": (JSON, b'{"base_model": "x", "dataset": "y", "training": {"epochs": true}}', 422, "training.epochs"),
    "J11 text": (JSON, b'{"base_model": "x", "dataset": "y", "training": {"epochs": "3"}}', 422, "training.epochs"),
    "J12 UTF-16": (JSON, '{"base_model": "x"}'.encode("utf-16"), 400, "UTF-8"),
    "J12 byte order mark": (JSON, b'\xef\xbb\xbf{"base_model": "x"}', 400, "byte order mark"),
    "J13 invalid UTF-8": (JSON, b'{"base_model": "\xff"}', 400, "UTF-8"),
    "J14 2 MB": (JSON, b'{"name": "' + b"x" * (2 << 20) + b'"}', 413, "larger than"),
    "J16 another type": ("text/plain", b"{}", 415, "application/json"),
    "J16 a form": ("application/x-www-form-urlencoded", b"a=b", 415, "application/json"),
    "J16 no type": ("", b"{}", 415, "application/json"),
    "J17 empty": (JSON, b"", 422, "empty"),
    "J18 an array": (JSON, b"[]", 422, "object"),
    "J18 a string": (JSON, b'"x"', 422, "object"),
    "J18 null": (JSON, b"null", 422, "object"),
    "J19 a million keys": (JSON, b"{" + b",".join(b'"%d":1' % i for i in range(10**6)) + b"}", 413, "larger than"),
    "J20 bidi in a name": (JSON, '{"base_model":"x","dataset":"y","name":"a\u202eb"}'.encode(), 422, "name"),
    "J20 CRLF in a name": (JSON, b'{"base_model": "x", "dataset": "y", "name": "a\\r\\nb"}', 422, "name"),
    "J20 a long name": (JSON, b'{"base_model": "x", "dataset": "y", "name": "' + b"x" * 101 + b'"}', 422, "name"),
    "cut off": (JSON, b'{"base_model": ', 400, "JSON"),
}  # fmt: skip


def check(answer: httpx2.Response, status: int, *, message: str = "") -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "category"}
    assert error["category"] == "user"
    assert message in error["message"]
    assert len(error["message"]) < 400
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"].startswith("request-")
    return error


@pytest.mark.parametrize("path", ["/jobs", "/adapters/merge"])
@pytest.mark.parametrize("case", BODIES)
def test_bodies(shared_site: Site, path: str, case: str) -> None:
    content_type, body, status, message = BODIES[case]
    headers = {"content-type": content_type} if content_type else {}
    answer = shared_site.ann.post(path, content=body, headers=headers)
    about_jobs = path == "/adapters/merge" and status == 422 and b'"base_model": "x"' in body
    check(answer, status, message="" if about_jobs else message)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
@pytest.mark.parametrize("path", ["/jobs", "/datasets"])
def test_compressed_bodies_are_not_read(shared_site: Site, path: str, encoding: str) -> None:
    headers = {"content-type": JSON, "content-encoding": encoding}
    check(shared_site.ann.post(path, content=gzip.compress(b"x" * 1000), headers=headers), 415, message="compressed")


# (fields that replace a good job's, status, param)
JOBS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"base_model": "../x"}, 422, "base_model"),
    ({"base_model": "/etc"}, 422, "base_model"),
    ({"base_model": "http://169.254.169.254/"}, 422, "base_model"),
    ({"base_model": "user/repo@main"}, 422, "base_model"),
    ({"base_model": "' OR 1=1--"}, 422, "base_model"),
    ({"base_model": 1}, 422, "base_model"),
    ({"base_model": "x" * 100_000}, 422, "base_model"),
    ({"dataset": "' OR 1=1--"}, 404, "dataset"),
    ({"dataset": "https://example.org/data.jsonl"}, 404, "dataset"),
    ({"dataset": None}, 422, "dataset"),
    ({"validation_dataset": "dataset-1"}, 404, "validation_dataset"),
    ({"trust_remote_code": True}, 422, "trust_remote_code"),
    ({"training": {"resume_from_checkpoint": "/x"}}, 422, "training.resume_from_checkpoint"),
    ({"training": {"output_dir": "/"}}, 422, "training.output_dir"),
    ({"training": {"report_to": "all"}}, 422, "training.report_to"),
    ({"lora": {"rank": 10**9}}, 422, "lora.rank"),
    ({"lora": {"rank": 0}}, 422, "lora.rank"),
    ({"training": {"global_batch": 10**6}}, 422, "training.global_batch"),
    ({"training": {"sequence_length": 10**7}}, 422, "training.sequence_length"),
    ({"training": {"epochs": 0}}, 422, "training.epochs"),
    ({"training": {"epochs": -1}}, 422, "training.epochs"),
    ({"training": {"learning_rate": 0}}, 422, "training.learning_rate"),
    ({"training": {"learning_rate": -1}}, 422, "training.learning_rate"),
    ({"training": {"learning_rate": 1e9}}, 422, "training.learning_rate"),
    ({"lora": {"target_modules": "(a+)+$"}}, 422, "lora.target_modules"),
    ({"lora": {"target_modules": ["(a+)+$"]}}, 422, "lora.target_modules"),
    ({"lora": {"target_modules": ["nowhere"]}}, 422, "lora.target_modules"),
    ({"lora": {"target_modules": ["*a" * 99 + "*b"]}}, 422, "lora.target_modules"),
    ({"lora": {"target_modules": ["[" * 200]}}, 422, "lora.target_modules"),
    ({"lora": {"target_modules": ["mlp"]}}, 422, "lora.target_modules"),
    ({"lora": {"rank_pattern": {"nowhere": 4}}}, 422, "lora.rank_pattern"),
    ({"lora": {"rank_pattern": {"q_proj": 10**9}}}, 422, "lora.rank_pattern"),
    ({"lora": {"rank_pattern": {"(a+)+$": 4}}}, 422, "lora.rank_pattern"),
    ({"lora": {"rank_pattern": {str(number): 4 for number in range(2000)}}}, 422, "lora.rank_pattern"),
    ({"lora": {"alpha_pattern": {"q_proj": "8"}}}, 422, "lora.alpha_pattern"),
    ({"lora": {"learning_rate_pattern": ["q_proj"]}}, 422, "lora.learning_rate_pattern"),
    ({"lora": {"learning_rate_pattern": {"q_proj": {}}}}, 422, "lora.learning_rate_pattern"),
    ({"lora": {"lora_plus_ratio": -1}}, 422, "lora.lora_plus_ratio"),
    ({"training": {"optimizer": "__import__('os')"}}, 422, "training.optimizer"),
    ({"training": {"momentum": 1}}, 422, "training.momentum"),
    ({"training": {"max_nonfinite_steps": 10**9}}, 422, "training.max_nonfinite_steps"),
    ({"training": {"early_stopping_patience": 2}}, 422, "training.early_stopping_patience"),
    (
        {"training": {"early_stopping_patience": 2, "eval_every": 1, "validation_fraction": 0}},
        422,
        "training.early_stopping_patience",
    ),
    ({"lora": []}, 422, "lora"),
]


@pytest.mark.parametrize(("fields", "status", "param"), JOBS)
def test_jobs(shared_site: Site, fields: dict[str, Any], status: int, param: str) -> None:
    good = {"base_model": rows.BASE_MODEL, "dataset": rows.add_dataset(shared_site.database, shared_site.ids["ann"])}
    error = check(shared_site.ann.post("/jobs", json=good | fields), status)
    assert error["param"] == param
    assert shared_site.ann.get("/jobs").json()["data"] == []


QUERIES = [
    "limit=-1", "limit=0", "limit=101", "limit=1000000000", "limit=x", "limit=" + "9" * 5000, "limit=1e3",
    "after=%00", "after=" + "x" * 101, "after=%27%20OR%201%3D1--", "after=%F0%9F%92%A9", "after=a%0ab",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("path", ["/datasets", "/jobs", "/adapters", "/artifacts", "/base-models"])
def test_queries(shared_site: Site, path: str, query: str) -> None:
    check(shared_site.ann.get(f"{path}?{query}"), 422)


@pytest.mark.parametrize("query", ["status=%27%20OR%201%3D1--", "status=%25", "status=claimed", "kind=_"])
def test_filters_are_literal(shared_site: Site, query: str) -> None:
    check(shared_site.ann.get(f"/jobs?{query}"), 422)


@pytest.mark.parametrize("after", ["-1", "x", str(10**30)])
def test_event_numbers(shared_site: Site, after: str) -> None:
    check(shared_site.ann.get(f"/jobs/{shared_site.train()}/events", params={"after": after}), 422)


def test_a_forged_cursor_shows_nothing_of_others(shared_site: Site) -> None:
    theirs = shared_site.upload(shared_site.bob)
    answer = shared_site.ann.get("/datasets", params={"after": theirs + "f"})
    assert theirs not in answer.text


PATHS = [
    "/%2e%2e/x", "/..;/jobs", "/%252e%252e", "/jobs%5c..", "/jobs/%00", "/datasets/%00/content", "/adapters/a%0ab",
    "/base-models/%00", "/base-models/..%2f..%2fetc", "/nope", "/jobs/", "//jobs", "/jobs/%ff",
    "/adapters/%F3%A0%81%81", "/jobs/" + "x" * 5000, "/datasets/' OR 1=1--", "/.git/config", "/docs/../jobs2",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths(shared_site: Site, path: str) -> None:
    check(shared_site.ann.get(path), 404)


@pytest.mark.parametrize("method", ["TRACE", "PUT", "PATCH", "CONNECT", "NONSENSE", "DELETE"])
def test_methods(shared_site: Site, method: str) -> None:
    answer = shared_site.ann.request(method, "/jobs")
    check(answer, 405)
    assert answer.headers["allow"]


KEYS = [
    None, "", "Bearer", "Bearer ", "Bearer x", "Bearer luthier_", "Bearer luthier_" + "x" * 43, "Basic luthier_x",
    "Bearer " + "x" * 10_000, "Bearer luthier_ü", "Bearer luthier_' OR 1=1--", "Bearer \x7f", "luthier_x",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_keys(shared_site: Site, key: str | None) -> None:
    headers = {} if key is None else {b"Authorization": key.encode()}
    answer = shared_site.client().get("/jobs", headers=headers)
    error = check(answer, 401)
    assert error["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.text == shared_site.client().get("/jobs").text


def test_no_route_but_the_open_ones_answers_without_a_key(shared_site: Site) -> None:
    stranger = shared_site.client()
    for path, operations in shared_site.app.openapi()["paths"].items():
        for method in operations:
            status = stranger.request(method, path).status_code
            assert status == (200 if path in ("/healthz", "/readyz") else 401), (method, path)


def test_a_key_in_the_query_is_refused(shared_site: Site) -> None:
    key = shared_site.keys["ann"]
    for query in (f"api_key={key}", f"x={key.replace('_', '%5F')}"):
        error = check(shared_site.ann.get(f"/jobs?{query}"), 400, message="Authorization")
        assert key not in error["message"]


def test_a_revoked_key_opens_nothing(sqlite_site: Site) -> None:
    from service import users

    with sqlite_site.database.unit_of_work() as session:
        for key, _ in users.keys(session):
            users.revoke_key(session, key.id)
    check(sqlite_site.ann.get("/jobs"), 401)


def test_headers_of_100_kb_are_refused(shared_site: Site) -> None:
    check(shared_site.ann.get("/jobs", headers={"x-padding": "x" * 100_000}), 431)
