"""One attempt to send a message: signature, TLS, limits on time and size, and no way to another place."""

import json
import socket
import ssl
import time
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest
from openai import InvalidWebhookSignatureError, OpenAI

from service import webhook_delivery
from service.webhook_addresses import Policy
from service.webhook_delivery import Outcome, new_secret, send
from tests.service.webhook_receiver import Receiver, certificate, receiving, status

SECRET = new_secret(bytes(range(32)))
BODY = json.dumps({"id": "message-1", "object": "event", "type": "fine_tuning.job.succeeded", "created_at": 1,
                   "data": {"id": "job-1"}})  # fmt: skip
LOOPBACK = [ip_network("127.0.0.0/8")]
PLAIN = Policy(True, LOOPBACK)


def sent(url: str, policy: Policy = PLAIN) -> Outcome:
    return send(url, SECRET, "message-1", BODY, policy, httpx.create_ssl_context())


def at(receiver: Receiver, policy: Policy = PLAIN) -> Outcome:
    return sent(f"http://127.0.0.1:{receiver.port}/hook?a=b", policy)


def test_k6_openais_client_verifies_a_message_and_no_altered_or_old_one() -> None:
    with receiving(status(204)) as receiver:
        assert at(receiver) == Outcome(204)
    head, body = receiver.requests[0]
    assert head.startswith("POST /hook?a=b HTTP/1.1\r\n")
    headers = receiver.headers()
    client = OpenAI(api_key="none", webhook_secret=SECRET)
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", "job-1")  # type: ignore[union-attr]
    assert headers["webhook-id"] == event.id
    for name, value in {
        "webhook-id": "message-2",
        "webhook-timestamp": str(int(headers["webhook-timestamp"]) - 301),
        "webhook-signature": "v1," + "A" * 43 + "=",
    }.items():
        with pytest.raises(InvalidWebhookSignatureError):
            client.webhooks.unwrap(body, headers | {name: value})
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace("succeeded", "failed"), headers)
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret=new_secret(bytes(32)))


def test_tls_is_for_the_name_at_the_checked_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, trusted = certificate(tmp_path, "hooks.example")
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    policy = Policy(False, LOOPBACK, lambda _host, _port: ["127.0.0.1"])
    with receiving(status(200), tls=context) as receiver:
        assert sent(f"https://hooks.example:{receiver.port}/", policy) == Outcome(200)
        assert receiver.names == ["hooks.example"]
        assert receiver.headers()["host"] == f"hooks.example:{receiver.port}"
        wrong = sent(f"https://other.example:{receiver.port}/", policy)
        assert wrong.status is None
        assert "certificate" in str(wrong.error)
        monkeypatch.delenv("SSL_CERT_FILE")
        assert "certificate" in str(sent(f"https://hooks.example:{receiver.port}/", policy).error)
    assert len(receiver.requests) == 1


def test_s10_a_name_that_is_rebound_between_the_check_and_the_dial() -> None:
    """One look-up for each attempt: what it says is what is dialled, and what a second one would say is never asked."""
    asked: list[str] = []

    def rebinding(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["93.184.216.34"] if len(asked) == 1 else ["127.0.0.1"]

    with receiving(status(200)) as receiver:
        policy = Policy(True, [], rebinding)
        webhook_delivery.addresses(webhook_delivery.parse(f"http://rebind.example:{receiver.port}/", policy), policy, 5)
        assert sent(f"http://rebind.example:{receiver.port}/", policy) == Outcome(
            error="not sent: its name has an address that is not public"
        )
        assert receiver.connections == 0
    assert len(asked) == 2


def test_the_dialled_address_is_the_checked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        dialled.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up again"))
    found = ["93.184.216.34", "93.184.216.35"]
    outcome = sent("https://example.com/", Policy(lookup=lambda _host, _port: found))
    assert outcome == Outcome(error="the connection failed")
    assert dialled == [("93.184.216.34", 443), ("93.184.216.35", 443)]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_s10_redirects_are_not_followed(code: int) -> None:
    with (
        receiving(status(200)) as inside,
        receiving(status(code, f"Location: http://127.0.0.1:{inside.port}/")) as first,
    ):
        outcome = at(first)
        assert (outcome.status, outcome.delivered) == (code, False)
        assert "redirects are not followed" in str(outcome.error)
        assert inside.connections == 0


def endless_head(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(1000):
        connection.sendall(b"X: " + b"y" * 1000 + b"\r\n")


def endless_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    for _ in range(10_000):
        connection.sendall(b"y" * 10_000)


def trickle(connection: socket.socket) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n":
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def garbage(connection: socket.socket) -> None:
    connection.sendall(b"220 mail.example ESMTP\r\n")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda _: time.sleep(1.5), "no answer within"),
        (trickle, "no answer within"),
        (endless_head, "longer than"),
        (garbage, "the connection broke off"),
        (lambda connection: connection.close(), "the connection broke off"),
    ],
    ids=["silence", "a byte now and then", "a head without end", "no HTTP", "closed"],
)
def test_s10_answers_that_are_slow_long_or_none(
    answer: Callable[[socket.socket], None], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_delivery, "SECONDS", 1.0)
    began = time.monotonic()
    with receiving(answer) as receiver:
        outcome = at(receiver)
    assert outcome.status is None
    assert error in str(outcome.error)
    assert time.monotonic() - began < 3


def test_s10_of_ten_gigabytes_nobody_reads_the_body() -> None:
    began = time.monotonic()
    with receiving(endless_body) as receiver:
        assert at(receiver) == Outcome(200)
    assert time.monotonic() - began < 2


def test_no_fault_says_what_the_network_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_delivery, "SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    outcome = sent(f"http://127.0.0.1:{port}/")
    assert outcome == Outcome(error="the connection failed")
    with receiving(status(200)) as receiver:
        plain = sent(f"https://127.0.0.1:{receiver.port}/", Policy(False, LOOPBACK))
    assert plain.status is None
    assert "127.0.0.1" not in str(plain.error)


def test_secrets_have_the_length_that_the_specification_wants() -> None:
    assert SECRET.startswith("whsec_")
    assert isinstance(httpx.create_ssl_context(), ssl.SSLContext)
