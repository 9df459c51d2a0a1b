"""Functions that read what strangers made, called in a process of their own with limits of memory and time.

A header, a config or a chat template can be made to take all memory, or to never end; what does that here ends a
child. It has none of its parent's environment, opens no file and no connection once it is ready, and is told nothing
but the request: JSON both ways, so that its answer can be no more than data. A function is named as "module:function",
takes one JSON value and returns one; what it raises of `lora_engine.errors` is raised again on this side. Where its
module has a `prepare`, that is called before the limits hold.
"""

import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import IO, Any, Self

from lora_engine import errors
from lora_engine.errors import EngineError

MAX_ANSWER_BYTES = 64 << 20
_START_SECONDS = 60.0  # to import what the function needs, on a busy machine
_SIZE_BYTES = 8
_READY = "ready"


class Exceeded(Exception):
    """A call took more memory or time than it may, or its process died of it; the message says which limits held."""


class Confined:
    """One function in one process, which is started by the first call and anew after a fault. Any thread may call."""

    def __init__(self, function: str, *, memory_bytes: int, seconds: float) -> None:
        self._function, self._memory_bytes, self._seconds = function, memory_bytes, seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # who started it: a fork of that process has no use of its pipes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def call(self, request: Any) -> Any:
        """What the function returns for `request`.

        Raises:
            EngineError: the function raised it.
            Exceeded: it took too much, or ended its process.
        """
        with self._lock:
            used = self._runs()
            began = time.monotonic()
            answer = self._ask(request)
            if answer is None and used and time.monotonic() - began < self._seconds:
                # Something else may have ended it, or what earlier calls left: a fresh one says whose fault it is.
                answer = self._ask(request)
            if answer is None:
                raise Exceeded(f"it took more than {self._seconds:g} s or {self._memory_bytes >> 20} MB")
        if "error" in answer:
            raise _rebuilt(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the process; the next call starts another."""
        with self._lock:
            self._end()

    def _ask(self, request: Any) -> Any:
        """The process's answer; None when it gave none, and it is ended then."""
        process = self._started()
        try:
            answer = _exchange(process, request, self._seconds + 1)
        except BaseException:
            self._end()
            raise
        if answer is None:
            self._end()
        return answer

    def _runs(self) -> bool:
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._runs():
            return self._process
        self._end()  # it may have died while nobody called
        limits = [str(self._memory_bytes), str(self._seconds)]
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._function, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
        )
        if _receive(self._process, _START_SECONDS) != _READY:
            self._end()
            raise Exceeded(f"the process for {self._function} did not start")
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _environment() -> dict[str, str]:
    """Where Python finds its modules, and nothing that a parser could give away."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    path = os.pathsep.join(entry or os.curdir for entry in sys.path)
    return kept | {"PYTHONPATH": path, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def _exchange(process: subprocess.Popen[bytes], request: Any, seconds: float) -> Any:
    assert process.stdin is not None  # noqa: S101 - both are pipes
    try:
        process.stdin.write(_frame(request))
        process.stdin.flush()
    except BrokenPipeError:
        return None
    return _receive(process, seconds)


def _receive(process: subprocess.Popen[bytes], seconds: float) -> Any:
    """The child's next message; None when it ended, is silent for too long or wants to say too much."""
    assert process.stdout is not None  # noqa: S101
    deadline = time.monotonic() + seconds
    size = int.from_bytes(_read(process.stdout, _SIZE_BYTES, deadline) or b"", "little")
    data = _read(process.stdout, size, deadline) if 0 < size <= MAX_ANSWER_BYTES else None
    return None if data is None else json.loads(data)


def _read(pipe: IO[bytes], size: int, deadline: float) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(pipe.fileno(), size - len(data)) if ready else b""
        if not piece:
            return None
        data += piece
    return bytes(data)


def _frame(value: Any) -> bytes:
    data = json.dumps(value).encode()
    return len(data).to_bytes(_SIZE_BYTES, "little") + data


def _rebuilt(error: dict[str, Any]) -> EngineError:
    kind = getattr(errors, error["kind"], EngineError)
    return kind(error["message"], **error["facts"]) if issubclass(kind, EngineError) else EngineError(error["message"])


def main() -> None:
    """The child: answer until the parent goes away. Memory counts from here; an alarm ends a call that is too long."""
    module, _, name = sys.argv[1].partition(":")
    found = importlib.import_module(module)
    function = getattr(found, name)
    if prepare := getattr(found, "prepare", None):
        prepare()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _limit(int(sys.argv[2]))
    answers.write(_frame(_READY))
    answers.flush()
    while size := int.from_bytes(requests.read(_SIZE_BYTES), "little"):
        request = json.loads(requests.read(size))
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[3]))  # its default action is the end
        try:
            answer = {"value": function(request)}
        except EngineError as error:
            answer = {"error": {"kind": type(error).__name__, "message": error.message, "facts": error.facts}}
        except MemoryError:
            sys.exit(1)  # the parent knows what that means
        answers.write(_frame(answer))
        answers.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if sys.platform == "linux":  # elsewhere the address space is not counted
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # those that are open stay; there will be no other


if __name__ == "__main__":
    main()
