"""Files out of the object store: conditional and partial requests (RFC 9110), and a folder as one streamed tar."""

import hashlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from service.api.errors import answer
from service.errors import NotFound, ServiceError
from service.models import Adapter, Artifact
from service.storage import ObjectDamaged, Storage

_BLOCK = 512
_END_OF_ARCHIVE = bytes(2 * _BLOCK)


@dataclass(frozen=True)
class StoredFile:
    """An object with what a download says about it; `name` is one of ours, never a client's."""

    name: str
    key: str
    size: int
    sha256: str


_MEDIA_TYPES = {
    ".json": "application/json", ".md": "text/markdown; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png",
}  # fmt: skip


class RangeNotSatisfiable(ServiceError):
    status, code, category = 416, "range_not_satisfiable", "user"


def send_named(request: Request, storage: Storage, row: Adapter | Artifact, name: str) -> Response:
    """One of a result's files. Raises NotFound for any other name."""
    for file in _stored(row):
        if file.name == name:
            suffix = name[name.rfind(".") :]
            return send_file(request, storage, file, _MEDIA_TYPES.get(suffix, "application/octet-stream"))
    raise NotFound(f"{row.id} has no file {name[:80]!r}")


def send_all(request: Request, storage: Storage, row: Adapter | Artifact) -> Response:
    """A result's files as one tar."""
    return send_archive(request, storage, row.id, _stored(row), row.digest)


def send_file(request: Request, storage: Storage, file: StoredFile, media_type: str) -> Response:
    """The file, a part of it, or nothing but headers, as the request's conditions have it."""
    etag = f'"{file.sha256}"'
    headers = _headers(file.name.rsplit("/", 1)[-1], etag) | {"Accept-Ranges": "bytes"}
    if _matches(request, etag):
        return Response(status_code=304, headers=headers)
    span = _range(request, etag, file.size)
    if span is not None and not span:
        fault = RangeNotSatisfiable(f"the file has {file.size} bytes; none of them are in the range")
        return answer(fault, **{"Content-Range": f"bytes */{file.size}"})
    if request.method == "HEAD":
        return Response(headers=headers | {"Content-Length": str(file.size)}, media_type=media_type)
    if span is None:
        whole = verified(storage.read(file.key), file)
        return StreamingResponse(whole, 200, headers | {"Content-Length": str(file.size)}, media_type)
    headers |= {
        "Content-Length": str(len(span)),
        "Content-Range": f"bytes {span.start}-{span.stop - 1}/{file.size}",
    }
    return StreamingResponse(storage.read(file.key, span.start, len(span)), 206, headers, media_type)


def send_archive(request: Request, storage: Storage, folder: str, files: Sequence[StoredFile], digest: str) -> Response:
    """All files below `folder` as one tar: the same bytes every time, made while they are sent."""
    etag = f'"tar-{digest}"'
    headers = _headers(f"{folder}.tar", etag) | {"Accept-Ranges": "none"}
    if _matches(request, etag):
        return Response(status_code=304, headers=headers)
    entries = [(_tar_header(f"{folder}/{file.name}", file.size), file) for file in sorted(files, key=lambda f: f.name)]
    length = sum(len(header) + file.size + -file.size % _BLOCK for header, file in entries) + len(_END_OF_ARCHIVE)
    headers["Content-Length"] = str(length)
    if request.method == "HEAD":
        return Response(headers=headers, media_type="application/x-tar")
    return StreamingResponse(_tar(storage, entries), 200, headers, "application/x-tar")


def verified(chunks: Iterator[bytes], file: StoredFile) -> Iterator[bytes]:
    """The same bytes, but the last chunk is held back until all of them have the right SHA-256.

    Raises:
        ObjectDamaged: which cuts the connection, so that the client sees a download that broke off.
    """
    digest, held = hashlib.sha256(), b""
    for chunk in chunks:
        digest.update(chunk)
        if held:
            yield held
        held = chunk
    if digest.hexdigest() != file.sha256:
        raise ObjectDamaged(file.key)
    yield held


def _stored(row: Adapter | Artifact) -> list[StoredFile]:
    return [StoredFile(f["name"], f"{row.prefix}/{f['name']}", f["size"], f["sha256"]) for f in row.files]


def _headers(filename: str, etag: str) -> dict[str, str]:
    return {
        "ETag": etag,
        "Content-Disposition": f'attachment; filename="{filename}"',
        "Cache-Control": "private, no-cache",
    }


def _matches(request: Request, etag: str) -> bool:
    """If-None-Match, compared weakly (RFC 9110, 13.1.2)."""
    tags = request.headers.get("if-none-match", "")
    return tags.strip() == "*" or etag in re.findall(r'"[^"]*"', tags)


def _range(request: Request, etag: str, size: int) -> range | None:
    """The one range asked for; empty when there is nothing in it; None where the whole file is the answer."""
    value = request.headers.get("range")
    if_range = request.headers.get("if-range")
    if value is None or request.method != "GET" or (if_range is not None and if_range.strip() != etag):
        return None
    match = re.fullmatch(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", value)
    if not match or match.group(0).strip().endswith("=-"):
        return None  # another unit, several ranges or no syntax: RFC 9110 lets a server send everything
    first, last = match.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(size, int(last) + 1) if last else size)


def _tar_header(name: str, size: int) -> bytes:
    """USTAR, with a PAX header before it only where a name or a size does not fit."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _tar(storage: Storage, entries: Sequence[tuple[bytes, StoredFile]]) -> Iterator[bytes]:
    for header, file in entries:
        yield header
        yield from verified(storage.read(file.key), file)
        yield bytes(-file.size % _BLOCK)
    yield _END_OF_ARCHIVE
