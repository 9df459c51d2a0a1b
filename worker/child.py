"""The worker's handle on its host process: started on demand, given orders, listened to, killed."""

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from typing import IO, Any

from worker.channel import News, Stop, decode, encode

log = logging.getLogger(__name__)
# The host computes on untrusted data: it gets no credentials.
_SECRET_PREFIXES = ("LUTHIER_", "AWS_", "POSTGRES_", "PG", "REDIS_", "HF_TOKEN")


class HostDied(Exception):
    """The host process ended by itself; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Host:
    """One child process. Use from one thread at a time. `inherited` is a descriptor that it holds while it lives."""

    def __init__(self, device: str, threads: int, inherited: int | None = None) -> None:
        command = [sys.executable, "-m", "worker.host", str(os.getpid()), device, str(threads)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET_PREFIXES)}
        environment["HF_HUB_OFFLINE"] = "1"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            pass_fds=() if inherited is None else (inherited,),
        )
        self._news: queue.Queue[News | None] = queue.Queue()
        self._idle_since = time.monotonic()
        threading.Thread(target=self._listen, args=(self._process.stdout,), name="host news", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def idle_seconds(self) -> float:
        """Since the last order or news."""
        return time.monotonic() - self._idle_since

    def order(self, verb: str, **data: Any) -> None:
        """Raises HostDied."""
        self._write(verb, data)

    def stop(self, how: Stop) -> None:
        """Ask the present order to end after its step, with a checkpoint or without. Raises HostDied."""
        self._write("stop", {"how": how})

    def next_news(self, timeout: float) -> News | None:
        """The next message, or None when there was none in time. Raises HostDied once the last one was taken."""
        try:
            news = self._news.get(timeout=timeout)
        except queue.Empty:
            return None
        if news is None:
            self._news.put(None)
            raise HostDied(self._process.wait())
        self._idle_since = time.monotonic()
        return news

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _write(self, kind: str, data: dict[str, Any]) -> None:
        stdin = self._process.stdin
        assert stdin is not None  # noqa: S101 - for the type checker: opened with PIPE
        self._idle_since = time.monotonic()
        try:
            stdin.write(encode(kind, data))
            stdin.flush()
        except (BrokenPipeError, ValueError):
            raise HostDied(self._process.wait()) from None

    def _listen(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._news.put(decode(line))
        self._news.put(None)
