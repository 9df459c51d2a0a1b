"""The migration to row-level security, where workers of the release before are at work."""

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

import migrations
from tests.conftest import postgres_database


@pytest.fixture
def plain_owner(postgres_server: str) -> Iterator[str]:
    """The URL of an empty database that belongs to a login which is no superuser."""
    with postgres_database(postgres_server, "template1") as url:
        owner = f"plain_{uuid4().hex}"
        name = make_url(url).database
        admin = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(admin, autocommit=True) as connection:
            for statement in (
                f"CREATE ROLE {owner} LOGIN PASSWORD 'a-password-of-the-test'",
                f"ALTER DATABASE {name} OWNER TO {owner}",
            ):
                connection.execute(statement.encode())
            plain = make_url(url).set(username=owner, password="a-password-of-the-test")
            yield plain.render_as_string(hide_password=False)
            connection.execute(f"DROP OWNED BY {owner} CASCADE".encode())
            connection.execute(f"ALTER DATABASE {name} OWNER TO CURRENT_USER".encode())
            connection.execute(f"DROP ROLE {owner}".encode())


def run(url: str, *statements: str) -> None:
    with psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)) as database:
        for statement in statements:
            database.execute(statement.encode())


def claimed_by_an_older_worker(url: str) -> None:
    migrations.upgrade(url, "0002")
    run(
        url,
        "INSERT INTO users (id, name, created_at) VALUES ('u', 'ann', 1)",
        "INSERT INTO base_models (id, source, folder, digest, files, architecture, parameters, modules, created_at) "
        "VALUES ('tiny', 's', 'f', 'd', '[]', 'a', 1, '[]', 1)",
        "INSERT INTO jobs (id, owner_id, kind, name, spec, base_model_id, state, priority, run_after, epoch, attempt, "
        "lease_until, lost_without_progress, step, event_seq, created_at, announced_at) VALUES ('job-1', 'u', 'train', "
        "'n', '{}', 'tiny', 'running', 0, 1, 1, 1, extract(epoch FROM clock_timestamp()) + 60, 0, 0, 0, 1, 1)",
    )


def test_workers_that_it_would_fence_are_to_stop_first(plain_owner: str) -> None:
    claimed_by_an_older_worker(plain_owner)
    with pytest.raises(RuntimeError, match=r"1 jobs are held by workers of the release before.*stop these workers"):
        migrations.upgrade(plain_owner, "0003")
    run(plain_owner, "UPDATE jobs SET lease_until = 1")  # nobody renews it any more
    migrations.upgrade(plain_owner, "0003")


def test_a_superuser_is_not_held_and_its_workers_go_on(postgres_server: str) -> None:
    with postgres_database(postgres_server, "template1") as url:
        claimed_by_an_older_worker(url)
        migrations.upgrade(url, "0003")
