"""Token buckets: how often something may happen, with a reserve for bursts.

A bucket holds at most `burst` tokens and gains `rate` a second (as in RFC 2697's meters). Buckets live in the memory
of one process: what is allowed is allowed by each process that serves HTTP, so that N of them allow N times as much.
That costs no round trip, needs no broker, and never fails; a proxy before them can hold the whole to one limit.
"""

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_BUCKETS = 100_000  # of the ones used least recently the rest is forgotten, which only ever allows more


class Buckets:
    """One bucket a name. Safe to use from many threads."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, name: str) -> int | None:
        """Take one token. None, or when there was none, the seconds after which there is one."""
        with self._lock:
            time_now = self._clock()
            level, since = self._levels.pop(name, (self._burst, time_now))
            level = min(self._burst, level + (time_now - since) * self._rate)
            taken = level >= 1
            self._levels[name] = (level - 1 if taken else level, time_now)
            if len(self._levels) > _MOST_BUCKETS:
                self._levels.popitem(last=False)
        return None if taken else math.ceil((1 - level) / self._rate)


def network(address: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of IPv6 that one customer has for himself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))
