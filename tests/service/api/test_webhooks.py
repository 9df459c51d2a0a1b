"""/webhooks: made and changed, written with a job's end, sent until they arrive, and off unless the operator allows."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from sqlalchemy import select, update

from service import jobs, leases, webhooks
from service.courier import Courier
from service.db import now
from service.models import Job, Webhook, WebhookDelivery
from service.settings import Settings
from service.webhook_delivery import Outcome
from tests.service.site import Site, open_site
from tests.service.webhook_receiver import receiving, status


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    allowed = {"webhooks": True, "webhooks_over_http": True, "webhook_networks": "127.0.0.0/8"}
    with open_site(Settings(data_dir=tmp_path / "data", database_url=database_url, **allowed)) as site:
        yield site


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 15
    while not (found := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def hook(site: Site, port: int, user: str = "ann", **fields: Any) -> dict[str, Any]:
    asked = {"url": f"http://127.0.0.1:{port}/hook", **fields}
    answer = site.client(user).post("/webhooks", json=asked)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def sent_to(site: Site, webhook_id: str, query: str = "") -> list[dict[str, Any]]:
    answer = site.ann.get(f"/webhooks/{webhook_id}/deliveries{query}")
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def test_a_succeeded_job_is_told_and_verified_by_openais_client(site: Site, tmp_path: Path) -> None:
    with receiving(status(200)) as receiver:
        made = hook(site, receiver.port, event_types=["fine_tuning.job.succeeded", "job.succeeded"], name="my hook")
        adapter = site.adapter(tmp_path)
        until(lambda: len(receiver.requests) == 2)
        (job,) = site.ann.get("/jobs").json()["data"]
        client = OpenAI(api_key="none", webhook_secret=made["secret"])
        events = {}
        for index, (_, body) in enumerate(receiver.requests):
            event = client.webhooks.unwrap(body, receiver.headers(index))
            events[event.type] = json.loads(body)
        assert events["fine_tuning.job.succeeded"]["data"] == {"id": job["id"]}
        assert events["job.succeeded"]["data"] == {  # type: ignore[index]
            "id": job["id"], "kind": "train", "status": "succeeded", "adapter": adapter, "artifact": None,
            "error": None,
        }  # fmt: skip
        delivered = until(lambda: [row for row in sent_to(site, made["id"]) if row["state"] == "delivered"][1:])
        assert (delivered[0]["last_status"], delivered[0]["attempts"], delivered[0]["last_error"]) == (200, 1, None)
    assert "secret" not in site.ann.get(f"/webhooks/{made['id']}").json()
    assert made["secret"] not in site.ann.get("/webhooks").text


def test_every_end_is_told_once_and_others_hear_nothing(site: Site) -> None:
    with receiving(status(200)) as mine, receiving(status(200)) as failures, receiving(status(200)) as bobs:
        hook(site, mine.port)
        hook(site, failures.port, event_types=["job.failed"])
        hook(site, bobs.port, user="bob")
        cancelled = site.train()
        assert site.ann.post(f"/jobs/{cancelled}/cancel").status_code == 202
        site.train()
        with site.database.unit_of_work() as session:
            leases.fail(session, site.claim(), "diverged", "user", "the loss is not finite")
        lost = site.train()
        with site.database.unit_of_work() as session:
            gone = {"lease_until": now() - 1, "lost_without_progress": 2}
            claim = leases.claim(session, "w", "slot", 60)
            assert claim is not None
            session.execute(update(Job).where(Job.id == lost).values(**gone))
        with site.database.unit_of_work() as session:
            leases.reap(session)
        until(lambda: len(mine.requests) == 3)
        until(lambda: len(failures.requests) == 2)
        bodies = [json.loads(body) for _, body in mine.requests]
        assert {(body["type"], (body["data"]["error"] or {}).get("code")) for body in bodies} == {
            ("job.cancelled", None), ("job.failed", "diverged"), ("job.failed", "worker_lost"),
        }  # fmt: skip
        assert len({body["id"] for body in bodies}) == 3
        assert bobs.requests == []


def test_what_is_rolled_back_is_not_told(site: Site) -> None:
    with receiving(status(200)) as receiver:
        hook(site, receiver.port)
        job_id = site.train()
        with site.database.reading() as undone:
            jobs.cancel(undone, site.ids["ann"], job_id)
            assert undone.scalar(select(WebhookDelivery.id)) is not None
        with site.database.reading() as session:
            assert session.scalar(select(WebhookDelivery.id)) is None


def cancel_one(site: Site) -> None:
    assert site.ann.post(f"/jobs/{site.train()}/cancel").status_code == 202


def test_a_receiver_that_fails_is_asked_again_under_the_same_id(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "RETRIES", (0.05, 0.05, 0.05))
    with receiving(status(500), status(302, "Location: http://127.0.0.1/"), status(204)) as receiver:
        made = hook(site, receiver.port)
        cancel_one(site)
        (row,) = until(lambda: [row for row in sent_to(site, made["id"]) if row["state"] == "delivered"])
        assert (row["attempts"], row["last_status"]) == (3, 204)
        assert {receiver.headers(index)["webhook-id"] for index in range(3)} == {row["id"]}


def test_dead_letters_wait_to_be_sent_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "RETRIES", (0.01,))
    with receiving(status(503), status(503), status(200)) as receiver:
        made = hook(site, receiver.port)
        cancel_one(site)
        (dead,) = until(lambda: sent_to(site, made["id"], "?state=dead"))
        assert (dead["attempts"], dead["last_error"], dead["next_attempt_at"]) == (2, "answered with 503", None)
        path = f"/webhooks/{made['id']}/deliveries/{dead['id']}"
        assert site.ann.get(path).json() == dead
        assert site.ann.post(f"{path}/resend").json()["state"] == "pending"
        until(lambda: site.ann.get(path).json()["state"] == "delivered")
        assert [json.loads(body)["id"] for _, body in receiver.requests] == [dead["id"]] * 3
        assert site.bob.get(path).status_code == site.bob.post(f"{path}/resend").status_code == 404


def test_the_schedule_is_that_of_the_specification_with_some_spread(site: Site) -> None:
    with receiving(status(500)) as receiver:
        made = hook(site, receiver.port)
        cancel_one(site)
        (row,) = until(lambda: [row for row in sent_to(site, made["id"]) if row["last_status"] == 500])
        assert row["state"] == "pending"
        assert 3 < row["next_attempt_at"] - time.time() < 6.1
    assert 60 * 3600 < sum(webhooks.RETRIES) < 4 * 86_400


def test_410_disables_the_webhook(site: Site) -> None:
    with receiving(status(410)) as receiver:
        made = hook(site, receiver.port)
        cancel_one(site)
        (dead,) = until(lambda: sent_to(site, made["id"], "?state=dead"))
        assert site.ann.get(f"/webhooks/{made['id']}").json()["enabled"] is False
        cancel_one(site)
        assert [row["id"] for row in sent_to(site, made["id"])] == [dead["id"]]
        assert site.ann.post(f"/webhooks/{made['id']}/deliveries/{dead['id']}/resend").status_code == 409


def test_a_message_that_a_courier_died_with_is_sent_by_another(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "_CLAIM_SECONDS", 0.2)
    with receiving(status(200)) as receiver, monkeypatch.context() as dying:
        made = hook(site, receiver.port)
        dying.setattr(Courier, "_deliver", lambda self, due: self._busy.discard(due.owner_id))
        cancel_one(site)
        until(lambda: sent_to(site, made["id"])[0]["attempts"])
        dying.undo()
        (row,) = until(lambda: [row for row in sent_to(site, made["id"]) if row["state"] == "delivered"])
        assert row["attempts"] > 1


def test_a_receiver_that_does_not_answer_holds_up_nobody_else(site: Site) -> None:
    with receiving(lambda _: time.sleep(6)) as deaf, receiving(status(200)) as good:
        hook(site, deaf.port, user="bob")
        hook(site, good.port)
        for _ in range(3):
            site.client("bob").post(f"/jobs/{site.train('bob')}/cancel")
        cancel_one(site)
        began = time.monotonic()
        until(lambda: good.requests)
        assert time.monotonic() - began < 3
        assert deaf.connections == 1


def test_made_listed_changed_deleted(site: Site) -> None:
    first, second = hook(site, 9999, name="first"), hook(site, 9999, name="second")
    assert [row["name"] for row in site.ann.get("/webhooks").json()["data"]] == ["second", "first"]
    page = site.ann.get("/webhooks?limit=1").json()
    assert (page["has_more"], page["last_id"]) == (True, second["id"])
    assert site.ann.get(f"/webhooks?after={second['id']}").json()["data"][0]["id"] == first["id"]
    path = f"/webhooks/{first['id']}"
    changed = {"enabled": False, "url": "http://127.0.0.1:9998/x", "event_types": ["job.failed"], "name": "other"}
    assert (
        site.ann.patch(path, json=changed).json()
        == {name: value for name, value in first.items() if name != "secret"} | changed
    )
    assert site.ann.patch(path, json={}).json()["name"] == "other"
    for other in (site.bob.get(path), site.bob.patch(path, json={"name": "x"}), site.bob.delete(path)):
        assert other.status_code == 404
    assert site.ann.delete(path).json() == {"id": first["id"], "object": "webhook", "deleted": True}
    assert site.ann.get(path).status_code == site.ann.get(f"{path}/deliveries").status_code == 404


def test_deleting_takes_the_deliveries_along_and_old_ones_go(site: Site) -> None:
    with receiving(status(200)) as receiver:
        made = hook(site, receiver.port)
        cancel_one(site)
        cancel_one(site)
        until(lambda: [row["state"] for row in sent_to(site, made["id"])] == ["delivered"] * 2)
    with site.database.unit_of_work() as session:
        oldest = min(row["id"] for row in sent_to(site, made["id"]))
        aged = update(WebhookDelivery).where(WebhookDelivery.id == oldest)
        session.execute(aged.values(created_at=now() - webhooks.KEPT_SECONDS - 1))
        webhooks.forget_old(session)
    assert len(sent_to(site, made["id"])) == 1
    site.ann.delete(f"/webhooks/{made['id']}")
    with site.database.reading() as session:
        assert session.scalar(select(WebhookDelivery.id)) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"url": "http://169.254.169.254/latest"}, "url"), ({"url": "https://[::1]/"}, "url"),
        ({"url": "https://2130706433/"}, "url"), ({"url": "https://0x7f.1/"}, "url"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "url"), ({"url": "https://[64:ff9b::a00:1]/"}, "url"),
        ({"url": "https://user@127.0.0.1/"}, "url"), ({"url": "http://127.0.0.1:22/"}, "url"), ({}, "url"),
        ({"url": "http://127.0.0.1:9999/", "event_types": []}, "event_types"),
        ({"url": "http://127.0.0.1:9999/", "event_types": ["job.exploded"]}, "event_types"),
        ({"url": "http://127.0.0.1:9999/", "name": "a\r\nb"}, "name"),
        ({"url": "http://127.0.0.1:9999/", "secret": "whsec_mine"}, "secret"),
    ],
)  # fmt: skip
def test_s10_what_is_refused_at_create_and_at_change(sqlite_url: str, tmp_path: Path, fields: Any, param: str) -> None:
    allowed = {"webhooks": True, "webhooks_over_http": True, "webhook_networks": "127.0.0.0/8"}
    with open_site(Settings(data_dir=tmp_path / "data", database_url=sqlite_url, **allowed)) as site:
        answer = site.ann.post("/webhooks", json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
        if fields:
            made = hook(site, 9999)
            assert site.ann.patch(f"/webhooks/{made['id']}", json=fields).status_code == 422


def test_no_more_than_ten(sqlite_url: str, tmp_path: Path) -> None:
    allowed = {"webhooks": True, "webhooks_over_http": True, "webhook_networks": "127.0.0.0/8"}
    with open_site(Settings(data_dir=tmp_path / "data", database_url=sqlite_url, **allowed)) as site:
        for _ in range(webhooks.MAX_WEBHOOKS):
            hook(site, 9999)
        answer = site.ann.post("/webhooks", json={"url": "http://127.0.0.1:9999/"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_many_webhooks")


def test_off_unless_the_operator_allows(sqlite_site: Site) -> None:
    with receiving(status(200)) as receiver:
        answer = sqlite_site.ann.post("/webhooks", json={"url": f"https://127.0.0.1:{receiver.port}/"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "webhooks_off")
        with sqlite_site.database.unit_of_work() as session:
            left = {"name": "x", "url": f"http://127.0.0.1:{receiver.port}/", "event_types": ["job.cancelled"]}
            session.add(Webhook(id="webhook-0", owner_id=sqlite_site.ids["ann"], secret="whsec_AAAA", **left))
        cancel_one(sqlite_site)
        time.sleep(0.3)
        assert receiver.connections == 0


def test_no_log_line_holds_the_url_or_the_secret(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), receiving(status(500)) as receiver:
        made = hook(site, receiver.port, url=f"http://127.0.0.1:{receiver.port}/?token=canary-in-a-url")
        cancel_one(site)
        until(lambda: [row for row in sent_to(site, made["id"]) if row["last_status"] == 500])
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("service")]
    assert any(made["id"] in line for line in ours)
    assert not any("canary-in-a-url" in line or made["secret"] in line for line in ours)


def test_what_waits_when_a_webhook_is_disabled_is_not_sent_later(site: Site) -> None:
    with receiving(status(500), status(200)) as receiver:
        made = hook(site, receiver.port)
        path = f"/webhooks/{made['id']}"
        cancel_one(site)
        until(lambda: [row for row in sent_to(site, made["id"]) if row["last_status"] == 500])
        assert site.ann.patch(path, json={"enabled": False}).status_code == 200
        (dead,) = sent_to(site, made["id"])
        assert (dead["state"], dead["last_error"]) == ("dead", "the webhook was disabled")
        assert site.ann.patch(path, json={"enabled": True}).status_code == 200
        assert site.ann.post(f"{path}/deliveries/{dead['id']}/resend").status_code == 200
        until(lambda: [row for row in sent_to(site, made["id"]) if row["state"] == "delivered"])


def test_410_of_a_url_that_was_changed_since_disables_nothing(site: Site) -> None:
    made = hook(site, 9999)
    path = f"/webhooks/{made['id']}"
    due = webhooks.Due("message-0", site.ids["ann"], made["id"], "http://127.0.0.1:9998/older", "", "{}", 1)
    gone = Outcome(status=410, error="answered with 410")
    with site.database.unit_of_work() as session:
        webhooks.settle(session, due, gone)
    assert site.ann.get(path).json()["enabled"] is True
    with site.database.unit_of_work() as session:
        webhooks.settle(session, replace(due, url=made["url"]), gone)
    assert site.ann.get(path).json()["enabled"] is False


def test_a_webhook_that_is_deleted_while_a_job_ends_fails_neither(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        data_dir=tmp_path / "data", database_url=postgres_url,
        webhooks=True, webhooks_over_http=True, webhook_networks="127.0.0.0/8",
    )  # fmt: skip
    monkeypatch.setattr(Courier, "start", lambda _: None)
    with open_site(settings) as site, ThreadPoolExecutor(1) as pool:
        # The job's end comes first: the deletion waits for its commit, and takes the message along.
        made, job_id = hook(site, 9999), site.train()
        with site.database.unit_of_work() as session:
            jobs.cancel(session, site.ids["ann"], job_id)
            deletion = pool.submit(site.ann.delete, f"/webhooks/{made['id']}")
            assert wait([deletion], timeout=0.5).not_done
        assert deletion.result(timeout=10).status_code == 200
        # The deletion comes first: the job's end waits, and there is nobody to tell.
        made, job_id = hook(site, 9999), site.train()
        with site.database.unit_of_work() as session:
            webhooks.delete(session, site.ids["ann"], made["id"])
            session.flush()
            ends = pool.submit(site.ann.post, f"/jobs/{job_id}/cancel")
            assert wait([ends], timeout=0.5).not_done
        assert ends.result(timeout=10).status_code == 202
        with site.database.reading() as session:
            assert session.scalars(select(WebhookDelivery.id)).all() == []
