"""/jobs: submitted once, listed, followed and cancelled."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from service import events, leases
from service.models import Job, new_id
from tests.service import rows
from tests.service.site import Site


def body(site: Site, **fields: Any) -> dict[str, Any]:
    return {"base_model": rows.BASE_MODEL, "dataset": rows.add_dataset(site.database, site.ids["ann"]), **fields}


def test_a_job_is_accepted_with_every_default_filled_in(site: Site) -> None:
    asked = body(site, name="support", lora={"rank": 4, "target_modules": ["q_proj"]}, training={"epochs": 2})
    answer = site.ann.post("/jobs", json=asked)
    assert answer.status_code == 201
    job = answer.json()
    assert (job["object"], job["kind"], job["status"], job["name"]) == ("job", "train", "queued", "support")
    assert (job["base_model"], job["dataset"], job["validation_dataset"]) == (rows.BASE_MODEL, asked["dataset"], None)
    assert (job["spec"]["lora"]["rank"], job["spec"]["lora"]["target_modules"]) == (4, ["q_proj"])
    assert (job["spec"]["training"]["epochs"], job["spec"]["training"]["global_batch"]) == (2, 8)
    assert (job["attempt"], job["step"], job["total_steps"], job["eta_seconds"]) == (0, 0, None, None)
    assert (job["adapter"], job["error"], job["started_at"], job["finished_at"]) == (None, None, None, None)
    assert job["metrics"] is None
    assert site.ann.get(f"/jobs/{job['id']}").json() == job


def test_settings_by_module_come_back_in_their_order(site: Site) -> None:
    """Of several entries the last one counts, so that the database must not sort them."""
    lora = {
        "target_modules": ["value", "layers.[0-7].*.q_proj"],
        "rank_pattern": {"v_proj": 4, "layers.1.*": 2},
        "alpha_pattern": {"v_proj": 8, "*": 4.5},
        "learning_rate_pattern": {"value": 0.001},
        "lora_plus_ratio": 16,
    }
    training = {"quantization": "int8", "optimizer": "adamw_8bit", "eval_every": 5, "early_stopping_patience": 2}
    answer = site.ann.post("/jobs", json=body(site, lora=lora, training=training))
    assert answer.status_code == 201, answer.text
    spec = site.ann.get(f"/jobs/{answer.json()['id']}").json()["spec"]
    assert {name: spec["lora"][name] for name in lora} == lora
    assert list(spec["lora"]["alpha_pattern"]) == ["v_proj", "*"]
    assert {name: spec["training"][name] for name in training} == training


def test_the_same_key_and_body_make_one_job(site: Site) -> None:
    asked, headers = body(site), {"Idempotency-Key": "order 66"}
    first = site.ann.post("/jobs", json=asked, headers=headers)
    again = site.ann.post("/jobs", json=dict(reversed(asked.items())), headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    other = site.ann.post("/jobs", json=asked | {"name": "other"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    assert len(site.ann.get("/jobs").json()["data"]) == 1
    theirs = {"base_model": rows.BASE_MODEL, "dataset": rows.add_dataset(site.database, site.ids["bob"])}
    assert site.bob.post("/jobs", json=theirs, headers=headers).json()["id"] != first.json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there", "ümlaut"])
def test_a_key_that_is_none_is_refused(shared_site: Site, key: str) -> None:
    headers = {b"Idempotency-Key": key.encode()}
    answer = shared_site.ann.post("/jobs", json={"base_model": "x", "dataset": "y"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_commit_that_fails_is_no_201(sqlite_site: Site) -> None:
    asked = body(sqlite_site)

    def fail(session: Session) -> None:
        if any(isinstance(row, Job) for row in session.identity_map.values()):
            raise RuntimeError("no commit")

    event.listen(Session, "before_commit", fail)
    try:
        answer = sqlite_site.ann.post("/jobs", json=asked)
    finally:
        event.remove(Session, "before_commit", fail)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert sqlite_site.ann.get("/jobs").json()["data"] == []


def test_lists_are_paged_and_filtered(site: Site, tmp_path: Path) -> None:
    done = site.train()
    site.succeed(tmp_path)
    cancelled, queued, running = site.train(), site.train(), None
    site.ann.post(f"/jobs/{cancelled}/cancel")
    running = site.claim().job_id
    assert running == queued
    waiting = site.train()
    site.train("bob")
    everything = sorted([done, cancelled, running, waiting], reverse=True)

    def listed(**query: Any) -> list[str]:
        return [job["id"] for job in site.ann.get("/jobs", params=query).json()["data"]]

    assert listed() == everything
    assert listed(limit=2) == everything[:2]
    assert listed(limit=2, after=everything[1]) == everything[2:]
    for status, job_id in [("succeeded", done), ("cancelled", cancelled), ("running", running), ("queued", waiting)]:
        assert listed(status=status) == [job_id]
    assert listed(kind="merge") == []


def test_a_job_tells_its_progress_and_its_result(site: Site, tmp_path: Path) -> None:
    job_id = site.train()
    claim = site.claim()
    with site.database.unit_of_work() as session:
        progress = leases.Progress(phase="training", step=3, total_steps=9, eta_seconds=12.5)
        leases.renew(session, claim, 60, progress)
    job = site.ann.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["phase"], job["attempt"]) == ("running", "training", 1)
    assert (job["step"], job["total_steps"], job["eta_seconds"]) == (3, 9, 12.5)
    assert job["created_at"] <= job["started_at"]
    with site.database.unit_of_work() as session:
        leases.fail(session, claim, "diverged", "user", "the loss is not finite")
    job = site.ann.get(f"/jobs/{job_id}").json()
    assert job["status"] == "failed"
    assert job["error"] == {"code": "diverged", "category": "user", "message": "the loss is not finite"}
    second = site.train()
    adapter_id = site.succeed(tmp_path)
    job = site.ann.get(f"/jobs/{second}").json()
    assert (job["status"], job["adapter"], job["error"]) == ("succeeded", adapter_id, None)
    assert job["metrics"] == {"train_loss": 0.5}
    site.ann.delete(f"/adapters/{adapter_id}")
    job = site.ann.get(f"/jobs/{second}").json()
    assert (job["adapter"], job["metrics"]) == (None, {"train_loss": 0.5})


def test_cancelling(site: Site) -> None:
    queued = site.train()
    answer = site.ann.post(f"/jobs/{queued}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    again = site.ann.post(f"/jobs/{queued}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_ended")
    running = site.train()
    site.claim()
    for _ in range(2):
        answer = site.ann.post(f"/jobs/{running}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (202, "running")


def test_another_owners_job_is_like_none_at_all(site: Site) -> None:
    theirs, nobodys = site.train(), new_id("job")
    for method, path in [
        ("GET", ""),
        ("POST", "/cancel"),
        ("GET", "/events"),
        ("GET", "/metrics"),
        ("GET", "/curves.svg"),
    ]:
        for headers in ({}, {"accept": "text/event-stream"}):
            other = site.bob.request(method, f"/jobs/{theirs}{path}", headers=headers)
            none = site.bob.request(method, f"/jobs/{nobodys}{path}", headers=headers)
            assert other.status_code == none.status_code == 404
            assert other.text.replace(theirs, "") == none.text.replace(nobodys, "")
    assert site.bob.get("/jobs").json()["data"] == []
    assert site.ann.get(f"/jobs/{theirs}").json()["status"] == "queued"


def test_another_owners_dataset_is_like_none_at_all(site: Site) -> None:
    theirs, nobodys = rows.add_dataset(site.database, site.ids["bob"]), new_id("dataset")
    answers = [site.ann.post("/jobs", json=body(site) | {"dataset": each}) for each in (theirs, nobodys)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text.replace(theirs, "") == answers[1].text.replace(nobodys, "")


def test_events_come_in_pages(site: Site) -> None:
    job_id = site.train()
    with site.database.unit_of_work() as session:
        for step in range(1, 6):
            events.append(session, job_id, f"Step {step}", type="metrics", data={"step": step, "loss": 1 / step})
    page = site.ann.get(f"/jobs/{job_id}/events", params={"limit": 4}).json()
    assert [event["seq"] for event in page["data"]] == [1, 2, 3, 4]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, 1, 4)
    assert page["data"][0] | {"created_at": 0} == {
        "seq": 1, "object": "job.event", "job": job_id, "type": "message", "level": "info", "message": "Queued",
        "data": {}, "created_at": 0,
    }  # fmt: skip
    rest = site.ann.get(f"/jobs/{job_id}/events", params={"after": 4}).json()
    assert ([event["seq"] for event in rest["data"]], rest["has_more"]) == ([5, 6], False)


def test_metrics_as_json_and_csv(site: Site) -> None:
    job_id = site.train()
    points = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "validation_loss": 1.25}]
    with site.database.unit_of_work() as session:
        for point in points:
            events.append(session, job_id, "Step", type="metrics", data=point)
    assert site.ann.get(f"/jobs/{job_id}/metrics").json() == {"object": "list", "data": points}
    answer = site.ann.get(f"/jobs/{job_id}/metrics", params={"format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert list(csv.DictReader(io.StringIO(answer.text))) == [
        {"step": "1", "loss": "2.0", "validation_loss": ""},
        {"step": "2", "loss": "1.5", "validation_loss": ""},
        {"step": "2", "loss": "", "validation_loss": "1.25"},
    ]


def test_curves_are_drawn_of_what_was_told_so_far(site: Site) -> None:
    job_id = site.train()
    before = site.ann.get(f"/jobs/{job_id}/curves.svg")
    assert (before.status_code, before.headers["content-type"]) == (200, "image/svg+xml")
    assert "no step has been made" in before.text
    points = [{"step": 0, "epoch": 0.0, "validation_loss": 3.0}]
    points += [{"step": n, "epoch": n / 4, "loss": 3 - n / 10, "learning_rate": 1e-4} for n in range(1, 13)]
    for point in points:
        if point["step"] in (4, 8, 12):
            point["validation_loss"] = 2 + abs(point["step"] - 4) / 10
    with site.database.unit_of_work() as session:
        for point in points:
            events.append(session, job_id, "Step", type="metrics", data=point)
        events.append(session, job_id, "Step", type="metrics", data={"step": 13, "epoch": 3.25, "skipped": True})
    figure = site.ann.get(f"/jobs/{job_id}/curves.svg").text
    for said in ("12 steps", "lowest validation loss 2.000 at step 4 (epoch 1.00)", "1 skipped", "overfitting from"):
        assert said in figure, said


def test_long_jobs_lose_points_but_no_evaluation(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_POINTS", 10)
    job_id = site.train()
    with site.database.unit_of_work() as session:
        for step in range(1, 51):
            point = {"step": step, "loss": 1.0} | ({"validation_loss": 1.0} if step % 10 == 3 else {})
            events.append(session, job_id, "Step", type="metrics", data=point)
    points = site.ann.get(f"/jobs/{job_id}/metrics").json()["data"]
    assert [point["step"] for point in points if "validation_loss" in point] == [3, 13, 23, 33, 43]
    assert len(points) < 20
