"""A sender and a receiver of transfers joined by a link that loses, doubles and reorders, with a clock that the test moves."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from lightning_diloco.runtime.transport.frames import Begin, BulkFrame, Cancel, Chunk, ReplyFrame
from lightning_diloco.runtime.transport.receiving import Delivery, IncomingTransfers
from lightning_diloco.runtime.transport.sending import OutgoingTransfers

CHUNK = 4
WINDOW = 3
BOOT = 7 << 32


class Link:
    """A sender and a receiver, the frames on their way, and what became of every transfer."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.drops: Counter[str] = Counter()
        self.now_s = 0.0
        self.sender = self.new_sender()
        self.receiver = self.new_receiver()
        self.forward: list[tuple[BulkFrame, bytes]] = []
        self.back: list[ReplyFrame] = []
        self.next_id = BOOT
        self.payloads: dict[int, bytes] = {}
        self.sent: dict[int, set[int]] = {}
        self.delivered: list[Delivery] = []
        self.ended: dict[int, str | None] = {}

    def new_sender(self) -> OutgoingTransfers:
        return OutgoingTransfers(count=self.count, resend_after_s=5.0, resend_max_s=20.0, chunk_bytes=CHUNK)

    def new_receiver(self) -> IncomingTransfers:
        return IncomingTransfers(accept=lambda h, n: True, count=self.count, window_chunks=WINDOW, chunk_bytes=CHUNK)

    def count(self, word: str) -> None:
        self.drops[word] += 1

    def add(self, payload: bytes) -> int:
        self.next_id += 1
        self.payloads[self.next_id] = payload
        self.sent[self.next_id] = set()
        self.sender.enqueue(self.next_id, b"%d" % self.next_id, memoryview(payload))
        return self.next_id

    def send(self) -> bool:
        """Send at most one frame."""
        self.sender.on_time(self.now_s)
        self.sender.hash_some(64)
        item = self.sender.peek(self.now_s)
        if item is None:
            return False
        self.sender.mark_sent(self.now_s)
        if isinstance(item.frame, Chunk):
            self.sent[item.frame.transfer_id].add(item.frame.index)
        self.forward.append((item.frame, b"" if item.data is None else bytes(item.data)))
        return True

    def arrive(self, frame: BulkFrame, data: bytes) -> None:
        if isinstance(frame, Cancel):
            self.receiver.on_cancel(frame)
            return
        if isinstance(frame, Begin):
            reaction = self.receiver.on_begin(frame, self.now_s)
        else:
            reaction = self.receiver.on_chunk(frame, memoryview(data), self.now_s)
        if reaction.reply is not None:
            self.back.append(reaction.reply)
        if reaction.delivery is not None:
            self.delivered.append(reaction.delivery)

    def return_(self, frame: ReplyFrame) -> None:
        ended = self.sender.on_reply(frame, self.now_s)
        if ended is not None:
            assert ended.transfer_id not in self.ended
            self.ended[ended.transfer_id] = ended.reason

    def cancel(self, transfer_id: int) -> None:
        ended = self.sender.cancel(transfer_id)
        if ended is not None:
            assert ended.transfer_id not in self.ended
            self.ended[ended.transfer_id] = ended.reason

    def disturb(self) -> None:
        """One random thing on a bad link: lose, double, reorder, deliver, let time pass."""
        queue: list[Any] = self.random.choice([self.forward, self.back])
        if not queue:
            self.now_s += self.random.choice([0.1, 6.0])
            return
        place = self.random.randrange(len(queue))
        fate = self.random.random()
        item = queue[place] if fate < 0.2 else queue.pop(place)
        if fate > 0.75:
            return
        if queue is self.forward:
            self.arrive(*item)
        else:
            self.return_(item)

    def settle(self) -> None:
        """A good link from now on, until nothing is pending."""
        for _ in range(20_000):
            moved = self.send()
            if self.forward:
                self.arrive(*self.forward.pop(0))
            elif self.back:
                self.return_(self.back.pop(0))
            elif not moved:
                if self.sender.is_idle:
                    return
                self.now_s += 1.0
        raise AssertionError(f"does not settle: {self.drops}")

    def intact(self) -> Counter[int]:
        """How often each transfer was delivered; the bytes must be right."""
        seen: Counter[int] = Counter()
        for delivery in self.delivered:
            assert delivery.payload is not None
            transfer_id = int(delivery.header)
            assert bytes(delivery.payload) == self.payloads[transfer_id]
            seen[transfer_id] += 1
        return seen
