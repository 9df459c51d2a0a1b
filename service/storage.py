"""Objects: a local directory or an S3 bucket behind one small interface.

An object appears whole or not at all, and `put_file` returns only after the bytes are durable and were compared
with their SHA-256. Keys are made by this service from its own ids, never from anything a client sent.
"""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from lora_engine import failpoints
from service.errors import NoSpace, Unavailable

CHUNK = 1 << 20


class ObjectMissing(Exception):
    """No object has this key."""


class ObjectDamaged(Exception):
    """An object's bytes are not the ones that were written."""


class Storage(Protocol):
    """What every store can do. Paths are local files; `start` and `length` count bytes."""

    def put_file(self, key: str, path: Path, sha256: str) -> None: ...

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]: ...

    def keys(self, prefix: str) -> Iterator[str]: ...

    def delete_prefix(self, prefix: str) -> None: ...

    def check(self) -> None: ...


def open_storage(url: str) -> Storage:
    """The store behind `file:///folder` or `s3://bucket/prefix` (credentials from the usual AWS_* variables)."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        return LocalStorage(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return S3Storage(parts.netloc, parts.path.strip("/"))
    raise ValueError(f"LUTHIER_STORAGE_URL: {parts.scheme or 'no scheme'} is not file:// or s3://")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(storage: Storage, key: str, path: Path, sha256: str) -> None:
    """Copy an object to a local file and compare its SHA-256.

    Raises:
        ObjectMissing, ObjectDamaged, Unavailable, OSError: and no file is left.
    """
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            for chunk in storage.read(key):
                failpoints.reach("storage.fetching")
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise ObjectDamaged(key)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def put_folder(storage: Storage, prefix: str, folder: Path, *, last: str | None = None) -> list[dict[str, Any]]:
    """Upload every file below `folder`; `last` names the one that must come after all others (a manifest).

    Returns name, size and SHA-256 of each, sorted by name.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    paths.sort(key=lambda path: path.name == last)
    files = []
    for path in paths:
        name, sha256 = path.relative_to(folder).as_posix(), file_sha256(path)
        storage.put_file(f"{prefix}/{name}", path, sha256)
        failpoints.reach("storage.between_files")
        files.append({"name": name, "size": path.stat().st_size, "sha256": sha256})
    return sorted(files, key=lambda file: str(file["name"]))


def fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Like `mkdir -p`, and durable: a new folder's name lies in its parent, which is fsynced."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


class LocalStorage:
    """Files below one folder; written beside their place, fsynced, then renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        target = self._path(key)
        temporary = target.with_name(f".{uuid.uuid4().hex}.tmp")
        digest = hashlib.sha256()
        with path.open("rb") as source:
            try:
                _make_folder(target.parent)
                with temporary.open("wb") as file:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                if digest.hexdigest() != sha256:
                    raise ObjectDamaged(key)
                failpoints.reach("storage.before_rename")
                temporary.rename(target)
                fsync_folder(target.parent)
            except OSError as error:
                kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else Unavailable
                raise kind(f"could not store an object: {error.strerror}") from error
            finally:
                temporary.unlink(missing_ok=True)

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        try:
            file = self._path(key).open("rb")
        except FileNotFoundError:
            raise ObjectMissing(key) from None
        return _chunks(file, start, length)

    def keys(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix)
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file() and not path.name.endswith(".tmp"):
                yield path.relative_to(self._root).as_posix()

    def delete_prefix(self, prefix: str) -> None:
        path = self._path(prefix)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def check(self) -> None:
        if not os.access(self._root, os.W_OK):
            raise Unavailable("the object directory is not writable")

    def _path(self, key: str) -> Path:
        path = self._root / key  # which is `key` alone when that begins with a slash
        if ".." in path.parts or self._root not in path.parents:
            raise ValueError(f"not an object key: {key!r}")
        return path


def _chunks(file: Any, start: int, length: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = length
        while left is None or left > 0:
            chunk = file.read(CHUNK if left is None else min(CHUNK, left))
            if not chunk:
                return
            left = None if left is None else left - len(chunk)
            yield chunk


class S3Storage:
    """An S3 bucket, or anything that speaks its protocol.

    What fails in passing is tried again, after pauses that grow and are drawn by chance, for `patience` in all; one
    request may take `request_timeout`. All requests are safe to repeat: a key is only ever written with one content.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        request_timeout: timedelta = timedelta(seconds=30),
        patience: timedelta = timedelta(seconds=60),
    ) -> None:
        config: dict[str, Any] = {}
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            config["endpoint"] = endpoint
        secret = os.environ.get("AWS_SECRET_ACCESS_KEY_FILE")
        if secret and (key := Path(secret).read_text(encoding="utf-8").strip()):
            config["secret_access_key"] = key
        allow_http = bool(endpoint and endpoint.startswith("http://"))
        client: Any = {"allow_http": allow_http, "timeout": request_timeout, "connect_timeout": timedelta(seconds=5)}
        backoff: Any = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2}
        retry: Any = {"max_retries": 20, "retry_timeout": patience, "backoff": backoff}
        self._store = S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=retry, **config)

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        with _translated(key):
            obstore.put(self._store, key, path)
            failpoints.reach("storage.after_put")
            head = obstore.head(self._store, key)
            digest = hashlib.sha256()
            for chunk in self.read(key):
                digest.update(chunk)
        if head["size"] != path.stat().st_size or digest.hexdigest() != sha256:
            self.delete_prefix(key)
            raise ObjectDamaged(key)

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with _translated(key):
            size = obstore.head(self._store, key)["size"]
        return self._ranges(key, start, size if length is None else min(size, start + length))

    def _ranges(self, key: str, start: int, end: int) -> Iterator[bytes]:
        while start < end:
            stop = min(end, start + 8 * CHUNK)
            with _translated(key):
                yield bytes(obstore.get_range(self._store, key, start=start, end=stop))
            start = stop

    def keys(self, prefix: str) -> Iterator[str]:
        with _translated(prefix):
            for page in obstore.list(self._store, f"{prefix.rstrip('/')}/"):
                yield from (item["path"] for item in page)

    def delete_prefix(self, prefix: str) -> None:
        with _translated(prefix):
            for key in list(self.keys(prefix)):
                obstore.delete(self._store, key)
            with suppress(FileNotFoundError):
                obstore.delete(self._store, prefix)

    def check(self) -> None:
        with _translated(""):
            next(iter(obstore.list(self._store, "health/")), None)


class _translated:  # noqa: N801 - used as a statement
    """The store's errors as ours: absent, or unavailable for now."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise ObjectMissing(self._key) from error
        if isinstance(error, BaseError):
            raise Unavailable("the object store does not answer") from error
