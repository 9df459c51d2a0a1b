"""A store that speaks as much S3 as the service uses, keeps objects in memory, and fails as the script says."""

import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

Kind = Literal["500", "503", "429", "hang", "reset", "short", "flipped", "dropped", "executed"]


class FakeStore:
    """`fail` scripts the next requests of a method; what is not scripted succeeds."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self._script: dict[str, list[Kind]] = {}
        self._lock = threading.Lock()

    def fail(self, method: str, kind: Kind, times: int = 1) -> None:
        """Of the next requests with this method, so many.

        Kinds: an HTTP status; hang: no answer for a minute; reset: RST in the middle of the body, or instead of an
        answer; short, flipped, dropped: 200 although other bytes, or none, are kept; executed: done, and then reset.
        """
        self._script[method] = [kind] * times

    def heal(self) -> None:
        self._script.clear()

    def next_fault(self, method: str) -> Kind | None:
        with self._lock:
            self.asked[method] += 1
            script = self._script.get(method)
            return script.pop() if script else None


@contextmanager
def listening(store: FakeStore) -> Iterator[str]:
    """The store's URL while it answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: FakeStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        fault = self._fault()
        if fault == "short":
            content = content[:-1]
        if fault == "flipped":
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault in (None, "short", "flipped", "executed"):
            self.store.objects[self._key()] = content
        if fault == "executed":
            self._reset()
        elif fault in (None, "short", "flipped", "dropped"):
            self._answer(200, b"", ETag='"0"')

    def do_GET(self) -> None:
        fault = self._fault()
        if fault not in (None, "reset", "flipped", "short"):
            return
        url = urlsplit(self.path)
        if "list-type" in url.query:
            self._list(parse_qs(url.query)["prefix"][0])
            return
        content = self.store.objects.get(self._key())
        if content is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        first, last = (int(span[1]), min(int(span[2]), len(content) - 1)) if span else (0, len(content) - 1)
        part = content[first : last + 1]
        if fault == "flipped":
            part = bytes([part[0] ^ 1]) + part[1:]
        if fault in ("reset", "short"):
            self._head(206 if span else 200, len(part), first, last, len(content))
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self._reset()
            return
        self._head(206 if span else 200, len(part), first, last, len(content))
        self.wfile.write(part)

    def do_HEAD(self) -> None:
        if self._fault() is not None:
            return
        content = self.store.objects.get(self._key())
        if content is None:
            self._answer(404, b"")
            return
        self._head(200, len(content), 0, 0, len(content))

    def do_DELETE(self) -> None:
        if self._fault() is None:
            self.store.objects.pop(self._key(), None)
            self._answer(204, b"")

    def do_POST(self) -> None:
        """DeleteObjects; an upload in parts would be another one, and is never as small as those of the tests."""
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if self._fault() is None:
            keys = re.findall(r"<Key>(.*?)</Key>", body)
            for key in keys:
                self.store.objects.pop(unescape(key), None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def _fault(self) -> Kind | None:
        """The scripted fault; a status, a hang and a reset of what has no body are carried out here."""
        fault = self.store.next_fault(self.command)
        if fault in ("500", "503", "429"):
            self._answer(int(fault), b"<Error><Code>SlowDown</Code></Error>")
        elif fault == "hang":
            time.sleep(60)
        elif fault == "reset" and self.command != "GET":
            self._reset()
        return fault

    def _list(self, prefix: str) -> None:
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"0"</ETag><Size>{len(content)}</Size></Contents>'
            for key, content in sorted(self.store.objects.items())
            if key.startswith(prefix)
        )
        self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode())

    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/").partition("/")[2]

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, first: int, last: int, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
