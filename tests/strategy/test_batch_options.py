"""What a user may say about batch sizes, and what a wrong word gets."""

from __future__ import annotations

import pytest

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.strategy.batch_options import BatchOptions, lr_factor


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_sizing": "Auto"}, ["'Auto'", "'auto'"]),
        ({"batch_sizing": "auto:0"}, ["'auto:0'", "'auto:N'"]),
        ({"batch_sizing": 32}, ["32", "by learner"]),
        ({"batch_sizing": {}}, ["{}", "by learner"]),
        ({"batch_sizing": {"NVIDIA T4": 8, 1: 4}}, ["all device names or all"]),
        ({"batch_sizing": {0: 0}}, ["batch_sizing[0]=0", "at least 1"]),
        ({"batch_sizing": {0: "8"}}, ["batch_sizing[0]='8'", "this is text"]),
        ({"target_step_s": 0.5}, ["target_step_s=0.5", "batch_sizing='auto'"]),
        ({"batch_sizing": "auto", "target_step_s": 0}, ["target_step_s=0", "above 0"]),
        ({"tokens_per_step": 0}, ["tokens_per_step=0", "at least 1"]),
        ({"batch_sizing": "auto", "target_step_s": 1, "tokens_per_step": 64}, ["tokens_per_step=64", "target_step_s=1"]),
        ({"inner_lr_rule": "cubic", "batch_sizing": "auto"}, ["'cubic'", "'linear'"]),
        ({"inner_lr_rule": "sqrt"}, ["'sqrt'", "Leave it 'none'"]),
    ],
)
def test_a_wrong_word_gets_a_sentence(options, words):
    with pytest.raises(ConfigurationError) as caught:
        DecoupledDiLoCoStrategy(**options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_sizes_by_device_learner_and_function():
    by_name = BatchOptions(sizing={"NVIDIA H100": 32, "NVIDIA H100 NVL": 48, "cpu": 4})
    assert by_name.size_for("NVIDIA H100 80GB HBM3", 0) == 32
    assert by_name.size_for("NVIDIA H100 NVL", 0) == 48
    assert by_name.size_for("NVIDIA T4", 0) is None
    assert by_name.size_for("cpu", 3) == 4
    by_learner = BatchOptions(sizing={0: 32, 1: 8})
    assert [by_learner.size_for("cpu", i) for i in range(3)] == [32, 8, None]
    assert BatchOptions(sizing=lambda device, learner: 2 + learner).size_for("cpu", 3) == 5
    assert BatchOptions(sizing=lambda device, learner: 2 + learner).size_for("cpu", None) is None
    with pytest.raises(ConfigurationError, match="returned=0"):
        BatchOptions(sizing=lambda device, learner: 0).size_for("cpu", 3)


def test_ceiling_of_a_cpu():
    assert BatchOptions(sizing="auto").cpu_ceiling(8) == 64
    assert BatchOptions(sizing="auto").cpu_ceiling(100) == 100
    assert BatchOptions(sizing="auto:16").cpu_ceiling(32) == 16


def test_rules_of_the_learning_rate():
    assert [lr_factor(rule, 32, 8) for rule in ("none", "sqrt", "linear")] == [1.0, 2.0, 4.0]
