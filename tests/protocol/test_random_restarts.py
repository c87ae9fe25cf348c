"""The invariants of PROTOCOL.md section 13 under random orders of everything that can happen, crashes of the syncer included."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.restarting import RestartingPair
from tests.protocol.test_invariants import PROFILE, SCHEDULE, Chaos, run
from tests.protocol.toy import Node


class Crashes(Chaos):
    """Snapshots and crashes at any moment, before the recovery from the last one is over as well."""

    kind = RestartingPair
    healing_rounds = 10

    def act(self, number: int, node: Node, how: int) -> None:
        if number in (60, 61, 62, 63, 64, 65) and how < 2:
            if how == 0 and not self.pair.syncer.job.is_recovering:
                self.pair.take_snapshot()
            elif how == 1:
                self.pair.crash()
        else:
            super().act(number, node, how)


@pytest.mark.parametrize("faults", [(), ("drop", "copy"), ("die",), ("bad",), ("drop", "copy", "die", "bad")], ids="-".join)
@given(schedule=SCHEDULE, quorum=st.integers(1, 3), adopt=st.sampled_from(["rebase", "overwrite"]))
@settings(PROFILE, max_examples=60)
def test_crashes_and(faults, schedule, quorum, adopt):
    pair = run(schedule, adopt=adopt, quorum=quorum, faults=frozenset(faults), kind=Crashes)
    assert pair.ended is not None
