"""multipart/form-data (RFC 7578) in constant memory: the files' bytes go where they belong as they arrive."""

from collections.abc import Callable, Collection, Mapping

import anyio
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.api.request import chunks
from service.errors import Invalid, Malformed, ServiceError

MAX_OWN_BYTES = 64 << 10  # what the form's own lines may add to its files
_MAX_FIELD_BYTES = 1024
_MAX_HEADER_BYTES = 16 << 10  # a filename of 10 KB is odd, but no reason to lose the file


class Form:
    """One form with texts, and files that go to `files` by their field. Feed it with `write`, then call `finish`."""

    def __init__(self, content_type: str, texts: Collection[str], files: Mapping[str, Callable[[bytes], None]]) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if not boundary or len(boundary) > 200:
            raise Malformed("the multipart body's Content-Type names no boundary")
        self._texts: dict[str, bytearray] = {}
        self._known, self._files = [*files, *texts], files
        self._header, self._value, self._disposition = b"", b"", b""
        self._field = ""
        self._ended = False
        self.seen: list[str] = []
        self.filename = ""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
            max_header_size=_MAX_HEADER_BYTES,
        )

    def text(self, field: str) -> str | None:
        """A field's value, or None. Raises Malformed when it is not UTF-8."""
        if field not in self.seen:
            return None
        try:
            return self._texts[field].decode()
        except UnicodeDecodeError:
            raise Malformed(f"{field}: is not UTF-8", param=field) from None

    def write(self, chunk: bytes) -> None:
        """Raises Malformed for what is no multipart body, and whatever the files' takers raise."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise Malformed(f"the multipart body cannot be read: {error}") from None

    def finish(self) -> None:
        """Raises Malformed when the body broke off."""
        if not self._ended:
            raise Malformed("the multipart body ends before its last boundary")

    def _on_part_begin(self) -> None:
        self._header = self._value = self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if field not in self._known:
            known = ", ".join(self._known)
            raise Invalid(f"{field[:40]!r}: unknown field; known are {known}", param=field[:40] or None)
        if field in self.seen:
            raise Malformed(f"{field}: is there twice", param=field)
        self.seen.append(field)
        self._field = field
        if field in self._files:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        else:
            self._texts[field] = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        field = self._field
        if field in self._files:
            self._files[field](data[start:end])
        elif len(self._texts[field]) + end - start > _MAX_FIELD_BYTES:
            raise Invalid(f"{field}: is longer than {_MAX_FIELD_BYTES} bytes", param=field)
        else:
            self._texts[field] += data[start:end]

    def _on_end(self) -> None:
        self._ended = True


async def receive(request: Request, take: Callable[[bytes], None], limit: int) -> None:
    """Give the whole body to `take`, a piece at a time and in a thread.

    Raises:
        ServiceError: what `take` raised first, after the rest of the body: to a client that is still sending, an early
            answer looks like a broken connection.
    """
    fault: ServiceError | None = None
    async for chunk in chunks(request, limit):
        if fault is None:
            try:
                await anyio.to_thread.run_sync(take, chunk)
            except ServiceError as error:
                fault = error
    if fault is not None:
        raise fault
