"""The whole HTTP application with users, in one process, on parts of its own."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lora_engine.base_files import digest_of
from service import jobs, leases, users
from service.api.connection import Connection
from service.app import create_app
from service.db import Database
from service.jobs import TrainingRequest
from service.models import new_id
from service.settings import Settings
from service.storage import Storage, put_folder
from tests.servers import answers, free_port, start, stop, wait_until
from tests.service import rows
from tests.service.adapter_files import make_adapter

LINE = b'{"prompt": "2 + 2 =", "completion": " 4"}\n'
FILES = {
    "README.md": b"# adapter\n",
    "adapter_config.json": b'{"peft_type": "LORA"}\n',
    "adapter_model.safetensors": bytes(range(256)) * 400,
}


class Site:
    """An application that runs, and what a test wants from it. `ann` and `bob` know nothing of each other."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self.database: Database = app.state.parts.database.of_everybody()
        self.storage: Storage = app.state.parts.storage
        rows.add_base_model(self.database)
        self.ids = {name: rows.add_user(self.database, name) for name in ("ann", "bob")}
        self.keys: dict[str, str] = {}
        with self.database.unit_of_work() as session:
            for name, user_id in self.ids.items():
                self.keys[name] = users.create_key(session, user_id)
        self.ann = self.client("ann")
        self.bob = self.client("bob")

    def client(self, name: str | None = None) -> TestClient:
        headers = {"Authorization": f"Bearer {self.keys[name]}"} if name else {}
        return TestClient(self.app, headers=headers, raise_server_exceptions=False)

    def upload(self, client: TestClient, content: bytes = LINE * 3) -> str:
        answer = client.post("/datasets", content=content, headers={"content-type": "application/jsonl"})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def train(self, user: str = "ann", **fields: Any) -> str:
        """A queued job."""
        request = TrainingRequest(
            base_model=rows.BASE_MODEL, dataset=rows.add_dataset(self.database, self.ids[user]), **fields
        )
        with self.database.unit_of_work() as session:
            job, _ = jobs.submit_training(session, self.ids[user], request)
        return job.id

    def claim(self) -> leases.Claim:
        """A worker's attempt at the next job, running."""
        with self.database.unit_of_work() as session:
            claim = leases.claim(session, "worker", new_id("slot"), 60)
            assert claim is not None
            leases.start(session, claim)
        return claim

    def adapter(self, folder: Path, files: Mapping[str, bytes] | None = None, user: str = "ann") -> str:
        """A trained adapter; returns its id."""
        self.train(user)
        return self.succeed(folder, files or make_adapter())

    def succeed(self, folder: Path, files: Mapping[str, bytes] = FILES, rank: int | None = 8) -> str:
        """What a worker does: run the next job to its end, with an artifact if there is no rank. Returns its id."""
        claim = self.claim()
        source = folder / claim.job_id
        source.mkdir()
        for name, content in files.items():
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(content)
        prefix = leases.result_prefix(claim, "artifact" if rank is None else "adapter")
        stored = put_folder(self.storage, prefix, source)
        digest = digest_of(stored)
        result = leases.Result(prefix=prefix, files=stored, digest=digest, rank=rank, metrics={"train_loss": 0.5})
        with self.database.unit_of_work() as session:
            leases.succeed(session, claim, result)
        return result.id


@contextmanager
def open_site(settings: Settings) -> Iterator[Site]:
    app = create_app(settings)
    with TestClient(app):
        yield Site(app, settings)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The running application behind a real socket; yields its URL."""
    config = uvicorn.Config(
        app, port=0, lifespan="off", log_level="error", timeout_graceful_shutdown=2, http=Connection
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def serving(data_dir: Path, database_url: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The API as a process of its own, started as an operator would; yields its URL and the process."""
    port = free_port()
    environment = os.environ | {"LUTHIER_DATA_DIR": str(data_dir), "LUTHIER_DATABASE_URL": database_url}
    command = [sys.executable, "-m", "service.cli", "api", "--port", str(port)]
    process = start(command, data_dir, "api", env=environment)
    try:
        wait_until(lambda: answers(port), process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process)


def merge(site: Site, *adapters: tuple[str, float], key: str | None = None, **fields: Any) -> httpx2.Response:
    body = {"adapters": [{"adapter": adapter, "weight": weight} for adapter, weight in adapters], **fields}
    return site.ann.post("/adapters/merge", json=body, headers={"Idempotency-Key": key} if key else {})
