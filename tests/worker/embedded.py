"""`luthier up` as a person starts it, with leases short enough for a test, and a client."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from lora_engine.base_files import file_list
from service import base_models, users
from service.db import Database
from service.settings import Settings
from tests import servers
from tests.servers import free_port, wait_until
from tests.worker.bench import DESCRIPTION, QUICK

FAST = {
    "LUTHIER_LEASE_SECONDS": "6",
    "LUTHIER_HEARTBEAT_SECONDS": "0.5",
    "LUTHIER_POLL_SECONDS": "1",
    "LUTHIER_SWEEP_SECONDS": "0.5",
    "LUTHIER_REWAKE_SECONDS": "2",
    "LUTHIER_THREADS": "1",
    "LUTHIER_DEVICE": "cpu",
}


class Embedded:
    """The service in a process tree and a folder of its own. Only what it prints and answers is looked at."""

    def __init__(self, database_url: str = "", base_model: str = "tiny") -> None:
        self.folder = folder = servers.short_folder()
        self.base_model, self.key, self.dataset = base_model, "", ""
        self.settings = Settings(data_dir=folder / "data", database_url=database_url)
        own = {"LUTHIER_DATA_DIR": str(self.settings.data_dir), "LUTHIER_DATABASE_URL": self.settings.database_url}
        self.environment = os.environ | FAST | own
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.start()
        self.client = httpx.Client(base_url=self.url, timeout=20)

    def start(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "service.cli", "up", "--port", str(port)]
        with (self.folder / "up.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        wait_until(self.is_ready, self.process)

    def restart(self) -> None:
        self.start()
        self.client.base_url = httpx.URL(self.url)

    def stop(self) -> int:
        """SIGTERM, as an init system sends it. Returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        self.client.close()
        assert self.process is not None
        if self.process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def log(self) -> str:
        return (self.folder / "up.log").read_text()

    def set_up(self, model: Path, examples: bytes = b"") -> None:
        """A base model, a user's key, and a dataset if there are examples."""
        database = Database(self.settings.database_url)
        with database.unit_of_work() as session:
            values = {"source": "tiny", "revision": None, "files": file_list(model)}
            base_models.add(session, self.base_model, folder=model, description=DESCRIPTION, **values)
            self.key = users.create_key(session, users.create_user(session, "ada").id)
        database.close()
        self.client.headers["Authorization"] = f"Bearer {self.key}"
        if examples:
            self.dataset = self.post("/datasets", files={"file": ("examples.jsonl", examples)})["id"]

    def post(self, path: str, **content: Any) -> Any:
        response = self.client.post(path, **content)
        assert response.is_success, response.text
        return response.json()

    def get(self, path: str) -> Any:
        """Waits for an API that is being started again."""
        deadline = time.monotonic() + 30
        while True:
            try:
                response = self.client.get(path)
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
                continue
            assert response.is_success, response.text
            return response.json()

    def submit(self, **training: Any) -> str:
        body = {"base_model": self.base_model, "dataset": self.dataset, "lora": {"rank": 4, "dropout": 0.1}}
        return str(self.post("/jobs", json=body | {"training": QUICK | training})["id"])

    def until(self, job_id: str, ready: Callable[[dict[str, Any]], bool], seconds: float = 120) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not ready(job := self.get(f"/jobs/{job_id}")):
            assert time.monotonic() < deadline, f"{job}\n{self.log[-3000:]}"
            time.sleep(0.05)
        return dict(job)

    def ended(self, job_id: str) -> dict[str, Any]:
        return self.until(job_id, lambda job: job["status"] in ("succeeded", "failed", "cancelled"))

    def find(self, *words: str) -> int | None:
        """The process of this tree whose command line has all the words."""
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                if all(word in " ".join(process.cmdline()) for word in words):
                    return process.pid
        return None

    def pid(self, *words: str) -> int:
        pid = self.find(*words)
        assert pid is not None, words
        return pid

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)
