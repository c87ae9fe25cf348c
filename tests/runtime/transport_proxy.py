"""A TCP proxy on a thread of its own that can cut, throttle, delay and damage what passes."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from typing import Self


class TransportProxy:
    """Forwards 127.0.0.1:`port` to `target_port`.

    Args:
        target_port: on 127.0.0.1.
        bytes_per_s: limit per connection and direction; None for none.
        delay_s: added to every piece on its way, each direction.
        listener: a bound socket to listen at; None takes a free port.
    """

    def __init__(
        self,
        target_port: int,
        *,
        bytes_per_s: float | None = None,
        delay_s: float = 0.0,
        listener: socket.socket | None = None,
    ) -> None:
        self._target_port = target_port
        self._listener = listener
        self.bytes_per_s = bytes_per_s
        self.delay_s = delay_s
        self.is_open = True
        self.bits_to_turn = 0
        self.random = random.Random(0)
        self.num_connections = 0
        self.recorded: list[bytearray] = []
        """What whoever dialled has said, one after the other."""
        self.hold_from_bytes: int | None = None
        """What the target says is kept back from the first piece of so many bytes on, until this is None."""
        self.num_held_bytes = 0
        """How much of it was read in such pieces."""
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._dialer: asyncio.StreamWriter | None = None
        self._loop = asyncio.new_event_loop()
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="transport-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._is_ready.wait(5):
            raise RuntimeError("the proxy did not start within 5 s")
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(5)
        self._loop.close()

    def cut(self, *, stay_closed: bool = False) -> None:
        """Reset all connections; with `stay_closed` new ones are refused until `reopen`."""
        self.is_open = not stay_closed
        self._loop.call_soon_threadsafe(self._abort)

    def reopen(self) -> None:
        self.is_open = True

    def slip_in(self, data: bytes) -> None:
        """Send bytes that the target did not send to whoever dialled last."""
        assert self._dialer is not None
        self._loop.call_soon_threadsafe(self._dialer.write, data)

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._end = asyncio.Event()
        if self._listener is None:
            listener = await asyncio.start_server(self._on_connection, "127.0.0.1", 0)
        else:
            listener = await asyncio.start_server(self._on_connection, sock=self._listener)
        self.port = listener.sockets[0].getsockname()[1]
        self._is_ready.set()
        await self._end.wait()
        listener.close()
        self._abort()
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open:
            writer.transport.abort()
            return
        self.num_connections += 1
        self._dialer = writer
        self._writers.append(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers.append(far_writer)
        self.recorded.append(spoken := bytearray())
        await asyncio.gather(self._forward(reader, far_writer, spoken), self._forward(far_reader, writer, None))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spoken: bytearray | None) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)
        sender = asyncio.ensure_future(self._send_late(pieces, writer, is_answer=spoken is None))
        try:
            while piece := await reader.read(16384):
                if spoken is not None:
                    spoken += piece
                elif self._holds(piece):
                    self.num_held_bytes += len(piece)
                if self.bits_to_turn > 0:
                    piece = self._damage(piece)
                await pieces.put((self._loop.time() + self.delay_s, piece))
                if self.bytes_per_s is not None:
                    await asyncio.sleep(len(piece) / self.bytes_per_s)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            sender.cancel()
            writer.transport.abort()

    def _holds(self, piece: bytes) -> bool:
        return self.hold_from_bytes is not None and len(piece) >= self.hold_from_bytes

    def _damage(self, piece: bytes) -> bytes:
        """One bit, at a random place, is another one."""
        self.bits_to_turn -= 1
        damaged = bytearray(piece)
        damaged[self.random.randrange(len(damaged))] ^= 1 << self.random.randrange(8)
        return bytes(damaged)

    async def _send_late(self, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, *, is_answer: bool) -> None:
        while True:
            due_s, piece = await pieces.get()
            await asyncio.sleep(max(0.0, due_s - self._loop.time()))
            while is_answer and self._holds(piece):
                await asyncio.sleep(0.005)
            writer.write(piece)
            await writer.drain()
