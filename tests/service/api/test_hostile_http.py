"""Hostile HTTP, H1 to H10: bytes over a socket, to the server as it runs."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from service.api import connection as limits
from service.settings import Settings
from tests.service.api.hostile import check_error, connect, exchange, read_answer
from tests.service.site import Site, listening, open_site


@pytest.fixture(scope="module")
def url(shared_site: Site) -> Iterator[str]:
    with listening(shared_site.app) as url:
        yield url


def head(method: str = "GET", path: str = "/jobs", key: str = "", host: str = "x") -> bytes:
    """A request's head, but for the empty line at its end."""
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{authorization}".encode()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX: "], ids=["H1 silence", "H1 half a head"])
def test_a_head_that_does_not_arrive(url: str, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.2)
    status, _, body = exchange(url, sent)
    assert status == (408 if sent else 0)
    if sent:
        assert check_error(body.decode())["code"] == "request_timeout"


@pytest.mark.parametrize(
    ("rate", "pieces", "why"),
    [(1, [], "no byte"), (1, [b"{"], "no byte"), (10_000, [b" "] * 60, "slower than")],
    ids=["H1 no body", "H1 a byte of a body", "H2 a byte now and then"],
)
def test_a_body_that_hardly_arrives(
    shared_site: Site, url: str, monkeypatch: pytest.MonkeyPatch, rate: int, pieces: list[bytes], why: str
) -> None:
    monkeypatch.setattr("service.api.request.SILENCE_SECONDS", 0.3)
    monkeypatch.setattr("service.api.request.MIN_BYTES_PER_SECOND", rate)
    with connect(url) as connection:
        connection.sendall(head("POST", key=shared_site.keys["ann"]) + b"Content-Length: 1000\r\n\r\n")
        connection.settimeout(0.03)
        for piece in pieces:
            connection.sendall(piece)
            try:
                connection.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                continue
        connection.settimeout(20)
        status, top, body = read_answer(connection)
    assert status == 408
    assert b"connection: close" in top
    check_error(body.decode(), message=why)


def test_h2_a_client_that_goes_on_after_its_refusal_is_cut(
    shared_site: Site, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.3)
    with connect(url) as connection:
        connection.sendall(head("POST", key=shared_site.keys["ann"]) + b"Content-Length: 9999999999\r\n\r\n")
        assert read_answer(connection)[0] == 413
        connection.settimeout(20)
        assert connection.recv(100) == b""


@pytest.mark.parametrize(
    ("size", "end"), [(40_000, b"\r\n\r\n"), (100_000, b"\r\n\r\n"), (100_000, b""), (3_000_000, b"")],
    ids=["H3 40 KB", "H3 100 KB", "H3 a header without an end", "H3 3 MB without an end"],
)  # fmt: skip
def test_headers_that_are_too_long(url: str, size: int, end: bytes) -> None:
    status, _, body = exchange(url, head() + b"X-Padding: " + b"x" * size + end)
    assert status == 431
    assert check_error(body.decode())["code"] == "headers_too_large"


CONTRADICTIONS = {
    "H4 a length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "H4 chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "H4 two lengths": b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "H4 another encoding": b"Transfer-Encoding: nonsense\r\n\r\n{}",
    "H4 chunks that are not the last encoding": b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "H4 a space before the colon": b"Content-Length : 2\r\n\r\n{}",
    "H4 a folded header": b"X: a\r\n Content-Length: 2\r\n\r\n{}",
    "H4 a NUL in a header": b"X: a\0b\r\n\r\n",
    "H4 a chunk that is no number": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "H4 a chunk that is too large": b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    "H5 a negative length": b"Content-Length: -5\r\n\r\n{}",
    "H5 a length with a sign": b"Content-Length: +2\r\n\r\n{}",
    "H5 a length that is no number": b"Content-Length: x\r\n\r\n{}",
    "H5 a length of 30 digits": b"Content-Length: 1" + b"0" * 29 + b"\r\n\r\n{}",
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_is_no_http(shared_site: Site, url: str, case: str) -> None:
    status, top, body = exchange(url, head("POST", key=shared_site.keys["ann"]) + CONTRADICTIONS[case])
    assert status == 400, top + body
    assert b"connection: close" in top
    check_error(body.decode())
    assert shared_site.ann.get("/jobs").json()["data"] == []


def test_h4_nothing_is_smuggled_behind_a_refused_request(shared_site: Site, url: str) -> None:
    smuggled = head("DELETE", "/datasets/x", key=shared_site.keys["ann"]) + b"\r\n"
    both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with connect(url) as connection:
        connection.sendall(head("POST", key=shared_site.keys["ann"]) + both + smuggled)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert received.count(b"HTTP/1.1 ") == 1


def test_h6_idle_connections_make_room(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip("this process may not have 2,000 connections")
    monkeypatch.setattr(limits, "capacity", lambda: 1000)
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 6000), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with httpx.Client(base_url=url) as early:
            assert early.get("/healthz").status_code == 200
            idle = [stack.enter_context(connect(url)) for _ in range(2000)]
            assert exchange(url, head(path="/healthz") + b"\r\n")[0] == 200
            assert httpx.get(f"{url}/healthz").status_code == 200
            assert idle[0].recv(1) == b""  # the one that has asked for nothing for the longest time


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "[::", "", "a b", "x\x7f", "luthier.example@evil"]
)
def test_h7_an_unknown_host(settings: Settings, host: str) -> None:
    strict = settings.model_copy(update={"allowed_hosts": "luthier.example, Other.example"})
    with open_site(strict) as site, listening(site.app) as url:
        assert exchange(url, head(path="/healthz", host=host) + b"\r\n")[0] == 400
        for good in ("luthier.example", "OTHER.example:8443", "127.0.0.1:1", "[::1]"):
            assert exchange(url, head(path="/healthz", host=good) + b"\r\n")[0] == 200


@pytest.mark.parametrize("lines", [b"", b"Host: a\r\nHost: b\r\n"], ids=["H7 none", "H7 two"])
def test_one_host_is_named(url: str, lines: bytes) -> None:
    assert exchange(url, b"GET /healthz HTTP/1.1\r\n" + lines + b"\r\n")[0] == 400


@pytest.mark.parametrize("method", ["TRACE", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_h8_a_method_that_no_route_takes(url: str, method: str) -> None:
    status, top, body = exchange(url, head(method) + b"\r\n")
    assert status == 405
    assert b"allow: " in top
    assert b"authorization" not in body.lower()


@pytest.mark.parametrize("method", ["NONSENSE", "get", "CONNECT", "\x00", "GET\tX"])
def test_h8_what_is_no_method(url: str, method: str) -> None:
    assert exchange(url, head(method) + b"\r\n")[0] in (400, 405)


PATHS = [
    "/%2e%2e/x", "/..;/jobs", "/%252e%252e", "/jobs%5c..", "/jobs/%00", "/datasets/%00/content", "/adapters/a%0ab",
    "/base-models/%00", "/base-models/..%2f..%2fetc", "/nope", "/jobs/", "//jobs", "/jobs/%ff", "/x/%2e%2e%2fy",
    "/adapters/%F3%A0%81%81", "/jobs/" + "x" * 5000, "/datasets/'%20OR%201=1--", "/.git/config", "/docs/../jobs2",
    "/../../etc/passwd", "/adapters/x/files/..%2f..%2f..%2fetc%2fpasswd", "/adapters/x/files/%2fetc%2fpasswd",
    "/artifacts/x/files/..%5c..%5cx", "/static/..%2fapp.py", "*", "http://other/nope", "/%c0%ae%c0%ae/",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_h9_paths_that_lead_nowhere(shared_site: Site, url: str, path: str) -> None:
    status, _, body = exchange(url, head(path=path, key=shared_site.keys["ann"]) + b"\r\n")
    assert status == 404 or (path == "*" and status == 400)
    check_error(body.decode())


def test_h10_another_origin_with_a_cookie_is_nobody(shared_site: Site, url: str) -> None:
    """No cookie is ever read: what a page elsewhere makes a browser send has no key, and it reads no answer."""
    foreign = (
        f"Origin: https://evil.example\r\nCookie: session={shared_site.keys['ann']}\r\nContent-Length: 2\r\n\r\n{{}}"
    )
    status, top, _ = exchange(url, head("POST") + foreign.encode())
    assert status == 401
    assert b"access-control" not in top
    assert b"set-cookie" not in top
