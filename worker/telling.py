"""How work tells that it goes on, and how far it is, and learns that it shall stop."""

import time
from collections.abc import Callable

from worker.channel import HostChannel

_SECONDS = 0.2  # between two messages; what counts modules or bytes would send thousands
_PULSE_SECONDS = 5.0


class Stopped(Exception):
    """The worker wants this order to end. Nothing of it is kept."""


def teller(channel: HostChannel) -> Callable[[int, int], None]:
    """For the engine's verbs: called with (done, total) again and again. It raises Stopped to end the work."""
    last = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal last
        if channel.stop is not None:
            raise Stopped
        if done >= total or time.monotonic() - last >= _SECONDS:
            last = time.monotonic()
            channel.send("progress", step=done, total_steps=total)

    return tell


def pulse(channel: HostChannel) -> Callable[[], None]:
    """For a training, which calls it before every micro-batch: a sign of life every few seconds, for the watchdog."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= _PULSE_SECONDS:
            last = time.monotonic()
            channel.send("alive")

    return beat
