"""What the tests of hostile input have in common: the one shape of a refusal, and bytes over a socket."""

import json
import socket
from contextlib import suppress
from typing import Any

import httpx2
from sqlalchemy import func, select

from service.models import Dataset
from tests.service.site import Site

JSON = "application/json"


def check(answer: httpx2.Response, status: int, *, message: str = "") -> dict[str, Any]:
    """The error of a refusal, which has the one shape and tells nothing of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("request-")
    return check_error(answer.text, message=message)


def check_error(body: str, *, message: str = "") -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code", "category"}
    assert error["category"] in ("user", "capacity")
    assert message in error["message"]
    assert len(error["message"]) < 400
    assert "Traceback" not in body
    return error


def left_over(site: Site) -> list[Any]:
    """Rows, objects and temporary files; empty when nothing was kept."""
    with site.database.reading() as session:
        count = session.scalar(select(func.count()).select_from(Dataset))
    return [*range(count or 0), *site.storage.keys("datasets"), *site.settings.work_dir.iterdir()]


def connect(url: str, seconds: float = 20) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=seconds)


def exchange(url: str, *pieces: bytes) -> tuple[int, bytes, bytes]:
    """Send what need not be HTTP; the answer's status, head and body (0 and nothing when there was none)."""
    with connect(url) as connection:
        with suppress(ConnectionError):  # refused before the last piece
            for piece in pieces:
                connection.sendall(piece)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, bytes, bytes]:
    received = b""
    with suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            received += data
            head, separator, body = received.partition(b"\r\n\r\n")
            length = next(
                (line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b"0"
            )
            if separator and len(body) >= int(length):
                break
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head[9:12]) if head else 0), head.lower(), body
