"""Row-level security on PostgreSQL: what a table shows to a transaction, by whose request it is.

`service.db` sets the variable `luthier.owner` in every transaction: to the caller's id in the API's requests, to `*`
for the inside. A table without a fitting value shows nothing and takes nothing, so that a query which forgets its owner
finds no more than one that names it. FORCE holds the tables' own owner to it too; only superusers pass.
The wall stands behind the queries, not before SQL of an attacker's own: who can set the variable chooses the rows.
SQLite has no such thing, and nothing is done there.
"""

import sqlalchemy as sa

_POLICY = "of_the_caller"
_INSIDE = "current_setting('luthier.owner', true) = '*'"


def protect(connection: sa.Connection, table: str, owner_column: str) -> None:
    """Rows of `table` belong to the user whose id is in `owner_column`."""
    _protect(connection, table, f"{owner_column} = current_setting('luthier.owner', true)")


def protect_by_job(connection: sa.Connection, table: str) -> None:
    """Rows of `table` belong to whom their job belongs to."""
    # The jobs of the subquery are those that the same transaction sees.
    condition = f"EXISTS (SELECT 1 FROM jobs WHERE jobs.id = {table}.job_id)"  # noqa: S608 - names of ours
    _protect(connection, table, condition)


def unprotect(connection: sa.Connection, table: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(f"DROP POLICY {_POLICY} ON {table}"))
        connection.execute(sa.text(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY"))
        connection.execute(sa.text(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY"))


def _protect(connection: sa.Connection, table: str, condition: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY"))
        connection.execute(sa.text(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY"))
        connection.execute(sa.text(f"CREATE POLICY {_POLICY} ON {table} USING ({_INSIDE} OR {condition})"))
