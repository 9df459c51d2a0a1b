"""What must stay where it is: keys, passwords and people's data are in no log line, no error and no event."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from service import leases, logs
from service.models import JobEvent
from service.settings import Settings
from tests.service import rows
from tests.service.site import Site, listening, open_site

SENTENCE = "the canary sings at dawn"
PASSWORD = "hunter2-canary-password"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    logs.configure(Settings(data_dir=tmp_path, log_format="json"), "api")
    root.setLevel(logging.DEBUG)
    yield text
    root.handlers[:], root.level = handlers, level


def events_of(site: Site) -> str:
    with site.database.reading() as session:
        return "\n".join(f"{row.message} {row.data}" for row in session.scalars(select(JobEvent)))


def test_canaries_are_in_no_log_no_error_and_no_event(database_url: str, tmp_path: Path, written: io.StringIO) -> None:
    with open_site(Settings(data_dir=tmp_path / "data", database_url=database_url)) as site:
        key = site.keys["ann"]
        line = json.dumps({"prompt": "x", "completion": SENTENCE}).encode() + b"\n"
        dataset = site.upload(site.ann, line * 3)
        jsonl = {"content-type": "application/jsonl"}
        answers = [
            site.ann.post("/datasets", content=line + b'{"prompt": "' + SENTENCE.encode() + b'"}\n', headers=jsonl),
            site.ann.post("/datasets", content=line + b'{"' + SENTENCE.encode() + b"\n", headers=jsonl),
            site.ann.get(f"/jobs?after={key}"),
            site.ann.get(f"/datasets/{key}"),
            site.client().get("/jobs", headers={"authorization": f"Bearer {key}x"}),
            site.ann.post("/jobs", json={"base_model": rows.BASE_MODEL, "dataset": dataset, key: 1}),
        ]
        job = site.ann.post("/jobs", json={"base_model": rows.BASE_MODEL, "dataset": dataset}).json()["id"]
        with site.database.unit_of_work() as session:
            leases.fail(session, site.claim(), "diverged", "user", "the loss is not finite")
        answers += [site.ann.get(f"/jobs/{job}"), site.ann.get(f"/jobs/{job}/events")]
        told = events_of(site)
    lines = [json.loads(text) for text in written.getvalue().splitlines()]
    assert any(entry.get("route") == "/jobs" and entry.get("status") == 201 for entry in lines)
    assert key not in written.getvalue()
    assert SENTENCE not in written.getvalue()
    assert SENTENCE not in told
    errors = [answer.text for answer in answers if answer.status_code >= 400]
    assert len(errors) == 6
    assert not any(SENTENCE in text for text in errors)


def test_a_database_that_refuses_tells_no_password(tmp_path: Path, written: io.StringIO) -> None:
    url = f"postgresql+psycopg://luthier:{PASSWORD}@127.0.0.1:1/x"
    from fastapi.testclient import TestClient

    from service.app import create_app

    with TestClient(create_app(Settings(data_dir=tmp_path / "data", database_url=url))) as client:
        answer = client.get("/jobs", headers={"authorization": "Bearer luthier_" + "x" * 43})
        ready = client.get("/readyz")
    assert (answer.status_code, ready.status_code) == (503, 503)
    assert not any(PASSWORD in text for text in (answer.text, ready.text, written.getvalue()))
    assert "does not answer" in written.getvalue()


def test_a_fault_of_ours_is_told_with_the_requests_id_alone(
    settings: Settings, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"no such thing as {PASSWORD} at redis://:{PASSWORD}@redis")

    monkeypatch.setattr("service.jobs.page", broken)
    with open_site(settings) as site:
        answer = site.ann.get("/jobs", headers={"x-request-id": "trace-me-0123"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "trace-me-0123"
    assert "trace-me-0123" in answer.json()["error"]["message"]
    assert PASSWORD not in answer.text
    (entry,) = [json.loads(line) for line in written.getvalue().splitlines() if "exception" in line]
    assert entry["request_id"] == "trace-me-0123"
    assert f":{PASSWORD}@" not in entry["exception"]


def test_a_request_id_is_taken_where_it_can_be_one(sqlite_site: Site) -> None:
    def given(value: str) -> str:
        return str(sqlite_site.ann.get("/jobs", headers={"x-request-id": value}).headers["x-request-id"])

    assert given("0af76519-16cd-43dd") == "0af76519-16cd-43dd"
    for value in ("short", "x" * 65, "with space here", "<script>alert(1)</script>", '{"a":1234}'):
        assert given(value).startswith("request-")


def test_a_real_server_writes_one_json_line_a_request(settings: Settings, written: io.StringIO) -> None:
    import httpx

    with open_site(settings) as site, listening(site.app) as url:
        httpx.get(f"{url}/jobs", headers={"authorization": f"Bearer {site.keys['ann']}"})
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    (entry,) = [line for line in lines if line["logger"] == "service.api.observed" and line["level"] == "info"]
    assert (entry["route"], entry["status"], entry["user_id"]) == ("/jobs", 200, site.ids["ann"])
    assert entry["request_id"].startswith("request-")
