"""Checkpoints on their way to the store, while the engine goes on and removes old ones."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import update

from lora_engine import checkpoint
from service import events, leases
from service.db import Database
from service.errors import NoSpace
from service.leases import Claim
from service.models import Job
from service.settings import Settings
from service.storage import LocalStorage
from tests.service import rows
from worker import orders
from worker.supervisor import Supervisor
from worker.workspace import check_room, put_checkpoint

CLAIM = Claim("job-1", "user-1", "train", 1, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "checkpoints", 3, {"x": torch.ones(2)}, {"step": 3})


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "objects")


def test_a_whole_checkpoint_is_stored(folder: Path, store: LocalStorage) -> None:
    prefix, _ = put_checkpoint(store, CLAIM, 3, folder)
    assert {Path(key).name for key in store.keys(prefix)} == {"MANIFEST.json", "state.json", "state.safetensors"}


@pytest.mark.parametrize("gone", ["MANIFEST.json", "state.json", "state.safetensors"])
def test_one_that_is_being_removed_is_not_taken_for_whole(
    folder: Path, store: LocalStorage, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = Path.rglob

    def listed_while_it_goes(path: Path, pattern: str) -> Iterator[Any]:
        (folder / gone).unlink()
        return listing(path, pattern)

    monkeypatch.setattr(Path, "rglob", listed_while_it_goes)
    with pytest.raises(FileNotFoundError):
        put_checkpoint(store, CLAIM, 3, folder)


def test_one_that_was_removed_is_missing(folder: Path, store: LocalStorage) -> None:
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        put_checkpoint(store, CLAIM, 3, folder)


@pytest.fixture
def claim(database: Database) -> Claim:
    rows.add_job(database)
    with database.unit_of_work() as session:
        claim = leases.claim(session, "worker", "cpu:1", 60)
        assert claim is not None
        leases.start(session, claim)
    return claim


def store_checkpoints(database: Database, store: LocalStorage, claim: Claim, folder: Path, *steps: int) -> None:
    for step in steps:
        tensors = {"x": torch.full((8,), float(step))}
        made = checkpoint.save(folder / "made", step, tensors, {"step": step, "fingerprint": "f"})
        with database.unit_of_work() as session:
            leases.add_checkpoint(session, claim, step, *put_checkpoint(store, claim, step, made))


def flip(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "state.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [flip, lambda content: content[:-1], lambda content: bytes(len(content)), lambda _: b"", None],
    ids=["one bit", "short", "zeros", "empty", "missing"],
)
def test_a_torn_or_altered_checkpoint_gives_way_to_the_older_one(
    database: Database,
    store: LocalStorage,
    claim: Claim,
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    """Whatever a power cut or a worn disk leaves of the newest: no byte of it is used, and it is forgotten."""
    store_checkpoints(database, store, claim, tmp_path, 3, 6)
    path = tmp_path / "objects" / "jobs" / claim.job_id / "e1" / "s6" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    resume = orders._fetch_newest_checkpoint(database, store, claim, tmp_path / "work")
    assert resume is not None
    assert checkpoint.load(Path(resume))[1]["step"] == 3
    with database.reading() as session:
        assert [row.step for row in leases.checkpoints(session, claim.job_id)] == [3]
        told = [event.message for event in events.after(session, claim.job_id, 0, 100)]
    assert "The checkpoint at step 6 is missing or damaged; going on from an older one" in told


def test_a_damaged_checkpoint_does_not_push_out_a_sound_one(
    database: Database, store: LocalStorage, claim: Claim, tmp_path: Path
) -> None:
    """Two are kept, and both verify, also when the steps after the older one have been made again."""
    store_checkpoints(database, store, claim, tmp_path, 3, 6)
    (tmp_path / "objects" / "jobs" / claim.job_id / "e1" / "s6" / "state.json").write_bytes(b"")
    orders._fetch_newest_checkpoint(database, store, claim, tmp_path / "work")
    claim = replace(claim, epoch=claim.epoch + 1)
    with database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == claim.job_id).values(epoch=claim.epoch))
    store_checkpoints(database, store, claim, tmp_path, 6)
    with database.unit_of_work() as session:
        assert leases.forget_checkpoints(session, claim, 2) == []
        assert [row.step for row in leases.checkpoints(session, claim.job_id)] == [6, 3]


def test_without_a_sound_checkpoint_the_job_starts_over(
    database: Database, store: LocalStorage, claim: Claim, tmp_path: Path
) -> None:
    store_checkpoints(database, store, claim, tmp_path, 3)
    store.delete_prefix(f"jobs/{claim.job_id}")
    assert orders._fetch_newest_checkpoint(database, store, claim, tmp_path / "work") is None


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(NoSpace, match="MiB free and needs"):
        check_room(tmp_path, 1 << 60)


def test_a_worker_without_room_takes_no_job(sqlite_database: Database, sqlite_url: str, tmp_path: Path) -> None:
    job_id = rows.add_job(sqlite_database)
    store = LocalStorage(tmp_path / "objects")

    def claim(min_free_bytes: int) -> Claim | None:
        settings = Settings(data_dir=tmp_path, database_url=sqlite_url, device="cpu", min_free_bytes=min_free_bytes)
        return Supervisor(settings, sqlite_database, store)._claim()

    assert claim(1 << 60) is None
    assert (claimed := claim(0)) is not None
    assert claimed.job_id == job_id
