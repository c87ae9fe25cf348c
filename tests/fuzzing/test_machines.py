"""Both machines without a socket: whatever message comes in whatever stage, nothing is raised and all that is answered can be sent."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from lightning_diloco.protocol import events as ev
from lightning_diloco.protocol import messages as msg
from lightning_diloco.protocol import wire
from lightning_diloco.protocol.actions import Decode, LearnerAction, Send
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.learner import LearnerMachine, LearnerOptions
from tests.fuzzing.values import struct

HINTS = {
    "fragment_id": (0, 1),
    "version": (Version(1, 0), Version(1, 1), Version(0, 9), Version(2, 0)),
    "parent": (None, Version(1, 0)),
    "next_seq": ((), (1, 1), (1,)),
    "seq": (1, 2),
    "learner_id": (0, 1),
    "incarnation": (0, 1),
    "role": ("waiting", "founder", "joiner", "member", "resumed"),
}
ENDS = (msg.Fenced, msg.JoinRefused, msg.Left)


def machine() -> LearnerMachine:
    options = LearnerOptions(
        nonce="n", num_fragments=2, fingerprint="f", config=b"{}", adopt="rebase", learner_id=None, token="", takeover_token=""
    )
    learner = LearnerMachine(options)
    learner.handle(ev.JoinRequested(), 0.0)
    return learner


def envelope(dice: random.Random) -> msg.Envelope:
    names = dice.choice(("job", "job", "other")), dice.choice(("first", "first", "other"))
    return msg.Envelope(*names, dice.choice((1, 1, 1, 0, 2)), dice.choice((0, 0, 1)))


def heard(dice: random.Random, learner: LearnerMachine) -> list[LearnerAction]:
    """Some message arrives; what follows from it, a version that is to be decoded included."""
    kind = dice.choice(get_args(msg.FromSyncer) + 4 * (msg.Publication, msg.Pull, msg.Resolved))
    if kind in ENDS and dice.random() < 0.95:
        return []
    message = struct(dice, kind, HINTS, wildness=0.3)
    event = ev.PublicationArrived if kind is msg.Publication else ev.ControlReceived
    name = "header" if kind is msg.Publication else "message"
    actions = learner.handle(event(envelope=envelope(dice), **{name: message}), 0.0)
    for action in [a for a in actions if isinstance(a, Decode)]:
        done = ev.Decoded(fragment_id=action.fragment_id, version=action.version, crc_ok=dice.random() < 0.7)
        actions += learner.handle(done, 0.0)
    return actions


@pytest.mark.parametrize("seed", range(40))
def test_a_learner_that_hears_anything_in_any_stage_raises_nothing(seed):
    dice, learner = random.Random(seed), machine()
    for _ in range(150):
        actions = heard(dice, learner)
        if dice.random() < 0.5:
            actions += learner.handle(ev.Boundary(tokens=8, steps=1, can_snapshot=True), 0.0)
        for action in actions:
            if isinstance(action, Send):
                wire.decode_from_learner(wire.encode(learner.state.envelope, action.message))
