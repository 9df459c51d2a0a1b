"""One HTTP/1.1 connection: uvicorn's, parsed by llhttp, with the limits that neither of them has.

A request's head has to arrive whole within `HEAD_SECONDS` and `MAX_HEAD_BYTES`; what is left of a body after its answer
may take as long. Where connections run out, those that ask for nothing make room. What is no HTTP/1.1 (RFC 9112: two
lengths, a length and chunks, a bare line feed …) is answered in the one error shape, and the connection ends.
"""

import asyncio
import functools
import resource
import sys

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.errors import answer
from service.errors import HeadersTooLarge, Malformed, ServiceError, TimedOut
from service.models import new_id

HEAD_SECONDS = 30.0
MAX_HEAD_BYTES = 64 << 10  # what is longer never reaches the application, which is stricter still
LINGER_SECONDS = 2.0  # in which a client that is still sending can read why it should not
_RESERVED_FILES = 256  # descriptors for the database, objects and uploads
_MOST = 10_000


@functools.cache
def capacity() -> int:
    """How many connections this process takes: all that its descriptors allow, after asking for as many as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST + _RESERVED_FILES
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(1, limit - _RESERVED_FILES)


class Connection(HttpToolsProtocol):
    """What `luthier api` gives uvicorn as its protocol."""

    _timer: asyncio.TimerHandle | None = None
    _in_head = True  # of the next request; else in a body
    _head_bytes = 0
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self.loop.time()
        self._expect_more()
        if len(self.connections) > capacity():
            idle = [other for other in self.connections if isinstance(other, Connection) and other.asks_nothing]
            min(idle, key=lambda other: other._since, default=self).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    @property
    def asks_nothing(self) -> bool:
        return self._in_head and (self.cycle is None or self.cycle.response_complete)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._timer is None:
                self._expect_more()
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadersTooLarge(f"the headers are longer than {MAX_HEAD_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._expect_nothing()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        self._expect_nothing()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and not self.transport.is_closing():
            self._expect_more()

    def send_400_response(self, msg: str) -> None:
        fault = sys.exception()
        self._refuse(Malformed(f"this is no HTTP/1.1: {fault or msg}"))

    def _expect_more(self) -> None:
        self._expect_nothing()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._nothing_came)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _nothing_came(self) -> None:
        self._timer = None
        if self._head_bytes:
            self._refuse(TimedOut(f"the request's head did not arrive within {HEAD_SECONDS:.0f} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ServiceError) -> None:
        """Answer and hang up; but for a client that is in the middle of another answer only hang up."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._expect_nothing()
        busy = self.cycle is not None and not self.cycle.response_complete
        if self.pipeline or (busy and self.cycle.response_started):
            self.transport.close()
            return
        if busy:  # its head was sound, its body is not: the application learns that the client is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        response = answer(error, Connection="close", **{"X-Request-ID": new_id("request")})
        head = [b"HTTP/1.1 %d \r\n" % error.status, *(b"%b: %b\r\n" % pair for pair in response.raw_headers), b"\r\n"]
        self.transport.write(b"".join(head) + bytes(response.body))
        # Closed at once, what the client still sends would be answered by a reset, which takes the answer with it.
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
