"""Failpoints: named places where a test makes a process die, stop, wait or fail. Off, one costs a check for None.

`POINTS` is the only list of them. The environment variable LUTHIER_FAILPOINTS names a folder; a file in it with the
name of a point arms that point, in every process that has the variable, running or yet to start. A point that acts
disarms itself first, so that what is started in its place does not meet it again.

Points lie in pairs, before and after an effect. An error raised *after* one is the answer that got lost: what was
asked for has been done, and the caller is told otherwise.
"""

import errno
import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

VARIABLE = "LUTHIER_FAILPOINTS"

# name: the file in which it is reached
POINTS = {
    # A request of the API.
    "upload.receiving": "service/datasets.py",  # for every piece of the body
    "dataset.before_object": "service/datasets.py",  # its row says validating
    "dataset.after_object": "service/datasets.py",  # its object is durable, its row does not know
    "submit.before_commit": "service/jobs.py",
    "commit.before_wake": "service/db.py",  # committed; the relay has not been told, nothing was answered
    "stack.before_publish": "service/stacking.py",  # a merge within the request has stored its files
    "stack.after_publish": "service/stacking.py",
    # The sweep, in every API and worker process.
    "relay.before_send": "service/queue.py",
    "relay.after_send": "service/queue.py",  # sent, and still in the outbox
    "sweep.before_reap_commit": "service/sweep.py",
    "sweep.objects_deleted": "service/sweep.py",  # the row does not know
    # The store.
    "storage.before_rename": "service/storage.py",  # a local object is written and fsynced beside its place
    "storage.after_put": "service/storage.py",  # the bytes are there, and not compared yet
    "storage.between_files": "service/storage.py",  # of a folder that is uploaded
    "storage.fetching": "service/storage.py",  # for every piece of an object
    # The worker.
    "worker.claimed": "worker/supervisor.py",
    "worker.ordered": "worker/run.py",  # the host has its order
    "worker.checkpoint_uploaded": "worker/run.py",  # and not recorded
    "worker.checkpoint_recorded": "worker/run.py",
    "worker.before_publish": "worker/run.py",  # the result is uploaded
    "worker.after_publish": "worker/run.py",
    # Its host.
    "host.loading": "worker/warm_base.py",
    "host.step": "worker/training.py",  # after every step, before it is told
    "host.finished": "worker/training.py",  # the adapter is written, and nobody was told
    # The engine.
    "checkpoint.writing": "lora_engine/checkpoint.py",  # between the tensors and the rest
    "folder.before_rename": "lora_engine/folders.py",  # whole and fsynced beside its place
    "folder.after_rename": "lora_engine/folders.py",
}

_folder: Path | None = Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None
_lock = threading.Lock()
_reached: Counter[str] = Counter()


class InjectedFault(Exception):
    """What a point raises that was given no other error."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a point does.

    Attributes:
        do: "kill" and "stop" send SIGKILL and SIGSTOP to the process; "sleep" waits; "raise" raises.
        at: the how manieth time it is reached, counted in each process since it was armed.
        seconds: of sleep.
        error: the errno of an OSError to raise, such as "ENOSPC"; None for an InjectedFault.
        always: act from then on every time, and stay armed.
    """

    do: Literal["kill", "stop", "sleep", "raise"]
    at: int = 1
    seconds: float = 3600.0
    error: str | None = None
    always: bool = False


def reach(point: str) -> None:
    """Do what `point` is armed with; nothing otherwise."""
    if _folder is not None:
        _act(_folder, point)


def watch(folder: Path | None) -> None:
    """Let this process heed the files of `folder`, as the variable does from the start; None for none."""
    global _folder
    _folder = folder
    _reached.clear()


def arm(folder: Path, point: str, fault: Fault) -> None:
    """Raises KeyError for a point that there is not."""
    _ = POINTS[point]
    temporary = folder / f".{point}"
    temporary.write_text(json.dumps(asdict(fault)))
    temporary.rename(folder / point)


def is_armed(folder: Path, point: str) -> bool:
    """False once the point has acted."""
    return (folder / point).exists()


def _act(folder: Path, point: str) -> None:
    path = folder / point
    with _lock:
        try:
            fault = Fault(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            _reached.pop(point, None)
            return
        _reached[point] += 1
        if _reached[point] < fault.at:
            return
        if not fault.always:
            try:
                path.unlink()
            except FileNotFoundError:  # another process was first
                return
    _do(fault, point)


def _do(fault: Fault, point: str) -> None:
    match fault.do:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(fault.seconds)
        case "raise" if fault.error is not None:
            number = int(getattr(errno, fault.error))
            raise OSError(number, os.strerror(number))
        case "raise":
            raise InjectedFault(point)
