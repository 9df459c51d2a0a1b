"""The API as a process that is killed and started again, with a client and one user."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from lora_engine import failpoints
from service import users
from service.db import Database
from service.settings import Settings
from service.storage import Storage, open_storage
from tests import servers
from tests.conftest import Failpoints
from tests.service import rows
from tests.service.site import LINE


class Api:
    """Sweeps at its start and once an hour, unless it is told otherwise."""

    def __init__(self, database_url: str, broker_url: str = "", **settings: str) -> None:
        self.folder = servers.short_folder()
        self.settings = Settings(data_dir=self.folder / "data", database_url=database_url, broker_url=broker_url)
        self.settings.data_dir.mkdir()
        self.points = Failpoints(self.folder / "failpoints")
        self.points.folder.mkdir()
        self.database = Database(database_url)
        self.storage: Storage = open_storage(self.settings.storage_url)
        self.port = servers.free_port()
        own = {"DATA_DIR": self.settings.data_dir, "DATABASE_URL": database_url, "SWEEP_SECONDS": 3600, **settings}
        own["BROKER_URL"] = self.settings.broker_url
        self.environment = os.environ | {f"LUTHIER_{name}": str(value) for name, value in own.items()}
        self.environment[failpoints.VARIABLE] = str(self.points.folder)
        self.process: subprocess.Popen[bytes] | None = None
        rows.add_base_model(self.database)
        owner = rows.add_user(self.database, "ann")
        self.owner_id = owner
        with self.database.unit_of_work() as session:
            self.key = users.create_key(session, owner)
        self.start()
        headers = {"Authorization": f"Bearer {self.key}"}
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=30)

    def start(self) -> None:
        """Unless it runs."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "service.cli", "api", "--port", str(self.port)]
            self.process = servers.start(command, self.folder, "api", env=self.environment)
            servers.wait_until(lambda: servers.answers(self.port), self.process)

    def died(self) -> bool:
        """Whether a signal ended it."""
        assert self.process is not None
        return self.process.wait(20) < 0

    def close(self) -> None:
        self.client.close()
        if self.process is not None:
            servers.stop(self.process)
        self.database.close()
        shutil.rmtree(self.folder)

    @property
    def log(self) -> str:
        return (self.folder / "api.log").read_text()

    def upload(self, content: bytes = LINE * 3) -> httpx.Response:
        return self.client.post("/datasets", content=content, headers={"content-type": "application/jsonl"})

    def dataset(self) -> str:
        answer = self.upload()
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def submit(self, dataset_id: str, key: str) -> httpx.Response:
        body = {"base_model": rows.BASE_MODEL, "dataset": dataset_id}
        return self.client.post("/jobs", json=body, headers={"Idempotency-Key": key})

    def cut_off(self, method: str, path: str, **content: Any) -> None:
        """A request during which the process is killed: there is no answer to it."""
        answer = None
        with suppress(httpx.TransportError):
            answer = self.client.request(method, path, **content)
        assert answer is None, answer.text
        assert self.died()

    def uploads_in_flight(self) -> list[Path]:
        return list(self.settings.work_dir.glob("upload-*"))
