"""`python -m worker` beside a test's own worker, to be killed or stopped. There is no broker: it polls."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Self

import psutil

from lora_engine import failpoints
from tests import servers
from tests.conftest import Failpoints
from tests.worker.bench import Bench

# A lease that a test can wait for, and a sweep once, at the start: tests reap when they mean to.
FAST = {"LEASE_SECONDS": 1.5, "HEARTBEAT_SECONDS": 0.3, "POLL_SECONDS": 0.5, "SWEEP_SECONDS": 3600}


class LoneWorker:
    """Use as a context: at the end nothing of it is left."""

    def __init__(self, bench: Bench, points: Failpoints, **settings: object) -> None:
        self._bench, self._points = bench, points
        self.folder = servers.short_folder()
        told = {
            "DATA_DIR": bench.settings.data_dir,
            "DATABASE_URL": bench.settings.database_url,
            "DEVICE": "cpu",
            "THREADS": 1,
            **FAST,
            **settings,
        }
        environment = os.environ | {f"LUTHIER_{name}": str(value) for name, value in told.items()}
        environment[failpoints.VARIABLE] = str(points.folder)
        self.process: subprocess.Popen[bytes] = servers.start(
            [sys.executable, "-m", "worker"], self.folder, "worker", env=environment
        )
        self._tree: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    @property
    def log(self) -> str:
        return (self.folder / "worker.log").read_text()

    @property
    def host(self) -> psutil.Process | None:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children():
                return process
        return None

    def wait_for(self, point: str) -> None:
        """Until the armed point has acted, in this worker or its host."""
        try:
            servers.wait_until(lambda: not self._points.is_armed(point))
        except TimeoutError:
            raise TimeoutError(f"{point}\n{self.log[-3000:]}") from None

    def kill(self) -> None:
        """SIGKILL. The kernel ends the host, even a stopped one, within five seconds."""
        host = self.host
        self.process.kill()
        self.process.wait()
        if host is not None:
            host.wait(5)

    def stop(self) -> None:
        """SIGSTOP, at a moment when it does not hold the one lock on writing that SQLite has."""
        for _ in range(100):
            self.process.send_signal(signal.SIGSTOP)
            if self._bench.is_writable():
                return
            self.go_on()
            time.sleep(0.02)
        raise TimeoutError("the database stays locked")

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)
