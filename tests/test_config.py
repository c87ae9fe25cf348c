"""What `SyncConfig` accepts, and the sentences for what it does not."""

from __future__ import annotations

import dataclasses

import pytest

from lightning_diloco import SyncConfig
from lightning_diloco.config import payload_bytes
from lightning_diloco.errors import ConfigurationError

WRONG = [
    ({"num_fragments": 0}, "num_fragments=0: must be a whole number of at least 1"),
    ({"sync_interval_steps": 0}, "sync_interval_steps=0: must be a whole number of at least 1"),
    ({"sync_interval_steps": 2.5}, "sync_interval_steps=2.5"),
    ({"sync_interval_steps": True}, "sync_interval_steps=True"),
    ({"min_quorum": -1}, "min_quorum=-1"),
    ({"overlap_steps": -1}, "overlap_steps=-1: must be a whole number of at least 0"),
    ({"grace_fraction": 1.0}, "grace_fraction=1.0: must be a finite number of at least 0 and below 1"),
    ({"grace_cap_steps": float("nan")}, "grace_cap_steps=nan"),
    ({"outer_lr": 0.0}, "outer_lr=0.0: must be a finite number above 0"),
    ({"outer_lr": "0.7"}, "outer_lr='0.7'"),
    ({"outer_momentum": 1.0}, "outer_momentum=1.0"),
    ({"merge": "median"}, "merge='median': must be one of 'rda', 'mean'"),
    ({"adopt": "mix"}, "adopt='mix'"),
    ({"wire_dtype": "fp16"}, "wire_dtype='fp16': must be one of 'fp32', 'bf16', 'int4'."),
    ({"sync_interval_steps": "8"}, "sync_interval_steps='8': must be a whole number of at least 1; this is text, an int is needed."),
    ({"norm_gate": "8"}, "norm_gate='8': must be a finite number above 1; this is text, a number is needed."),
    ({"lr_clock": None}, "lr_clock=None"),
    ({"mean_patterns": "lm_head"}, "mean_patterns='lm_head': must be a list of strings"),
    ({"mean_patterns": ["lm_head", ""]}, "must be non-empty strings"),
    ({"include_frozen": 1}, "include_frozen=1: must be True or False"),
    ({"token_budget": 0}, "token_budget=0"),
    ({"norm_gate": 1.0}, "norm_gate=1.0"),
    ({"drain_timeout_s": 0}, "drain_timeout_s=0"),
    ({"heartbeat_s": float("inf")}, "heartbeat_s=inf"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_a_wrong_value_is_named_with_its_rule(options, sentence):
    with pytest.raises(ConfigurationError) as caught:
        SyncConfig(**options)
    assert sentence in str(caught.value)


def test_an_unknown_option_suggests_the_nearest_one():
    with pytest.raises(ConfigurationError, match="Unknown option 'sync_interval': did you mean 'sync_interval_steps'"):
        SyncConfig.from_options({"sync_interval": 24})
    with pytest.raises(ConfigurationError, match="the options are: num_fragments"):
        SyncConfig.from_options({"zzz": 1})


def test_options_survive_a_round_trip_through_plain_values():
    config = SyncConfig(num_fragments=3, mean_patterns=["head"], norm_gate=None, token_budget=10**6)
    assert SyncConfig.from_options(config.as_dict()) == config
    assert config.mean_patterns == ("head",)


def test_the_first_field_that_differs_is_named():
    config = SyncConfig()
    assert config.first_difference(SyncConfig()) is None
    assert config.first_difference(dataclasses.replace(config, outer_lr=0.5, merge="mean")) == "merge"


@pytest.mark.parametrize(("wire_dtype", "two", "four"), [("bf16", 45, 68), ("int4", 165, 250)])
@pytest.mark.parametrize("num_params", [12e9, 0.85e6])
def test_a_learner_sends_a_small_share_of_what_data_parallel_training_sends(wire_dtype, two, four, num_params):
    config = SyncConfig(wire_dtype=wire_dtype)
    per_step = payload_bytes(int(num_params / config.num_fragments), wire_dtype) * config.num_fragments / config.sync_interval_steps
    for learners, share in ((2, two), (4, four)):
        # A ring all-reduce of float32 gradients: each sends 2 (M - 1) / M of them.
        assert 4 * num_params * 2 * (learners - 1) / learners > share * per_step
