"""Bytes to messages and back: msgpack of (envelope, message), closed per direction and channel.

A syncer only ever decodes what a learner (or an observer) may say on that channel, and the other way round, so a reflected or
misdirected message is refused by its tag. No pickle, no code, no references: msgspec builds frozen structs or raises.
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.protocol.messages import (
    Envelope,
    FromLearner,
    FromObserver,
    FromSyncer,
    LearnerHeader,
    Message,
    SyncerHeader,
    ToObserver,
)

__all__ = [
    "decode_from_learner",
    "decode_from_observer",
    "decode_from_syncer",
    "decode_learner_header",
    "decode_syncer_header",
    "decode_to_observer",
    "encode",
]

_T = TypeVar("_T")

_ENCODER: Final = msgspec.msgpack.Encoder()
_FROM_LEARNER: Final = msgspec.msgpack.Decoder(tuple[Envelope, FromLearner])
_FROM_SYNCER: Final = msgspec.msgpack.Decoder(tuple[Envelope, FromSyncer])
_FROM_OBSERVER: Final = msgspec.msgpack.Decoder(tuple[Envelope, FromObserver])
_TO_OBSERVER: Final = msgspec.msgpack.Decoder(tuple[Envelope, ToObserver])
_LEARNER_HEADER: Final = msgspec.msgpack.Decoder(tuple[Envelope, LearnerHeader])
_SYNCER_HEADER: Final = msgspec.msgpack.Decoder(tuple[Envelope, SyncerHeader])


def encode(envelope: Envelope, message: Message) -> bytes:
    """The wire form of one message of any kind."""
    return _ENCODER.encode((envelope, message))


def decode_from_learner(data: bytes) -> tuple[Envelope, FromLearner]:
    """A learner's control message.

    Raises:
        RemoteProtocolError: the bytes are no such message.
    """
    return _decode(_FROM_LEARNER, data, "a learner's message")


def decode_from_syncer(data: bytes) -> tuple[Envelope, FromSyncer]:
    """A syncer's control message.

    Raises:
        RemoteProtocolError: the bytes are no such message.
    """
    return _decode(_FROM_SYNCER, data, "a syncer's message")


def decode_from_observer(data: bytes) -> tuple[Envelope, FromObserver]:
    """What an observer asks.

    Raises:
        RemoteProtocolError: the bytes are no such message.
    """
    return _decode(_FROM_OBSERVER, data, "an observer's message")


def decode_to_observer(data: bytes) -> tuple[Envelope, ToObserver]:
    """A syncer's answer to an observer.

    Raises:
        RemoteProtocolError: the bytes are no such message.
    """
    return _decode(_TO_OBSERVER, data, "an answer to an observer")


def decode_learner_header(data: bytes) -> tuple[Envelope, LearnerHeader]:
    """The header of a payload that a learner sends.

    Raises:
        RemoteProtocolError: the bytes are no such header.
    """
    return _decode(_LEARNER_HEADER, data, "a learner's payload header")


def decode_syncer_header(data: bytes) -> tuple[Envelope, SyncerHeader]:
    """The header of a payload that the syncer sends.

    Raises:
        RemoteProtocolError: the bytes are no such header.
    """
    return _decode(_SYNCER_HEADER, data, "a syncer's payload header")


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes, what: str) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RemoteProtocolError("wrong_layout", f"not {what}: {error}") from error
