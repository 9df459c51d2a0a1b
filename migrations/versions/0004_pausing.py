"""Paused jobs, and jobs that give way

Rows that an older worker or API writes stay valid: what is new has defaults, and the new state is only one more.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_OLD_STATES = "state IN ('queued', 'claimed', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')"
_NEW_STATES = "state IN ('queued', 'paused', 'claimed', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')"
_OLD_UNDER_WAY = "state IN ('queued', 'claimed', 'running')"
_NEW_UNDER_WAY = "state IN ('queued', 'paused', 'claimed', 'running')"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("pause_requested_at", sa.Float(precision=53), nullable=True))
    op.add_column("jobs", sa.Column("preempt_requested_at", sa.Float(precision=53), nullable=True))
    op.add_column("jobs", sa.Column("preemptions", sa.Integer(), server_default="0", nullable=False))
    _replace_check(_OLD_STATES, _NEW_STATES)
    _replace_index(_NEW_UNDER_WAY)


def downgrade() -> None:
    op.execute("UPDATE jobs SET state = 'queued' WHERE state = 'paused'")
    _replace_index(_OLD_UNDER_WAY)
    _replace_check(_NEW_STATES, _OLD_STATES)
    for name in ("preemptions", "preempt_requested_at", "pause_requested_at"):
        op.drop_column("jobs", name)


def _replace_check(old: str, new: str) -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint("ck_jobs_state", "jobs", type_="check")
        op.create_check_constraint("ck_jobs_state", "jobs", new)
        return
    # SQLite cannot alter a CHECK. Making the table anew would drop what other tables refer to; editing the schema's
    # text is the procedure that its documentation has for constraints (lang_altertable.html, section 8).
    bind = op.get_bind()
    version = bind.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    edit = "UPDATE sqlite_master SET sql = replace(sql, :old, :new) WHERE type = 'table' AND name = 'jobs'"
    bind.execute(sa.text(edit), {"old": old, "new": new})
    op.execute(f"PRAGMA schema_version = {version + 1}")
    op.execute("PRAGMA writable_schema = OFF")


def _replace_index(under_way: str) -> None:
    op.drop_index("uq_jobs_recipe_digest", table_name="jobs")
    where = sa.text(under_way)
    columns = ["owner_id", "recipe_digest"]
    op.create_index("uq_jobs_recipe_digest", "jobs", columns, unique=True, postgresql_where=where, sqlite_where=where)
