"""The schema's history: there and back on both databases, and what it does to rows that are there already."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

import migrations
from service.db import Database
from service.models import Table
from tests.conftest import _postgres

VERSIONS = sorted(path.stem[:4] for path in (Path(migrations.__file__).parent / "versions").glob("0*.py"))


@pytest.fixture(params=["sqlite", "postgres"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without tables."""
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    else:
        server, name = request.getfixturevalue("postgres_server"), f"empty_{tmp_path.name.lower()[-20:]}"
        _postgres(server, f'DROP DATABASE IF EXISTS "{name}"')
        _postgres(server, f'CREATE DATABASE "{name}"')
        database = Database(server.format(name=name))
    yield database
    database.close()
    if request.param == "postgres":
        _postgres(server, f'DROP DATABASE "{name}" WITH (FORCE)')


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_every_step_goes_there_and_back(empty: Database) -> None:
    url = empty.engine.url.render_as_string(hide_password=False)
    migrations.upgrade(url)
    assert tables(empty) == set(Table.metadata.tables)
    assert migrations.check(url) == []
    for version in reversed(VERSIONS[1:]):
        migrations.downgrade(url, f"{int(version) - 1:04}")
    assert "audit_log" not in tables(empty)
    assert "jobs" in tables(empty)
    migrations.upgrade(url)
    assert migrations.check(url) == []
    migrations.downgrade(url, "base")
    assert tables(empty) == set()
    migrations.upgrade(url)
    assert migrations.check(url) == []


def test_keys_and_results_that_are_there_go_on(empty: Database) -> None:
    """A key without a scope is one that may write, as it was; the bytes of results are counted."""
    url = empty.engine.url.render_as_string(hide_password=False)
    migrations.upgrade(url)
    migrations.downgrade(url, "0002")
    rows = [
        "INSERT INTO users (id, name, created_at) VALUES ('u', 'ann', 1)",
        "INSERT INTO api_keys (id, user_id, sha256, hint, created_at) VALUES ('k', 'u', 'x', 'luthier_ab', 1)",
        "INSERT INTO base_models (id, source, folder, digest, files, architecture, parameters, modules, created_at)"
        " VALUES ('tiny', 's', '/', 'd', '[]', 'a', 1, '[]', 1)",
        "INSERT INTO jobs (id, owner_id, kind, name, spec, base_model_id, state, priority, run_after, epoch, attempt,"
        " lost_without_progress, step, event_seq, created_at, finished_at, announced_at)"
        " VALUES ('j', 'u', 'train', 'n', '{}', 'tiny', 'succeeded', 0, 1, 1, 1, 0, 1, 0, 1, 1, 1)",
        "INSERT INTO adapters (id, owner_id, job_id, base_model_id, name, kind, epoch, prefix, files, digest, rank,"
        " metrics, created_at)"
        """ VALUES ('a', 'u', 'j', 'tiny', 'n', 'train', 1, 'p', '[{"size": 30}, {"size": 12}]', 'd', 4, '{}', 1)""",
    ]
    with empty.unit_of_work() as session:
        for statement in rows:
            session.connection().exec_driver_sql(statement)
    migrations.upgrade(url)
    with empty.reading() as session:
        assert session.execute(text("SELECT scope, expires_at FROM api_keys")).one() == ("write", None)
        assert session.execute(text("SELECT bytes FROM adapters")).scalar_one() == 42
        assert session.execute(text("SELECT deleted_at FROM users")).scalar_one() is None
