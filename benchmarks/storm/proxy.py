"""The links between learners and syncer: a TCP proxy for each learner that breaks, holds, slows down and corrupts what passes.

One thread runs all of them. A `Link` has one listening port for each address of the syncer (control and bulk) and counts what it does, so
that a fault can be *confirmed*: connections that were reset or refused, bytes that were held, bytes that passed slowly, bits that were
turned. A partition is of one of two kinds, because the two look different to a transport: `reset` ends connections and refuses new
ones; `hold` takes everything and passes on nothing, as a router does that drops packets, until the link is up again and what was held
goes on.
"""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

__all__ = ["Counts", "Link", "Proxies"]

_PIECE_BYTES = 65536


@dataclass
class Counts:
    """What a link has done since it was made; only grows."""

    connections: int = 0
    reset: int = 0
    refused: int = 0
    bytes_passed: int = 0
    bytes_held: int = 0
    bytes_slowed: int = 0
    bits_turned: int = 0


@dataclass
class Link:
    """The link of one learner; attributes may be set from any thread."""

    learner_id: int
    targets: dict[str, str]
    """By the syncer's address, `tcp://127.0.0.1:PORT`, the address to dial in its place."""
    rng: random.Random
    state: Literal["up", "reset", "hold"] = "up"
    bytes_per_s: float | None = None
    """Limit of each connection and direction; None: none."""
    bits_to_turn: int = 0
    """So many of the next pieces get one bit turned, each at a random place."""
    counts: Counts = field(default_factory=Counts)
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def snapshot(self) -> dict[str, int]:
        """The counts of this moment."""
        return asdict(self.counts)


class Proxies:
    """All links of a job, on one thread.

    Args:
        seed: of what is random in them.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._links: dict[int, Link] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def link(self, learner_id: int, endpoints: list[str]) -> Link:
        """The link of a learner, made at the first call.

        Args:
            learner_id: whose.
            endpoints: addresses of the syncer.
        """
        if learner_id not in self._links:
            link = Link(learner_id, {}, random.Random(f"{self._seed} {learner_id}"))
            asyncio.run_coroutine_threadsafe(self._listen(link, endpoints), self._loop).result(10)
            self._links[learner_id] = link
        return self._links[learner_id]

    def partition(self, link: Link, kind: Literal["reset", "hold"]) -> None:
        """Take the link down."""
        link.state = kind
        if kind == "reset":
            self._loop.call_soon_threadsafe(self._reset, link)

    def _reset(self, link: Link) -> None:
        for writer in list(link.writers):
            link.counts.reset += 1
            writer.transport.abort()

    async def _listen(self, link: Link, endpoints: list[str]) -> None:
        for endpoint in endpoints:
            port = int(endpoint.rpartition(":")[2])
            server = await asyncio.start_server(lambda r, w, port=port: self._connect(link, port, r, w), "127.0.0.1", 0)
            link.targets[endpoint] = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _end(self) -> None:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _connect(self, link: Link, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if link.state == "reset":
            link.counts.refused += 1
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # the syncer is down
            writer.transport.abort()
            return
        link.counts.connections += 1
        link.writers |= {writer, far_writer}
        try:
            await asyncio.gather(self._pass(link, reader, far_writer), self._pass(link, far_reader, writer))
        finally:
            link.writers -= {writer, far_writer}

    async def _pass(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(_PIECE_BYTES if link.bytes_per_s is None else 4096):
                if link.state == "hold":
                    link.counts.bytes_held += len(piece)
                    while link.state == "hold":
                        await asyncio.sleep(0.05)
                if link.bytes_per_s is not None:
                    link.counts.bytes_slowed += len(piece)
                    await asyncio.sleep(len(piece) / link.bytes_per_s)
                if link.bits_to_turn > 0:
                    link.bits_to_turn -= 1
                    link.counts.bits_turned += 1
                    piece = _turn_a_bit(piece, link.rng)
                link.counts.bytes_passed += len(piece)
                writer.write(piece)
                await writer.drain()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort() if link.state == "reset" else writer.close()


def _turn_a_bit(piece: bytes, rng: random.Random) -> bytes:
    turned = bytearray(piece)
    turned[rng.randrange(len(turned))] ^= 1 << rng.randrange(8)
    return bytes(turned)
