"""The child process that holds the warm base model and the device: ``python -m worker.host``.

A crash, an OOM kill or a hang in native code ends this process and not the worker's heartbeat. It dies with the
worker: the kernel kills it, and should that fail, its stdin ends.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy
import torch
from safetensors import SafetensorError

from lora_engine.errors import AdapterError, BaseModelError, EngineError, OutOfMemory
from worker import exporting, io_faults, merging, training
from worker.channel import HostChannel, News
from worker.telling import Stopped
from worker.warm_base import WarmBase

_PR_SET_PDEATHSIG = 1
_NO_MEMORY = "memory ran out; lower sequence_length or the rank, or use nf4"
_VERBS: dict[str, Callable[[dict[str, Any], WarmBase, HostChannel], None]] = {
    "train": training.train,
    "merge": merging.merge,
    "search": merging.search,
    "extract": merging.extract,
    "ingest": merging.ingest,
    "export": exporting.export,
    "analyze": exporting.analyze,
    "verify": exporting.verify,
}
log = logging.getLogger(__name__)


def main() -> None:
    """Carry out orders until the worker ends."""
    _die_with_parent(int(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s host %(message)s")
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the worker asks with it where a host hangs
    channel = HostChannel()
    warm = WarmBase(device=sys.argv[2], threads=int(sys.argv[3]))
    channel.send("ready")
    while True:
        _carry_out(channel.next_order(), channel, warm)


def _carry_out(order: News, channel: HostChannel, warm: WarmBase) -> None:
    try:
        _VERBS[order.event](order.data, warm, channel)
    except Stopped:
        channel.send("stopped")
    except BaseModelError as error:
        # This machine's files or device are at fault; another worker may do better.
        channel.send("interrupted", code=error.code, message=error.message)
    except EngineError as error:
        channel.send("failed", **_reason(error))
    except (MemoryError, torch.OutOfMemoryError):
        log.exception("order %s", order.event)
        channel.send("failed", **_reason(OutOfMemory(_NO_MEMORY if order.event == "train" else "memory ran out")))
    except (numpy.linalg.LinAlgError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        log.exception("order %s", order.event)
        message = "the numbers of the adapters are beyond what can be computed with; look for huge or tiny weights"
        channel.send("failed", **_reason(AdapterError(message)))
    except (OSError, SafetensorError) as error:
        log.exception("order %s", order.event)
        code, message = io_faults.told(error)
        if code == "disk_full" and order.event != "train":  # would begin again and end here again
            channel.send("failed", code=code, message=message, category="capacity")
        else:  # a training goes on from its checkpoint once there is room
            channel.send("interrupted", code=code, message=message)
    except Exception as error:
        # Nobody knows what state this process is in now; the next one starts afresh.
        log.exception("order %s", order.event)
        channel.send("interrupted", code="internal_error", message=f"{type(error).__name__}: {error}"[:300])


def _reason(error: EngineError) -> dict[str, Any]:
    return {"code": error.code, "category": error.category, "message": error.message}


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


if __name__ == "__main__":
    main()
