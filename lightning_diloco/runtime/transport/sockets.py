"""ZeroMQ sockets with the options that this transport relies on, and the thread-safe wake-up.

Why each option: high-water marks bound memory, and with ROUTER_MANDATORY a full or missing peer is an error that we see, where
a plain ROUTER drops in silence. ROUTER_HANDOVER lets a reconnecting learner take its own identity back at once. MAXMSGSIZE cuts
a connection that announces a giant message, before a byte of it is allocated. Heartbeats and TCP keepalive find dead links.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable

import zmq

from .frames import CHUNK_BYTES, MAX_MESSAGE_BYTES
from .options import TransportOptions

__all__ = ["ConfigureSocket", "Waker", "make_socket", "receive_parts", "send_parts"]

ConfigureSocket = Callable[["zmq.Socket[bytes]"], None]
"""Called with every socket before it is bound or connected, for keys and authentication."""

_CONTROL_HWM = 1024
_ENCRYPTED_BYTES = 64
"""ZeroMQ applies its limit to what is on the wire: CURVE adds 33 bytes to each part of a message."""
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1000
_CONNECT_MS = 10_000
"""An attempt to connect is given up after so long and another one begins. Where a firewall drops what comes, the operating system would ask
more and more seldom, for two minutes: a port that is opened then would be noticed up to a minute late."""

_BULK_PATIENCE = 4
"""Bulk waits so many times as long for a heartbeat. ZeroMQ takes nothing but a whole message for a sign of life, and a heartbeat waits
behind the chunk that is being sent: a chunk has to pass in this time, or its connection is cut in its middle, again and again."""

_write = ctypes.PyDLL(None).write
"""write(2), with the interpreter's lock held."""
_write.argtypes, _write.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t), ctypes.c_ssize_t


def make_socket(
    context: zmq.Context[zmq.Socket[bytes]],
    *,
    is_router: bool,
    is_bulk: bool,
    options: TransportOptions,
    configure: ConfigureSocket | None,
) -> zmq.Socket[bytes]:
    """Make one of the four kinds of socket, neither bound nor connected.

    Args:
        context: owner of the I/O thread.
        is_router: the syncer's side.
        is_bulk: the bulk channel.
        options: numbers of the transport.
        configure: for keys.
    """
    sock: zmq.Socket[bytes] = context.socket(zmq.ROUTER if is_router else zmq.DEALER)
    # A writer learns of the reader's progress in batches of half the mark: twice the window keeps honest credit from hitting it.
    mark = 2 * options.window_chunks + 8 if is_bulk else _CONTROL_HWM
    sock.setsockopt(zmq.SNDHWM, mark)
    sock.setsockopt(zmq.RCVHWM, mark)
    sock.setsockopt(zmq.MAXMSGSIZE, (CHUNK_BYTES if is_bulk else MAX_MESSAGE_BYTES) + _ENCRYPTED_BYTES)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    sock.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * options.heartbeat_interval_s))
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * options.heartbeat_timeout_s * (_BULK_PATIENCE if is_bulk else 1)))
    sock.setsockopt(zmq.IPV6, 1)
    if is_router:
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
    else:
        sock.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        sock.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
    if configure is not None:
        configure(sock)
    return sock


def send_parts(sock: zmq.Socket[bytes], parts: list[bytes | memoryview], *, is_shared: bool = False) -> bool:
    """Send one message without blocking.

    Args:
        sock: any of ours.
        parts: the message.
        is_shared: long parts are not copied. ZeroMQ holds their memory until they have left or were dropped, also after their transfer
            has ended; if they change then, the receiver gets what it ignores: a chunk of a transfer that has ended.

    Returns:
        False when the peer is unknown, gone, or its queue is full; nothing was sent then.
    """
    try:
        sock.send_multipart(parts, flags=zmq.NOBLOCK, copy=not is_shared)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            return False
        raise
    return True


def receive_parts(sock: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """Receive one message without blocking and without copying.

    Args:
        sock: any of ours.

    Returns:
        The parts, or None when nothing has arrived.
    """
    try:
        return sock.recv_multipart(flags=zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None


class Waker:
    """A pipe to oneself: `wake` from any thread makes the poller return.

    `wake` keeps the interpreter's lock, which `os.write` would give away: where all threads share one core, another one that is awake
    already takes it in that moment, and the training thread gets it back after milliseconds (docs/lab-notes.md).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for one non-blocking call only; keeps `wake` away from a closed descriptor
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._is_closed = False

    def fileno(self) -> int:
        """Return the descriptor to poll for reading."""
        return self._reader

    def wake(self) -> None:
        """Make the descriptor readable; never blocks, harmless after `close`."""
        with self._lock:
            if not self._is_closed:
                _write(self._writer, b"\0", 1)  # if it is full, it is readable already

    def drain(self) -> None:
        """Forget all wake-ups so far."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._reader, 4096)) == 4096:
                pass

    def close(self) -> None:
        """Release both ends."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                os.close(self._reader)
                os.close(self._writer)
