"""Figures as folds over the event tape: what was merged, what was lost, who took part, how busy the learners were.

Nothing here reads a file or a clock: `runtime` reads the tape and feeds its lines. The definitions are those of `summary.json`; each
figure is explained in the module that folds it:

- `accounts`: tokens per learner and fragment, in exact integers.
- `participation`: merges, their members and who was eligible.
- `activity`: step times, stalls, presence; goodput and uptime.
- `summary`: all of them together, as the content of `summary.json`.
- `sharded`: the same from the tapes of all shards of a syncer.
- `present`: what is not in it because it is about the moment: rates, staleness, members, what went wrong last.
"""

from __future__ import annotations

from lightning_diloco.metrics.accounts import FragmentAccount, LedgerError, TokenAccounts
from lightning_diloco.metrics.activity import Activity
from lightning_diloco.metrics.participation import MergeLog
from lightning_diloco.metrics.present import PresentFold, PresentLearner
from lightning_diloco.metrics.sharded import ShardedFold, renumbered
from lightning_diloco.metrics.summary import SCHEMA, SummaryFold

__all__ = [
    "SCHEMA",
    "Activity",
    "FragmentAccount",
    "LedgerError",
    "MergeLog",
    "PresentFold",
    "PresentLearner",
    "ShardedFold",
    "SummaryFold",
    "TokenAccounts",
    "renumbered",
]
