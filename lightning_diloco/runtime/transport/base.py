"""The transport of both sides: one poll loop over the control socket, the bulk socket and a wake-up.

Contract. Thread-confined: every method but `wake` belongs to one thread. Nothing is opened in a constructor. Nothing blocks but
`poll`, at most for its timeout. Whatever arrives from the network is validated, counted in `stats.drops` when it is not as it
should be, and never raises. Every payload ends in exactly one `PayloadDelivered` or `PayloadFailed` on the sender's side; at the
receiver's it is delivered at most once.

One turn of the loop: send what credit allows (a few chunks in all, peers in rotation), wait when there was nothing to do, take
control messages first, then a few bulk messages. So a control message waits behind a few MiB of bulk at most, and bulk behind
at most `_CONTROL_PER_TURN` control messages.
"""

from __future__ import annotations

import math
import secrets
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import zmq

from lightning_diloco.errors import ConfigurationError, LocalProtocolError

from .events import ControlReceived, PayloadDelivered, PayloadFailed, PayloadReceived, PayloadRefused, TransportEvent
from .frames import (
    FRAME_KIND,
    MAX_CONTROL_BYTES,
    MAX_HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    USER_KIND,
    Chunk,
    ReplyFrame,
    decode_bulk,
    decode_reply,
    encode_frame,
    seal,
    unseal,
)
from .options import TransportOptions, TransportStats
from .peers import Accept, IncomingPeers
from .receiving import Reaction
from .sending import Ended, OutgoingTransfers
from .sockets import ConfigureSocket, Waker, receive_parts, send_parts

__all__ = ["Transport"]

_CONTROL_PER_TURN: Final = 256
_EXPIRY_CHECK_S: Final = 1.0


class Transport(ABC):
    """What `SyncerTransport` and `LearnerTransport` share.

    Args:
        accept: called inside `poll` for each offered payload with (peer, header, total_bytes), before memory is allocated. True
            takes it; False, "refused" or "oversized" refuse it. The header is the peer's bytes: an exception here refuses.
        context: the ZeroMQ context; None makes one that `close` ends. ``inproc://`` needs a shared one.
        now: a monotonic clock in seconds.
        options: limits and times.
        configure: called with every socket before it is bound or connected, for keys.
    """

    def __init__(
        self,
        *,
        accept: Accept,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        now: Callable[[], float] = time.monotonic,
        options: TransportOptions | None = None,
        configure: ConfigureSocket | None = None,
    ) -> None:
        self.stats = TransportStats()
        self._context = context
        self._owns_context = context is None
        self._now = now
        self._options = options or TransportOptions()
        self._configure = configure
        self._control: zmq.Socket[bytes] | None = None
        self._bulk: zmq.Socket[bytes] | None = None
        self._waker: Waker | None = None
        self._poller = zmq.Poller()
        self._is_closed = False
        self._last_id = secrets.randbits(31) << 32
        self._outgoing: OrderedDict[bytes, OutgoingTransfers] = OrderedDict()
        self._incoming = IncomingPeers(
            accept=accept,
            count=self.stats.count,
            window_chunks=self._options.window_chunks,
            abandon_after_s=self._options.abandon_after_s,
        )
        self._events: list[TransportEvent] = []
        self._next_expiry_s = -math.inf

    # ---- what the two sides do differently

    @abstractmethod
    def _address(self, peer: bytes, parts: list[bytes | memoryview], *, is_bulk: bool) -> list[bytes | memoryview]:
        """Return the parts with what the socket needs to find the peer in front."""

    @abstractmethod
    def _split(self, parts: list[zmq.Frame], *, is_bulk: bool) -> tuple[bytes, list[zmq.Frame]] | None:
        """Return the sender and the parts that follow its identity; None, counted, when nobody who may speak has sent it."""

    @abstractmethod
    def _check_peer(self, peer: bytes) -> None:
        """Raise LocalProtocolError when this cannot be a peer of this side."""

    @abstractmethod
    def _count_bytes(self, num_bytes: int, *, is_sent: bool) -> None:
        """Add payload bytes to the uplink or the downlink."""

    # ---- the public calls

    def send_control(self, peer: bytes, data: bytes) -> bool:
        """Send a control message; at most once, not repeated after a loss.

        Args:
            peer: receiver.
            data: at most 1 MiB.

        Returns:
            False when the peer cannot be reached now or its queue is full: dropped and counted as "control_unsent".

        Raises:
            LocalProtocolError: the message is too long, the peer cannot exist, or the transport is not open.
        """
        self._check_peer(peer)
        if len(data) > MAX_CONTROL_BYTES:
            raise LocalProtocolError(f"a control message of {len(data)} bytes exceeds {MAX_CONTROL_BYTES}; send it with send_payload")
        taken = send_parts(self._require_open(), self._address(peer, [seal(USER_KIND + data)], is_bulk=False))
        if taken:
            self.stats.control_sent += 1
        else:
            self.stats.count("control_unsent")
        return taken

    def send_payload(self, peer: bytes, header: bytes, payload: memoryview[Any] | bytes | bytearray) -> int:
        """Queue a payload; `poll` does the sending.

        Args:
            peer: receiver.
            header: opaque bytes for the receiver's ``accept``, at most 64 KiB.
            payload: contiguous bytes; must not change before the transfer's event.

        Returns:
            The transfer id, named by the one event that ends this transfer.

        Raises:
            LocalProtocolError: the header is too long, the peer cannot exist, or the transport is not open.
        """
        self._check_peer(peer)
        self._require_open()
        if len(header) > MAX_HEADER_BYTES:
            raise LocalProtocolError(f"a header of {len(header)} bytes exceeds {MAX_HEADER_BYTES}; move it into the payload")
        view = memoryview(payload)
        if not view.c_contiguous:
            raise LocalProtocolError("a payload must be contiguous bytes; copy it first")
        outgoing = self._outgoing.get(peer)
        if outgoing is None:
            outgoing = self._outgoing[peer] = OutgoingTransfers(
                count=self.stats.count,
                resend_after_s=self._options.resend_after_s,
                resend_max_s=self._options.resend_max_s,
            )
        self._last_id += 1
        outgoing.enqueue(self._last_id, bytes(header), view.cast("B") if view.nbytes else memoryview(b""))
        return self._last_id

    def cancel(self, peer: bytes, transfer_id: int) -> bool:
        """Give a payload up; no chunk of it is sent from now on, and it is never delivered unless all of it has left already.

        Args:
            peer: its receiver.
            transfer_id: as returned by `send_payload`.

        Returns:
            True when it was pending; `PayloadFailed` with "cancelled" follows. False when it has ended already.
        """
        outgoing = self._outgoing.get(peer)
        ended = None if outgoing is None else outgoing.cancel(transfer_id)
        if ended is not None:
            self._tell_end(peer, ended)
        return ended is not None

    def forget(self, peer: bytes) -> None:
        """Free all that is held for a peer that is gone; what was queued to it fails with "forgotten".

        Which of its payloads were delivered stays in a bounded memory, so that a peer that wakes up does not deliver twice.

        Args:
            peer: who is gone.
        """
        outgoing = self._outgoing.pop(peer, None)
        if outgoing is not None:
            for transfer_id in outgoing.pending_ids:
                self._tell_end(peer, Ended(transfer_id, "forgotten"))
        self._incoming.forget(peer)

    def incoming_progress(self, peer: bytes) -> tuple[int, int] | None:
        """(transfer id, chunks held without a gap) of the payload that is coming from this peer; None: nothing is."""
        return self._incoming.progress(peer)

    def wake(self) -> None:
        """Make `poll` return at once; callable from any thread, never blocks, does nothing while the transport is not open."""
        waker = self._waker
        if waker is not None:
            waker.wake()

    def poll(self, timeout_s: float) -> list[TransportEvent]:
        """Send and receive until something happened.

        Args:
            timeout_s: the longest wait in seconds; 0 does one turn.

        Returns:
            The events in their order, empty after the timeout or a `wake`.

        Raises:
            LocalProtocolError: the transport is not open.
        """
        self._require_open()
        end_s = time.monotonic() + timeout_s
        while True:
            is_busy = self._pump()
            left_s = end_s - time.monotonic()
            woken = self._receive(0.0 if is_busy or self._events else min(left_s, self._timer_s()))
            if self._events or woken or time.monotonic() >= end_s:
                events, self._events = self._events, []
                return events

    def close(self) -> None:
        """Close the sockets and the wake-up; idempotent. Nothing that is pending is reported."""
        if self._is_closed:
            return
        self._is_closed = True
        for sock in (self._control, self._bulk):
            if sock is not None:
                sock.close(linger=int(1000 * self._options.close_linger_s))
        if self._waker is not None:
            self._waker.close()
        if self._owns_context and self._context is not None:
            self._context.term()
        self._control = self._bulk = None
        self._outgoing.clear()
        self._incoming.clear()

    # ---- opening

    def _open(self, endpoint: str) -> zmq.Context[zmq.Socket[bytes]]:
        """Return the context, made on first use together with the wake-up."""
        if self._is_closed:
            raise LocalProtocolError("this transport was closed; make a new one")
        if self._context is None:
            if endpoint.startswith("inproc://"):
                raise ConfigurationError(f"{endpoint} needs a shared zmq.Context; pass the same context to both sides")
            self._context = zmq.Context()
        if self._waker is None:
            self._waker = Waker()
            self._poller.register(self._waker.fileno(), zmq.POLLIN)
        return self._context

    def _require_open(self) -> zmq.Socket[bytes]:
        if self._is_closed or self._control is None:
            raise LocalProtocolError("this transport is not open; call bind() or connect() first and nothing after close()")
        return self._control

    # ---- sending

    def _pump(self) -> bool:
        """Send what credit and sockets allow; True when more could be done at once."""
        now_s = self._now()
        budget = self._options.turn_chunks
        for peer in list(self._outgoing):
            outgoing = self._outgoing[peer]
            outgoing.on_time(now_s)
            if budget > 0:
                budget -= outgoing.hash_some(budget)
            while (item := outgoing.peek(now_s)) is not None and (budget > 0 or item.data is None):
                parts: list[bytes | memoryview] = [encode_frame(item.frame)]
                if item.data is not None:
                    parts.append(item.data)
                if self._bulk is None or not send_parts(self._bulk, self._address(peer, parts, is_bulk=True), is_shared=True):
                    outgoing.mark_blocked(now_s)
                    break
                outgoing.mark_sent(now_s)
                if item.data is not None:
                    budget -= 1
                    self._count_bytes(len(item.data), is_sent=True)
            if outgoing.is_idle:
                del self._outgoing[peer]
        if self._outgoing:
            self._outgoing.move_to_end(next(iter(self._outgoing)))  # the next turn begins with another peer
        return budget <= 0

    def _timer_s(self) -> float:
        """Seconds until a payload must be looked at although nothing arrives."""
        now_s = self._now()
        due_s = [outgoing.deadline_s() for outgoing in self._outgoing.values()]
        return min([_EXPIRY_CHECK_S, *(max(0.0, t - now_s) for t in due_s if t is not None)])

    def _reply(self, peer: bytes, frame: ReplyFrame) -> None:
        parts = self._address(peer, [FRAME_KIND + encode_frame(frame)], is_bulk=False)
        if not send_parts(self._require_open(), parts):
            self.stats.count("reply_unsent")  # the sender offers again and is answered again

    # ---- receiving

    def _receive(self, wait_s: float) -> bool:
        """Wait, then take control messages first and a few bulk messages; True when `wake` was called."""
        ready = dict(self._poller.poll(max(0, math.ceil(1000 * wait_s))))
        waker = self._waker
        woken = waker is not None and waker.fileno() in ready
        if woken and waker is not None:
            waker.drain()
        # A look at an empty socket costs an exception: more than all else in a turn.
        if self._control in ready:
            self._drain_control()
        if self._bulk in ready:
            self._drain_bulk()
        now_s = self._now()
        if now_s >= self._next_expiry_s:
            self._next_expiry_s = now_s + _EXPIRY_CHECK_S
            self._incoming.expire(now_s)
        return woken

    def _drain_control(self) -> None:
        sock = self._require_open()
        for _ in range(_CONTROL_PER_TURN):
            parts = receive_parts(sock)
            if parts is None:
                return
            found = self._split(parts, is_bulk=False)
            if found is None:
                continue
            if len(found[1]) != 1:
                self.stats.count("malformed_control")
            else:
                self._on_control(found[0], found[1][0].buffer)

    def _on_control(self, peer: bytes, data: memoryview) -> None:
        outgoing, kind = self._outgoing.get(peer), bytes(data[:1])
        frame = decode_reply(data[1:]) if kind == FRAME_KIND else None
        if kind == USER_KIND:
            self._on_message(peer, data)
        elif frame is None:
            self.stats.count("malformed_control")
        elif outgoing is None:
            self.stats.count("late_reply")
        else:
            if (ended := outgoing.on_reply(frame, self._now())) is not None:
                self._tell_end(peer, ended)

    def _on_message(self, peer: bytes, data: memoryview) -> None:
        if (message := unseal(data)) is None or len(data) > MAX_MESSAGE_BYTES:
            self.stats.count("damaged_control" if message is None else "oversized_control")
        else:
            if (outgoing := self._outgoing.get(peer)) is not None:
                outgoing.unblock()
            self.stats.control_received += 1
            self._events.append(ControlReceived(peer, bytes(message[1:])))

    def _drain_bulk(self) -> None:
        for _ in range(self._options.turn_chunks):
            parts = None if self._bulk is None else receive_parts(self._bulk)
            if parts is None:
                return
            found = self._split(parts, is_bulk=True)
            if found is None:
                continue
            peer, body = found
            frame = decode_bulk(body[0].buffer) if body else None
            if frame is None or len(body) != (2 if isinstance(frame, Chunk) else 1):
                self.stats.count("malformed_bulk")
                continue
            data = body[1].buffer if isinstance(frame, Chunk) else memoryview(b"")
            self._count_bytes(len(data), is_sent=False)
            self._react(peer, self._incoming.on_frame(peer, frame, data, self._now()))

    def _react(self, peer: bytes, reaction: Reaction) -> None:
        if reaction.reply is not None:
            self._reply(peer, reaction.reply)
        delivery = reaction.delivery
        if delivery is None:
            return
        if delivery.payload is not None:
            self.stats.payloads_received += 1
            self._events.append(PayloadReceived(peer, delivery.header, delivery.payload))
        elif delivery.reason is not None:
            self._events.append(PayloadRefused(peer, delivery.header, delivery.reason))

    def _tell_end(self, peer: bytes, ended: Ended) -> None:
        if ended.reason is None:
            self.stats.payloads_sent += 1
            self._events.append(PayloadDelivered(peer, ended.transfer_id))
        else:
            self._events.append(PayloadFailed(peer, ended.transfer_id, ended.reason))
