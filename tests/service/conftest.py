"""The application on both databases, and one on PostgreSQL that a whole file of tests shares."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.settings import Settings
from tests.conftest import postgres_database
from tests.service.site import Site, open_site


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with open_site(Settings(data_dir=tmp_path / "data", database_url=database_url)) as site:
        yield site


@pytest.fixture
def sqlite_site(settings: Settings) -> Iterator[Site]:
    """For tests in which the database plays no part."""
    with open_site(settings) as site:
        yield site


@pytest.fixture(scope="module")
def shared_site(
    postgres_server: str, postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """For tables of requests that leave no traces. PostgreSQL, because it refuses more than SQLite does."""
    data_dir = tmp_path_factory.mktemp("shared")
    with postgres_database(postgres_server, postgres_template) as url:
        settings = Settings(
            data_dir=data_dir,
            database_url=url,
            max_upload_bytes=3 << 20,
            max_dataset_rows=1000,
            refusals_per_second=1000,  # the tables are of refusals, all from one address
        )
        with open_site(settings) as site:
            yield site
