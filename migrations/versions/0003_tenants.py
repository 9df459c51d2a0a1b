"""Key scopes and rotation, audit log, quotas, receipts of deletion, row-level security"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from migrations.row_security import protect, protect_by_job, unprotect

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_UNFINISHED = sa.text("state NOT IN ('succeeded', 'failed', 'cancelled')")
_TIME = sa.Float(precision=53)
_OWNED = (
    ("users", "id"), ("api_keys", "user_id"), ("datasets", "owner_id"), ("jobs", "owner_id"), ("adapters", "owner_id"),
    ("artifacts", "owner_id"), ("adapter_aliases", "owner_id"), ("idempotency_keys", "owner_id"),
    ("audit_log", "user_id"), ("erasures", "owner_id"),
)  # fmt: skip
_OF_JOBS = ("job_events", "checkpoints", "adapter_parents")


def upgrade() -> None:
    _refuse_while_older_workers_run(op.get_bind())
    for table, column in _new_columns():
        op.add_column(table, column)
    _count_bytes(op.get_bind())
    op.create_index(
        "ix_jobs_unfinished",
        "jobs",
        ["owner_id"],
        unique=False,
        postgresql_where=_UNFINISHED,
        sqlite_where=_UNFINISHED,
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=64), nullable=True),
        sa.Column("key_id", sa.String(length=64), nullable=True),
        sa.Column("address", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=200), nullable=False),
        sa.Column("object_id", sa.String(length=200), nullable=True),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
    )
    op.create_index("ix_audit_log_user_id_id", "audit_log", ["user_id", "id"], unique=False)
    op.create_table(
        "erasures",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("owner_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("subject_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("finished_at", _TIME, nullable=True),
        sa.Column("purged_at", _TIME, nullable=True),
        sa.Column("receipt", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_erasures"),
    )
    op.create_index("ix_erasures_owner_id_id", "erasures", ["owner_id", "id"], unique=False)
    for statement in _triggers(op.get_bind()):
        op.execute(statement)
    for table, owner_column in _OWNED:
        protect(op.get_bind(), table, owner_column)
    for table in _OF_JOBS:
        protect_by_job(op.get_bind(), table)


def downgrade() -> None:
    for table in (*_OF_JOBS, *(table for table, _ in _OWNED)):
        unprotect(op.get_bind(), table)
    op.drop_table("erasures")
    op.drop_table("audit_log")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_change()")
    op.drop_index("ix_jobs_unfinished", table_name="jobs")
    for table, column in reversed(_new_columns()):
        op.drop_column(table, column.name)


def _refuse_while_older_workers_run(connection: sa.Connection) -> None:
    """They set no `luthier.owner`, so that row-level security would hide their jobs from them. Superusers it lets pass.

    Raises:
        RuntimeError: workers hold leases, as a login that is held by row-level security.
    """
    if connection.dialect.name != "postgresql":
        return
    owner = "SELECT r.rolsuper OR r.rolbypassrls FROM pg_class t JOIN pg_roles r ON r.oid = t.relowner "
    if connection.scalar(sa.text(owner + "WHERE t.oid = 'jobs'::regclass")):
        return
    held = connection.scalar(
        sa.text("SELECT count(*) FROM jobs WHERE lease_until > extract(epoch FROM clock_timestamp())")
    )
    if held:
        raise RuntimeError(
            f"{held} jobs are held by workers of the release before, which could not go on after this migration, as the "
            "tables' owner is no superuser; stop these workers, wait until they have given their jobs back, and migrate "
            "again"
        )


def _new_columns() -> list[tuple[str, sa.Column[Any]]]:
    return [
        ("users", sa.Column("max_unfinished_jobs", sa.BigInteger(), nullable=True)),
        ("users", sa.Column("max_running_jobs", sa.BigInteger(), nullable=True)),
        ("users", sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True)),
        ("users", sa.Column("deleted_at", _TIME, nullable=True)),
        ("api_keys", sa.Column("scope", sa.String(length=8), nullable=False, server_default="write")),
        ("api_keys", sa.Column("expires_at", _TIME, nullable=True)),
        ("api_keys", sa.Column("last_used_at", _TIME, nullable=True)),
        ("adapters", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0")),
        ("artifacts", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0")),
    ]


def _count_bytes(connection: sa.Connection) -> None:
    """Of the results that are there; their files are in a JSON list."""
    for name in ("adapters", "artifacts"):
        table = sa.table(
            name, sa.column("id", sa.String()), sa.column("files", sa.JSON()), sa.column("bytes", sa.BigInteger())
        )
        for row in connection.execute(sa.select(table.c.id, table.c.files)).all():
            size = sum(file["size"] for file in row.files)
            connection.execute(table.update().where(table.c.id == row.id).values(bytes=size))


def _triggers(connection: sa.Connection) -> list[str]:
    """The audit log is added to and read, by whatever role."""
    refusal = "the audit log is only added to"
    if connection.dialect.name == "postgresql":
        return [
            f"CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{refusal}'; END $$",
            "CREATE TRIGGER audit_log_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
        ]
    return [
        f"CREATE TRIGGER audit_log_refuses_{event} BEFORE {event} ON audit_log "
        f"BEGIN SELECT RAISE(ABORT, '{refusal}'); END"
        for event in ("UPDATE", "DELETE")
    ]
