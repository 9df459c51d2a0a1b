"""/datasets: what is uploaded is checked, kept, listed, handed back and deleted."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from service.models import Dataset
from service.storage import LocalStorage
from tests.service import rows
from tests.service.site import LINE, Site

FORM = "multipart/form-data; boundary=XX"
CHAT = {"messages": [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "hi"}]}


def left_over(site: Site) -> list[Any]:
    """Rows, objects and temporary files; empty when nothing was kept."""
    with site.database.reading() as session:
        count = session.scalar(select(func.count()).select_from(Dataset))
    return [*range(count or 0), *site.storage.keys("datasets"), *site.settings.work_dir.iterdir()]


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


@pytest.mark.parametrize(
    ("filename", "name"),
    [("train.jsonl", "train.jsonl"), ("../../etc/passwd", "dataset"), ("C:\\x", "x"), ("x" * 10_000, "dataset"),
     (".", "dataset"), ("a%00b", "dataset"), ("", "dataset")],
)  # fmt: skip
def test_a_filename_is_a_label_at_most(shared_site: Site, filename: str, name: str) -> None:
    head = f'--XX\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
    body = head.encode() + LINE + b"\r\n--XX--\r\n"
    answer = shared_site.ann.post("/datasets", content=body, headers={"content-type": FORM})
    assert (answer.status_code, answer.json()["name"]) == (201, name)


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


def test_the_same_bytes_of_two_owners_are_two_objects(sqlite_site: Site) -> None:
    first, second = sqlite_site.upload(sqlite_site.ann), sqlite_site.upload(sqlite_site.bob)
    sqlite_site.ann.delete(f"/datasets/{first}")
    assert sqlite_site.bob.get(f"/datasets/{second}/content").status_code == 200
    assert len(list(sqlite_site.storage.keys("datasets"))) == 2


def form(*parts: tuple[str, bytes], end: bytes = b"--XX--\r\n") -> bytes:
    lines = [
        f"--XX\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + body + b"\r\n" for head, body in parts
    ]
    return b"".join(lines) + end


FILE = 'name="file"; filename="a"'
_ROW, _VALUE, _MEDIA, _FORM = "invalid_dataset", "invalid_value", "unsupported_media_type", "malformed_request"
_TEXT, _BYTES = "text/plain", "application/octet-stream"
# (content type, body, status, code, what the message says)
HOSTILE: dict[str, tuple[str, bytes, int, str, str]] = {
    "bad row 7": (_TEXT, LINE * 6 + b'{"prompt": 1, "completion": ""}\n' + LINE, 422, _ROW, "line 7"),
    "NaN": (_TEXT, b'{"prompt": NaN, "completion": "x"}', 422, _ROW, "NaN"),
    "nested": (_TEXT, b"[" * 100_000, 422, _ROW, "line 1"),
    "duplicate key": (_TEXT, b'{"prompt": "a", "prompt": "b", "completion": "c"}', 422, _ROW, "twice"),
    "surrogate": (_TEXT, b'{"prompt": "\\ud800", "completion": "c"}', 422, _ROW, "surrogate"),
    "NUL": (_TEXT, b'{"prompt": "\\u0000", "completion": "c"}', 422, _ROW, "NUL"),
    "unknown role": (_TEXT, b'{"messages": [{"role": "root", "content": "x"}]}', 422, _ROW, "role"),
    "all masked": (_TEXT, b'{"messages": [{"role": "user", "content": "x"}]}', 422, _ROW, "nothing"),
    "template": (_TEXT, b'{"messages": [], "chat_template": "{{ x }}"}', 422, _ROW, "chat_template"),
    "an array": ("application/json", b'[{"prompt": "a", "completion": "b"}]', 422, _ROW, "array"),
    "a URL": ("application/json", b'{"url": "http://169.254.169.254/"}', 422, _ROW, "expected the keys"),
    "empty": (_TEXT, b"", 422, _VALUE, "no example"),
    "blank lines": (_TEXT, b" \n\r\n\n" * 100, 422, _VALUE, "no example"),
    "one long line": (_TEXT, b'{"prompt": "' + b"x" * (2 << 20) + b'"}', 422, _ROW, "longer than"),
    "one long blank line": (_TEXT, b" " * (2 << 20), 422, _ROW, "longer than"),
    "too many rows": (_TEXT, LINE * 1001, 413, "too_large", "1000 lines"),
    "too many bytes": (_TEXT, LINE * 80_000, 413, "too_large", "larger than"),
    "a form with too many bytes": (FORM, form((FILE, LINE * 80_000)), 413, "too_large", "larger than"),
    "UTF-16": (_TEXT, LINE.decode().encode("utf-16"), 422, _VALUE, "UTF-8"),
    "UTF-16 without a mark": (_TEXT, LINE.decode().encode("utf-16-le"), 422, _VALUE, "UTF-8"),
    "byte order mark": (_TEXT, b"\xef\xbb\xbf" + LINE, 422, _VALUE, "UTF-8"),
    "Latin-1": (_TEXT, b'{"prompt": "\xe9", "completion": "c"}', 422, _ROW, "UTF-8"),
    "zip": (_BYTES, b"PK\x03\x04" + bytes(100), 415, _MEDIA, "zip"),
    "gzip": (_BYTES, b"\x1f\x8b\x08" + bytes(100), 415, _MEDIA, "gzip"),
    "tar": (_BYTES, b"a.jsonl".ljust(257, b"x") + b"ustar\x0000", 415, _MEDIA, "tar"),
    "ELF": (_BYTES, b"\x7fELF\x02" + bytes(100), 415, _MEDIA, "program"),
    "HTML": (_TEXT, b"  <!DOCTYPE html><script>", 415, _MEDIA, "HTML"),
    "pickle": (_BYTES, b"\x80\x04\x95" + bytes(100), 415, _MEDIA, "pickle"),
    "Parquet": (_BYTES, b"PAR1" + bytes(300), 415, _MEDIA, "Parquet"),
    "zip in a form": (FORM, form((FILE, b"PK\x03\x04xxxx")), 415, _MEDIA, "zip"),
    "wrong type": ("application/x-www-form-urlencoded", LINE, 415, _MEDIA, "application/jsonl"),
    "no type": ("", LINE, 415, _MEDIA, "application/jsonl"),
    "no boundary": ("multipart/form-data", form((FILE, LINE)), 400, _FORM, "boundary"),
    "unclosed": (FORM, form((FILE, LINE), end=b""), 400, _FORM, "ends before"),
    "no multipart": (FORM, LINE, 400, _FORM, "multipart"),
    "two files": (FORM, form((FILE, LINE), (FILE, LINE)), 400, _FORM, "twice"),
    "no file": (FORM, form(('name="name"', b"x")), 422, _VALUE, "file"),
    "1,001 parts": (FORM, form(*[(f'name="f{i}"', b"x") for i in range(1001)]), 422, _VALUE, "unknown field"),
    "a long name": (FORM, form(('name="name"', b"x" * 2000), (FILE, LINE)), 422, _VALUE, "name"),
    "a name that is no UTF-8": (FORM, form(('name="name"', b"\xff"), (FILE, LINE)), 400, _FORM, "name"),
    "a name with markup": (FORM, form(('name="name"', b"<b>"), (FILE, LINE)), 422, _VALUE, "name"),
    "a name with a newline": (FORM, form(('name="name"', b"a\nb"), (FILE, LINE)), 422, _VALUE, "name"),
    "a name of dots": (FORM, form(('name="name"', b".."), (FILE, LINE)), 422, _VALUE, "name"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_dataset_is_refused_and_nothing_is_kept(shared_site: Site, case: str) -> None:
    content_type, body, status, code, message = HOSTILE[case]
    before = left_over(shared_site)
    headers = {"content-type": content_type} if content_type else {}
    answer = shared_site.ann.post("/datasets", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "category"}
    assert (error["code"], error["category"]) == (code, "user")
    assert message in error["message"]
    assert len(error["message"]) < 300
    assert left_over(shared_site) == before


def test_a_length_over_the_cap_is_refused_before_the_body_is_read(shared_site: Site) -> None:
    def body() -> Any:
        raise AssertionError("was read")
        yield b""

    headers = {"content-type": "application/jsonl", "content-length": str(4 << 20)}
    assert shared_site.ann.post("/datasets", content=body(), headers=headers).status_code == 413


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
