"""Artifacts, aliases, and results known by their recipe"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_UNDER_WAY = sa.text("state IN ('queued', 'claimed', 'running')")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("recipe_digest", sa.String(length=64), nullable=True))
    op.create_index("ix_jobs_recipe_digest", "jobs", ["owner_id", "recipe_digest"], unique=False)
    op.create_index(
        "uq_jobs_recipe_digest",
        "jobs",
        ["owner_id", "recipe_digest"],
        unique=True,
        postgresql_where=_UNDER_WAY,
        sqlite_where=_UNDER_WAY,
    )
    op.create_table(
        "artifacts",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("owner_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("base_model_id", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.Column("deleted_at", sa.Float(precision=53), nullable=True),
        sa.Column("purged_at", sa.Float(precision=53), nullable=True),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name="fk_artifacts_base_model_id"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_artifacts_job_id"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name="fk_artifacts_owner_id"),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        sa.UniqueConstraint("job_id", name="uq_artifacts_job_id"),
    )
    op.create_index("ix_artifacts_owner_id_id", "artifacts", ["owner_id", "id"], unique=False)
    op.create_table(
        "adapter_aliases",
        sa.Column("owner_id", sa.String(length=64), nullable=False),
        sa.Column("alias", sa.String(length=100), nullable=False),
        sa.Column("adapter_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name="fk_adapter_aliases_adapter_id"),
        sa.ForeignKeyConstraint(["owner_id"], ["users.id"], name="fk_adapter_aliases_owner_id"),
        sa.PrimaryKeyConstraint("owner_id", "alias", name="pk_adapter_aliases"),
    )
    op.create_index("ix_adapter_aliases_adapter_id", "adapter_aliases", ["adapter_id"], unique=False)


def downgrade() -> None:
    op.drop_table("adapter_aliases")
    op.drop_table("artifacts")
    op.drop_index("uq_jobs_recipe_digest", table_name="jobs")
    op.drop_index("ix_jobs_recipe_digest", table_name="jobs")
    op.drop_column("jobs", "recipe_digest")
