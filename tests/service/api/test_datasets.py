"""/datasets: what is uploaded is checked, kept, listed, handed back and deleted."""

import hashlib
import json
from pathlib import Path

import pytest

from service.storage import LocalStorage
from tests.service import rows
from tests.service.api.hostile import left_over
from tests.service.site import LINE, Site

FORM = "multipart/form-data; boundary=XX"
CHAT = {"messages": [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "hi"}]}


def test_a_form_becomes_a_dataset(site: Site) -> None:
    content = json.dumps(CHAT).encode() + b"\r\n\n" + LINE + b'{"instruction": "i", "output": "o"}'
    answer = site.ann.post("/datasets", files={"file": ("x.jsonl", content)}, data={"name": "my examples"})
    assert answer.status_code == 201
    dataset = answer.json()
    assert dataset["object"] == "dataset"
    assert (dataset["name"], dataset["status"], dataset["rows"]) == ("my examples", "ready", 3)
    assert (dataset["bytes"], dataset["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert site.ann.get(f"/datasets/{dataset['id']}").json() == dataset
    assert site.ann.get(f"/datasets/{dataset['id']}/content").content == content
    assert list(site.settings.work_dir.iterdir()) == []


def test_a_raw_body_becomes_a_dataset(sqlite_site: Site) -> None:
    headers = {"content-type": "application/jsonl"}
    answer = sqlite_site.ann.post("/datasets?name=raw", content=LINE, headers=headers)
    assert (answer.status_code, answer.json()["name"], answer.json()["rows"]) == (201, "raw", 1)


def test_lists_page_newest_first_and_show_the_owners_only(site: Site) -> None:
    made = [site.upload(site.ann) for _ in range(5)]
    site.upload(site.bob)
    made.sort(reverse=True)
    seen: list[str] = []
    after: dict[str, str] = {}
    for _ in range(3):
        page = site.ann.get("/datasets", params={"limit": "2"} | after).json()
        seen += [item["id"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        assert page["has_more"] == (len(seen) < 5)
        after = {"after": page["last_id"]}
    assert seen == made
    empty = site.ann.get("/datasets", params=after).json()
    assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_another_owners_dataset_is_like_none_at_all(site: Site) -> None:
    theirs, nobodys = site.upload(site.ann), "dataset-" + "0" * 32
    for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/content"), ("HEAD", "/content")]:
        other = site.bob.request(method, f"/datasets/{theirs}{path}")
        none = site.bob.request(method, f"/datasets/{nobodys}{path}")
        assert other.status_code == none.status_code == 404
        assert other.text.replace(theirs, "") == none.text.replace(nobodys, "")
    assert site.ann.get(f"/datasets/{theirs}").status_code == 200


def test_a_deleted_dataset_is_gone(site: Site) -> None:
    dataset_id = site.upload(site.ann)
    answer = site.ann.delete(f"/datasets/{dataset_id}")
    assert answer.json() == {"id": dataset_id, "object": "dataset", "deleted": True}
    assert site.ann.get(f"/datasets/{dataset_id}").status_code == 404
    assert site.ann.get(f"/datasets/{dataset_id}/content").status_code == 404
    assert site.ann.delete(f"/datasets/{dataset_id}").status_code == 404
    assert site.ann.get("/datasets").json()["data"] == []


def test_a_dataset_in_use_stays_until_the_job_has_ended(site: Site) -> None:
    trained, validated = site.upload(site.ann), site.upload(site.ann)
    body = {"base_model": rows.BASE_MODEL, "dataset": trained, "validation_dataset": validated}
    job_id = site.ann.post("/jobs", json=body).json()["id"]
    for dataset_id in (trained, validated):
        answer = site.ann.delete(f"/datasets/{dataset_id}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "in_use")
        assert job_id in answer.json()["error"]["message"]
    site.ann.post(f"/jobs/{job_id}/cancel")
    for dataset_id in (trained, validated):
        assert site.ann.delete(f"/datasets/{dataset_id}").status_code == 200


def test_what_is_still_being_stored_is_neither_read_nor_deleted(sqlite_site: Site) -> None:
    dataset_id = rows.add_dataset(sqlite_site.database, sqlite_site.ids["ann"], status="validating")
    assert sqlite_site.ann.get(f"/datasets/{dataset_id}").json()["status"] == "validating"
    assert sqlite_site.ann.get(f"/datasets/{dataset_id}/content").status_code == 409
    assert sqlite_site.ann.delete(f"/datasets/{dataset_id}").status_code == 409


def test_a_store_that_fails_keeps_nothing(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LocalStorage, key: str, path: Path, sha256: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalStorage, "put_file", full)
    answer = sqlite_site.ann.post("/datasets", content=LINE, headers={"content-type": "application/jsonl"})
    assert (answer.status_code, answer.json()["error"]["category"]) == (507, "capacity")
    assert left_over(sqlite_site) == []


def test_a_full_disk_is_told_as_such(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("service.datasets.Upload.write", full)
    answer = sqlite_site.ann.post("/datasets", content=LINE, headers={"content-type": "application/jsonl"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    assert left_over(sqlite_site) == []
