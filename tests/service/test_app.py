"""The process that serves HTTP: what it imports, what it answers to its own faults, what uploads cost it."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import func, select

from service import users
from service.db import Database
from service.models import Dataset
from tests.servers import wait_until
from tests.service import rows
from tests.service.site import LINE, Site, listening, serving

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "bitsandbytes", "peft", "openai", "boto3")
MB = 1 << 20


def test_it_starts_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    """A process that serves HTTP has no use for what the engine needs, and starts in about a second without it."""
    program = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
from fastapi.testclient import TestClient
import service.app
with TestClient(service.app.create_app()) as client:
    assert client.get("/healthz").json() == {{"status": "ok"}}
    assert client.get("/openapi.json").status_code == 200
    assert client.get("/jobs").status_code in (401, 503)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"LUTHIER_DATA_DIR": str(tmp_path)}, timeout=60)


def test_an_unforeseen_fault_is_a_500_in_the_one_shape(
    sqlite_site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret of the inside")

    monkeypatch.setattr("service.jobs.page", fail)
    answer = sqlite_site.ann.get("/jobs")
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["code"], error["category"], error["type"]) == ("internal_error", "platform", "server_error")
    assert "secret" not in answer.text
    request_id = answer.headers["x-request-id"]
    assert request_id in error["message"]
    assert any(request_id in record.message and record.exc_info for record in caplog.records)


def account(database: Database) -> dict[str, str]:
    user_id = rows.add_user(database)
    with database.unit_of_work() as session:
        return {"Authorization": f"Bearer {users.create_key(session, user_id)}", "Content-Type": "application/jsonl"}


def upload_of(megabytes: int) -> Any:
    line = b'{"prompt": "x", "completion": "' + b"y" * 16_000 + b'"}\n'
    for _ in range(megabytes * MB // (64 * len(line))):
        yield line * 64


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_large_upload_takes_little_memory(sqlite_url: str, sqlite_database: Database, tmp_path: Path) -> None:
    headers = account(sqlite_database)
    with serving(tmp_path / "data", sqlite_url) as (url, process):
        assert httpx.post(f"{url}/datasets", content=upload_of(2), headers=headers).status_code == 201
        before = psutil.Process(process.pid).memory_info().rss
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak counts from here
        answer = httpx.post(f"{url}/datasets", content=upload_of(60), headers=headers, timeout=60)
        assert answer.json()["bytes"] > 59 * MB
        status = Path(f"/proc/{process.pid}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    assert peak - before < 40 * MB


def test_an_upload_that_breaks_off_leaves_nothing(sqlite_site: Site) -> None:
    with listening(sqlite_site.app) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            head = (
                f"POST /datasets HTTP/1.1\r\nHost: x\r\nAuthorization: {sqlite_site.ann.headers['authorization']}\r\n"
            )
            connection.sendall(head.encode() + b"Content-Type: text/plain\r\nContent-Length: 100000\r\n\r\n" + LINE * 9)
            wait_until(lambda: any(sqlite_site.settings.work_dir.iterdir()))
        wait_until(lambda: not any(sqlite_site.settings.work_dir.iterdir()))
    assert sqlite_site.ann.get("/datasets").json()["data"] == []


def test_a_process_killed_in_an_upload_leaves_no_dataset(
    sqlite_url: str, sqlite_database: Database, tmp_path: Path
) -> None:
    headers = account(sqlite_database)
    work_dir = tmp_path / "data" / "work"
    with serving(tmp_path / "data", sqlite_url) as (url, process):

        def body() -> Any:
            yield LINE * 1000
            wait_until(lambda: any(work_dir.iterdir()))
            process.send_signal(signal.SIGKILL)
            process.wait()
            yield LINE * 100_000

        with pytest.raises(httpx.TransportError):
            httpx.post(f"{url}/datasets", content=body(), headers=headers)
    with sqlite_database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Dataset)) == 0
    assert len(list(work_dir.iterdir())) == 1  # until the sweep finds that it is abandoned


def test_the_documentation_page_loads_nothing_from_elsewhere(sqlite_site: Site) -> None:
    client = sqlite_site.client()
    page = client.get("/docs")
    assert page.status_code == 200
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert any(link.endswith(".js") for link in links)
    assert all(link.startswith("/") and client.get(link).status_code == 200 for link in links)
