"""Datasets: uploaded JSONL files, checked line by line while they arrive, and never changed afterwards.

An upload passes three places. The bytes go into a file of `work_dir`, and any fault ends it there. A row of status
`validating` says that an object is about to be; it becomes `ready` once the object is durable. What a crash leaves
of either is removed by `sweep_abandoned`.
"""

import hashlib
import logging
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy import delete as delete_rows
from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from lora_engine import examples, failpoints
from lora_engine.errors import DataError
from service import quotas
from service.db import Database, newest, now
from service.errors import Conflict, Invalid, NotFound, TooLarge, Unavailable, UnsupportedMedia
from service.models import TERMINAL, Dataset, Job, new_id
from service.settings import Settings
from service.storage import Storage

ABANDONED_SECONDS = 3600.0  # an upload in flight writes far more often than this
NAME = re.compile(r"(?=.*[^ .])[A-Za-z0-9 ._-]{1,100}")
_UPLOAD = "upload-"
# What a file begins with when it is no text at all; a broken line further down is told by its number instead.
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "a zip archive", b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd", b"BZh": "compressed with bzip2", b"\xfd7zXZ": "compressed with xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"\x7fELF": "a program", b"MZ": "a program", b"%PDF": "a PDF",
    b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle", b"\x80\x05": "a pickle", b"<": "HTML or XML", b"GGUF": "a model file",
}  # fmt: skip
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Received:
    """A whole upload in which every line is an example."""

    path: Path
    bytes: int
    sha256: str
    rows: int


class Upload:
    """A file of `work_dir` that takes an upload's bytes and checks them as they come. Gone after the `with` block."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes, self._max_lines = settings.max_upload_bytes, settings.max_dataset_rows
        self._path = settings.work_dir / f"{_UPLOAD}{new_id('file')}.jsonl"
        self._bytes = self._rows = self._lines = 0
        self._digest = hashlib.sha256()
        self._tail = bytearray()

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # writes what is buffered, for which there may be no room
        finally:
            self._path.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes, in pieces of any size.

        Raises:
            UnsupportedMedia: the first bytes are those of another format.
            TooLarge: more bytes, or more lines, than the settings allow.
            Invalid: a line is no example; the message names the line and the remedy.
        """
        failpoints.reach("upload.receiving")
        if not self._bytes:
            _check_signature(chunk)
        self._bytes += len(chunk)
        if self._bytes > self._max_bytes:
            raise TooLarge(f"the file is larger than {self._max_bytes} bytes")
        self._digest.update(chunk)
        self._file.write(chunk)
        first, *rest = chunk.split(b"\n")
        self._tail += first
        for piece in rest:
            self._check_line(bytes(self._tail))
            self._tail = bytearray(piece)
        if len(self._tail) > examples.MAX_LINE_BYTES:
            self._check_line(bytes(self._tail))

    def finish(self) -> Received:
        """Raises Invalid when there was no example at all."""
        if self._tail:
            self._check_line(bytes(self._tail))
        if not self._rows:
            raise Invalid("the file holds no example: write one JSON object per line", param="file")
        self._file.close()
        return Received(self._path, self._bytes, self._digest.hexdigest(), self._rows)

    def _check_line(self, line: bytes) -> None:
        self._lines += 1
        if self._lines > self._max_lines:
            raise TooLarge(f"the file has more than {self._max_lines} lines")
        if not line.strip() and len(line) <= examples.MAX_LINE_BYTES:
            return
        try:
            examples.parse_line(line, self._lines)
        except DataError as error:
            raise Invalid(error.message, param="file", code=error.code) from None
        self._rows += 1


def _check_signature(head: bytes) -> None:
    what = next((what for signature, what in _SIGNATURES.items() if head.lstrip().startswith(signature)), None)
    if head[257:262] == b"ustar":
        what = "a tar archive"
    if what is not None:
        raise UnsupportedMedia(f"the file is {what}; upload plain JSONL, one JSON object per line", param="file")
    if head.startswith(_BYTE_ORDER_MARKS) or b"\x00" in head[:4]:
        raise Invalid("line 1: UTF-16, or text with a byte order mark; save the file as plain UTF-8", param="file")


def check_name(name: str) -> str:
    """Raises Invalid unless `name` is one that can be shown and written anywhere."""
    if not NAME.fullmatch(name):
        raise Invalid("name: 1 to 100 letters, digits, spaces, dots, dashes or underscores", param="name")
    return name


def object_key(dataset_id: str) -> str:
    return f"{_prefix(dataset_id)}/data.jsonl"


def _prefix(dataset_id: str) -> str:
    """Everything of a dataset, also what a killed process left half written."""
    return f"datasets/{dataset_id}"


def add(database: Database, storage: Storage, owner_id: str, name: str, received: Received) -> Dataset:
    """Make a dataset of a received file.

    Raises:
        Unavailable, NoSpace: the store or the database failed; nothing is kept.
    """
    dataset = Dataset(
        id=new_id("dataset"), owner_id=owner_id, name=name, status="validating",
        bytes=received.bytes, sha256=received.sha256, rows=received.rows,
    )  # fmt: skip
    with database.unit_of_work() as session:
        quotas.admit_bytes(session, owner_id, received.bytes)
        session.add(dataset)
    try:
        failpoints.reach("dataset.before_object")
        storage.put_file(object_key(dataset.id), received.path, received.sha256)
        failpoints.reach("dataset.after_object")
        with database.unit_of_work() as session:
            ready = update(Dataset).where(Dataset.id == dataset.id)
            if not session.execute(ready.values(status="ready").returning(Dataset.id)).first():
                raise Unavailable("storing the file took too long; upload it again")
            return session.get_one(Dataset, dataset.id, populate_existing=True)
    except BaseException:
        # What cannot be removed now, for the same reason, is removed by the sweep.
        with suppress(Exception):
            _discard(database, storage, dataset.id)
        raise


def get(session: Session, owner_id: str, dataset_id: str, *, keep: bool = False) -> Dataset:
    """One dataset; with `keep` nobody deletes it before this transaction ends.

    Raises:
        NotFound: also for another owner's and for a deleted one.
    """
    rows = select(Dataset).where(Dataset.id == dataset_id, Dataset.owner_id == owner_id, Dataset.deleted_at.is_(None))
    dataset = session.scalar(rows.with_for_update(read=True) if keep else rows)
    if dataset is None:
        raise NotFound(f"there is no dataset {dataset_id[:80]!r}")
    return dataset


def ready(session: Session, owner_id: str, dataset_id: str, param: str = "dataset") -> Dataset:
    """The one that a request names in the field `param`; nobody deletes it before this transaction ends.

    Raises:
        NotFound, Conflict: no such dataset of this owner, or one that is still being validated.
    """
    try:
        dataset = get(session, owner_id, dataset_id, keep=True)
    except NotFound as error:
        raise NotFound(f"{param}: {error.message}", param=param) from None
    if dataset.status != "ready":
        raise Conflict(f"{param}: is still being validated; wait until its status is ready", param=param)
    return dataset


def page(session: Session, owner_id: str, after: str | None, limit: int) -> tuple[list[Dataset], bool]:
    """The owner's datasets, newest first, below the id `after`; and whether there are more."""
    rows = select(Dataset).where(Dataset.owner_id == owner_id, Dataset.deleted_at.is_(None))
    return newest(session, rows, Dataset.id, after, limit)


def delete(session: Session, owner_id: str, dataset_id: str) -> None:
    """From the commit on it is gone; the sweep removes its object.

    Raises:
        NotFound: no such dataset of this owner.
        Conflict: it is being stored, or a job that has not ended uses it.
    """
    rows = select(Dataset).where(Dataset.id == dataset_id, Dataset.owner_id == owner_id, Dataset.deleted_at.is_(None))
    dataset = session.scalar(rows.with_for_update())
    if dataset is None:
        raise NotFound(f"there is no dataset {dataset_id[:80]!r}")
    if dataset.status != "ready":
        raise Conflict("the dataset is still being stored; try again in a moment")
    uses = or_(Job.dataset_id == dataset_id, Job.validation_dataset_id == dataset_id)
    job_id = session.scalar(select(Job.id).where(uses, Job.state.not_in(TERMINAL)).limit(1))
    if job_id is not None:
        raise Conflict(f"{job_id} uses the dataset; wait until it has ended, or cancel it", code="in_use")
    session.execute(update(Dataset).where(Dataset.id == dataset_id).values(deleted_at=now()))


def sweep_abandoned(database: Database, storage: Storage, settings: Settings) -> None:
    """Remove files of uploads that ended with their process, rows that never became ready, and deleted objects."""
    for path in settings.work_dir.glob(f"{_UPLOAD}*"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if path.stat().st_mtime < time.time() - ABANDONED_SECONDS:
                path.unlink()
                log.warning("removed the abandoned upload %s", path.name)
    with database.reading() as session:
        stale = (Dataset.status == "validating") & (Dataset.created_at < now() - ABANDONED_SECONDS)
        abandoned = session.scalars(select(Dataset.id).where(stale).limit(20)).all()
        unpurged = Dataset.deleted_at.is_not(None) & Dataset.purged_at.is_(None)
        deleted = session.scalars(select(Dataset.id).where(unpurged).limit(20)).all()
    for dataset_id in abandoned:
        _discard(database, storage, dataset_id)
        log.warning("removed %s, which was never stored", dataset_id)
    for dataset_id in deleted:
        storage.delete_prefix(_prefix(dataset_id))
        with database.unit_of_work() as session:
            session.execute(update(Dataset).where(Dataset.id == dataset_id).values(purged_at=now()))


def _discard(database: Database, storage: Storage, dataset_id: str) -> None:
    """The row goes first: who still stores the object then finds no row to make ready, and removes it."""
    with database.unit_of_work() as session:
        gone = delete_rows(Dataset).where(Dataset.id == dataset_id, Dataset.status == "validating")
        removed = session.execute(gone.returning(Dataset.id)).first()
        kept = session.get(Dataset, dataset_id) is not None
    if removed or not kept:
        storage.delete_prefix(_prefix(dataset_id))
