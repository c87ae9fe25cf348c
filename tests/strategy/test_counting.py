"""Tokens of a batch: the user's word first, then what the batch looks like."""

from __future__ import annotations

import pytest
import torch

from lightning_diloco import ConfigurationError
from lightning_diloco.strategy.counting import count_tokens

IDS = torch.ones(3, 5, dtype=torch.long)
MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


class Counting:
    def diloco_tokens(self, batch):
        return 7


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": IDS, "attention_mask": MASK}, 6),
        ({"input_ids": IDS}, 15),
        ({"image": torch.zeros(4, 2)}, 4),
        ((torch.zeros(4, 2), torch.zeros(4)), 4),
        (torch.zeros(6, 2), 6),
        ("a string", 1),
        (object(), 1),
        (None, 1),
    ],
)
def test_a_batch_counts_by_what_it_holds(batch, tokens):
    assert count_tokens(batch, object()) == tokens


def test_the_module_is_asked_before_the_batch_is_looked_at():
    assert count_tokens({"input_ids": IDS}, Counting()) == 7


def test_the_option_has_the_first_word():
    assert count_tokens({"input_ids": IDS}, Counting(), lambda batch: torch.tensor(3)) == 3


@pytest.mark.parametrize("value", [-1, 1.5, None, True, torch.tensor(1.5)])
def test_a_counter_that_returns_no_count_is_refused(value):
    with pytest.raises(ConfigurationError, match="token_counter returned"):
        count_tokens(IDS, object(), lambda batch: value)
