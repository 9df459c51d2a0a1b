"""Sending webhooks: signed as Standard Webhooks says, to an address that was checked, within limits."""

import base64
import hashlib
import hmac
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import httpcore

from service.webhook_addresses import Policy, Refused, Target, addresses, parse

SECONDS = 5.0  # for all of it: the name, the connection, the request, the answer's head
MAX_ANSWER_BYTES = 64 << 10  # on the wire; of the answer only the head is read
_TRIED_ADDRESSES = 3
_SECRET = "whsec_"  # noqa: S105 - what every secret begins with


@dataclass(frozen=True)
class Outcome:
    """What came of an attempt: the answer's HTTP status, or why there was none."""

    status: int | None = None
    error: str | None = None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


def signature(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """The header `webhook-signature` (Standard Webhooks, symmetric): HMAC-SHA256 over id, time and body."""
    key = base64.b64decode(secret.removeprefix(_SECRET))
    signed = hmac.new(key, f"{message_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def new_secret(random: bytes) -> str:
    """`random`: 24 to 64 bytes, says the specification."""
    return _SECRET + base64.b64encode(random).decode()


def send(url: str, secret: str, message_id: str, body: str, policy: Policy, tls: ssl.SSLContext) -> Outcome:
    """One attempt. No fault of the other side raises; redirects are not followed."""
    deadline = time.monotonic() + SECONDS
    timestamp = int(time.time())
    headers = {
        "content-type": "application/json",
        "user-agent": f"Luthier/{version('luthier')}",
        "connection": "close",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(secret, message_id, timestamp, body),
    }
    try:
        target = parse(url, policy)
        dialled = _Dialler(addresses(target, policy, SECONDS), deadline)
        return _answered(_post(target, dialled, headers, body.encode(), tls))
    except Refused as refusal:
        return Outcome(error=f"not sent: {refusal}")
    except (httpcore.TimeoutException, _Late):
        return Outcome(error=f"no answer within {SECONDS:.0f} s")
    except _TooLong:
        return Outcome(error=f"the answer's head is longer than {MAX_ANSWER_BYTES} bytes")
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
        return Outcome(error=_fault(error))


def _answered(status: int) -> Outcome:
    if 200 <= status < 300:
        return Outcome(status)
    followed = "; redirects are not followed" if 300 <= status < 400 else ""
    return Outcome(status, f"answered with {status}{followed}")


def _fault(error: Exception) -> str:
    """Without what the system says of addresses and ports."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not valid: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return "does not speak TLS"
        cause = cause.__cause__ or cause.__context__
    return "the connection failed" if isinstance(error, httpcore.ConnectError) else "the connection broke off"


def _post(target: Target, dialler: "_Dialler", headers: Mapping[str, str], body: bytes, tls: ssl.SSLContext) -> int:
    """The status. The rest of the answer is left where it is: nobody reads it."""
    url = httpcore.URL(
        scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path.encode()
    )
    with (
        httpcore.ConnectionPool(ssl_context=tls, network_backend=dialler) as pool,
        pool.stream("POST", url, headers=list({"host": target.authority, **headers}.items()), content=body) as answer,
    ):
        return int(answer.status)


class _Late(Exception):
    """The deadline has passed."""


class _TooLong(Exception):
    """More bytes came than a head may have."""


class _Dialler(httpcore.NetworkBackend):
    """Connects to the addresses that it was given, whatever name it is asked for, until a deadline.

    TLS asks for and verifies the name all the same: httpcore hands it to `start_tls`.
    """

    def __init__(self, checked: Sequence[str], deadline: float) -> None:
        self._checked, self._deadline = checked[:_TRIED_ADDRESSES], deadline
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - the name, which was looked up before
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - there is one deadline for everything
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        for last, address in enumerate(self._checked, 1 - len(self._checked)):
            try:
                left = _left(self._deadline)
                inner = self._inner.connect_tcp(address, port, left, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if last == 0:
                    raise
            else:
                return _Bounded(inner, self._deadline)
        raise httpcore.ConnectError("no address")


class _Bounded(httpcore.NetworkStream):
    """A connection with one deadline and a limit on what it reads, which no trickle of bytes gets around."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: float) -> None:
        self._inner, self._deadline, self._read = inner, deadline, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        data = self._inner.read(max_bytes, _left(self._deadline))
        self._read += len(data)
        if self._read > MAX_ANSWER_BYTES:
            raise _TooLong
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._inner.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        inner = self._inner.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _Bounded(inner, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(deadline: float) -> float:
    """Seconds. Raises _Late when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise _Late
    return left
