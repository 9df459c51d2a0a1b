"""Hostile datasets, D1 to D23: nothing of what is refused is kept, and nothing of what is kept is believed."""

import base64
import csv
import gzip
import hashlib
from dataclasses import replace
from typing import Any

import pytest

from service import events, leases
from tests.service.api.hostile import check, check_error, connect, left_over, read_answer
from tests.service.site import LINE, Site, listening

FORM = "multipart/form-data; boundary=XX"
JSONL = {"content-type": "application/jsonl"}


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
    "D10 bad row 7": (_TEXT, LINE * 6 + b'{"prompt": 1, "completion": ""}\n' + LINE, 422, _ROW, "line 7"),
    "D11 NaN": (_TEXT, b'{"prompt": NaN, "completion": "x"}', 422, _ROW, "NaN"),
    "D11 nested": (_TEXT, b"[" * 100_000, 422, _ROW, "line 1"),
    "D11 duplicate key": (_TEXT, b'{"prompt": "a", "prompt": "b", "completion": "c"}', 422, _ROW, "twice"),
    "D11 surrogate": (_TEXT, b'{"prompt": "\\ud800", "completion": "c"}', 422, _ROW, "surrogate"),
    "D11 NUL": (_TEXT, b'{"prompt": "\\u0000", "completion": "c"}', 422, _ROW, "NUL"),
    "D18 unknown role": (_TEXT, b'{"messages": [{"role": "root", "content": "x"}]}', 422, _ROW, "role"),
    "D21 all masked": (_TEXT, b'{"messages": [{"role": "user", "content": "x"}]}', 422, _ROW, "nothing"),
    "D20 template": (_TEXT, b'{"messages": [], "chat_template": "{{ x }}"}', 422, _ROW, "chat_template"),
    "D7 an array": ("application/json", b'[{"prompt": "a", "completion": "b"}]', 422, _ROW, "array"),
    "D23 a URL": ("application/json", b'{"url": "http://169.254.169.254/"}', 422, _ROW, "expected the keys"),
    "D7 empty": (_TEXT, b"", 422, _VALUE, "no example"),
    "D7 blank lines": (_TEXT, b" \n\r\n\n" * 100, 422, _VALUE, "no example"),
    "D8 one long line": (_TEXT, b'{"prompt": "' + b"x" * (2 << 20) + b'"}', 422, _ROW, "longer than"),
    "D8 one long blank line": (_TEXT, b" " * (2 << 20), 422, _ROW, "longer than"),
    "D9 too many rows": (_TEXT, LINE * 1001, 413, "too_large", "1000 lines"),
    "D1 too many bytes": (_TEXT, LINE * 80_000, 413, "too_large", "larger than"),
    "D1 a form with too many bytes": (FORM, form((FILE, LINE * 80_000)), 413, "too_large", "larger than"),
    "D11 UTF-16": (_TEXT, LINE.decode().encode("utf-16"), 422, _VALUE, "UTF-8"),
    "D11 UTF-16 without a mark": (_TEXT, LINE.decode().encode("utf-16-le"), 422, _VALUE, "UTF-8"),
    "D11 byte order mark": (_TEXT, b"\xef\xbb\xbf" + LINE, 422, _VALUE, "UTF-8"),
    "D11 Latin-1": (_TEXT, b'{"prompt": "\xe9", "completion": "c"}', 422, _ROW, "UTF-8"),
    "D13 zip": (_BYTES, b"PK\x03\x04" + bytes(100), 415, _MEDIA, "zip"),
    "D12 gzip": (_BYTES, b"\x1f\x8b\x08" + bytes(100), 415, _MEDIA, "gzip"),
    "D13 tar": (_BYTES, b"a.jsonl".ljust(257, b"x") + b"ustar\x0000", 415, _MEDIA, "tar"),
    "D16 ELF": (_BYTES, b"\x7fELF\x02" + bytes(100), 415, _MEDIA, "program"),
    "D16 HTML": (_TEXT, b"  <!DOCTYPE html><script>", 415, _MEDIA, "HTML"),
    "D16 pickle": (_BYTES, b"\x80\x04\x95" + bytes(100), 415, _MEDIA, "pickle"),
    "D14 Parquet": (_BYTES, b"PAR1" + bytes(300), 415, _MEDIA, "Parquet"),
    "D13 zip in a form": (FORM, form((FILE, b"PK\x03\x04xxxx")), 415, _MEDIA, "zip"),
    "D16 wrong type": ("application/x-www-form-urlencoded", LINE, 415, _MEDIA, "application/jsonl"),
    "D16 no type": ("", LINE, 415, _MEDIA, "application/jsonl"),
    "D4 no boundary": ("multipart/form-data", form((FILE, LINE)), 400, _FORM, "boundary"),
    "D4 unclosed": (FORM, form((FILE, LINE), end=b""), 400, _FORM, "ends before"),
    "D4 no multipart": (FORM, LINE, 400, _FORM, "multipart"),
    "D4 two files": (FORM, form((FILE, LINE), (FILE, LINE)), 400, _FORM, "twice"),
    "D4 no file": (FORM, form(('name="name"', b"x")), 422, _VALUE, "file"),
    "D4 1,001 parts": (FORM, form(*[(f'name="f{i}"', b"x") for i in range(1001)]), 422, _VALUE, "unknown field"),
    "D3 a long name": (FORM, form(('name="name"', b"x" * 2000), (FILE, LINE)), 422, _VALUE, "name"),
    "D3 a name that is no UTF-8": (FORM, form(('name="name"', b"\xff"), (FILE, LINE)), 400, _FORM, "name"),
    "D3 a name with markup": (FORM, form(('name="name"', b"<b>"), (FILE, LINE)), 422, _VALUE, "name"),
    "D3 a name with a newline": (FORM, form(('name="name"', b"a\nb"), (FILE, LINE)), 422, _VALUE, "name"),
    "D3 a name of dots": (FORM, form(('name="name"', b".."), (FILE, LINE)), 422, _VALUE, "name"),
    "D8 100 deep and long": (
        _TEXT, b'{"prompt": "' + b"[" * (1 << 19) + b'", "completion": 1}', 422, _ROW, "completion"),
    "D12 gzip bomb": (_BYTES, gzip.compress(bytes(10 << 20)), 415, _MEDIA, "gzip"),
    "D12 zstd": (_BYTES, b"\x28\xb5\x2f\xfd" + bytes(100), 415, _MEDIA, "zstd"),
    "D14 a forged num_values": (
        _BYTES, b"PAR1\x15\x04\x15\xfe\xff\xff\xff\x0f" + bytes(280) + b"PAR1", 415, _MEDIA, "Parquet"),
    "D14 a thrift length of 104 GiB": (_BYTES, b"PAR1" + b"\xff" * 836 + b"PAR1", 415, _MEDIA, "Parquet"),
    "D15 an Arrow file": (
        _BYTES, b"ARROW1\0\0" + b"ARROW:extension:name arrow.py_extension_type", 415, _MEDIA, "Arrow"),
    "D15 an Arrow stream": (_BYTES, b"\xff\xff\xff\xff\x10\0\0\0" + b"arrow.py_extension_type", 422, _ROW, "UTF-8"),
    "D16 a model file": (_BYTES, b"GGUF" + bytes(100), 415, _MEDIA, "model file"),
    "D16 a script": (_TEXT, b"#!/bin/sh\nid\n", 422, _ROW, "line 1"),
    "D18 no role": (_TEXT, b'{"messages": [{"content": "x"}]}', 422, _ROW, "role"),
    "D18 a list as content": (
        _TEXT, b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', 422, _ROW, "content"),
    "D18 100,000 turns": (_TEXT, b'{"messages": [' + b'{"role":"a"},' * 10**5 + b"{}]}", 422, _ROW, "longer than"),
    "D18 10,000 turns": (
        _TEXT, b'{"messages": [' + b'{"role":"user","content":"x"},' * 10**4 + b"{}]}", 422, _ROW, "256"),
    "D18 messages that are none": (_TEXT, b'{"messages": {"role": "user"}}', 422, _ROW, "messages"),
    "D21 all of weight 0": (
        _TEXT, b'{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}', 422, _ROW, "nothing"),
    "D23 a URL as a field": (FORM, form(('name="url"', b"http://169.254.169.254/")), 422, _VALUE, "unknown field"),
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


def test_d1_a_length_over_the_cap_is_refused_before_the_body_is_read(shared_site: Site) -> None:
    def body() -> Any:
        raise AssertionError("was read")
        yield b""

    headers = {"content-type": "application/jsonl", "content-length": str(4 << 20)}
    assert shared_site.ann.post("/datasets", content=body(), headers=headers).status_code == 413


def test_d2_a_body_without_an_end_is_refused_at_the_cap(sqlite_site: Site) -> None:
    """Nothing says how long it will be, and it does not end: the answer comes all the same."""
    parts = sqlite_site.app.state.parts
    small = sqlite_site.settings.model_copy(update={"max_upload_bytes": 1 << 20})
    sqlite_site.app.state.parts = replace(parts, settings=small)
    head = f"POST /datasets HTTP/1.1\r\nHost: x\r\nAuthorization: {sqlite_site.ann.headers['authorization']}\r\n"
    chunk = LINE * 1000
    with listening(sqlite_site.app) as url, connect(url) as connection:
        connection.sendall(head.encode() + b"Content-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range((2 << 20) // len(chunk)):
            connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        status, _, body = read_answer(connection)
    assert status == 413
    check_error(body.decode())
    assert left_over(sqlite_site) == []


@pytest.mark.parametrize(
    ("filename", "name"),
    [("train.jsonl", "train.jsonl"), ("../../etc/passwd", "dataset"), ("C:\\x", "x"), ("x" * 10_000, "dataset"),
     (".", "dataset"), ("a%00b", "dataset"), ("", "dataset")],
)  # fmt: skip
def test_d3_a_filename_is_a_label_at_most(shared_site: Site, filename: str, name: str) -> None:
    head = f'--XX\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
    body = head.encode() + LINE + b"\r\n--XX--\r\n"
    answer = shared_site.ann.post("/datasets", content=body, headers={"content-type": FORM})
    assert (answer.status_code, answer.json()["name"]) == (201, name)


def digest_of(content: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(content).digest()).decode()}:"


@pytest.mark.parametrize("kind", ["application/jsonl", FORM])
def test_d5_a_body_is_checked_against_its_digest(shared_site: Site, kind: str) -> None:
    body = form((FILE, LINE)) if kind == FORM else LINE
    before = left_over(shared_site)
    headers = {"content-type": kind, "content-digest": f"sha-512=:AA==:, {digest_of(body + b'x')}"}
    error = check(shared_site.ann.post("/datasets", content=body, headers=headers), 422, message="SHA-256")
    assert (error["code"], error["param"]) == ("checksum_mismatch", "Content-Digest")
    for value in ("sha-256=:x:", "sha-256=abc", "sha-256="):
        check(shared_site.ann.post("/datasets", content=body, headers=headers | {"content-digest": value}), 400)
    assert left_over(shared_site) == before
    headers["content-digest"] = digest_of(body)
    assert shared_site.ann.post("/datasets", content=body, headers=headers).status_code == 201


def test_d10_a_bad_row_is_told_without_what_is_in_it(shared_site: Site) -> None:
    secret = b"the patient is called Ada" * 100
    rows = [b'{"prompt": "%b", "completion": 1}' % secret, b'{"%b": 1}' % secret, b'{"messages": ["%b"]}' % secret,
            b'{"messages": [{"role": "%b"}]}' % secret, b'{"prompt": "%b' % secret]  # fmt: skip
    for row in rows:
        error = check(shared_site.ann.post("/datasets", content=LINE * 6 + row, headers=JSONL), 422, message="line 7")
        assert len(error["message"]) < 300
        assert error["message"].count("patient") <= 3  # of a key or a role, 80 characters at most


def test_d16_a_download_is_a_file_and_nothing_to_look_at(shared_site: Site) -> None:
    content = b'{"prompt": "<script>alert(1)</script>", "completion": "x"}\n'
    answer = shared_site.ann.get(f"/datasets/{shared_site.upload(shared_site.ann, content)}/content")
    assert answer.content == content
    assert answer.headers["content-disposition"].startswith("attachment; filename=")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_d17_a_table_has_numbers_only(sqlite_site: Site) -> None:
    job_id = sqlite_site.train()
    point = {"step": 1, "loss": 2.5, "tokens_per_second": 10.0}
    claim = sqlite_site.claim()
    with sqlite_site.database.unit_of_work() as session:
        leases.renew(session, claim, 60, leases.Progress(step=1, points=(point,)))
        events.append(session, job_id, "=cmd()")
    names, *cells = csv.reader(sqlite_site.ann.get(f"/jobs/{job_id}/metrics?format=csv").text.splitlines())
    assert all(name.isidentifier() for name in names)
    assert [float(cell) for row in cells for cell in row if cell] == list(point.values())


def test_d22_the_same_bytes_of_two_owners_are_two_objects(sqlite_site: Site) -> None:
    first, second = sqlite_site.upload(sqlite_site.ann), sqlite_site.upload(sqlite_site.bob)
    sqlite_site.ann.delete(f"/datasets/{first}")
    assert sqlite_site.bob.get(f"/datasets/{second}/content").status_code == 200
    assert len(list(sqlite_site.storage.keys("datasets"))) == 2
