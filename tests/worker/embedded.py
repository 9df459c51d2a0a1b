"""`luthier up` as a person starts it, with leases short enough for a test, and a client."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.servers import free_port, wait_until
from tests.worker.bench import QUICK

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
    """The service in a process tree of its own. Only what it prints and answers is looked at."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = os.environ | FAST | {"LUTHIER_DATA_DIR": str(folder / "data")} | environment
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

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def log(self) -> str:
        return (self.folder / "up.log").read_text()

    def luthier(self, *arguments: str) -> str:
        """One call of the console script; what it printed."""
        command = [sys.executable, "-m", "service.cli", *arguments]
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout.strip()

    def set_up(self, model: Path, examples: bytes) -> None:
        """A base model, a user's key, a dataset."""
        self.luthier("base-models", "add", "tiny", "--folder", str(model))
        self.client.headers["Authorization"] = f"Bearer {self.luthier('users', 'add', 'ada')}"
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
        body = {"base_model": "tiny", "dataset": self.dataset, "lora": {"rank": 4, "dropout": 0.1}}
        return str(self.post("/jobs", json=body | {"training": QUICK | training})["id"])

    def until(self, job_id: str, ready: Callable[[dict[str, Any]], bool], seconds: float = 120) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while not ready(job := self.get(f"/jobs/{job_id}")):
            assert time.monotonic() < deadline, f"{job}\n{self.log[-3000:]}"
            time.sleep(0.05)
        return dict(job)

    def ended(self, job_id: str) -> dict[str, Any]:
        return self.until(job_id, lambda job: job["status"] in ("succeeded", "failed", "cancelled"))

    def pid(self, *words: str) -> int:
        """The process of this tree whose command line has all the words."""
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children(recursive=True):
            line = " ".join(process.cmdline())
            if all(word in line for word in words):
                return process.pid
        raise LookupError(words)

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)
