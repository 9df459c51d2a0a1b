"""The tables. Times are unix seconds by the database's clock; ids carry a prefix and sort by creation."""

import os
import time
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from service.db import now

ACTIVE = ("claimed", "running", "cancelling")
TERMINAL = ("succeeded", "failed", "cancelled")
STATES = ("queued", "paused", *ACTIVE, *TERMINAL)
UNDER_WAY = ("queued", "paused", "claimed", "running")  # and nobody has asked to cancel


def new_id(prefix: str) -> str:
    """A version 7 UUID (RFC 9562) as 32 hex digits behind `prefix`: sortable by time, 74 bits unguessable."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | (0x7 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    return f"{prefix}-{value:032x}"


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {float: Float(53), int: BigInteger, dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


def _id() -> Mapped[str]:
    return mapped_column(String(64), primary_key=True)


def _created() -> Mapped[float]:
    return mapped_column(server_default=None, default=now())


class User(Table):
    """Somebody whose data nobody else sees. Limits that are null are those of the settings.

    One who is deleted stays until everything of theirs is gone, and can do nothing meanwhile.
    """

    __tablename__ = "users"
    id: Mapped[str] = _id()
    name: Mapped[str] = mapped_column(String(100), unique=True)
    created_at: Mapped[float] = _created()
    max_unfinished_jobs: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    max_stored_bytes: Mapped[int | None]
    deleted_at: Mapped[float | None]


class ApiKey(Table):
    """A key's SHA-256; the key itself is shown once and never kept."""

    __tablename__ = "api_keys"
    id: Mapped[str] = _id()
    user_id: Mapped[str] = mapped_column(ForeignKey("users.id"), index=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(16))
    scope: Mapped[str] = mapped_column(String(8), default="write", server_default="write")
    created_at: Mapped[float] = _created()
    expires_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class BaseModel(Table):
    """An entry of the operator's catalogue: the one list of base models that jobs may name."""

    __tablename__ = "base_models"
    id: Mapped[str] = mapped_column(String(100), primary_key=True)
    source: Mapped[str] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(String(64))
    folder: Mapped[str] = mapped_column(Text)
    digest: Mapped[str] = mapped_column(String(64))
    files: Mapped[list[Any]]
    architecture: Mapped[str] = mapped_column(String(100))
    parameters: Mapped[int]
    context_length: Mapped[int | None]
    modules: Mapped[list[Any]]
    created_at: Mapped[float] = _created()


class Dataset(Table):
    """An uploaded file of examples. `ready` once every row was checked and the object is durable.

    A deleted one stays as a tombstone, because jobs refer to it; `purged_at` says that its object is gone too.
    """

    __tablename__ = "datasets"
    __table_args__ = (
        CheckConstraint("status IN ('validating', 'ready')", name="status"),
        Index("ix_datasets_owner_id_id", "owner_id", "id"),
    )
    id: Mapped[str] = _id()
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str] = mapped_column(String(100))
    status: Mapped[str] = mapped_column(String(16))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    rows: Mapped[int | None]
    created_at: Mapped[float] = _created()
    deleted_at: Mapped[float | None]
    purged_at: Mapped[float | None]


class Job(Table):
    """The truth about one piece of work: a training, a merge, an export, an analysis …

    `epoch` is the fencing token: it rises at every claim, reap and release. A lower `priority` runs first.
    A pause or a preemption that is asked for is a wish of the row, not a state: workers that do not know it train on.
    `recipe_digest` names a result by what it is made of; an owner has at most one such job on its way.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"state IN {STATES}", name="state"),
        CheckConstraint(f"(state IN {ACTIVE}) = (lease_until IS NOT NULL)", name="lease"),
        CheckConstraint(f"(state IN {TERMINAL}) = (finished_at IS NOT NULL)", name="finished"),
        Index("ix_jobs_owner_id_id", "owner_id", "id"),
        Index("ix_jobs_unfinished", "owner_id", postgresql_where=text(f"state NOT IN {TERMINAL}"),
              sqlite_where=text(f"state NOT IN {TERMINAL}")),
        Index("ix_jobs_claimable", "priority", "run_after", "id", postgresql_where=text("state = 'queued'"),
              sqlite_where=text("state = 'queued'")),
        Index("uq_jobs_device_slot", "device_slot", unique=True, postgresql_where=text(f"state IN {ACTIVE}"),
              sqlite_where=text(f"state IN {ACTIVE}")),
        Index("ix_jobs_lease_until", "lease_until", postgresql_where=text("lease_until IS NOT NULL"),
              sqlite_where=text("lease_until IS NOT NULL")),
        Index("ix_jobs_recipe_digest", "owner_id", "recipe_digest"),
        Index("uq_jobs_recipe_digest", "owner_id", "recipe_digest", unique=True,
              postgresql_where=text(f"state IN {UNDER_WAY}"), sqlite_where=text(f"state IN {UNDER_WAY}")),
    )  # fmt: skip
    id: Mapped[str] = _id()
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(100))
    spec: Mapped[dict[str, Any]]
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    validation_dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"))
    recipe_digest: Mapped[str | None] = mapped_column(String(64))

    state: Mapped[str] = mapped_column(String(16), default="queued")
    priority: Mapped[int] = mapped_column(Integer, default=0)
    run_after: Mapped[float] = mapped_column(default=now())
    epoch: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    worker_id: Mapped[str | None] = mapped_column(String(200))
    device_slot: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[float | None]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    preempt_requested_at: Mapped[float | None]
    preemptions: Mapped[int] = mapped_column(Integer, server_default="0")
    lost_without_progress: Mapped[int] = mapped_column(Integer, default=0)

    phase: Mapped[str | None] = mapped_column(String(40))
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    eta_seconds: Mapped[float | None]
    event_seq: Mapped[int] = mapped_column(default=0)
    error_code: Mapped[str | None] = mapped_column(String(40))
    error_category: Mapped[str | None] = mapped_column(String(16))
    error_message: Mapped[str | None] = mapped_column(Text)

    created_at: Mapped[float] = _created()
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    announced_at: Mapped[float] = mapped_column(default=now())
    purged_at: Mapped[float | None]
    trace_parent: Mapped[str | None] = mapped_column(String(55))
    parents: Mapped[list["AdapterParent"]] = relationship(order_by="AdapterParent.position")


class JobEvent(Table):
    """What happened, in order and without gaps; never changed."""

    __tablename__ = "job_events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int]
    type: Mapped[str] = mapped_column(String(16))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float] = _created()


class Checkpoint(Table):
    """A resumable state that was uploaded and verified. The object store cannot fence; this row does."""

    __tablename__ = "checkpoints"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    prefix: Mapped[str] = mapped_column(Text)
    manifest_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = _created()


class Adapter(Table):
    """A job's result: complete, verified, and at most one per job. A deleted one stays as a tombstone for lineage.

    A succeeded job has one; a diverged one may have left the last good state.
    """

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("job_id"), Index("ix_adapters_owner_id_id", "owner_id", "id"))
    id: Mapped[str] = _id()
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    name: Mapped[str] = mapped_column(String(100))
    kind: Mapped[str] = mapped_column(String(16))
    epoch: Mapped[int]
    prefix: Mapped[str] = mapped_column(Text)
    files: Mapped[list[Any]]
    bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    digest: Mapped[str] = mapped_column(String(64))
    rank: Mapped[int] = mapped_column(Integer)
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[float] = _created()
    deleted_at: Mapped[float | None]
    purged_at: Mapped[float | None]


class AdapterAlias(Table):
    """A name that an owner gives to an adapter, to be used in the place of its id."""

    __tablename__ = "adapter_aliases"
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(String(100), primary_key=True)
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), index=True)
    created_at: Mapped[float] = _created()


class Artifact(Table):
    """A job's result that is no adapter: the files of an export, of an analysis, of a verification."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id"), Index("ix_artifacts_owner_id_id", "owner_id", "id"))
    id: Mapped[str] = _id()
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    name: Mapped[str] = mapped_column(String(100))
    kind: Mapped[str] = mapped_column(String(16))
    epoch: Mapped[int]
    prefix: Mapped[str] = mapped_column(Text)
    files: Mapped[list[Any]]
    bytes: Mapped[int] = mapped_column(default=0, server_default="0")
    digest: Mapped[str] = mapped_column(String(64))
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[float] = _created()
    deleted_at: Mapped[float | None]
    purged_at: Mapped[float | None]


class AdapterParent(Table):
    """Lineage: which adapters a job works on, with their weights."""

    __tablename__ = "adapter_parents"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    parent_id: Mapped[str] = mapped_column(ForeignKey("adapters.id"), index=True)
    weight: Mapped[float]


class AuditEntry(Table):
    """Who did what, or was refused it. Appended for each such request; triggers refuse to change or remove it.

    It outlives whom and what it tells of, hence no foreign keys; it holds ids and addresses, nothing that was sent.
    """

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_user_id_id", "user_id", "id"),)
    id: Mapped[str] = _id()
    created_at: Mapped[float] = _created()
    request_id: Mapped[str] = mapped_column(String(64))
    user_id: Mapped[str | None] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(64))
    address: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(200))
    object_id: Mapped[str | None] = mapped_column(String(200))
    status: Mapped[int] = mapped_column(Integer)


class Erasure(Table):
    """That a user or a dataset was erased with all that was made of it: the receipt, and until then the order."""

    __tablename__ = "erasures"
    __table_args__ = (Index("ix_erasures_owner_id_id", "owner_id", "id"),)
    id: Mapped[str] = _id()
    owner_id: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(16))
    subject_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = _created()
    finished_at: Mapped[float | None]
    purged_at: Mapped[float | None]
    receipt: Mapped[dict[str, Any]]


class OutboxMessage(Table):
    """A message for the broker, written with the change it announces, sent after the commit."""

    __tablename__ = "outbox"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = _created()


class IdempotencyKey(Table):
    """One accepted request per owner and key, with the hash of its body."""

    __tablename__ = "idempotency_keys"
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float] = _created()


class Webhook(Table):
    """Where an owner wants to be told of ended jobs. The secret signs what is sent, so it is kept as it is."""

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_owner_id_id", "owner_id", "id"),)
    id: Mapped[str] = _id()
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str] = mapped_column(String(100))
    url: Mapped[str] = mapped_column(Text)
    event_types: Mapped[list[Any]]
    secret: Mapped[str] = mapped_column(String(100))
    enabled: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[float] = _created()


class WebhookDelivery(Table):
    """One message for one webhook, written with the job's end; its id is the message's for every attempt to send it."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="state"),
        Index("ix_webhook_deliveries_webhook_id_id", "webhook_id", "id"),
        Index("ix_webhook_deliveries_created_at", "created_at"),
        Index("ix_webhook_deliveries_due", "next_attempt_at", postgresql_where=text("state = 'pending'"),
              sqlite_where=text("state = 'pending'")),
    )  # fmt: skip
    id: Mapped[str] = _id()
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id"))
    owner_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    event_type: Mapped[str] = mapped_column(String(40))
    body: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[float] = mapped_column(default=now())
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float] = _created()
    delivered_at: Mapped[float | None]
