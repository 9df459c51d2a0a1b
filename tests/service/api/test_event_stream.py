"""Event streams: everything once, in order, resumable, and over when the job is."""

import json
from collections.abc import Iterator

import httpx
import pytest

from service import events, leases
from service.api import event_stream, event_watch
from tests.servers import wait_until
from tests.service.site import Site, listening

STREAM = {"accept": "text/event-stream"}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_watch, "POLL_SECONDS", 0.02)


def parse(lines: Iterator[str]) -> Iterator[tuple[int, str, dict[str, object]]]:
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield int(fields["id"]), fields["event"], json.loads(fields["data"])
            fields = {}


def test_a_stream_follows_a_job_to_its_end(site: Site) -> None:
    job_id = site.train()
    with listening(site.app) as url, httpx.Client(base_url=url, headers=site.ann.headers, timeout=30) as client:
        with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            stream = parse(answer.iter_lines())
            assert next(stream)[2]["message"] == "Queued"
            claim = site.claim()
            with site.database.unit_of_work() as session:
                leases.renew(session, claim, 60, leases.Progress(step=1, points=({"step": 1, "loss": 2.0},)))
            with site.database.unit_of_work() as session:
                leases.fail(session, claim, "diverged", "user", "a\nb")
            rest = list(stream)
        assert [seq for seq, _, _ in rest] == [2, 3, 4, 5]
        assert [kind for _, kind, _ in rest] == ["message", "message", "metrics", "message"]
        assert rest[2][2]["data"] == {"step": 1, "loss": 2.0}
        assert rest[3][2]["message"] == "Failed: a\nb"
        later = client.get(f"/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "3"})
        assert [seq for seq, _, _ in parse(iter(later.text.split("\n")))] == [4, 5]
        over = client.get(f"/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": "5"})
        assert (over.status_code, over.content) == (204, b"")


def test_more_events_than_fit_one_batch_all_arrive(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "BATCH", 3)
    monkeypatch.setattr(event_watch, "BATCH", 3)
    job_id = sqlite_site.train()
    with sqlite_site.database.unit_of_work() as session:
        for step in range(4):
            events.append(session, job_id, f"Step {step}")
    sqlite_site.ann.post(f"/jobs/{job_id}/cancel")
    answer = sqlite_site.ann.get(f"/jobs/{job_id}/events", headers=STREAM)
    assert [seq for seq, _, _ in parse(iter(answer.text.split("\n")))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("last", ["-1", "x", "1.5", "9" * 30, "1; drop", ""])
def test_a_last_event_id_that_was_never_given_out_is_refused(shared_site: Site, last: str) -> None:
    job_id = shared_site.train()
    answer = shared_site.ann.get(f"/jobs/{job_id}/events", headers=STREAM | {"Last-Event-ID": last})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


def test_a_quiet_stream_is_kept_alive(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "KEEP_ALIVE_SECONDS", 0.1)
    job_id = sqlite_site.train()
    with (
        listening(sqlite_site.app) as url,
        httpx.stream("GET", f"{url}/jobs/{job_id}/events", headers={**sqlite_site.ann.headers, **STREAM}) as answer,
    ):
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith(":"))
        sqlite_site.ann.post(f"/jobs/{job_id}/cancel")
        assert len(list(parse(lines))) == 1


def test_a_client_that_goes_away_ends_its_stream(sqlite_site: Site) -> None:
    job_id = sqlite_site.train()
    streams, owner_id = sqlite_site.app.state.parts.streams, sqlite_site.ids["ann"]
    headers = {**sqlite_site.ann.headers, **STREAM}
    with listening(sqlite_site.app) as url:
        with httpx.stream("GET", f"{url}/jobs/{job_id}/events", headers=headers) as answer:
            lines = answer.iter_lines()
            assert next(lines) == "id: 1"
            assert streams[owner_id] == 1
        wait_until(lambda: streams[owner_id] == 0, seconds=20)


def test_one_owner_has_so_many_streams_and_no_more(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_STREAMS", 1)
    job_id, theirs = sqlite_site.train(), sqlite_site.train("bob")
    sqlite_site.app.state.parts.streams[sqlite_site.ids["ann"]] = 1
    answer = sqlite_site.ann.get(f"/jobs/{job_id}/events", headers=STREAM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many")
    assert int(answer.headers["retry-after"]) > 0
    sqlite_site.bob.post(f"/jobs/{theirs}/cancel")
    assert sqlite_site.bob.get(f"/jobs/{theirs}/events", headers=STREAM).status_code == 200
