"""The worker's handle on its host process: started on demand, given orders, listened to, killed."""

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from lora_engine import failpoints
from worker.channel import News, Stop, decode, encode

log = logging.getLogger(__name__)
# The host computes on untrusted data: it gets what it needs to compute, and no credentials.
_HANDED_ON = ("PATH", "HOME", "LANG", "LC_", "TZ", "TMPDIR", "VIRTUAL_ENV", "PYTHON", "LD_", "CUDA", "NVIDIA", "OMP_",
              "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_", "TRITON_", "XDG_CACHE_HOME", "TOKENIZERS_", "BNB_",
              failpoints.VARIABLE)  # fmt: skip
# The kernel kills a child with the *thread* that started it: this one lives as long as the process.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host starter")


class HostDied(Exception):
    """The host process ended by itself; `code` is its exit status, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Host:
    """One child process. Use from one thread at a time. `inherited` is a descriptor that it holds while it lives."""

    def __init__(self, device: str, threads: int, inherited: int | None = None) -> None:
        command = [sys.executable, "-m", "worker.host", str(os.getpid()), device, str(threads)]
        environment = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
        environment["HF_HUB_OFFLINE"] = "1"
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as `device_faults` counts them
        # NumPy's products here are of small matrices, over which its threads wait for each other.
        environment.setdefault("OPENBLAS_NUM_THREADS", "1")
        self._process = _starter.submit(
            subprocess.Popen[str],
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            errors="replace",
            pass_fds=() if inherited is None else (inherited,),
        ).result()
        self._news: queue.Queue[News | None] = queue.Queue()
        self._idle_since = time.monotonic()
        self.used = False
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
        self.used = True
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

    def dump_stacks(self) -> None:
        """Have the host write to the log where each of its threads is."""
        self._process.send_signal(signal.SIGUSR1)

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
        try:
            for line in stdout:
                try:
                    self._news.put(decode(line))
                except (ValueError, KeyError, TypeError):  # torn by its death, or printed by a library
                    log.warning("host: not a message: %.200r", line)
        finally:
            self._news.put(None)
