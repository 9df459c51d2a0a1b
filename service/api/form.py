"""multipart/form-data (RFC 7578) in constant memory: the file's bytes go where they belong as they arrive."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.datasets import Upload
from service.errors import Invalid, Malformed

_MAX_FIELD_BYTES = 1024
_MAX_HEADER_BYTES = 16 << 10  # a filename of 10 KB is odd, but no reason to lose the file


class Form:
    """One form with a `file` and perhaps a `name`. Feed it with `write`, then call `finish`."""

    def __init__(self, content_type: str, upload: Upload) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if not boundary or len(boundary) > 200:
            raise Malformed("the multipart body's Content-Type names no boundary")
        self._upload = upload
        self._header, self._value, self._disposition = b"", b"", b""
        self._field: str | None = None
        self._seen: list[str] = []
        self._ended = False
        self._name = bytearray()
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

    @property
    def name(self) -> str | None:
        """The field `name`, or None. Raises Malformed when it is not UTF-8."""
        if "name" not in self._seen:
            return None
        try:
            return self._name.decode()
        except UnicodeDecodeError:
            raise Malformed("name: is not UTF-8", param="name") from None

    def write(self, chunk: bytes) -> None:
        """Raises Malformed for what is no multipart body, and whatever the upload raises."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise Malformed(f"the multipart body cannot be read: {error}") from None

    def finish(self) -> None:
        """Raises Malformed when the body broke off, Invalid when it has no file."""
        if not self._ended:
            raise Malformed("the multipart body ends before its last boundary")
        if "file" not in self._seen:
            raise Invalid("file: is missing; send the JSONL file as the form's field `file`", param="file")

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
        if field not in ("file", "name"):
            raise Invalid(f"{field[:40]!r}: unknown field; known are file, name", param=field[:40] or None)
        if field in self._seen:
            raise Malformed(f"{field}: is there twice", param=field)
        self._seen.append(field)
        self._field = field
        if field == "file":
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            self._upload.write(data[start:end])
        elif len(self._name) + end - start > _MAX_FIELD_BYTES:
            raise Invalid(f"{self._field}: is longer than {_MAX_FIELD_BYTES} bytes", param=self._field)
        else:
            self._name += data[start:end]

    def _on_end(self) -> None:
        self._ended = True
