"""A merge within the request that fails, is cancelled, or dies with its process."""

import errno
from pathlib import Path
from typing import Any

import pytest

from lora_engine.errors import AdapterError
from service import adapters, leases, stacking, sweep
from service import storage as objects
from service.errors import NoSpace, Unavailable
from tests.service.site import Site, merge


@pytest.mark.parametrize("how", ["object store", "local disk"])
def test_a_full_disk_is_a_507_and_nothing_is_left(
    sqlite_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    adapter = sqlite_site.adapter(tmp_path)

    def full(*_: object, **__: object) -> None:
        if how == "object store":
            raise NoSpace("could not store an object: No space left on device")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(*((objects, "put_folder") if how == "object store" else (adapters, "fetch")), full)
        answer = merge(sqlite_site, (adapter, 2), key="k")
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert len(sqlite_site.ann.get("/adapters").json()["data"]) == 1
    assert not any(sqlite_site.settings.work_dir.iterdir())
    (job,) = sqlite_site.ann.get("/jobs?kind=merge").json()["data"]
    assert (job["status"], job["error"]["code"]) == ("failed", "disk_full")
    assert merge(sqlite_site, (adapter, 2), key="k").status_code == 201


def test_what_fails_here_is_left_to_a_worker(
    sqlite_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = sqlite_site.adapter(tmp_path)

    def down(*_: object, **__: object) -> None:
        raise Unavailable("the object store does not answer")

    with monkeypatch.context() as store:
        store.setattr(objects, "put_folder", down)
        answer = merge(sqlite_site, (adapter, 2))
    job = answer.json()
    assert (answer.status_code, job["status"], job["attempt"]) == (202, "queued", 0)
    assert sqlite_site.claim().job_id == job["id"]


def test_a_process_that_dies_in_a_merge_leaves_it_to_a_worker(
    sqlite_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = sqlite_site.adapter(tmp_path)
    object.__setattr__(sqlite_site.settings, "lease_seconds", -1)
    monkeypatch.setattr(stacking, "make", lambda *_: None)  # what it would have done, it never did
    job = merge(sqlite_site, (adapter, 2)).json()
    assert job["status"] == "running"
    with sqlite_site.database.unit_of_work() as session:
        assert leases.reap(session) == [job["id"]]
    assert sqlite_site.claim().job_id == job["id"]


def test_a_cancel_in_the_middle_of_a_request_leaves_nothing(
    sqlite_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = sqlite_site.adapter(tmp_path)
    fetch, told = adapters.fetch, list[str]()

    def cancelled(*arguments: Any) -> None:
        (job,) = sqlite_site.ann.get("/jobs?kind=merge").json()["data"]
        told.append(sqlite_site.ann.post(f"/jobs/{job['id']}/cancel").json()["status"])
        fetch(*arguments)

    monkeypatch.setattr(adapters, "fetch", cancelled)
    answer = merge(sqlite_site, (adapter, 2))
    assert told == ["cancelled"]
    assert (answer.status_code, answer.json()["status"], answer.json()["adapter"]) == (202, "cancelled", None)
    assert len(sqlite_site.ann.get("/adapters").json()["data"]) == 1
    sweep.purge_leftovers(sqlite_site.database, sqlite_site.storage, -1)
    assert not any(answer.json()["id"] in key for key in sqlite_site.storage.keys("adapters"))


def test_a_merge_whose_process_died_is_cancelled_at_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = site.adapter(tmp_path)
    monkeypatch.setattr(stacking, "make", lambda *_: None)  # what it would have done, it never did
    job = merge(site, (adapter, 2)).json()
    told = site.ann.post(f"/jobs/{job['id']}/cancel").json()
    assert (job["status"], told["status"]) == ("running", "cancelled")
    again = merge(site, (adapter, 2)).json()
    assert (again["object"], again["id"] != job["id"]) == ("job", True)


@pytest.mark.parametrize("error", [AdapterError("values that are not finite"), NoSpace("full"), Unavailable("away")])
def test_a_merge_that_is_cancelled_and_then_fails_is_cancelled(
    sqlite_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    adapter = sqlite_site.adapter(tmp_path)

    def cancelled(*_: Any) -> None:
        (job,) = sqlite_site.ann.get("/jobs?kind=merge").json()["data"]
        sqlite_site.ann.post(f"/jobs/{job['id']}/cancel")
        raise error

    monkeypatch.setattr(adapters, "fetch", cancelled)
    assert merge(sqlite_site, (adapter, 2)).status_code in (202, 422, 507)
    (job,) = sqlite_site.ann.get("/jobs?kind=merge").json()["data"]
    assert (job["status"], job["error"]) == ("cancelled", None)
