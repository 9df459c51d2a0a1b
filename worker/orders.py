"""What the host is told to do: a job's row as an order, and its files in the workspace."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from service import adapter_uploads, adapters, datasets, leases
from service import storage as objects
from service.db import Database
from service.leases import Claim
from service.models import Adapter, BaseModel, Dataset, Job
from service.storage import ObjectDamaged, ObjectMissing, Storage
from worker import workspace

log = logging.getLogger(__name__)


def prepare(database: Database, storage: Storage, claim: Claim, folder: Path) -> tuple[str, dict[str, Any]]:
    """(verb, order) for the host. No transaction is open while files are fetched.

    Raises:
        ObjectMissing, ObjectDamaged, ServiceError: a file could not be had, or does not fit on the disk.
        Fenced: the job is no longer this attempt's.
    """
    return claim.kind, _ORDERS[claim.kind](database, storage, claim, folder)


def _training(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    with database.reading() as session:
        job = session.get_one(Job, claim.job_id)
        base = session.get_one(BaseModel, job.base_model_id)
        dataset = session.get_one(Dataset, job.dataset_id)
        held_out = _validation_dataset(session, job)
    spec = {
        "base_model": base.folder,
        "base_model_name": base.source,
        "dataset": _fetch_dataset(storage, dataset, folder),
        "validation_dataset": held_out and _fetch_dataset(storage, held_out, folder),
        "output": str(folder / "output"),
        **job.spec,
    }
    return {"spec": spec, "base": _pinned(base), "resume": _fetch_newest_checkpoint(database, storage, claim, folder)}


def _merge(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    job, _ = _job(database, claim)
    weighted = _fetch_sources(database, storage, claim, folder)
    return {"spec": job.spec | {"adapters": weighted, "output": str(folder / "result")}}


def _export(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    job, base = _job(database, claim)
    spec = {
        "base_model": base.folder,
        "base_model_name": base.source,
        "adapters": _fetch_sources(database, storage, claim, folder),
        "output": str(folder / "result"),
        "export": job.spec["export"],
        "merge": job.spec["merge"],
        "base_digest": base.digest,  # the host verifies it before
    }
    return {"spec": spec, "base": _pinned(base)}


def _search(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    job, base = _job(database, claim)
    with database.reading() as session:
        dataset = session.get_one(Dataset, job.dataset_id)
    spec = {
        "base_model": base.folder,
        "dataset": _fetch_dataset(storage, dataset, folder),
        "adapters": [source["path"] for source in _fetch_sources(database, storage, claim, folder)],
        "output": str(folder / "result"),
        "search": job.spec["search"],
    }
    return {"spec": spec, "base": _pinned(base)}


def _analyze(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    job, base = _job(database, claim)
    with database.reading() as session:
        named = {row.id: f"{row.name} ({row.id})" for row in session.scalars(_rows(job))}
    spec = {
        "base_model": base.folder,
        "adapters": _fetch_sources(database, storage, claim, folder),
        "names": [named[source["adapter"]] for source in job.spec["adapters"]],
        "output": str(folder / "result"),
        "analyze": job.spec["analyze"],
    }
    return {"spec": spec, "base": _pinned(base)}


def _ingest(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    job, base = _job(database, claim)
    for file in job.spec["files"]:
        key = adapter_uploads.source_key(claim.job_id, file["name"])
        objects.fetch(storage, key, folder / "source" / file["name"], file["sha256"])
    initial = folder / "source" / adapter_uploads.INITIAL
    spec = {
        "folder": str(folder / "source"),
        "initial": str(initial) if initial.exists() else None,
        "output": str(folder / "result"),
        "base_model": base.folder,
        "base_model_name": base.source,
        "base_digest": base.digest,
        "ingest": job.spec["ingest"],
    }
    return {"spec": spec, "base": _pinned(base)}


def _extract(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:  # noqa: ARG001
    job, base = _job(database, claim)
    with database.reading() as session:
        tuned = session.get_one(BaseModel, job.spec["tuned_model"])
    folders = {"base_model": base.folder, "tuned_model": tuned.folder, "output": str(folder / "result")}
    return {
        "spec": job.spec | folders | {"base_model_name": base.source},
        "base": _pinned(base),
        "tuned": _pinned(tuned),
    }


def _verify(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    job, _ = _job(database, claim)
    paths = [source["path"] for source in _fetch_sources(database, storage, claim, folder)]
    with database.reading() as session:
        made = session.get_one(Adapter, job.spec["adapter"])
    adapters.fetch(storage, made, folder / made.id)
    return {"adapter": str(folder / made.id), "sources": paths, "output": str(folder / "result")}


def _job(database: Database, claim: Claim) -> tuple[Job, BaseModel]:
    with database.reading() as session:
        job = session.get_one(Job, claim.job_id)
        return job, session.get_one(BaseModel, job.base_model_id)


def _pinned(base: BaseModel) -> dict[str, Any]:
    return {"id": base.id, "folder": base.folder, "digest": base.digest}


def _fetch_sources(database: Database, storage: Storage, claim: Claim, folder: Path) -> list[dict[str, Any]]:
    """The adapters of the job's spec as the engine's specs have them: paths and weights."""
    with database.reading() as session:
        job = session.get_one(Job, claim.job_id)
        found = session.scalars(_rows(job)).all()
    # The result may be as large as they are together.
    workspace.check_room(folder, 2 * sum(int(file["size"]) for adapter in found for file in adapter.files))
    for adapter in found:
        adapters.fetch(storage, adapter, folder / adapter.id)
    return [
        {
            "path": str(folder / source["adapter"]),
            "weight": source.get("weight", 1.0),
            "weights": source.get("weights", {}),
        }
        for source in job.spec["adapters"]
    ]


def _rows(job: Job) -> Select[Adapter]:
    return select(Adapter).where(Adapter.id.in_({source["adapter"] for source in job.spec["adapters"]}))


def _validation_dataset(session: Session, job: Job) -> Dataset | None:
    return session.get_one(Dataset, job.validation_dataset_id) if job.validation_dataset_id else None


def _fetch_dataset(storage: Storage, dataset: Dataset, folder: Path) -> str:
    path = folder / f"{dataset.id}.jsonl"
    workspace.check_room(folder, dataset.bytes)
    objects.fetch(storage, datasets.object_key(dataset.id), path, dataset.sha256)
    return str(path)


def _fetch_newest_checkpoint(database: Database, storage: Storage, claim: Claim, folder: Path) -> str | None:
    """The newest checkpoint whose bytes verify; None to start over."""
    with database.reading() as session:
        checkpoints = leases.checkpoints(session, claim.job_id)
    path = folder / "resume"
    for checkpoint in checkpoints:
        try:
            workspace.fetch_checkpoint(storage, checkpoint, path)
        except (ObjectMissing, ObjectDamaged) as error:
            log.warning("%s: checkpoint %d is unusable: %r", claim.job_id, checkpoint.step, error)
            with database.unit_of_work() as session:
                leases.reject_checkpoint(session, claim, checkpoint)
            continue
        return str(path)
    return None


_ORDERS: dict[str, Callable[[Database, Storage, Claim, Path], dict[str, Any]]] = {
    "train": _training,
    "merge": _merge,
    "search": _search,
    "extract": _extract,
    "ingest": _ingest,
    "export": _export,
    "analyze": _analyze,
    "verify": _verify,
}
