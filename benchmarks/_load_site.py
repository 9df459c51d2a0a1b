"""What is put under load: PostgreSQL with durable commits, API processes, and rows of a thousand users."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text

import migrations
from service.db import Database
from tests import servers
from tests.service import rows

USERS, JOBS, ADAPTERS = 1_000, 100_000, 10_000
HEAVY = 50_000  # jobs of the first user; the others share the rest

_ROWS = [
    "INSERT INTO users (id, name, created_at) SELECT 'user-' || u, 'user ' || u, 1"
    " FROM generate_series(0, {users} - 1) u",
    "INSERT INTO datasets (id, owner_id, name, status, bytes, sha256, rows, created_at) SELECT 'dataset-' || u,"
    " 'user-' || u, 'd', 'ready', 10, repeat('c', 64), 1, 1 FROM generate_series(0, {users} - 1) u",
    "INSERT INTO jobs (id, owner_id, kind, name, spec, base_model_id, dataset_id, state, priority, run_after, epoch,"
    " attempt, lost_without_progress, step, event_seq, created_at, finished_at, announced_at, purged_at)"
    " SELECT 'job-' || lpad(j::text, 8, '0'), 'user-' || CASE WHEN j < {heavy} THEN 0 ELSE j % {users} END, 'train',"
    " 'job', '{{\"lora\": {{\"rank\": 8}}, \"training\": {{\"epochs\": 1}}}}', 'tiny', 'dataset-' || CASE WHEN j <"
    " {heavy} THEN 0 ELSE j % {users} END, 'succeeded', 0, 1, 1, 1, 0, 100, 0, 1, 1, 1, 1"
    " FROM generate_series(0, {jobs} - 1) j",
    "INSERT INTO adapters (id, owner_id, job_id, base_model_id, name, kind, epoch, prefix, files, bytes, digest, rank,"
    " metrics, created_at) SELECT 'adapter-' || substr(id, 5), owner_id, id, 'tiny', 'a', 'train', 1, 'p', '[]', 1000,"
    " repeat('d', 64), 8, '{{}}', 1 FROM jobs WHERE substr(id, 5)::int % ({jobs} / {adapters}) = 0",
]


@dataclass(frozen=True)
class Site:
    """API processes on one database. Jobs have consecutive ids, users and their keys numbers."""

    database: Database
    url: str
    ports: list[int]
    processes: list[psutil.Process]

    def key(self, user: int) -> str:
        return _key(user)


def owner_of(job: int) -> int:
    return 0 if job < HEAVY else job % USERS


def job_id(job: int) -> str:
    return f"job-{job:08}"


def _key(user: int) -> str:
    return f"luthier_load-{user}"


@contextmanager
def open_site(processes: int) -> Iterator[Site]:
    launcher, broker = servers.Launcher(), servers.Valkey()
    try:
        server = servers.address(str(launcher.folder), "postgres")
        durable = ("ALTER SYSTEM SET fsync = on", "ALTER SYSTEM SET full_page_writes = on", "SELECT pg_reload_conf()")
        _execute(server.format(name="postgres"), *durable, "CREATE DATABASE load")
        url = server.format(name="load")
        migrations.upgrade(url)
        database = Database(url)
        _fill(database, url)
        with tempfile.TemporaryDirectory() as folder:
            ports = [servers.free_port() for _ in range(processes)]
            started = [_start(url, broker.url, Path(folder), port) for port in ports]
            try:
                for port, process in zip(ports, started, strict=True):
                    servers.wait_until(lambda port=port: servers.answers(port), process)  # type: ignore[misc]
                yield Site(database, url, ports, [psutil.Process(process.pid) for process in started])
            finally:
                for process in started:
                    servers.stop(process)
        database.close()
    finally:
        broker.close()
        launcher.close()


def _start(url: str, broker_url: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    own = {"LUTHIER_DATA_DIR": str(folder), "LUTHIER_DATABASE_URL": url, "LUTHIER_BROKER_URL": broker_url,
           "LUTHIER_REQUESTS_PER_SECOND": "100000",
           "LUTHIER_MAX_UNFINISHED_JOBS": "1000000"}  # fmt: skip
    return servers.start([sys.executable, "-m", "service.cli", "api", "--port", str(port)], folder, f"api-{port}",
                         env=os.environ | own)  # fmt: skip


def _fill(database: Database, url: str) -> None:
    rows.add_base_model(database)
    sizes = {"users": USERS, "jobs": JOBS, "adapters": ADAPTERS, "heavy": HEAVY}
    _execute(url, *(statement.format(**sizes) for statement in _ROWS))
    keys = [
        {"id": f"key-{user}", "user": f"user-{user}", "sha256": hashlib.sha256(_key(user).encode()).hexdigest()}
        for user in range(USERS)
    ]
    engine = create_engine(url)
    with engine.begin() as connection:
        statement = "INSERT INTO api_keys (id, user_id, sha256, hint, scope, created_at) VALUES (:id, :user, :sha256, 'l', 'write', 1)"  # noqa: E501
        connection.execute(text(statement), keys)
    engine.dispose()
    _execute(url, "VACUUM ANALYZE")


def _execute(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
