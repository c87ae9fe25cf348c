"""The small version of `make fuzz`: 5,000 messages, both targets; and the generator itself."""

from __future__ import annotations

from typing import get_args

import pytest

from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import FromLearner, FromSyncer, LearnerHeader, SyncerHeader
from lightning_diloco.runtime.transport.frames import SEAL_BYTES
from tests.fuzzing.learner_target import JOB, FalseSyncer, attack_learner
from tests.fuzzing.shots import LEARNER, SYNCER, Shots, World
from tests.fuzzing.syncer_target import attack_syncer
from tests.fuzzing.tally import MAX_GROWTH_BYTES, MIN_SHARE, Tally
from tests.fuzzing.values import fields_of


def holds(tally: Tally, num_messages: int) -> None:
    assert tally.faults == []
    assert tally.num_fired == num_messages
    assert tally.num_reached >= MIN_SHARE * num_messages
    assert 0 < tally.rss[-1] <= tally.rss[0] + MAX_GROWTH_BYTES


@pytest.mark.process
def test_a_live_syncer_under_fire_goes_on_with_its_job_as_if_nobody_had_fired(tmp_path):
    tally = attack_syncer(2000, 1, tmp_path)
    holds(tally, 2000)
    assert tally.merges > 0
    for answer in ("WhoAreYou", "Welcome joiner", "JoinRefused wrong_layout", "JoinRefused protocol_version", "payload refused, refused"):
        assert tally.answers[answer] > 0, tally.answers
    assert sum(count for answer, count in tally.answers.items() if answer.startswith("Resolved refused")) > 0, tally.answers


@pytest.mark.process
def test_a_live_learner_under_fire_of_its_syncer_ends_with_its_own_steps_bit_for_bit(tmp_path):
    tally = attack_learner(3000, 1, tmp_path)
    holds(tally, 3000)
    for answer in ("Hello", "NeedFull", "NotHeld", "payload refused, refused", "payload received"):
        assert tally.answers[answer] > 0, tally.answers


# ---- the generator --------------------------------------------------------------------------------------------------------------


def world() -> World:
    hints = {"fragment_id": (0, 1), "version": (Version(3, 0),)}
    return World(JOB, hints, 0.3, (48, 1 << 20), flaw=lambda dice, index, envelope, header, values: (envelope, header, values))


@pytest.mark.parametrize("side", [LEARNER, SYNCER], ids=["learner", "syncer"])
def test_a_seed_and_a_number_give_the_shot(side):
    first, again, other = (Shots(side, seed) for seed in (5, 5, 6))
    numbers = range(200)
    assert [first.make(world(), i) for i in numbers] == [again.make(world(), i) for i in reversed(numbers)][::-1]
    assert [first.make(world(), i) for i in numbers] != [other.make(world(), i) for i in numbers]


@pytest.mark.parametrize(
    ("side", "kinds"),
    [(LEARNER, get_args(FromLearner) + get_args(LearnerHeader)), (SYNCER, get_args(FromSyncer) + get_args(SyncerHeader))],
    ids=["learner", "syncer"],
)
def test_every_type_of_message_and_every_field_of_it_is_varied(side, kinds):
    shots, seen = Shots(side, 1), {kind: {field.name: set() for field in fields_of(kind)} for kind in kinds}
    for index in range(6000):
        message = shots.make(world(), index).message
        for name in seen.get(type(message), ()):
            seen[type(message)][name].add(repr(getattr(message, name)))
    assert [(kind.__name__, name) for kind in kinds for name, values in seen[kind].items() if len(values) < 2] == []


@pytest.mark.parametrize("side", [LEARNER, SYNCER], ids=["learner", "syncer"])
def test_what_is_decoded_and_what_is_not_both_come_in_every_way(side):
    shots = Shots(side, 2)
    made = [shots.make(world(), index) for index in range(3000)]
    for kind in shots.kinds:
        assert any(shot.kind == kind for shot in made)
    assert all(shot.message is not None for shot in made if shot.kind == "control")
    assert all(shot.message is None for shot in made if shot.kind == "control, other side")
    for kind in ("control, broken", "control, bytes", "payload, bytes"):
        share = sum(shot.message is not None for shot in made if shot.kind == kind) / sum(shot.kind == kind for shot in made)
        assert share < 0.5, kind


def test_an_order_of_a_learners_own_syncer_is_never_fired():
    syncer = FalseSyncer(Tally("learner", 0))
    try:
        target, shots = syncer.world(), Shots(SYNCER, 3)
        made = [shots.make(target, i) for i in range(3000)]
        words = [SYNCER.decode(shot.control[1:-SEAL_BYTES]) for shot in made if shot.control is not None and shot.message is not None]
        assert not any(syncer.is_order(*word) for word in words)
        names = {type(message).__name__ for _, message in words}
        assert names >= {"Stop", "Fenced", "Left", "JoinRefused"}, "with another envelope they are no orders"
        assert {"Resolved", "Welcome", "Recall"} <= {type(m).__name__ for envelope, m in words if envelope == JOB}
    finally:
        syncer.close()
