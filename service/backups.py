"""Backups: a snapshot of the database and every object it refers to, and the way back into an empty place.

The tables are written as JSON lines, read in one transaction, and come back through the migrations: so a backup of
SQLite can become PostgreSQL, and one of an older version is brought up to date. Objects never change once they are
written, so that they are copied after the snapshot; each is compared with its SHA-256 on both ways. What was deleted
meanwhile is remembered as deleted. A backup's manifest is written last: without one there is no backup.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Connection, Engine, MetaData, Table, func, insert, inspect, select, text
from sqlalchemy.orm import Session

from service import datasets, leases
from service.db import Database, now
from service.errors import Conflict, Invalid
from service.models import ACTIVE, Adapter, Artifact, Dataset, Job
from service.storage import ObjectDamaged, ObjectMissing, Storage, fetch, file_sha256

MANIFEST = "MANIFEST.json"
_FORMAT = 1
_REVISION = "alembic_version"
_BATCH = 500
_PLACES = ("datasets", "adapters", "artifacts", "jobs")


@dataclass
class Backup:
    """What a manifest says. `objects` and `tables` map a name to its SHA-256 (and, of tables, the number of rows)."""

    version: str
    revision: str
    created_at: float
    format: int = _FORMAT
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, str] = field(default_factory=dict)
    deleted: list[list[str]] = field(default_factory=list)  # table and id of what went while the objects were copied


@dataclass(frozen=True)
class _Wanted:
    """An object that a row refers to, by table and id; without a SHA-256 it may be gone without harm."""

    key: str
    sha256: str | None
    table: str
    row_id: str


def write(database: Database, storage: Storage, destination: Storage, scratch: Path) -> Backup:
    """Make a backup in `destination`, which has to be empty, while the service goes on.

    Raises:
        ObjectMissing, ObjectDamaged: an object is not what its row says; the backup has no manifest then.
        Conflict: there is something at the destination.
    """
    if _anything_in(destination) or next(destination.keys("database"), None):
        raise Conflict("there is something at the destination already; every backup has a place of its own")
    with _snapshot(database) as connection:
        backup, wanted = _dump(connection, scratch)
    for name in backup.tables:
        path = scratch / f"{name}.jsonl.gz"
        destination.put_file(f"database/{path.name}", path, backup.tables[name]["sha256"])
    for item in wanted:
        _copy_wanted(database, storage, destination, item, backup, scratch / "object")
    manifest = scratch / MANIFEST
    manifest.write_text(json.dumps(vars(backup), indent=1), encoding="utf-8")
    destination.put_file(MANIFEST, manifest, file_sha256(manifest))
    return backup


def read_manifest(source: Storage) -> Backup:
    """Raises Invalid: there is no whole backup, or one of a newer format."""
    try:
        backup = Backup(**json.loads(b"".join(source.read(MANIFEST))))
    except ObjectMissing:
        raise Invalid(f"there is no {MANIFEST}: this is no backup, or one that was not finished") from None
    except (ValueError, TypeError):
        raise Invalid(f"{MANIFEST} cannot be read") from None
    if backup.format != _FORMAT:
        raise Invalid(f"the backup has format {backup.format}; this version reads {_FORMAT}")
    return backup


def refuse_occupied(database: Database, storage: Storage) -> None:
    """Raises Conflict: a backup only comes back into an empty database and an empty store."""
    if inspect(database.engine).get_table_names():
        raise Conflict("the database has tables already; restore into an empty one")
    if _anything_in(storage):
        raise Conflict("the object store has objects already; restore into an empty one")


def restore_objects(backup: Backup, source: Storage, storage: Storage, scratch: Path) -> None:
    """Before the rows, so that no row is ever without its object. Raises ObjectMissing, ObjectDamaged."""
    for key, sha256 in backup.objects.items():
        fetch(source, f"objects/{key}", scratch / "object", sha256)
        storage.put_file(key, scratch / "object", sha256)


def restore_rows(backup: Backup, source: Storage, database: Database, scratch: Path) -> None:
    """Fill the tables, which have the backup's revision and are empty, in one transaction.

    Raises:
        ObjectMissing, ObjectDamaged: a table's file is not the one that was written.
    """
    for name, described in backup.tables.items():
        fetch(source, f"database/{name}.jsonl.gz", scratch / f"{name}.jsonl.gz", described["sha256"])
    deleted = {(table, row_id) for table, row_id in backup.deleted}
    with database.engine.execution_options(luthier_writes=True).begin() as connection:
        _no_limits(connection)
        for table in _tables(connection):
            rows = _read_rows(scratch / f"{table.name}.jsonl.gz")
            for batch in _batches(rows, _BATCH):
                for row in batch:
                    if (table.name, row.get("id")) in deleted:
                        row["deleted_at"] = row["purged_at"] = backup.created_at
                connection.execute(insert(table), batch)
            _set_sequence(connection, table)


def requeue(database: Database) -> int:
    """Jobs that ran when the backup was made have no worker any more: they go on from their last checkpoint."""
    with database.unit_of_work() as session:
        running = session.scalars(select(Job).where(Job.state.in_(ACTIVE))).all()
        for job in running:
            leases.release(session, leases.taken(job))
        return len(running)


class _snapshot:  # noqa: N801 - used as a statement
    """A connection whose reads all see one moment."""

    def __init__(self, database: Database) -> None:
        options = {} if database.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        self._engine: Engine = database.engine.execution_options(**options)

    def __enter__(self) -> Connection:
        self._connection = self._engine.connect()
        _no_limits(self._connection)
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _no_limits(connection: Connection) -> None:
    """What a request may not do, a backup must: take its time."""
    if connection.dialect.name == "postgresql":
        for limit in ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout"):
            connection.execute(text(f"SET LOCAL {limit} = 0"))


def _tables(connection: Connection) -> list[Table]:
    """As the database has them, parents before children; not as this version would like them."""
    metadata = MetaData()
    metadata.reflect(connection)
    tables = [table for table in metadata.sorted_tables if table.name != _REVISION]
    for table in tables:
        for column in table.columns:
            if isinstance(column.type, JSON):
                column.type.none_as_null = True  # an absent value stays absent
    return tables


def _dump(connection: Connection, scratch: Path) -> tuple[Backup, list[_Wanted]]:
    revision = connection.execute(text(f"SELECT version_num FROM {_REVISION}")).scalar_one()  # noqa: S608
    created = connection.execute(select(now())).scalar_one()
    backup = Backup(version=version("luthier"), revision=revision, created_at=created)
    for table in _tables(connection):
        path = scratch / f"{table.name}.jsonl.gz"
        rows = 0
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
            for row in connection.execution_options(yield_per=_BATCH).execute(select(table)).mappings():
                file.write(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
                rows += 1
        backup.tables[table.name] = {"rows": rows, "sha256": file_sha256(path)}
    with Session(connection) as session:
        return backup, list(_wanted(session))


def _wanted(session: Session) -> Iterator[_Wanted]:
    for dataset in session.scalars(select(Dataset).where(Dataset.status == "ready", Dataset.deleted_at.is_(None))):
        yield _Wanted(datasets.object_key(dataset.id), dataset.sha256, "datasets", dataset.id)
    results: list[Adapter | Artifact] = [
        *session.scalars(select(Adapter).where(Adapter.deleted_at.is_(None))),
        *session.scalars(select(Artifact).where(Artifact.deleted_at.is_(None))),
    ]
    for result in results:
        for file in result.files:
            yield _Wanted(f"{result.prefix}/{file['name']}", file["sha256"], result.__tablename__, result.id)
    for job_id in session.scalars(select(Job.id).where(Job.purged_at.is_(None))):
        yield _Wanted(f"jobs/{job_id}/", None, "jobs", job_id)  # checkpoints, and files that it was given


def _copy_wanted(
    database: Database, storage: Storage, destination: Storage, item: _Wanted, backup: Backup, path: Path
) -> None:
    if item.sha256 is None:
        for key in storage.keys(item.key.rstrip("/")):
            try:
                _download(storage, key, path)
            except ObjectMissing:
                continue  # a checkpoint that newer ones replaced: an attempt begins with the newest that is whole
            _upload(destination, key, path, file_sha256(path), backup)
        return
    try:
        fetch(storage, item.key, path, item.sha256)
    except (ObjectMissing, ObjectDamaged):
        if not _deleted_by_now(database, item):
            raise
        if [item.table, item.row_id] not in backup.deleted:
            backup.deleted.append([item.table, item.row_id])
        return
    _upload(destination, item.key, path, item.sha256, backup)


def _download(storage: Storage, key: str, path: Path) -> None:
    with path.open("wb") as file:
        for chunk in storage.read(key):
            file.write(chunk)


def _upload(destination: Storage, key: str, path: Path, sha256: str, backup: Backup) -> None:
    destination.put_file(f"objects/{key}", path, sha256)
    backup.objects[key] = sha256


def _deleted_by_now(database: Database, item: _Wanted) -> bool:
    tables: dict[str, type[Dataset | Adapter | Artifact]] = {
        "datasets": Dataset,
        "adapters": Adapter,
        "artifacts": Artifact,
    }
    table = tables[item.table]
    with database.reading() as session:
        alive = select(func.count()).select_from(table).where(table.id == item.row_id, table.deleted_at.is_(None))
        return session.execute(alive).scalar_one() == 0


def _anything_in(storage: Storage) -> bool:
    return any(next(storage.keys(place), None) for place in (*_PLACES, "objects"))


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _set_sequence(connection: Connection, table: Table) -> None:
    """PostgreSQL counts on from what came back; SQLite does so by itself."""
    if connection.dialect.name != "postgresql":
        return
    for column in table.primary_key.columns:
        sequence = connection.execute(
            text("SELECT pg_get_serial_sequence(:table, :column)"), {"table": table.name, "column": column.name}
        ).scalar()
        if sequence:
            last = select(func.coalesce(func.max(column), 0) + 1).scalar_subquery()
            connection.execute(select(func.setval(sequence, last, False)))
