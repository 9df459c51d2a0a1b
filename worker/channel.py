"""How a worker and its host process talk: one JSON object a line, orders down stdin, news up a pipe of its own."""

import json
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any, Literal, TextIO

Stop = Literal["checkpoint", "abandon"]


@dataclass(frozen=True)
class News:
    """One message of the host: what happened, and its particulars."""

    event: str
    data: dict[str, Any]


def encode(kind: str, data: dict[str, Any]) -> str:
    return json.dumps({"kind": kind, "data": data}, separators=(",", ":")) + "\n"


def decode(line: str) -> News:
    message = json.loads(line)
    return News(message["kind"], message["data"])


class HostChannel:
    """The host's end. A thread reads orders, so that a stop is seen while the engine computes."""

    def __init__(self) -> None:
        # Libraries print to stdout as they like: that goes to stderr, and the news keep a descriptor to themselves.
        self._news: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._orders: list[News] = []
        self._arrived = threading.Condition()
        self._stop: Stop | None = None
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    @property
    def stop(self) -> Stop | None:
        """Whether the present order shall end early, and how."""
        return self._stop

    def next_order(self) -> News:
        """Waits for the next order."""
        with self._arrived:
            while not self._orders:
                self._arrived.wait()
            return self._orders.pop(0)

    def send(self, event: str, **data: Any) -> None:
        self._news.write(encode(event, data))
        self._news.flush()

    def _read(self) -> None:
        for line in sys.stdin:
            order = decode(line)
            with self._arrived:
                if order.event == "stop":
                    self._stop = order.data["how"]
                else:
                    self._stop = None  # it was meant for the order before, which has ended
                    self._orders.append(order)
                    self._arrived.notify()
        # The worker is gone: nothing this process could still make would count.
        os._exit(1)
