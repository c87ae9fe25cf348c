"""A relay between a learner and the syncer that adds a one-way delay, and where there are no namespaces also a rate.

    python -m benchmarks.wan.relay '{"endpoints": [...], "delay_s": 0.05, "bytes_per_s": null}'

`netem` is what a kernel has for delays, and not every kernel has it. The relay stands beside the learner, in its namespace. It takes TCP
connections, dials the endpoint that each is for, and passes on what arrives `delay_s` later, in both directions; with a rate each direction
passes no more than that, all connections together. What waits is bounded, so that a sender feels it. It prints one line of JSON (by
endpoint the address to dial in its place), and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress

__all__ = ["relay"]

_PIECE_BYTES = 16384
_MAX_WAITING = 64
"""Pieces of one direction of a connection that wait."""


class _Pace:
    """One direction of the link."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    async def take(self, num_bytes: int) -> None:
        """Wait until the link has passed so much."""
        if self._bytes_per_s is not None:
            self._free_s = max(self._free_s, time.monotonic()) + num_bytes / self._bytes_per_s
            await asyncio.sleep(self._free_s - time.monotonic())


async def relay(endpoints: list[str], *, delay_s: float, bytes_per_s: float | None) -> dict[str, str]:
    """Serve from now on.

    Args:
        endpoints: each `tcp://HOST:PORT`.
        delay_s: one way.
        bytes_per_s: of each direction; None: no limit.

    Returns:
        By endpoint, the address to dial in its place.
    """
    up, down, routes = _Pace(bytes_per_s), _Pace(bytes_per_s), {}
    for endpoint in endpoints:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        target = host.strip("[]").removeprefix("::ffff:"), int(port)

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int] = target) -> None:
            """One connection, until it ends on either side."""
            try:
                far_reader, far_writer = await asyncio.open_connection(*target)
            except OSError:
                writer.transport.abort()
                return
            await asyncio.gather(_pass(up, delay_s, reader, far_writer), _pass(down, delay_s, far_reader, writer))

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        routes[endpoint] = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    return routes


async def _pass(pace: _Pace, delay_s: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction of a connection: the reader is ahead of the writer by no more than the queue."""
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_WAITING)

    async def receive() -> None:
        """Put what arrives into the queue, and at last nothing."""
        piece = b"-"
        while piece:
            piece = await reader.read(_PIECE_BYTES)
            await waiting.put((time.monotonic(), piece))

    async def send() -> None:
        """Pass on what is due."""
        while True:
            arrived_s, piece = await waiting.get()
            if not piece:
                return
            await pace.take(len(piece))
            await asyncio.sleep(arrived_s + delay_s - time.monotonic())
            writer.write(piece)
            await writer.drain()

    with suppress(ExceptionGroup):  # the connection broke on one side
        async with asyncio.TaskGroup() as group:
            group.create_task(receive())
            group.create_task(send())
    writer.close()


async def _serve() -> None:
    print(json.dumps(await relay(**json.loads(sys.argv[1]))), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve())
