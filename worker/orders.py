"""What the host is told to do: a job's row as an order, and its files in the workspace."""

import logging
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import datasets, leases
from service import storage as objects
from service.db import Database
from service.leases import Claim
from service.models import Adapter, AdapterParent, BaseModel, Dataset, Job
from service.storage import ObjectDamaged, ObjectMissing, Storage
from worker import workspace

log = logging.getLogger(__name__)


def prepare(database: Database, storage: Storage, claim: Claim, folder: Path) -> tuple[str, dict[str, Any]]:
    """(verb, order) for the host. No transaction is open while files are fetched.

    Raises:
        ObjectMissing, ObjectDamaged, ServiceError: a file could not be had.
    """
    if claim.kind == "train":
        return "train", _training(database, storage, claim, folder)
    return "merge", _merge(database, storage, claim, folder)


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
    pinned = {"id": base.id, "folder": base.folder, "digest": base.digest}
    return {"spec": spec, "base": pinned, "resume": _fetch_newest_checkpoint(database, storage, claim, folder)}


def _merge(database: Database, storage: Storage, claim: Claim, folder: Path) -> dict[str, Any]:
    with database.reading() as session:
        job = session.get_one(Job, claim.job_id)
        parents = (
            select(Adapter, AdapterParent.weight)
            .join(AdapterParent, AdapterParent.parent_id == Adapter.id)
            .where(AdapterParent.job_id == claim.job_id)
            .order_by(AdapterParent.position)
        )
        sources = [(adapter, weight) for adapter, weight in session.execute(parents)]
    for adapter in {adapter.id: adapter for adapter, _ in sources}.values():
        workspace.fetch_adapter(storage, adapter.prefix, adapter.files, folder / adapter.id)
    weighted = [{"path": str(folder / adapter.id), "weight": weight} for adapter, weight in sources]
    return {"spec": {"adapters": weighted, "output": str(folder / "adapter"), "method": job.spec["method"]}}


def _validation_dataset(session: Session, job: Job) -> Dataset | None:
    return session.get_one(Dataset, job.validation_dataset_id) if job.validation_dataset_id else None


def _fetch_dataset(storage: Storage, dataset: Dataset, folder: Path) -> str:
    path = folder / f"{dataset.id}.jsonl"
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
            continue
        return str(path)
    return None
