"""What ZeroMQ's socket monitor tells of handshakes: without it a wrong key looks like a machine that is switched off.

A handshake fails at both ends, and each end learns another part. The syncer sees who came without keys, with a key that is not admitted,
or with another syncer's key in mind. The learner sees that somebody answers the telephone and hangs up; and, as it dials, when a
connection is there and when it is lost (`links`).
"""

from __future__ import annotations

import secrets
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

__all__ = ["HandshakeWatch"]

_FAILED: Final = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_LINK: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
_QUEUE: Final = 100_000
"""Events that wait at most. ZeroMQ's own thread waits for room when there are more: a syncer that is busy starting must have plenty."""


class HandshakeWatch:
    """Watches one socket.

    Args:
        sock: not bound or connected yet.
        is_dialling: tell too when its connection comes and goes.
    """

    def __init__(self, sock: zmq.Socket[bytes], *, is_dialling: bool = False) -> None:
        self._sock = sock
        address = f"inproc://handshakes-{secrets.token_hex(8)}"
        sock.monitor(address, _FAILED | _LINK if is_dialling else _FAILED)
        self._events: zmq.Socket[bytes] = sock.context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, _QUEUE)
        self._events.setsockopt(zmq.LINGER, 0)
        self._events.connect(address)

    def look(self) -> list[str]:
        """What has happened since the last call, in a word each.

        "unknown_key": refused by the syncer. "no_keys": one end has keys, the other has none. "other_syncer": does not open with the
        syncer's key. "handshake": the other end hung up. And of a socket that dials: "up": the handshake is over, messages can pass.
        "down": the connection is gone, whether the handshake was over or not. "again": it will dial again, said right after that.
        """
        found = []
        while self._events.poll(0):
            event = parse_monitor_message(self._events.recv_multipart())
            found.append(_word(int(event["event"]), int(event["value"])))
        return found

    def close(self) -> None:
        """Stop watching; before the socket is closed."""
        # In this order: an event for which nobody listens any more would hold up ZeroMQ's own thread.
        self._sock.disable_monitor()
        self._events.close()


def _word(event: int, value: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
        return "up"
    if event == zmq.EVENT_DISCONNECTED:
        return "down"
    if event == zmq.EVENT_CONNECT_RETRIED:
        return "again"
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return "unknown_key"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return "no_keys"
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return "other_syncer"
    return "handshake"
