"""What Alembic runs: one transaction on the database that `migrations` was given."""

from alembic import context
from sqlalchemy import Connection, text

from service.db import Database
from service.models import Table

_LOCK = 0x4C555448  # any number, the same in every process


def run(database_url: str) -> None:
    database = Database(database_url)
    try:
        # The write option makes SQLite's transaction IMMEDIATE, so that two migrators queue up.
        with database.engine.execution_options(luthier_writes=True).begin() as connection:
            _migrate(connection, is_sqlite=database.is_sqlite)
    finally:
        database.close()


def _migrate(connection: Connection, *, is_sqlite: bool) -> None:
    if not is_sqlite:
        # The limits of requests are none for migrations: one waits for another, and an index takes its time.
        for limit in ("lock_timeout", "statement_timeout"):
            connection.execute(text(f"SET LOCAL {limit} = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    context.configure(connection=connection, target_metadata=Table.metadata, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["database_url"])
