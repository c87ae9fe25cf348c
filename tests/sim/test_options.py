"""A wrong value is refused when the options are made, with its name and the rule."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.sim import Cut, Freeze, Kill, Link, Pause, SimLearner, SimOptions

ONE = (SimLearner(),)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Link(latency_s=-1.0), "Link: latency_s=-1.0: must be a finite number of at least 0."),
        (lambda: Link(up_bytes_per_s=0), "Link: up_bytes_per_s=0: must be a finite number above 0."),
        (lambda: Link(down_bytes_per_s=math.inf), "Link: down_bytes_per_s=inf: must be a finite number above 0."),
        (lambda: SimLearner(step_s=0.0), "SimLearner: step_s=0.0: must be a finite number above 0."),
        (lambda: SimLearner(jitter=1.0), "SimLearner: jitter=1.0: must be a finite number of at least 0 and below 1."),
        (lambda: SimLearner(join_at_s=math.nan), "SimLearner: join_at_s=nan: must be a finite number of at least 0."),
        (lambda: SimLearner(tokens_per_step=None), "SimLearner: tokens_per_step=None: must be a whole number of at least 1."),
        (lambda: SimLearner(max_steps=0), "SimLearner: max_steps=0: must be a whole number of at least 1."),
        (lambda: SimLearner(tokens_per_step=True), "SimLearner: tokens_per_step=True: must be a whole number of at least 1."),
        (lambda: Pause(learner_id=0, at_s=1.0, for_s=0.0), "Pause: for_s=0.0: must be a finite number above 0."),
        (lambda: Freeze(learner_id=0, at_s=1.0, for_s="2"), "Freeze: for_s='2': must be a finite number above 0."),
        (lambda: Cut(learner_id=0, at_s=-1.0, for_s=1.0), "Cut: at_s=-1.0: must be a finite number of at least 0."),
        (lambda: Kill(learner_id=0, at_s=-1.0), "Kill: at_s=-1.0: must be a finite number of at least 0."),
        (lambda: SimOptions(learners=(), stop_at_s=1.0), "SimOptions: learners=(): must hold at least one SimLearner."),
        (lambda: SimOptions(learners=ONE), "SimOptions: the job would not end. Set stop_at_s, until_s, or max_steps of a learner."),
        (lambda: SimOptions(learners=ONE, stop_at_s=0.0), "SimOptions: stop_at_s=0.0: must be a finite number above 0."),
        (lambda: SimOptions(learners=ONE, stop_at_s=1.0, merge_s=-1), "SimOptions: merge_s=-1: must be a finite number of at least 0."),
        (lambda: SimOptions(learners=ONE, stop_at_s=1.0, seed=1.5), "SimOptions: seed=1.5: must be a whole number."),
        (
            lambda: SimOptions(learners=ONE, stop_at_s=1.0, params_per_fragment=0),
            "SimOptions: params_per_fragment=0: must be a whole number, at least 1.",
        ),
        (
            lambda: SimOptions(learners=ONE, stop_at_s=1.0, happenings=(Kill(learner_id=1, at_s=1.0),)),
            "Kill: learner_id=1: there are 1 learners, from 0 on.",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_a_sentence(make, sentence):
    with pytest.raises(ConfigurationError) as error:
        make()
    assert str(error.value) == sentence


def test_happenings_of_one_kind_come_by_time():
    later, sooner, other = Pause(learner_id=0, at_s=9.0, for_s=1.0), Pause(learner_id=0, at_s=3.0, for_s=1.0), Kill(learner_id=0, at_s=1.0)
    options = SimOptions(learners=ONE * 2, stop_at_s=1.0, happenings=[later, other, sooner])
    assert options.of(Pause) == [sooner, later]
    assert options.of(Pause, 1) == []
    assert options.of(Kill, 0) == [other]


def test_options_are_frozen_and_keyword_only():
    options = SimOptions(learners=ONE, stop_at_s=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 3
    with pytest.raises(TypeError):
        SimOptions(ONE)
