"""Hostile orders, S1 to S10, and what is asked about jobs, A1 to A7."""

from typing import Any

import pytest
from sqlalchemy import event

from service import events, leases
from service.models import new_id
from tests.service import rows
from tests.service.api.hostile import check
from tests.service.site import Site

# (case, fields that replace a good job's, status, param)
JOBS: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("S1", {"base_model": "../x"}, 422, "base_model"),
    ("S1", {"base_model": "/etc"}, 422, "base_model"),
    ("S1", {"base_model": "http://169.254.169.254/"}, 422, "base_model"),
    ("S1", {"base_model": "user/repo@main"}, 422, "base_model"),
    ("S1", {"base_model": "' OR 1=1--"}, 422, "base_model"),
    ("S1", {"base_model": 1}, 422, "base_model"),
    ("S1", {"base_model": "x" * 100_000}, 422, "base_model"),
    ("S5", {"dataset": "' OR 1=1--"}, 404, "dataset"),
    ("S5", {"dataset": "https://example.org/data.jsonl"}, 404, "dataset"),
    ("S5", {"dataset": None}, 422, "dataset"),
    ("S5", {"validation_dataset": "dataset-1"}, 404, "validation_dataset"),
    ("S2", {"trust_remote_code": True}, 422, "trust_remote_code"),
    ("S2", {"training": {"resume_from_checkpoint": "/x"}}, 422, "training.resume_from_checkpoint"),
    ("S2", {"training": {"output_dir": "/"}}, 422, "training.output_dir"),
    ("S2", {"training": {"report_to": "all"}}, 422, "training.report_to"),
    ("S3", {"lora": {"rank": 10**9}}, 422, "lora.rank"),
    ("S3", {"lora": {"rank": 0}}, 422, "lora.rank"),
    ("S3", {"training": {"global_batch": 10**6}}, 422, "training.global_batch"),
    ("S3", {"training": {"sequence_length": 10**7}}, 422, "training.sequence_length"),
    ("S3", {"training": {"epochs": 0}}, 422, "training.epochs"),
    ("S3", {"training": {"epochs": -1}}, 422, "training.epochs"),
    ("S3", {"training": {"learning_rate": 0}}, 422, "training.learning_rate"),
    ("S3", {"training": {"learning_rate": -1}}, 422, "training.learning_rate"),
    ("S3", {"training": {"learning_rate": 1e9}}, 422, "training.learning_rate"),
    ("S9", {"lora": {"target_modules": "(a+)+$"}}, 422, "lora.target_modules"),
    ("S9", {"lora": {"target_modules": ["(a+)+$"]}}, 422, "lora.target_modules"),
    ("S9", {"lora": {"target_modules": ["nowhere"]}}, 422, "lora.target_modules"),
    ("S9", {"lora": {"target_modules": ["*a" * 99 + "*b"]}}, 422, "lora.target_modules"),
    ("S9", {"lora": {"target_modules": ["[" * 200]}}, 422, "lora.target_modules"),
    ("S9", {"lora": {"target_modules": ["mlp"]}}, 422, "lora.target_modules"),
    ("S9", {"lora": {"rank_pattern": {"nowhere": 4}}}, 422, "lora.rank_pattern"),
    ("S9", {"lora": {"rank_pattern": {"q_proj": 10**9}}}, 422, "lora.rank_pattern"),
    ("S9", {"lora": {"rank_pattern": {"(a+)+$": 4}}}, 422, "lora.rank_pattern"),
    ("S9", {"lora": {"rank_pattern": {str(number): 4 for number in range(2000)}}}, 422, "lora.rank_pattern"),
    ("S9", {"lora": {"alpha_pattern": {"q_proj": "8"}}}, 422, "lora.alpha_pattern"),
    ("S9", {"lora": {"learning_rate_pattern": ["q_proj"]}}, 422, "lora.learning_rate_pattern"),
    ("S9", {"lora": {"learning_rate_pattern": {"q_proj": {}}}}, 422, "lora.learning_rate_pattern"),
    ("S3", {"lora": {"lora_plus_ratio": -1}}, 422, "lora.lora_plus_ratio"),
    ("S3", {"training": {"optimizer": "__import__('os')"}}, 422, "training.optimizer"),
    ("S3", {"training": {"momentum": 1}}, 422, "training.momentum"),
    ("S3", {"training": {"max_nonfinite_steps": 10**9}}, 422, "training.max_nonfinite_steps"),
    ("S3", {"training": {"early_stopping_patience": 2}}, 422, "training.early_stopping_patience"),
    (
        "S3",
        {"training": {"early_stopping_patience": 2, "eval_every": 1, "validation_fraction": 0}},
        422,
        "training.early_stopping_patience",
    ),
    ("S3", {"lora": []}, 422, "lora"),
]


@pytest.mark.parametrize(
    ("fields", "status", "param"), [job[1:] for job in JOBS], ids=[f"{case} {param}" for case, _, _, param in JOBS]
)
def test_what_is_no_job(shared_site: Site, fields: dict[str, Any], status: int, param: str) -> None:
    error = check(shared_site.ann.post("/jobs", json=good(shared_site) | fields), status)
    assert error["param"] == param
    assert shared_site.ann.get("/jobs").json()["data"] == []


def good(site: Site, owner: str = "ann", **fields: Any) -> dict[str, Any]:
    dataset = rows.add_dataset(site.database, site.ids[owner], **fields)
    return {"base_model": rows.BASE_MODEL, "dataset": dataset}


def test_s5_what_is_anothers_costs_what_does_not_exist(shared_site: Site) -> None:
    """The same answer after the same statements: neither body nor time tells that an id is somebody's."""
    told: list[tuple[str, list[str]]] = []
    for dataset in (good(shared_site, "bob")["dataset"], new_id("dataset")):
        statements: list[str] = []
        listener = lambda _c, _cursor, statement, *_: statements.append(statement)  # noqa: B023, E731
        event.listen(shared_site.database.engine, "before_cursor_execute", listener)
        try:
            answer = shared_site.ann.post("/jobs", json=good(shared_site) | {"dataset": dataset})
        finally:
            event.remove(shared_site.database.engine, "before_cursor_execute", listener)
        check(answer, 404)
        told.append((answer.text.replace(dataset, ""), statements))
    assert told[0] == told[1]


def test_s6_a_dataset_that_is_not_ready_or_gone(shared_site: Site) -> None:
    error = check(shared_site.ann.post("/jobs", json=good(shared_site, status="validating")), 409)
    assert error["param"] == "dataset"
    deleted = {"base_model": rows.BASE_MODEL, "dataset": shared_site.upload(shared_site.ann)}
    assert shared_site.ann.delete(f"/datasets/{deleted['dataset']}").status_code == 200
    check(shared_site.ann.post("/jobs", json=deleted), 404)


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "ümlaut", "a\x7f"])
def test_s7_a_key_that_is_none(shared_site: Site, key: str) -> None:
    headers = {b"Idempotency-Key": key.encode()}
    error = check(shared_site.ann.post("/jobs", json=good(shared_site), headers=headers), 400)
    assert error["param"] == "Idempotency-Key"


def test_s7_a_key_is_one_request_of_one_owner(sqlite_site: Site) -> None:
    asked, headers = good(sqlite_site), {"Idempotency-Key": "order 66"}
    first, again = (sqlite_site.ann.post("/jobs", json=asked, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"]
    other = check(sqlite_site.ann.post("/jobs", json=asked | {"name": "other"}, headers=headers), 422)
    assert other["code"] == "idempotency_mismatch"
    theirs = sqlite_site.bob.post("/jobs", json=good(sqlite_site, "bob"), headers=headers)
    assert theirs.json()["id"] != first.json()["id"]


def test_a1_what_has_ended_is_not_cancelled(sqlite_site: Site) -> None:
    job_id = sqlite_site.train()
    theirs = check(sqlite_site.bob.post(f"/jobs/{job_id}/cancel"), 404)
    nobodys = check(sqlite_site.bob.post(f"/jobs/{(none := new_id('job'))}/cancel"), 404)
    assert theirs["message"].replace(job_id, "") == nobodys["message"].replace(none, "")
    assert sqlite_site.ann.post(f"/jobs/{job_id}/cancel").status_code == 202
    assert check(sqlite_site.ann.post(f"/jobs/{job_id}/cancel"), 409)["code"] == "job_ended"


def test_a5_what_a_job_says_is_text(sqlite_site: Site) -> None:
    """Escapes of a terminal, markup and lines of their own arrive as they were said, inside of JSON."""
    said = "\x1b[31mred\x1b[0m <script>alert(1)</script>\r\nid: 9\n\ndata: forged"
    job_id = sqlite_site.train()
    claim = sqlite_site.claim()
    with sqlite_site.database.unit_of_work() as session:
        events.append(session, job_id, said)
        leases.fail(session, claim, "diverged", "user", said)
    page = sqlite_site.ann.get(f"/jobs/{job_id}/events")
    assert said in [item["message"] for item in page.json()["data"]]
    stream = sqlite_site.ann.get(f"/jobs/{job_id}/events", headers={"accept": "text/event-stream"})
    job = sqlite_site.ann.get(f"/jobs/{job_id}")
    assert job.json()["error"]["message"] == said
    for answer in (page, stream, job):
        assert b"\x1b" not in answer.content
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "html" not in answer.headers["content-type"]
    assert not [line for line in stream.text.splitlines() if line.startswith(("id: 9", "data: forged"))]
    figure = sqlite_site.ann.get(f"/jobs/{job_id}/curves.svg")
    assert "<script" not in figure.text


QUERIES = [
    "limit=-1", "limit=0", "limit=101", "limit=1000000000", "limit=x", "limit=" + "9" * 5000, "limit=1e3",
    "after=%00", "after=" + "x" * 101, "after=%27%20OR%201%3D1--", "after=%F0%9F%92%A9", "after=a%0ab",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES, ids=[f"A6 {query[:40]}" for query in QUERIES])
@pytest.mark.parametrize("path", ["/datasets", "/jobs", "/adapters", "/artifacts", "/base-models"])
def test_queries(shared_site: Site, path: str, query: str) -> None:
    check(shared_site.ann.get(f"{path}?{query}"), 422)


@pytest.mark.parametrize("query", ["status=%27%20OR%201%3D1--", "status=%25", "status=claimed", "kind=_"])
def test_a7_filters_are_literal(shared_site: Site, query: str) -> None:
    check(shared_site.ann.get(f"/jobs?{query}"), 422)


@pytest.mark.parametrize("after", ["-1", "x", str(10**30)])
def test_a4_event_numbers(shared_site: Site, after: str) -> None:
    check(shared_site.ann.get(f"/jobs/{shared_site.train()}/events", params={"after": after}), 422)


def test_a6_a_forged_cursor_shows_nothing_of_others(shared_site: Site) -> None:
    theirs = shared_site.upload(shared_site.bob)
    answer = shared_site.ann.get("/datasets", params={"after": theirs + "f"})
    assert theirs not in answer.text
