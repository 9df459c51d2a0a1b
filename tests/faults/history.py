"""What must be true of the rows and objects after any fault: invariants I1 to I10, one checker for all tests."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service import datasets, events
from service.db import Database
from service.models import (
    ACTIVE,
    TERMINAL,
    Adapter,
    Artifact,
    Checkpoint,
    Dataset,
    IdempotencyKey,
    Job,
    JobEvent,
    OutboxMessage,
)
from service.storage import ObjectMissing, Storage


def check(
    database: Database,
    storage: Storage | None = None,
    *,
    accepted: Iterable[str] = (),
    keys: Mapping[str, str] | None = None,
    at_rest: bool = True,
    checkpoint_every: int | None = None,
    collected: bool = False,
) -> None:
    """Raises AssertionError with every invariant that does not hold, and where.

    Args:
        storage: with it, every object that a row promises is read and compared with its SHA-256.
        accepted: ids of jobs that clients were told of by 201 or 202.
        keys: the job that each Idempotency-Key was answered with.
        at_rest: no more jobs are to come and all had time to end.
        checkpoint_every: the steps that a loss of a worker may cost.
        collected: the sweep has removed what nothing refers to.
    """
    with database.reading() as session:
        faults = list(_faults(session, accepted, keys or {}, at_rest, checkpoint_every))
        if storage is not None:
            faults += _object_faults(session, storage, collected=collected)
    assert not faults, "\n".join(faults)


def _faults(
    session: Session, accepted: Iterable[str], keys: Mapping[str, str], at_rest: bool, checkpoint_every: int | None
) -> Iterator[str]:
    jobs = {job.id: job for job in session.scalars(select(Job))}
    told: dict[str, list[JobEvent]] = defaultdict(list)
    for event in session.scalars(select(JobEvent).order_by(JobEvent.job_id, JobEvent.seq)):
        told[event.job_id].append(event)
    checkpoints: dict[str, list[Checkpoint]] = defaultdict(list)
    for checkpoint in session.scalars(select(Checkpoint).order_by(Checkpoint.created_at)):
        checkpoints[checkpoint.job_id].append(checkpoint)
    results: dict[str, list[Adapter | Artifact]] = defaultdict(list)
    for table in (Adapter, Artifact):
        for result in session.scalars(select(table)):
            results[result.job_id].append(result)
    for job_id, job in jobs.items():
        log = told[job_id]
        yield from _log_faults(job, log, checkpoints[job_id])
        yield from _result_faults(job, results[job_id])
        if job.kind == "train":
            yield from _step_faults(session, job, log, checkpoint_every)
    yield from _acceptance_faults(session, jobs, accepted, keys)
    yield from _slot_faults(jobs.values())
    if at_rest:
        yield from (f"I5 {job.id}: is {job.state}" for job in jobs.values() if job.state not in TERMINAL)
        yield from (f"I5 outbox: {message.job_id}" for message in session.scalars(select(OutboxMessage)))


def _log_faults(job: Job, log: Sequence[JobEvent], checkpoints: Sequence[Checkpoint]) -> Iterator[str]:
    if [event.seq for event in log] != list(range(1, job.event_seq + 1)):
        yield f"I10 {job.id}: events {[event.seq for event in log]} of {job.event_seq}"
    claims = [event for event in log if event.message.startswith("Claimed by a worker")]
    epochs = [event.epoch for event in claims]
    if epochs != sorted(set(epochs)):
        yield f"I1 {job.id}: claimed in the epochs {epochs}"
    newest = 0
    for event in log:
        if event.epoch < newest:
            yield f"I2 {job.id}: event {event.seq} has epoch {event.epoch} after {newest}"
        newest = max(newest, event.epoch)
    for checkpoint in checkpoints:
        later = [event.epoch for event in claims if event.created_at < checkpoint.created_at]
        if later and checkpoint.epoch < max(later):
            yield f"I2 {job.id}: checkpoint {checkpoint.step} of epoch {checkpoint.epoch} after claim {max(later)}"


def _result_faults(job: Job, results: Sequence[Adapter | Artifact]) -> Iterator[str]:
    if job.state == "succeeded":
        if len(results) != 1:
            yield f"I3 {job.id}: succeeded with {len(results)} results"
        elif results[0].epoch != job.epoch:
            yield f"I3 {job.id}: result of epoch {results[0].epoch}, last claim {job.epoch}"
    elif results and job.error_code != "diverged":
        yield f"I3 {job.id}: {job.state} with {len(results)} results"


def _step_faults(session: Session, job: Job, log: Sequence[JobEvent], checkpoint_every: int | None) -> Iterator[str]:
    steps = [event.data["step"] for event in log if event.type == "metrics" and "loss" in event.data]
    losses = max(0, job.attempt - 1)
    if checkpoint_every is not None and len(steps) > (job.total_steps or 0) + losses * checkpoint_every:
        yield f"I6 {job.id}: {len(steps)} steps of {job.total_steps} with {losses} losses"
    if job.state == "succeeded" and job.total_steps:
        counted = [point["step"] for point in events.metrics(session, job.id) if "loss" in point]
        if counted != list(range(1, job.total_steps + 1)):
            yield f"I9 {job.id}: {len(counted)} steps are told of {job.total_steps}"


def _acceptance_faults(
    session: Session, jobs: Mapping[str, Job], accepted: Iterable[str], keys: Mapping[str, str]
) -> Iterator[str]:
    yield from (f"I4 {job_id}: was accepted and is not there" for job_id in accepted if job_id not in jobs)
    known = {row.key: row.job_id for row in session.scalars(select(IdempotencyKey))}
    yield from (
        f"I4 key {key}: {job_id}, kept {known.get(key)}" for key, job_id in keys.items() if known.get(key) != job_id
    )
    yield from (f"I4 key {key}: of no job {job_id}" for key, job_id in known.items() if job_id not in jobs)


def _slot_faults(jobs: Iterable[Job]) -> Iterator[str]:
    slots = [job.device_slot for job in jobs if job.state in ACTIVE and job.device_slot is not None]
    yield from (f"I8 {slot}: {slots.count(slot)} jobs" for slot in set(slots) if slots.count(slot) > 1)


def _object_faults(session: Session, storage: Storage, *, collected: bool) -> Iterator[str]:
    promised: dict[str, str | None] = {}  # SHA-256 by key; None: the manifest of a checkpoint says
    for dataset in session.scalars(select(Dataset).where(Dataset.status == "ready", Dataset.deleted_at.is_(None))):
        promised[datasets.object_key(dataset.id)] = dataset.sha256
    results: list[Any] = [*session.scalars(select(Adapter)), *session.scalars(select(Artifact))]
    for result in (result for result in results if result.deleted_at is None):
        promised |= {f"{result.prefix}/{file['name']}": file["sha256"] for file in result.files}
    ended = set(session.scalars(select(Job.id).where(Job.purged_at.is_not(None))))
    for checkpoint in session.scalars(select(Checkpoint)):
        if checkpoint.job_id not in ended:
            promised[f"{checkpoint.prefix}/MANIFEST.json"] = checkpoint.manifest_sha256
    for key, digest in promised.items():
        try:
            found = sha256(b"".join(storage.read(key))).hexdigest()
        except ObjectMissing:
            yield f"I7 {key}: a row promises it"
            continue
        if digest is not None and found != digest:
            yield f"I7 {key}: other bytes than were promised"
    if collected:
        for top in ("datasets", "adapters", "artifacts", "jobs"):
            yield from (f"I7 {key}: nothing refers to it" for key in storage.keys(top) if key not in promised)
