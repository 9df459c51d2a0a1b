"""What every test can ask for. Nothing here imports torch, and nothing is started before a test needs it."""

import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

# Before anything imports torch, here or in a child: the runs of xdist share the cores already.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings
from sqlalchemy import create_engine, text

import migrations
from lora_engine import failpoints
from lora_engine.failpoints import Fault
from service.db import Database
from service.settings import Settings
from service.storage import Storage, open_storage
from tests import servers

FOLDER = "luthier_servers"
settings.register_profile("same examples every time", derandomize=True, database=None)
settings.load_profile("same examples every time")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is cut off tidies up too
        launcher = servers.Launcher()
        config.add_cleanup(launcher.close)
        config.stash[_folder] = str(launcher.folder)
    else:
        config.stash[_folder] = config.workerinput[FOLDER]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    node.workerinput[FOLDER] = node.config.stash[_folder]  # type: ignore[attr-defined]


_folder = pytest.StashKey[str]()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("LUTHIER_", "AWS_"))]:
        monkeypatch.delenv(name)


# Databases: every test gets a copy of one that was migrated once.


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "luthier.db"
    migrations.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "data" / "luthier.db"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> str:
    """An URL with {name} where the database's name goes."""
    return servers.address(pytestconfig.stash[_folder], "postgres")


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str) -> str:
    """One template for each of xdist's workers: making it takes less time than agreeing on one."""
    name = f"template_{uuid.uuid4().hex}"
    _postgres(postgres_server, f"CREATE DATABASE {name}")
    migrations.upgrade(postgres_server.format(name=name))
    return name


@contextmanager
def postgres_database(server: str, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    _postgres(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.format(name=name)
    _postgres(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_server: str, postgres_template: str) -> Iterator[str]:
    with postgres_database(postgres_server, postgres_template) as url:
        yield url


def _postgres(server: str, statement: str) -> None:
    engine = create_engine(server.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Migrated and empty, once on SQLite and once on PostgreSQL."""
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def sqlite_database(sqlite_url: str) -> Iterator[Database]:
    """For tests in which the database plays no part."""
    database = Database(sqlite_url)
    yield database
    database.close()


# Faults.


class Failpoints:
    """Arms points in this process, and in those that it starts from now on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def arm(self, point: str, do: Literal["kill", "stop", "sleep", "raise"] = "kill", **fault: Any) -> None:
        failpoints.arm(self.folder, point, Fault(do=do, **fault))

    def is_armed(self, point: str) -> bool:
        """False once it has acted."""
        return failpoints.is_armed(self.folder, point)


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Failpoints]:
    folder = tmp_path / "failpoints"
    folder.mkdir()
    monkeypatch.setenv(failpoints.VARIABLE, str(folder))
    failpoints.watch(folder)
    yield Failpoints(folder)
    failpoints.watch(None)


# The broker and the object stores.


@pytest.fixture
def broker() -> Iterator[servers.Valkey]:
    valkey = servers.Valkey()
    yield valkey
    valkey.close()


@pytest.fixture
def s3_bucket(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Makes an empty bucket on "moto" or "nanio", points AWS_* there, and returns the bucket's storage URL."""

    def make(server: str) -> str:
        import boto3

        endpoint = servers.address(pytestconfig.stash[_folder], server)
        for name, value in servers.S3_CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        bucket = f"test-{uuid.uuid4().hex}"
        boto3.client("s3", region_name=servers.BUCKET_REGION).create_bucket(Bucket=bucket)
        return f"s3://{bucket}/objects"

    return make


@pytest.fixture(params=["local", "moto", "nanio"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, s3_bucket: Callable[[str], str]) -> Storage:
    url = f"file://{tmp_path / 'data' / 'objects'}" if request.param == "local" else s3_bucket(request.param)
    return open_storage(url)


@pytest.fixture
def settings(sqlite_url: str, tmp_path: Path) -> Settings:
    """Embedded parts below tmp_path, SQLite migrated; nothing listens at the broker's address."""
    return Settings(data_dir=tmp_path / "data", database_url=sqlite_url)
