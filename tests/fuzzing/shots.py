"""What is fired at a peer: messages of one direction, made from a seed and a number.

`Shots(side, seed).make(world, index)` gives the same shot for the same seed, index and world (what the attacker knows). One shot is one
message: a control message, one frame, or one payload with all its chunks.

Shots at a syncer never hold a contribution that a learner of good faith could have sent, and shots at a learner no order that its own
syncer may give (`World.is_order`): whatever changes the job's state is then a fault of ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.protocol import messages as msg
from lightning_diloco.protocol import wire
from lightning_diloco.protocol.messages import Envelope, Message
from lightning_diloco.runtime.transport.frames import FRAME_KIND, SEAL_BYTES, USER_KIND, BulkFrame, ReplyFrame, encode_frame, seal
from tests.fuzzing.payloads import Parts, frames_of
from tests.fuzzing.values import Hints, broken, mutated, struct


@dataclass(frozen=True)
class Side:
    """One direction of the wire."""

    control: tuple[type, ...]
    headers: tuple[type, ...]
    decode: Callable[[bytes], tuple[Envelope, Message]]
    decode_header: Callable[[bytes], tuple[Envelope, Message]]
    reflected: tuple[type, ...]


LEARNER = Side(
    get_args(msg.FromLearner), get_args(msg.LearnerHeader), wire.decode_from_learner, wire.decode_learner_header, get_args(msg.FromSyncer)
)
SYNCER = Side(
    get_args(msg.FromSyncer), get_args(msg.SyncerHeader), wire.decode_from_syncer, wire.decode_syncer_header, get_args(msg.FromLearner)
)


@dataclass
class World:
    """What an attacker knows.

    Args:
        envelope: of the job; of its own session if it has one.
        hints: see `values.Hints`.
        wildness: share of the fields that are drawn from the whole type.
        sizes: bytes of each fragment's float32 values.
        flaw: given (dice, index, envelope, header, values), makes a payload that the rules must refuse; returns the three.
        is_order: whether a message may rightly change the target's state, and is therefore not sent.
        rare: types of messages that end the session they come from: few of them, or nothing else would be heard of it.
    """

    envelope: Envelope
    hints: Hints
    wildness: float
    sizes: tuple[int, ...]
    flaw: Callable[[random.Random, int, Envelope, Any, str], tuple[Envelope, Any, str]]
    is_order: Callable[[Envelope, Any], bool] = lambda envelope, message: False
    rare: tuple[type, ...] = ()


@dataclass(frozen=True)
class Shot:
    """One message.

    Args:
        index: its number.
        kind: how it was made.
        name: the type of message that it is, or began as.
        control: the part for the control socket, or nothing.
        bulk: messages for the bulk socket, each a tuple of parts.
        message: what the target's decoder makes of a control message or of a payload's header; None: nothing.
        transfer_id: of a payload.
        cuts: longer than the socket allows, so the connection ends with it.
    """

    index: int
    kind: str
    name: str
    control: bytes | None = None
    bulk: tuple[Parts, ...] = ()
    message: Any = None
    transfer_id: int = -1
    cuts: bool = False


KINDS = {
    "control": 66,
    "control, broken": 6,
    "control, bytes": 10,
    "control, other side": 2,
    "payload": 10,
    "payload, bytes": 2,
    "frame": 4,
}
CUTS_EVERY = 5000


@dataclass
class Shots:
    """The sequence of one seed."""

    side: Side
    seed: int
    kinds: dict[str, int] = field(default_factory=lambda: dict(KINDS))

    def make(self, world: World, index: int) -> Shot:
        """The shot of this number."""
        dice = random.Random(f"{self.seed}/{index}")
        if index % CUTS_EVERY == CUTS_EVERY - 1:
            return Shot(index, "too long", "bytes", control=USER_KIND + bytes(1 << 21), cuts=True)
        kind = dice.choices(list(self.kinds), list(self.kinds.values()))[0]
        if kind.startswith("payload"):
            return self._payload(world, dice, index, kind)
        if kind == "frame":
            return self._frame(dice, index)
        while True:
            name, data = self._control(world, dice, kind)
            decoded = self._decode(self.side.decode, data)
            if decoded is None or not world.is_order(*decoded):
                return Shot(index, kind, name, control=seal(USER_KIND + data), message=decoded and decoded[1])

    def _control(self, world: World, dice: random.Random, kind: str) -> tuple[str, bytes]:
        cls = dice.choice(self.side.reflected if kind == "control, other side" else self.side.control)
        if cls in world.rare and dice.random() < 0.97:
            return self._control(world, dice, kind)
        envelope, message = self._envelope(world, dice), struct(dice, cls, world.hints, wildness=world.wildness)
        data = wire.encode(envelope, message)
        if kind == "control, broken":
            pair = (envelope, broken(dice, message)) if dice.random() < 0.7 else (broken(dice, envelope), message)
            data = msgspec.msgpack.encode(pair)
        elif kind == "control, bytes":
            other = wire.encode(world.envelope, struct(dice, dice.choice(self.side.control), world.hints, wildness=0.5))
            data = mutated(dice, data, other)
        return cls.__name__, data

    def _envelope(self, world: World, dice: random.Random) -> Envelope:
        """Nearly always the right one; else the wrong job, lineage, epoch or incarnation."""
        if dice.random() < 0.85:
            return world.envelope
        right = world.envelope
        name = dice.choice(("job_id", "lineage", "epoch", "incarnation"))
        if name in ("job_id", "lineage"):
            return msgspec.structs.replace(right, **{name: dice.choice(("", "other", "a" * 200))})
        before = getattr(right, name)
        return msgspec.structs.replace(right, **{name: dice.choice((max(0, before - 1), before + 1, 2**31, 2**62))})

    def _payload(self, world: World, dice: random.Random, index: int, kind: str) -> Shot:
        main = [kind for kind in self.side.headers if kind in (msg.Contribution, msg.Publication)]
        cls = dice.choice(main if dice.random() < 0.7 else self.side.headers)
        header = struct(dice, cls, world.hints, wildness=world.wildness / 2)
        values = dice.choice(("nan", "inf", "huge", "sound", "zeros", "noise"))
        values = values if kind == "payload" else "nan"
        envelope, header, values = world.flaw(dice, index, self._envelope(world, dice), header, values)
        data = wire.encode(envelope, header)
        if kind == "payload, bytes":
            data = mutated(dice, data, data)[:60_000]
        decoded = self._decode(self.side.decode_header, data)
        if decoded is not None and world.is_order(*decoded):
            data, decoded = data[:-1], None
        size = world.sizes[min(getattr(header, "fragment_id", 0), len(world.sizes) - 1)]
        transfer_id, bulk = frames_of(dice, data, values, size)
        return Shot(index, kind, cls.__name__, bulk=bulk, message=decoded and decoded[1], transfer_id=transfer_id)

    def _frame(self, dice: random.Random, index: int) -> Shot:
        """Frames of the transport with values at their edges, flipped bits, and parts too many or too few."""
        cls = dice.choice(get_args(BulkFrame) + get_args(ReplyFrame))
        data = encode_frame(struct(dice, cls, {}, wildness=1.0))
        if dice.random() < 0.5:
            # With the right checksum at its end, or it would be thrown away unread.
            data = seal(mutated(dice, data[:-SEAL_BYTES], data))
        data = mutated(dice, data, data) if dice.random() < 0.2 else data
        if dice.random() < 0.4:
            kind = dice.choice((FRAME_KIND, FRAME_KIND, b"", b"\x00", b"\x03", b"\xff"))
            return Shot(index, "frame", cls.__name__, control=kind + data)
        extra = tuple(dice.randbytes(dice.choice((0, 1, 4096))) for _ in range(dice.choice((0, 1, 1, 1, 2, 40))))
        return Shot(index, "frame", cls.__name__, bulk=((data, *extra),))

    @staticmethod
    def _decode(decode: Callable[[bytes], tuple[Envelope, Message]], data: bytes) -> tuple[Envelope, Message] | None:
        try:
            return decode(data)
        except RemoteProtocolError:
            return None
