"""A joined pair of transports on one thread, and a raw peer that says what it likes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

import zmq

from lightning_diloco.runtime.transport import (
    SYNCER,
    Accept,
    LearnerTransport,
    PayloadDelivered,
    PayloadReceived,
    SyncerTransport,
    TransportEvent,
    TransportOptions,
)
from lightning_diloco.runtime.transport.frames import FRAME_KIND, BulkFrame, ReplyFrame, decode_reply, encode_frame

MIB = 1 << 20
NONCE = b"learner-number-0"


def accept_all(peer: bytes, header: bytes, total_bytes: int) -> bool:
    return True


def make_bytes(num_bytes: int, seed: int = 0) -> bytes:
    """Bytes that differ from chunk to chunk, cheap to make."""
    block = bytes((seed * 31 + i * 7 + (i >> 8)) & 0xFF for i in range(4099))  # a prime: chunks are not alike
    return (block * (num_bytes // 4099 + 1))[:num_bytes]


class Pair:
    """A syncer and its learners in this process, polled in turn."""

    def __init__(self, kind: str, *, accept: Accept = accept_all, **numbers: Any) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.options = TransportOptions(**{"resend_after_s": 0.3, "resend_max_s": 2.0, **numbers})
        endpoint = "tcp://127.0.0.1:0" if kind == "tcp" else f"inproc://{uuid.uuid4().hex}"
        self.syncer = SyncerTransport(endpoint, accept=accept, context=self.context, options=self.options)
        self.syncer.bind()
        self.learners: dict[bytes, LearnerTransport] = {}
        self.syncer_events: list[TransportEvent] = []
        self.learner_events: list[TransportEvent] = []
        self.learner = self.add_learner(NONCE, accept)
        self.raw: list[zmq.Socket[bytes]] = []

    def add_learner(self, nonce: bytes, accept: Accept = accept_all) -> LearnerTransport:
        learner = LearnerTransport(self.syncer.control_endpoint, nonce=nonce, accept=accept, context=self.context, options=self.options)
        learner.connect()
        learner.connect_bulk(self.syncer.bulk_endpoint)
        self.learners[nonce] = learner
        return learner

    def meet(self) -> None:
        """Exchange one control message each way, so that both ends are connected."""
        for learner in self.learners.values():
            assert learner.send_control(SYNCER, b"meet")
            self.until(lambda: len(self.syncer_events) == 1)
            self.syncer_events.clear()

    def step(self) -> None:
        self.syncer_events += self.syncer.poll(0.001)
        for learner in self.learners.values():
            self.learner_events += learner.poll(0.001)

    def until(self, condition: Callable[[], bool], limit_s: float = 20.0) -> None:
        end_s = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < end_s, (self.syncer.stats, [x.stats for x in self.learners.values()])
            self.step()

    def steps_for(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            self.step()

    def received(self) -> list[PayloadReceived]:
        return [e for e in self.syncer_events + self.learner_events if isinstance(e, PayloadReceived)]

    def delivered(self) -> list[PayloadDelivered]:
        return [e for e in self.syncer_events + self.learner_events if isinstance(e, PayloadDelivered)]

    def dial_raw(self, endpoint: str, routing_id: bytes | None) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        if routing_id is not None:
            sock.setsockopt(zmq.ROUTING_ID, routing_id)
        sock.connect(endpoint)
        self.raw.append(sock)
        return sock

    def close(self) -> None:
        for sock in self.raw:
            sock.close()
        for learner in self.learners.values():
            learner.close()
        self.syncer.close()
        self.context.term()


class RawPeer:
    """Both sockets of a peer that follows no rule."""

    def __init__(self, pair: Pair, nonce: bytes) -> None:
        self.pair = pair
        self.nonce = nonce
        self.control = pair.dial_raw(pair.syncer.control_endpoint, b"c" + nonce)
        self.bulk = pair.dial_raw(pair.syncer.bulk_endpoint, b"b" + nonce)

    def say(self, frame: BulkFrame, data: bytes | None = None) -> None:
        self.bulk.send_multipart([encode_frame(frame)] if data is None else [encode_frame(frame), data])

    def hear(self) -> ReplyFrame:
        """The next reply of the syncer."""
        self.pair.until(lambda: bool(self.control.poll(0)))
        message = self.control.recv()
        assert message[:1] == FRAME_KIND
        frame = decode_reply(message[1:])
        assert frame is not None
        return frame
