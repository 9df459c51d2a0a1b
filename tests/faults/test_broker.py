"""The whole service with a broker that is cut off, hangs, is emptied, and repeats itself (F5, F6, F7, F14)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from service import queue
from service.db import Database
from tests.faults import history
from tests.faults.proxy import Proxy
from tests.servers import Valkey
from tests.tiny_model import make_tiny_model
from tests.worker.embedded import Embedded

EXAMPLES = b'{"prompt": "2 + 2 =", "completion": " 4"}\n' * 48


@pytest.fixture
def proxied(broker: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Embedded, Proxy]]:
    with Proxy(broker.socket) as proxy:
        monkeypatch.setitem(os.environ, "LUTHIER_BROKER_URL", f"redis://127.0.0.1:{proxy.port}/0")
        embedded = Embedded()
        embedded.set_up(make_tiny_model(tmp_path / "model"), EXAMPLES)
        yield embedded, proxy
        embedded.close()


def test_a_broker_that_fails_in_every_way_loses_nothing_and_doubles_nothing(
    proxied: tuple[Embedded, Proxy], broker: Valkey
) -> None:
    embedded, proxy = proxied
    jobs = []

    def ends(how: str) -> None:
        job: dict[str, Any] = embedded.ended(jobs[-1])
        assert (job["status"], job["attempt"]) == ("succeeded", 1), how

    proxy.cut()
    jobs.append(embedded.submit())
    ends("F5, F7: by the poll, while there is no broker")
    proxy.heal()
    proxy.hang()
    jobs.append(embedded.submit())
    ends("F5: the broker takes connections and says nothing")
    proxy.heal()
    jobs.append(embedded.submit(epochs=60))
    embedded.until(jobs[-1], lambda job: bool(job["step"] >= 5))
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        client.flushall()
    celery = queue.make_celery(broker.url)
    for job_id in jobs * 10:
        queue.send(celery, job_id)
    ends("F6, F14: emptied while it trains, and old messages come again, ten times each")
    jobs.append(embedded.submit())
    ends("F7: a worker whose broker was away for long takes jobs again")
    database = Database(embedded.settings.database_url)
    history.check(database, accepted=jobs, at_rest=False, checkpoint_every=3)
    database.close()
