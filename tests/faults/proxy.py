"""A TCP proxy that goes wrong as it is told: slow, silent, cut, reset, or with an answer lost on the way."""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

_PIECE = 64 << 10
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, zero seconds: closing sends RST


class Proxy:
    """Listens on `port` of the loopback, in a thread of its own; forwards to a unix socket or a (host, port).

    Attributes:
        latency: seconds by which every piece is late, in each direction.
    """

    def __init__(self, target: Path | tuple[str, int]) -> None:
        self.latency = 0.0
        self._target = target
        self._cut = False
        self._flows = threading.Event()
        self._flows.set()
        self._lose: tuple[bytes, bytes] | None = None
        self.lost_answers = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._run(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """End every connection and take no new one until `heal`."""
        self._cut = True
        self.reset()

    def hang(self) -> None:
        """Keep connections, take new ones, and forward nothing until `heal`: a partition, as TCP sees it."""
        self._flows.clear()

    def heal(self) -> None:
        self._cut, self.latency = False, 0.0
        self._flows.set()

    def reset(self) -> None:
        """RST on every connection there is."""
        self._run(self._reset())

    def lose_answer(self, after: bytes, once_seen: bytes) -> None:
        """Of the next message that has `after` in it, on a connection that sent `once_seen` before, the answer is lost.

        The server has carried it out by then; the client sees its connection reset.
        """
        self._lose = (once_seen, after)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._server.close()
        await self._reset()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _reset(self) -> None:
        for writer in list(self._writers):
            _abort(writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            _abort(writer)
            return
        await self._flowing()
        try:
            if isinstance(self._target, Path):
                server_reader, server_writer = await asyncio.open_unix_connection(self._target)
            else:
                server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _abort(writer)
            return
        pair, losing = {writer, server_writer}, asyncio.Event()
        self._writers |= pair
        try:
            await asyncio.gather(
                self._pump(reader, server_writer, losing, asked=True),
                self._pump(server_reader, writer, losing, asked=False),
            )
        except OSError:
            pass
        finally:
            self._writers -= pair
            for each in pair:
                _abort(each)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, losing: asyncio.Event, *, asked: bool
    ) -> None:
        seen = False
        while piece := await reader.read(_PIECE):
            await self._flowing()
            if self.latency:
                await asyncio.sleep(self.latency)
            if asked and self._lose is not None:
                seen = seen or self._lose[0] in piece
                if seen and self._lose[1] in piece:
                    self._lose = None
                    losing.set()
            elif not asked and losing.is_set():
                self.lost_answers += 1
                raise ConnectionResetError
            writer.write(piece)
            await writer.drain()
        raise ConnectionResetError  # one side has ended: so does the other

    async def _flowing(self) -> None:
        while not self._flows.is_set():
            await asyncio.sleep(0.01)


def _abort(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
