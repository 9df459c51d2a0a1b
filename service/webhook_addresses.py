"""Where webhooks may go: which URLs, and which addresses their names stand for.

Anybody with a key chooses the URL and we send the request, so every address of a name has to be public: not this
machine, not this network, not a cloud's metadata service (OWASP API7, server-side request forgery). A name is looked
up again for every attempt, and the connection is made to an address that was checked, not to the name.
"""

import queue
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from service.settings import Settings

MAX_URL_LENGTH = 2000
_PORTS = {"https": 443, "http": 80}
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_GLOBAL_UNICAST = ip_network("2000::/3")  # all that is handed out of IPv6 (RFC 4291, IANA)
# What Python calls global and is not: addresses that hold or relay another one, and Azure's own service.
_SPECIAL = [
    ip_network(name)
    for name in ("168.63.129.16/32", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]


class Refused(Exception):
    """A webhook may not go there; the message tells its owner why."""


def lookup(host: str, port: int) -> list[str]:
    """Every address of a name. Raises OSError when it has none."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


@dataclass(frozen=True)
class Policy:
    """What the operator allows beside HTTPS to public addresses."""

    allow_http: bool = False
    networks: Sequence[IPv4Network | IPv6Network] = ()
    lookup: Callable[[str, int], list[str]] = field(default=lookup)

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """Raises ValueError for what is not a network."""
        names = [name.strip() for name in settings.webhook_networks.split(",")]
        return cls(settings.webhooks_over_http, [ip_network(name) for name in names if name])


@dataclass(frozen=True)
class Target:
    """A URL in its parts, none of which is read again from text. `path` has the query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def parse(url: str, policy: Policy) -> Target:
    """Raises Refused."""
    if len(url) > MAX_URL_LENGTH or not re.fullmatch(r"[\x21-\x7e]+", url) or re.search(r'[\\"<>^`{|}#]', url):
        raise Refused(f"expected at most {MAX_URL_LENGTH} printable ASCII characters, without spaces or a fragment")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        raise Refused("is not a URL") from None
    if parts.scheme not in ("https", "http") or (parts.scheme == "http" and not policy.allow_http):
        raise Refused("must begin with https://")
    if "@" in parts.netloc:
        raise Refused("must not contain a user or a password; a path or a query may hold a token")
    port = _PORTS[parts.scheme] if port is None else port
    if port not in _PORTS.values() and port < 1024:
        raise Refused(f"port {port} is not for webhooks: use 443, or one from 1024")
    _check_host(host)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port, path)


def addresses(target: Target, policy: Policy, seconds: float) -> list[str]:
    """Every address that `target` stands for, now. Raises Refused unless all of them may be dialled."""
    found = _lookup_within(target, policy, seconds)
    for address in found:
        if not _may_dial(address, policy):
            # Not which one: that would map the network for whoever asks.
            raise Refused("its name has an address that is not public")
    return found


def _check_host(host: str) -> None:
    """Raises Refused for what resolvers read in more than one way, such as 0x7f.1 or 2130706433, and for zones."""
    try:
        if "%" in host:
            raise ValueError
        ip_address(host)
    except ValueError:
        labels = host.split(".")
        numeric = re.fullmatch(r"\d+|0x[0-9a-f]*", labels[-1]) is not None
        if len(host) > 253 or numeric or not all(_LABEL.fullmatch(label) for label in labels):
            raise Refused("its host is neither a name nor an address") from None


def _may_dial(text: str, policy: Policy) -> bool:
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return False
    return any(address in network for network in policy.networks) or _is_public(address)


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if any(address in network for network in _SPECIAL):
        return False
    if isinstance(address, IPv6Address):
        return address in _GLOBAL_UNICAST and address.is_global
    return address.is_global and not address.is_multicast and not address.is_reserved


def _lookup_within(target: Target, policy: Policy, seconds: float) -> list[str]:
    """getaddrinfo has no time limit; a name server that never answers must hold up nobody."""
    answer: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(policy.lookup(target.host, target.port))
        except (OSError, UnicodeError) as error:
            answer.put(error)

    threading.Thread(target=ask, name="webhook lookup", daemon=True).start()
    try:
        found = answer.get(timeout=max(0.0, seconds))
    except queue.Empty:
        raise Refused("its name was not resolved in time") from None
    if not isinstance(found, list) or not found:
        raise Refused("its name has no address")
    return found
