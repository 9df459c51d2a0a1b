"""Parts that fail on demand."""

from collections.abc import Iterator

import pytest

from service.settings import Settings
from tests import servers
from tests.faults import store
from tests.faults.store import FakeStore
from tests.service.site import Site, open_site


@pytest.fixture
def sqlite_site(settings: Settings) -> Iterator[Site]:
    with open_site(settings) as site:
        yield site


@pytest.fixture
def fake_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    """An S3 store that AWS_* point to; its bucket is any."""
    fake = FakeStore()
    with store.listening(fake) as url:
        for name, value in servers.S3_CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield fake
