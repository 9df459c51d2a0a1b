"""Event streams whose clients do not read (F35)."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest

from service import events
from service.api import event_stream, event_watch
from tests.servers import wait_until
from tests.service.site import Site, listening

STREAM = {"accept": "text/event-stream"}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_watch, "POLL_SECONDS", 0.02)


@contextmanager
def deaf(site: Site, job_id: str, count: int) -> Iterator[str]:
    """The site's URL, while so many clients have asked for the job's events and never read."""
    with listening(site.app) as url:
        clients = []
        for _ in range(count):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
            head = f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.keys['ann']}\r\n"
            client.sendall(f"{head}Accept: text/event-stream\r\n\r\n".encode())
            clients.append(client)
        wait_until(lambda: site.app.state.parts.streams[site.ids["ann"]] == count)
        try:
            yield url
        finally:
            for client in clients:
                client.close()


def tell(site: Site, job_id: str, count: int, length: int) -> None:
    with site.database.unit_of_work() as session:
        for number in range(count):
            events.append(session, job_id, f"{number}: {'x' * length}")


def test_f35_clients_that_never_read_cost_little_and_hold_nobody_up(sqlite_site: Site) -> None:
    site, job_id = sqlite_site, sqlite_site.train()
    with deaf(site, job_id, 99) as url:
        before = psutil.Process().memory_info().rss
        tell(site, job_id, 500, 4000)
        site.ann.post(f"/jobs/{job_id}/cancel")
        with httpx.stream("GET", f"{url}/jobs/{job_id}/events", headers={**site.ann.headers, **STREAM}) as answer:
            seen = [line for line in answer.iter_lines() if line.startswith("id: ")]
        assert len(seen) == 502
        # All of it for each of them would be 200 MB.
        assert psutil.Process().memory_info().rss - before < 150 << 20


def test_f35_clients_that_never_read_are_let_go(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """More is told than the sockets' buffers hold."""
    site, job_id = sqlite_site, sqlite_site.train()
    monkeypatch.setattr(event_stream, "STALLED_SECONDS", 0.3)
    with deaf(site, job_id, 5):
        tell(site, job_id, 1000, 16_000)
        wait_until(lambda: site.app.state.parts.streams[site.ids["ann"]] == 0, seconds=30)
