"""The logins of the API and of the workers on PostgreSQL: no owners of anything, and with the rights they need alone.

Row-level security holds them, as it never does a superuser. The workers' login sees no key and no audit log; nobody's
can change the audit log, create, alter or drop.
"""

from psycopg import sql
from sqlalchemy import make_url

from service.db import Database

API, WORKER = "luthier_api", "luthier_worker"
_NOT_OF_WORKERS = ("api_keys", "audit_log", "erasures")
_READ_BY_WORKERS = ("users", "alembic_version")


def provision(database_url: str, api_password: str, worker_password: str) -> None:
    """Make the two logins, or bring them up to date; again after every migration, as it may have made tables.

    Args:
        database_url: of the tables' owner, who may create roles.
    """
    database = Database(database_url)
    try:
        with database.engine.begin() as connection:
            raw = connection.connection.driver_connection
            if raw is None:
                raise RuntimeError("the connection has no driver below it")
            name = make_url(database_url).database or ""
            for role, password in ((API, api_password), (WORKER, worker_password)):
                # Scrambled here, as the server may log what it is sent.
                scrambled = raw.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
                for statement in _login(role, scrambled, name):
                    raw.execute(statement)
            for statement in _rights():
                raw.execute(statement)
    finally:
        database.close()


def _login(role: str, password: str, database: str) -> list[sql.Composed]:
    login = sql.Identifier(role)
    attributes = sql.SQL("LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE PASSWORD")
    create = sql.SQL("IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = {}) THEN CREATE ROLE {}; END IF;").format(
        sql.Literal(role), login
    )
    return [
        sql.SQL("DO {}").format(sql.Literal(f"BEGIN {create.as_string()} END")),
        sql.SQL("ALTER ROLE {} WITH {} {}").format(login, attributes, sql.Literal(password)),
        sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(sql.Identifier(database), login),
        sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(login),
        sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {}").format(login),
        sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {}").format(login),
        sql.SQL("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {}").format(login),
    ]


def _rights() -> list[sql.Composed]:
    """What is taken back of all that was granted."""
    api, worker = sql.Identifier(API), sql.Identifier(WORKER)
    all_of, writing = sql.SQL("REVOKE ALL ON {} FROM {}"), sql.SQL("REVOKE INSERT, UPDATE, DELETE ON {} FROM {}")
    return [
        sql.SQL("REVOKE UPDATE, DELETE ON audit_log FROM {}").format(api),
        writing.format(sql.Identifier("alembic_version"), api),
        *(all_of.format(sql.Identifier(table), worker) for table in _NOT_OF_WORKERS),
        *(writing.format(sql.Identifier(table), worker) for table in _READ_BY_WORKERS),
    ]
