"""A client that costs the machine little: HTTP/1.1 over one kept connection, nothing but what the load needs."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One kept connection; one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def request(self, method: str, path: str, key: str, body: bytes = b"", **headers: str) -> Answer:
        await self.send(method, path, key, len(body), **headers)
        if body:
            self._writer.write(body)
        answer = await self.head()
        answer.body = await self._reader.readexactly(int(answer.headers.get("content-length", 0)))
        return answer

    async def send(self, method: str, path: str, key: str, length: int, **headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {key}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if method == "POST":
            lines.append(f"Content-Length: {length}")
        self._writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> Answer:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(": ") for line in lines[1:] if line)
        return Answer(int(lines[0].split()[1]), {name.lower(): value for name, _, value in pairs}, b"")

    async def finish(self) -> Answer:
        """The answer to a request whose body was sent by `write`."""
        answer = await self.head()
        answer.body = await self._reader.readexactly(int(answer.headers.get("content-length", 0)))
        return answer

    async def lines(self) -> AsyncIterator[bytes]:
        """Of an event stream: its lines, without those of the chunked coding around them."""
        while line := await self._reader.readline():
            yield line.rstrip()


@dataclass
class Timed:
    """How long requests took, in milliseconds, and how many a second there were."""

    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    answers: list[Any] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.milliseconds) / self.seconds

    def percentile(self, share: float) -> float:
        return percentile(self.milliseconds, share)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def drive(
    ports: Sequence[int], connections: int, seconds: float, one: Callable[[Connection], Awaitable[Any]]
) -> Timed:
    """`one` request after the other on each of so many connections, for so long."""
    timed = Timed()
    began = time.perf_counter()

    async def client(number: int) -> None:
        async with Connection(ports[number % len(ports)]) as connection:
            while time.perf_counter() < began + seconds:
                start = time.perf_counter()
                timed.answers.append(await one(connection))
                timed.milliseconds.append((time.perf_counter() - start) * 1000)

    await asyncio.gather(*(client(number) for number in range(connections)))
    timed.seconds = time.perf_counter() - began
    return timed
