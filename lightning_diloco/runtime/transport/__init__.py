"""The transport of the runtime: control messages and large payloads between learners and the syncer.

`frames` has the wire format, `sending` and `receiving` the transfer rules without sockets, `base` the poll loop, `endpoints`
the two ends, `gate` who may come in. ``docs/transport.md`` tells it on one page.
"""

from __future__ import annotations

from .base import Transport
from .endpoints import LearnerTransport, SyncerTransport
from .events import (
    SYNCER,
    ControlReceived,
    KeyRevoked,
    PayloadDelivered,
    PayloadFailed,
    PayloadReceived,
    PayloadRefused,
    TransportEvent,
)
from .frames import CHUNK_BYTES, MAX_CONTROL_BYTES, MAX_HEADER_BYTES, NONCE_BYTES
from .options import TransportOptions, TransportStats
from .peers import Accept
from .sockets import ConfigureSocket

__all__ = [
    "CHUNK_BYTES",
    "MAX_CONTROL_BYTES",
    "MAX_HEADER_BYTES",
    "NONCE_BYTES",
    "SYNCER",
    "Accept",
    "ConfigureSocket",
    "ControlReceived",
    "KeyRevoked",
    "LearnerTransport",
    "PayloadDelivered",
    "PayloadFailed",
    "PayloadReceived",
    "PayloadRefused",
    "SyncerTransport",
    "Transport",
    "TransportEvent",
    "TransportOptions",
    "TransportStats",
]
