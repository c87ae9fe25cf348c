"""The two ends: `SyncerTransport` binds, `LearnerTransport` dials; over ``tcp://`` and, in one process, over ``inproc://``.

A learner's routing ids are one byte for the channel and the 16-byte nonce of its process, so that the syncer knows which control
and bulk sockets belong together. A reconnecting learner shows the same ids and takes its places over. Who may use a nonce is
for keys (`gate`) or the job's token to say. ``inproc://`` does not reconnect: when the syncer's sockets close,
the learner makes a new transport.
"""

from __future__ import annotations

import errno
import math
import re
import time
from collections.abc import Callable

import zmq

from lightning_diloco.errors import CannotListenError, ConfigurationError, LocalProtocolError
from lightning_diloco.runtime.addresses import is_ipv6_only, reach, split
from lightning_diloco.runtime.keys import SyncerKeys

from .base import Transport
from .events import SYNCER, KeyRevoked
from .frames import BULK_PREFIX, CONTROL_PREFIX, NONCE_BYTES, Alive, encode_frame, parse_routing_id
from .gate import Gate
from .handshakes import HandshakeWatch
from .links import LinkWatch
from .options import TransportOptions
from .peers import Accept
from .sockets import ConfigureSocket, make_socket, send_parts

__all__ = ["LearnerTransport", "SyncerTransport"]

_LOOK_S = 0.5
"""Seconds between two looks whether the sockets take messages, and at what failed to come about."""
_MUTE_S = 2.0
"""A socket that has taken none, or was given up by ZeroMQ, for so long is replaced."""
_MAPPED = re.compile(r"\[::ffff:([0-9.]+)\]")


class SyncerTransport(Transport):
    """The syncer's end: two ROUTER sockets; a peer is the nonce of a learner's process.

    Args:
        control_endpoint: where to listen: an IP address, an interface by name, or ``*``; port 0 takes a free one.
        bulk_endpoint: None takes the same host and a free port (``inproc://name-bulk`` for ``inproc://name``).
        accept: see `Transport`.
        context: see `Transport`.
        now: see `Transport`.
        options: see `Transport`.
        keys: of this syncer: only admitted sites are let in, and what passes is encrypted. None: whoever reaches the ports may speak.
    """

    def __init__(
        self,
        control_endpoint: str = "tcp://127.0.0.1:0",
        bulk_endpoint: str | None = None,
        *,
        accept: Accept,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        now: Callable[[], float] = time.monotonic,
        options: TransportOptions | None = None,
        keys: SyncerKeys | None = None,
    ) -> None:
        super().__init__(accept=accept, context=context, now=now, options=options)
        self._gate = None if keys is None else Gate(keys, self.stats.count)
        self._configure = None if self._gate is None else self._gate.configure
        self._watches: list[HandshakeWatch] = []
        self._look_s = 0.0
        self._wanted = (control_endpoint, bulk_endpoint or _beside(control_endpoint))
        self._bound: tuple[str, str] | None = None

    @property
    def control_endpoint(self) -> str:
        """Where the control socket listens, with the real port."""
        return self._require_bound()[0]

    @property
    def bulk_endpoint(self) -> str:
        """Where the bulk socket listens, with the real port."""
        return self._require_bound()[1]

    def bind(self) -> None:
        """Open both sockets.

        Raises:
            CannotListenError: an address cannot be bound now.
            ConfigurationError: a host's name stands in its place, which never can.
            LocalProtocolError: already bound or closed.
        """
        if self._bound is not None:
            raise LocalProtocolError("this transport is bound already; make another one for another address")
        context = self._open(self._wanted[0])
        if self._gate is not None:
            self._gate.start(context)
        control, control_endpoint = self._listen(context, self._wanted[0], is_bulk=False)
        try:
            self._bulk, bulk_endpoint = self._listen(context, self._wanted[1], is_bulk=True)
        except ConfigurationError:
            self._stop_watching()
            self._poller.unregister(control)
            control.close()
            raise
        self._control = control
        self._bound = (control_endpoint, bulk_endpoint)

    def is_admitted(self, peer: bytes) -> bool:
        """Whether the site that a peer came from is let in, by the last look at the folder; without keys everybody is.

        Args:
            peer: of an event; one that was not heard for so long that it is forgotten is not known to be let in.
        """
        return self._gate is None or self._gate.knows(peer)

    def close(self) -> None:
        """Close the gate, the sockets and the wake-up; idempotent. Nothing that is pending is reported."""
        self._stop_watching()
        if self._gate is not None:
            self._gate.stop()
            self._gate.sum_up()
        super().close()

    def _stop_watching(self) -> None:
        for watch in self._watches:
            watch.close()
        self._watches.clear()

    def _receive(self, wait_s: float) -> bool:
        woken = super()._receive(wait_s)
        now_s = self._now()
        if self._gate is not None and now_s >= self._look_s:
            self._look_s = now_s + _LOOK_S
            for watch in self._watches:
                for reason in watch.look():
                    self._gate.turned_away(reason)
            self._shut_out(self._gate, is_due=True)
        return woken

    def _shut_out(self, gate: Gate, *, is_due: bool) -> None:
        self._events += [KeyRevoked(peer) for peer in gate.look(is_due=is_due)]

    def _listen(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, is_bulk: bool) -> tuple[zmq.Socket[bytes], str]:
        sock = make_socket(context, is_router=True, is_bulk=is_bulk, options=self._options, configure=self._configure)
        if self._gate is not None:
            self._watches.append(HandshakeWatch(sock))
        try:
            sock.bind(endpoint)
        except zmq.ZMQError as error:
            if self._gate is not None:
                self._watches.pop().close()
            sock.close()
            raise _cannot_listen(endpoint, error) from error
        self._poller.register(sock, zmq.POLLIN)
        # Sockets are dual-stack: an IPv4 address comes back mapped into IPv6.
        return sock, _MAPPED.sub(r"\1", sock.getsockopt_string(zmq.LAST_ENDPOINT))

    def _require_bound(self) -> tuple[str, str]:
        if self._bound is None:
            raise LocalProtocolError("the real endpoints are known after bind(); call it first")
        return self._bound

    def _address(self, peer: bytes, parts: list[bytes | memoryview], *, is_bulk: bool) -> list[bytes | memoryview]:
        return [(BULK_PREFIX if is_bulk else CONTROL_PREFIX) + peer, *parts]

    def _split(self, parts: list[zmq.Frame], *, is_bulk: bool) -> tuple[bytes, list[zmq.Frame]] | None:
        peer = parse_routing_id(bytes(parts[0].buffer), BULK_PREFIX if is_bulk else CONTROL_PREFIX)
        if peer is None:
            self.stats.count("malformed_identity")
            return None
        if self._gate is not None:
            if self._gate.has_changed():
                self._shut_out(self._gate, is_due=False)
            if not self._gate.admits(peer, parts[0]):
                return None
        return peer, parts[1:]

    def _check_peer(self, peer: bytes) -> None:
        if len(peer) != NONCE_BYTES:
            raise LocalProtocolError(f"peer {peer!r} is not a nonce of {NONCE_BYTES} bytes; use the peer of an event")

    def _count_bytes(self, num_bytes: int, *, is_sent: bool) -> None:
        if is_sent:
            self.stats.bytes_down += num_bytes
        else:
            self.stats.bytes_up += num_bytes


class LearnerTransport(Transport):
    """The learner's end: two DEALER sockets that dial and redial (50 ms to 1 s); its only peer is `SYNCER`.

    ZeroMQ redials by itself when a connection ends. It does not when the other end refuses its key, or when what it reads is not its
    protocol, as after a bit was turned on the way: then the socket is left without a connection for ever. It mostly shows it by taking no
    message, but now and then it takes them until its queue is full; its monitor shows it by not saying that it dials again. A socket of
    which either is so for `_MUTE_S` is replaced. (One whose queue is full, after an outage of many minutes, looks alike; what is in it is
    out of date.)

    Args:
        control_endpoint: where the syncer's control socket listens.
        nonce: 16 random bytes of this process.
        accept: see `Transport`.
        context: see `Transport`.
        now: see `Transport`.
        options: see `Transport`.
        configure: see `Transport`.

    Raises:
        ConfigurationError: the nonce has another length.
    """

    def __init__(
        self,
        control_endpoint: str,
        *,
        nonce: bytes,
        accept: Accept,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        now: Callable[[], float] = time.monotonic,
        options: TransportOptions | None = None,
        configure: ConfigureSocket | None = None,
    ) -> None:
        if len(nonce) != NONCE_BYTES:
            raise ConfigurationError(f"the nonce has {len(nonce)} bytes, not {NONCE_BYTES}; draw it with secrets.token_bytes")
        super().__init__(accept=accept, context=context, now=now, options=options, configure=configure)
        self._control_endpoint = control_endpoint
        self._bulk_endpoint: str | None = None
        self._nonce = nonce
        self._look_s = 0.0
        self._times_back = 0
        self._alive_s = -math.inf
        self._mute_since_s: dict[bytes, float] = {}
        self._is_ipv6: bool | None = None  # of the one host that is dialled, once it is known
        self.control_link = LinkWatch()
        """What is known of the control connection; as the next one it may be read from any thread."""
        self.bulk_link = LinkWatch()
        """What is known of the bulk connection."""

    @property
    def failed_handshakes(self) -> set[str]:
        """What went wrong at the syncer's door since it let this learner in, as `HandshakeWatch` calls it."""
        return self.control_link.failed

    def connect(self) -> None:
        """Dial control; returns at once, messages wait in a bounded queue until the syncer answers.

        Raises:
            ConfigurationError: the address is malformed.
            LocalProtocolError: connected already or closed.
        """
        if self._control is not None:
            raise LocalProtocolError("this transport is connected already; it redials by itself")
        self._control = self._dial(self._control_endpoint, CONTROL_PREFIX)

    def connect_bulk(self, endpoint: str) -> None:
        """Dial bulk; a second call with another address replaces the first.

        What is on its way is offered again at once: whoever had the offer may have been another process, also at the same address.

        Args:
            endpoint: as told by the syncer; its port is dialled at the host that control has dialled (see `addresses.reach`).

        Raises:
            ConfigurationError: the address is malformed.
            LocalProtocolError: not connected or closed.
        """
        self._require_open()
        endpoint = reach(self._control_endpoint, endpoint)
        if endpoint != self._bulk_endpoint:
            bulk = self._dial(endpoint, BULK_PREFIX)
            self._hang_up(self._bulk)
            self._bulk, self._bulk_endpoint = bulk, endpoint
        self._offer_again()

    def _offer_again(self) -> None:
        for outgoing in self._outgoing.values():
            outgoing.offer_again()

    def _say_alive(self, now_s: float) -> None:
        """Find out whether the other end still knows whose connection bulk is.

        When somebody else shows this learner's ids, ZeroMQ's ROUTER gives them to him, and what it has left of this connection answers
        heartbeats, so that it seems to be up. It stops to do so with the first message that it cannot hand on: then the heartbeats cut
        it, and it is dialled anew. A learner that waits for a payload has no message; control has its heartbeats.
        """
        if self._bulk is not None and self.bulk_link.is_up and now_s - self._alive_s >= self._options.heartbeat_timeout_s:
            self._alive_s = now_s
            send_parts(self._bulk, [encode_frame(Alive())])

    def _hang_up(self, sock: zmq.Socket[bytes] | None) -> None:
        if sock is not None:
            self._poller.unregister(sock)
            sock.close(linger=0)

    def _receive(self, wait_s: float) -> bool:
        woken = super()._receive(wait_s)
        now_s = self._now()
        if now_s >= self._look_s:
            self._look_s = now_s + _LOOK_S
            self.control_link.look(now_s)
            self.bulk_link.look(now_s)
            self._offer_what_was_lost()
            self._say_alive(now_s)
            self._replace_mute(now_s)
        return woken

    def _offer_what_was_lost(self) -> None:
        """After a connection came back: an offer, its answer or the last word may have gone with it, and the wait for them has grown."""
        times_back = self.control_link.times_back + self.bulk_link.times_back
        if times_back != self._times_back:
            self._times_back = times_back
            self._offer_again()

    def close(self) -> None:
        """Close the sockets and the wake-up; idempotent. Nothing that is pending is reported."""
        self.control_link.close()
        self.bulk_link.close()
        super().close()

    def _replace_mute(self, now_s: float) -> None:
        """Dial anew with a socket that takes no message any more. In one process there is nothing to dial anew."""
        if self._is_mute(self._control, CONTROL_PREFIX, now_s):
            control = self._dial(self._control_endpoint, CONTROL_PREFIX)
            self._hang_up(self._control)
            self._control = control
        if self._bulk_endpoint is not None and self._is_mute(self._bulk, BULK_PREFIX, now_s):
            endpoint, self._bulk_endpoint = self._bulk_endpoint, None
            self.connect_bulk(endpoint)

    def _is_mute(self, sock: zmq.Socket[bytes] | None, prefix: bytes, now_s: float) -> bool:
        link = self.bulk_link if prefix == BULK_PREFIX else self.control_link
        is_well = sock is None or self._control_endpoint.startswith("inproc://") or (sock.poll(0, zmq.POLLOUT) and not link.is_given_up)
        if is_well:
            self._mute_since_s.pop(prefix, None)
            return False
        is_mute = now_s - self._mute_since_s.setdefault(prefix, now_s) >= _MUTE_S
        if is_mute:
            del self._mute_since_s[prefix]
            self.stats.count("redialled")
        return is_mute

    def _dial(self, endpoint: str, prefix: bytes) -> zmq.Socket[bytes]:
        sock = make_socket(
            self._open(endpoint),
            is_router=False,
            is_bulk=prefix == BULK_PREFIX,
            options=self._options,
            configure=self._configure,
        )
        sock.setsockopt(zmq.ROUTING_ID, prefix + self._nonce)
        if self._is_ipv6 is None:
            self._is_ipv6 = is_ipv6_only((split(endpoint) or ("", 0))[0])
        sock.setsockopt(zmq.IPV6, int(self._is_ipv6))
        watch = HandshakeWatch(sock, is_dialling=True) if endpoint.startswith("tcp://") else None
        try:
            sock.connect(endpoint)
        except zmq.ZMQError as error:
            if watch is not None:
                watch.close()
            sock.close()
            raise ConfigurationError(f"cannot dial {endpoint!r}: {error}; give it as tcp://host:port") from error
        (self.bulk_link if prefix == BULK_PREFIX else self.control_link).follow(watch, endpoint, self._now())
        self._poller.register(sock, zmq.POLLIN)
        return sock

    def _address(self, peer: bytes, parts: list[bytes | memoryview], *, is_bulk: bool) -> list[bytes | memoryview]:
        return parts

    def _split(self, parts: list[zmq.Frame], *, is_bulk: bool) -> tuple[bytes, list[zmq.Frame]] | None:
        return SYNCER, parts

    def _check_peer(self, peer: bytes) -> None:
        if peer != SYNCER:
            raise LocalProtocolError(f"peer {peer!r} is unknown here; a learner speaks to SYNCER only")

    def _count_bytes(self, num_bytes: int, *, is_sent: bool) -> None:
        if is_sent:
            self.stats.bytes_up += num_bytes
        else:
            self.stats.bytes_down += num_bytes


def _cannot_listen(endpoint: str, error: zmq.ZMQError) -> ConfigurationError:
    """The error for an endpoint that ZeroMQ does not bind."""
    if error.errno == errno.ENODEV:
        # ZeroMQ asks no name service where to listen: it took the host for an interface.
        host = endpoint.rpartition(":")[0].removeprefix("tcp://")
        return ConfigurationError(
            f"cannot listen on {endpoint}: {host} is no interface of this machine, and a host's name is for those who dial. Give an IP "
            "address of this machine, the name of an interface, or * for all of them."
        )
    return CannotListenError(f"cannot listen on {endpoint}: {error}; choose a free port at an address of this machine")


def _beside(control_endpoint: str) -> str:
    """Return the default bulk endpoint: same host, a free port."""
    if control_endpoint.startswith("inproc://"):
        return f"{control_endpoint}-bulk"
    return f"{control_endpoint.rpartition(':')[0]}:0"
