"""The drill of docs/operations.md: a backup made while the service works comes back on an empty host, and goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, text

from service import backups, leases
from service.app import create_app
from service.db import Database
from service.errors import Conflict, Invalid
from service.models import Job
from service.settings import Settings
from service.storage import fetch, open_storage, put_folder
from service.sweep import purge_deleted
from tests.conftest import postgres_database
from tests.service import rows
from tests.service.adapter_files import make_adapter
from tests.service.site import LINE, Site

STILL = (
    "users",
    "base_models",
    "datasets",
    "checkpoints",
    "adapters",
    "adapter_parents",
    "idempotency_keys",
    "audit_log",
)
MOVING = ("jobs", "job_events", "outbox")


def luthier(settings: Settings, *command: str) -> subprocess.CompletedProcess[str]:
    """The console as an operator uses it, on the database and the store of `settings`."""
    environment = os.environ | {
        "LUTHIER_DATA_DIR": str(settings.data_dir),
        "LUTHIER_DATABASE_URL": settings.database_url,
    }
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *command], env=environment, capture_output=True, text=True, timeout=120
    )


def all_rows(url: str, table: str) -> list[tuple[object, ...]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(text(f"SELECT * FROM {table} ORDER BY 1, 2"))]  # noqa: S608
    engine.dispose()
    return found


@pytest.fixture
def empty(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[Settings]:
    """A host with nothing on it but a database server, of the same kind."""
    folder = tmp_path / "new host"
    if database_url.startswith("sqlite"):
        folder.mkdir()
        yield Settings(data_dir=folder)
        return
    with postgres_database(request.getfixturevalue("postgres_server"), "template0") as url:
        yield Settings(data_dir=folder, database_url=url)


def submit(client: TestClient, dataset: str) -> str:
    answer = client.post("/jobs", json={"base_model": rows.BASE_MODEL, "dataset": dataset})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def work(site: Site, folder: Path) -> tuple[str, str, str]:
    """A dataset, an adapter, and a job that runs and has a checkpoint; their ids."""
    dataset = site.upload(site.ann)
    submit(site.ann, dataset)
    adapter = site.succeed(folder, make_adapter())
    submit(site.ann, dataset)
    claim = site.claim()
    state = folder / "state"
    state.mkdir()
    (state / "MANIFEST.json").write_text('{"files": {}}')
    prefix = f"jobs/{claim.job_id}/e{claim.epoch}/s2"
    (manifest,) = put_folder(site.storage, prefix, state)
    with site.database.unit_of_work() as session:
        leases.add_checkpoint(session, claim, 2, prefix, manifest["sha256"])
    return dataset, adapter, claim.job_id


def test_the_drill(site: Site, empty: Settings, tmp_path: Path) -> None:
    dataset, adapter, job_id = work(site, tmp_path)
    archive = site.ann.get(f"/adapters/{adapter}/archive").content
    place = str(tmp_path / "backup")
    done = luthier(site.settings, "backup", place)
    assert done.returncode == 0, done.stderr
    before = {table: all_rows(site.settings.database_url, table) for table in (*STILL, *MOVING)}

    done = luthier(empty, "restore", place)
    assert done.returncode == 0, done.stderr
    assert "1 jobs that ran go on" in done.stdout
    for table in STILL:
        assert all_rows(empty.database_url, table) == before[table], table
    for table in MOVING:  # the job that ran was queued again, and says so
        assert len(all_rows(empty.database_url, table)) >= len(before[table]) > 0, table

    app = create_app(empty)
    with TestClient(app, headers={"Authorization": f"Bearer {site.keys['ann']}"}) as ann:
        assert ann.get(f"/datasets/{dataset}/content").content == LINE * 3
        assert ann.get(f"/adapters/{adapter}/archive").content == archive
        assert ann.get(f"/adapters/{adapter}", headers=site.bob.headers).status_code == 404
        database, storage = app.state.parts.database.of_everybody(), app.state.parts.storage
        with database.reading() as session:
            job = session.get_one(Job, job_id)
            assert (job.state, job.lost_without_progress, job.lease_until) == ("queued", 0, None)
            (checkpoint,) = leases.checkpoints(session, job_id)
        fetch(storage, f"{checkpoint.prefix}/MANIFEST.json", tmp_path / "compared", checkpoint.manifest_sha256)
        newer = submit(ann, dataset)
        with database.unit_of_work() as session:
            claim = leases.claim(session, "worker", "slot", 60)
        assert claim is not None
        assert claim.job_id == job_id
        assert claim.epoch > job.epoch
        assert newer != job_id


def test_only_an_empty_host_is_restored(sqlite_site: Site, tmp_path: Path) -> None:
    site = sqlite_site
    work(site, tmp_path)
    place = str(tmp_path / "backup")
    assert luthier(site.settings, "backup", place).returncode == 0
    for command, said in (("restore", "the database has tables"), ("backup", "something at the destination")):
        done = luthier(site.settings, command, place)
        assert done.returncode == 1
        assert said in done.stderr
    nothing = Settings(data_dir=tmp_path / "other", storage_url=f"file://{site.settings.data_dir / 'objects'}")
    with pytest.raises(Conflict, match="object store has objects"):
        backups.refuse_occupied(Database(f"sqlite:///{tmp_path / 'new.db'}"), open_storage(nothing.storage_url))


@pytest.mark.parametrize("file", ["database/jobs.jsonl.gz", "objects"])
def test_a_flipped_bit_of_a_backup_is_noticed(sqlite_site: Site, tmp_path: Path, file: str) -> None:
    work(sqlite_site, tmp_path)
    place = tmp_path / "backup"
    assert luthier(sqlite_site.settings, "backup", str(place)).returncode == 0
    path = place / file
    path = next(item for item in sorted(path.rglob("*")) if item.is_file()) if path.is_dir() else path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = luthier(Settings(data_dir=tmp_path / "new host"), "restore", str(place))
    assert done.returncode == 1
    assert done.stderr.startswith("not done: damaged: ")


def test_a_backup_without_its_manifest_is_none(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="was not finished"):
        backups.read_manifest(open_storage(f"file://{tmp_path}"))


def test_a_missing_object_leaves_no_backup(sqlite_site: Site, tmp_path: Path) -> None:
    dataset, _, _ = work(sqlite_site, tmp_path)
    sqlite_site.storage.delete_prefix(f"datasets/{dataset}")
    done = luthier(sqlite_site.settings, "backup", str(tmp_path / "backup"))
    assert done.returncode == 1
    assert "missing: " in done.stderr
    assert dataset in done.stderr
    assert not (tmp_path / "backup" / backups.MANIFEST).exists()


def test_what_is_deleted_meanwhile_comes_back_as_deleted(sqlite_site: Site, tmp_path: Path) -> None:
    site = sqlite_site
    _, adapter, _ = work(site, tmp_path)
    (tmp_path / "scratch").mkdir()
    place = open_storage(f"file://{tmp_path / 'backup'}")

    class Deleting:
        """The store as it is, in which the owner deletes the adapter once the first object was read."""

        def __getattr__(self, name: str) -> Any:
            return getattr(site.storage, name)

        def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
            if site.ann.get(f"/adapters/{adapter}").status_code == 200:
                assert site.ann.delete(f"/adapters/{adapter}").is_success
                purge_deleted(site.database, site.storage)
            return site.storage.read(key, start, length)

    made = backups.write(site.database, Deleting(), place, tmp_path / "scratch")
    assert made.deleted == [["adapters", adapter]]
    assert [key for key in made.objects if key.startswith("adapters/")] == []
    empty = Settings(data_dir=tmp_path / "new host")
    done = luthier(empty, "restore", str(tmp_path / "backup"))
    assert done.returncode == 0, done.stderr
    (gone,) = all_rows(empty.database_url, "adapters")
    assert made.created_at in gone
