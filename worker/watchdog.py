"""Notices that a host computes no more although it lives: a kernel that never returns, a file system that hangs.

The lease says nothing of that, as another process renews it. A training tells of every step, and while it is at one, of
every micro-batch and every few seconds; before the first, how long one should take. Other work tells less, and has
longer.
"""

import statistics
import time
from collections import deque

from worker.channel import News

_STEPS = 101  # whose median says how long a step takes
_TIMES_A_STEP = 10
_OTHER_WORK = 12  # times as long may it take to load a base model, or to decompose a matrix


class Watchdog:
    """`heard` everything that the host tells; `silence` is too long once it exceeds `limit` (both in seconds)."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._durations: deque[float] = deque(maxlen=_STEPS)
        self._training = False
        self._predicted = 0.0
        self._last = time.monotonic()

    def heard(self, news: News) -> None:
        """Call it when a message has been dealt with: what that took was not the host's time."""
        self._last = time.monotonic()
        if news.event == "planned":
            self._training = True
            self._predicted = float(news.data.get("predicted_step_seconds") or 0.0)
        elif news.event == "phase":
            self._training = False
        elif news.event == "step":
            self._durations.append(float(news.data["seconds"]))

    @property
    def limit(self) -> float:
        if not self._training:
            return _OTHER_WORK * self._stall_seconds
        usual = statistics.median(self._durations) if self._durations else 0.0
        return max(self._stall_seconds, _TIMES_A_STEP * max(usual, self._predicted))

    @property
    def silence(self) -> float:
        return time.monotonic() - self._last

    @property
    def expired(self) -> bool:
        return self.silence > self.limit
