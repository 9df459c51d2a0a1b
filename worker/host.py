"""The child process that holds the warm base model and the device: ``python -m worker.host``.

A crash, an OOM kill or a hang in native code ends this process and not the worker's heartbeat. It dies with the
worker: the kernel kills it, and should that fail, its stdin ends.
"""

import ctypes
import logging
import os
import signal
import sys
from typing import Any

from lora_engine.errors import EngineError, OutOfMemory
from worker import merging, training
from worker.channel import HostChannel, News

_PR_SET_PDEATHSIG = 1
log = logging.getLogger(__name__)


def main() -> None:
    """Carry out orders until the worker ends."""
    _die_with_parent(int(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s host %(message)s")
    channel = HostChannel()
    warm = training.WarmBase(device=sys.argv[2], threads=int(sys.argv[3]))
    channel.send("ready")
    while True:
        _carry_out(channel.next_order(), channel, warm)


def _carry_out(order: News, channel: HostChannel, warm: training.WarmBase) -> None:
    try:
        if order.event == "train":
            training.train(order.data, warm, channel)
        else:
            merging.merge(order.data, channel)
    except EngineError as error:
        channel.send("failed", **_reason(error))
    except MemoryError as error:
        channel.send("failed", **_reason(OutOfMemory(f"the machine ran out of memory: {error}")))
    except OSError as error:
        log.exception("order %s", order.event)
        channel.send("interrupted", code="io_error", message=f"{error.strerror or error}")


def _reason(error: EngineError) -> dict[str, Any]:
    return {"code": error.code, "category": error.category, "message": error.message}


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


if __name__ == "__main__":
    main()
