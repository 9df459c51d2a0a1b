"""Hostile JSON, J1 to J20: refused before any of it is used, whatever the route."""

import gzip

import pytest

from tests.service.api.hostile import JSON, check
from tests.service.site import Site

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
    "J5 cut off": (JSON, b'{"base_model": ', 400, "JSON"),
}  # fmt: skip


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
def test_j15_compressed_bodies_are_not_read(shared_site: Site, path: str, encoding: str) -> None:
    headers = {"content-type": JSON, "content-encoding": encoding}
    check(shared_site.ann.post(path, content=gzip.compress(b"x" * 1000), headers=headers), 415, message="compressed")
