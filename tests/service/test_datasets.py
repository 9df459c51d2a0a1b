"""Datasets from the inside: what arrives in any pieces, what crashes leave, and who wins a race."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service import datasets, jobs
from service.db import Database, now
from service.errors import Conflict, Invalid, NotFound, ServiceError, Unavailable
from service.models import Dataset
from service.settings import Settings
from service.storage import LocalStorage
from tests.service import rows

LINE = b'{"prompt": "\xc3\xa9", "completion": "b"}'


@pytest.fixture
def objects(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "data" / "objects")


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_lines_are_the_same_in_pieces_of_any_size(settings: Settings, size: int) -> None:
    content = LINE + b"\n\n\r\n" + LINE + b"\r\n  \n" + LINE
    with datasets.Upload(settings) as upload:
        for start in range(0, len(content), size):
            upload.write(content[start : start + size])
        received = upload.finish()
        assert received.path.read_bytes() == content
    assert (received.rows, received.bytes) == (3, len(content))
    assert received.sha256 == hashlib.sha256(content).hexdigest()
    assert not received.path.exists()


@pytest.mark.parametrize("size", [1, 5, 10_000])
def test_the_faulty_line_is_named_in_pieces_of_any_size(settings: Settings, size: int) -> None:
    content = LINE + b"\n\n" + b'{"prompt": 1, "completion": "x"}' + b"\n" + LINE
    with pytest.raises(Invalid, match="line 3, prompt"), datasets.Upload(settings) as upload:  # noqa: PT012
        for start in range(0, len(content), size):
            upload.write(content[start : start + size])
    assert list(settings.work_dir.iterdir()) == []


@pytest.mark.parametrize("filler", [b"x", b" "])
def test_a_line_is_refused_once_it_is_too_long(settings: Settings, filler: bytes) -> None:
    """Not at its end: a line that never ends would fill the memory."""
    with datasets.Upload(settings) as upload:
        upload.write(filler * (1 << 20))
        with pytest.raises(Invalid, match="longer than"):
            upload.write(filler)


def test_a_row_without_its_object_is_never_ready(
    database: Database, objects: LocalStorage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies while it stores: the row says `validating`, and the sweep removes it after a while."""
    owner_id = rows.add_user(database)

    def die(self: LocalStorage, key: str, path: Path, sha256: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStorage, "put_file", die)
    monkeypatch.setattr(datasets, "_discard", lambda *_: None)  # as little as a killed process does
    with datasets.Upload(settings) as upload:
        upload.write(LINE)
        with pytest.raises(KeyboardInterrupt):
            datasets.add(database, objects, owner_id, "x", upload.finish())
    monkeypatch.undo()
    datasets.sweep_abandoned(database, objects, settings)
    with database.reading() as session:
        assert session.scalar(select(Dataset.status)) == "validating"
    with database.unit_of_work() as session:
        session.execute(update(Dataset).values(created_at=now() - datasets.ABANDONED_SECONDS - 1))
    datasets.sweep_abandoned(database, objects, settings)
    with database.reading() as session:
        assert session.scalar(select(Dataset.id)) is None


def test_an_upload_that_outlived_its_row_keeps_nothing(
    database: Database, objects: LocalStorage, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner_id = rows.add_user(database)
    put = LocalStorage.put_file

    def slow(self: LocalStorage, key: str, path: Path, sha256: str) -> None:
        put(self, key, path, sha256)
        with database.unit_of_work() as session:
            session.execute(update(Dataset).values(created_at=now() - datasets.ABANDONED_SECONDS - 1))
        datasets.sweep_abandoned(database, objects, settings)
        put(self, key, path, sha256)

    monkeypatch.setattr(LocalStorage, "put_file", slow)
    with datasets.Upload(settings) as upload:
        upload.write(LINE)
        with pytest.raises(Unavailable):
            datasets.add(database, objects, owner_id, "x", upload.finish())
    assert list(objects.keys("datasets")) == []
    with database.reading() as session:
        assert session.scalar(select(Dataset.id)) is None


def test_the_sweep_removes_files_of_dead_uploads_only(
    sqlite_database: Database, objects: LocalStorage, settings: Settings
) -> None:
    settings.work_dir.mkdir()
    dead, alive, foreign = (settings.work_dir / name for name in ("upload-1.jsonl", "upload-2.jsonl", "job-1"))
    for path in (dead, alive, foreign):
        path.touch()
    for path in (dead, foreign):
        os.utime(path, (0, time.time() - datasets.ABANDONED_SECONDS - 1))
    datasets.sweep_abandoned(sqlite_database, objects, settings)
    assert sorted(settings.work_dir.iterdir()) == sorted([alive, foreign])


def test_the_sweep_removes_objects_of_deleted_datasets_once(
    database: Database, objects: LocalStorage, settings: Settings
) -> None:
    owner_id = rows.add_user(database)
    kept: list[str] = []
    gone: list[str] = []
    for group in (kept, gone):
        with datasets.Upload(settings) as upload:
            upload.write(LINE)
            group.append(datasets.add(database, objects, owner_id, "x", upload.finish()).id)
    with database.unit_of_work() as session:
        datasets.delete(session, owner_id, gone[0])
    datasets.sweep_abandoned(database, objects, settings)
    assert list(objects.keys("datasets")) == [datasets.object_key(kept[0])]
    with database.reading() as session:
        assert session.get_one(Dataset, gone[0]).purged_at is not None
        assert session.get_one(Dataset, kept[0]).purged_at is None


@pytest.mark.parametrize("first", ["delete", "submit"])
def test_a_deletion_and_a_job_never_both_win(database: Database, first: str) -> None:
    """Whoever comes second waits for the other's commit, and is then refused."""
    owner_id, base_model = rows.add_user(database), rows.add_base_model(database)
    dataset_id = rows.add_dataset(database, owner_id)

    def delete(session: Session) -> None:
        datasets.delete(session, owner_id, dataset_id)

    def submit(session: Session) -> None:
        jobs.submit_training(session, owner_id, jobs.TrainingRequest(base_model=base_model, dataset=dataset_id))

    winner, loser = (delete, submit) if first == "delete" else (submit, delete)
    outcome: list[type[BaseException] | None] = []

    def lose() -> None:
        try:
            with database.unit_of_work() as session:
                loser(session)
            outcome.append(None)
        except ServiceError as error:
            outcome.append(type(error))

    with database.unit_of_work() as session:
        winner(session)
        thread = threading.Thread(target=lose)
        thread.start()
        thread.join(0.3)
        assert outcome == []
    thread.join()
    assert outcome == [NotFound if first == "delete" else Conflict]
