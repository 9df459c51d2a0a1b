"""What the HTTP process costs and how fast it answers: ``python -m benchmarks.api [MEGABYTES]`` prints a table.

Embedded parts: SQLite, a local directory, no broker and no worker. Everything runs on the one machine, the client too.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil

import migrations
from service import base_models, users
from service.db import Database
from service.models import new_id
from service.settings import Settings
from tests.servers import free_port, stop

LINE = b'{"prompt": "What is the answer?", "completion": "' + b"word " * 200 + b'"}\n'
REQUESTS = 300


def main(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder))
        key = _prepare(settings)
        url = f"http://127.0.0.1:{free_port()}"
        began = time.perf_counter()
        with (Path(folder) / "api.log").open("wb") as log:
            process = _start(url, settings, log.fileno())
        try:
            ready = _until_ready(url, began)
            spent = sum(psutil.Process(process.pid).cpu_times()[:2])
            with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600) as client:
                _report(client, process.pid, (ready, spent), megabytes)
        finally:
            stop(process)


def _prepare(settings: Settings) -> str:
    migrations.upgrade(settings.database_url)
    database = Database(settings.database_url)
    with database.unit_of_work() as session:
        user = users.create_user(session, "bench")
        description = {"architecture": "none", "parameters": 1, "context_length": 1, "modules": []}
        base_models.add(
            session, "base", folder=settings.data_dir, source="none", revision=None, files=[], description=description
        )
        key = users.create_key(session, user.id)
    database.close()
    return key


def _start(url: str, settings: Settings, log: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"LUTHIER_DATA_DIR": str(settings.data_dir)}
    command = [sys.executable, "-m", "service.cli", "api", "--port", url.rpartition(":")[2]]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _until_ready(url: str, began: float) -> float:
    while time.perf_counter() - began < 60:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return time.perf_counter() - began
        except httpx.TransportError:
            time.sleep(0.01)
    raise TimeoutError("not ready after 60 s")


def _report(client: httpx.Client, pid: int, ready: tuple[float, float], megabytes: int) -> None:
    process = psutil.Process(pid)
    small = _upload(client, LINE * 10)
    before = process.memory_info().rss
    began = time.perf_counter()
    _upload(client, _lines(megabytes << 20))
    seconds = time.perf_counter() - began
    growth = (_peak(process) - before) / (1 << 20)
    body = {"base_model": "base", "dataset": small}
    submit = _median(lambda: client.post("/jobs", json=body, headers={"Idempotency-Key": new_id("key")}), 201)
    job_id = client.get("/jobs").json()["data"][0]["id"]
    rows = [
        ("from the start of the process to `/readyz` 200", f"{ready[0]:.2f} s"),
        ("CPU time in that", f"{ready[1]:.2f} s"),
        ("memory once it serves", f"{before / (1 << 20):.0f} MB"),
        (f"upload of {megabytes} MB, every line checked, hashed, stored", f"{megabytes / seconds:.0f} MB/s"),
        ("its peak above that memory", f"{growth:.0f} MB"),
        ("`POST /jobs`, median", f"{submit:.1f} ms"),
        ("`GET /jobs/{id}`, median", f"{_median(lambda: client.get(f'/jobs/{job_id}'), 200):.1f} ms"),
        ("`GET /jobs?limit=100`, median", f"{_median(lambda: client.get('/jobs?limit=100'), 200):.1f} ms"),
    ]
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}\n")
    print("| what | measured |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


def _upload(client: httpx.Client, content: bytes | Iterator[bytes]) -> str:
    answer = client.post("/datasets", content=content, headers={"Content-Type": "application/jsonl"})
    answer.raise_for_status()
    return str(answer.json()["id"])


def _lines(size: int) -> Iterator[bytes]:
    block = LINE * 256
    for _ in range(size // len(block)):
        yield block


def _peak(process: psutil.Process) -> int:
    """The highest resident set so far, where the system tells; the present one elsewhere."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return int(process.memory_info().rss)
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def _median(call: Callable[[], httpx.Response], status: int) -> float:
    times = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        answer = call()
        times.append((time.perf_counter() - began) * 1000)
        assert answer.status_code == status, answer.text
    return statistics.median(times)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
