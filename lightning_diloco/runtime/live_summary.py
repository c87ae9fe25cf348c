"""The figures of a job while it runs, for whoever asks: `summary.json`, `lightning-diloco status`, the metrics endpoint.

All three read the same fold over the same tape, so they differ only by the moment at which they have read it. Reading happens on the
asker's thread, from the file: the syncer's loop neither waits for it nor does any of it. A reading that has just been made is given
again, and the next one is made no sooner than `REST` times what that one took: whoever asks without a pause costs a twentieth of one core
(and of the interpreter lock) at most.

After the end `settle` says what the last summary was; from then on that is what everybody gets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lightning_diloco.metrics import PresentFold, PresentLearner, SummaryFold
from lightning_diloco.runtime.tape import TAPE_NAME, TapeTail

__all__ = ["PORTION_BYTES", "LiveSummary", "Reading"]

FRESH_S: Final = 0.25
"""A reading so young is given again; a line of the tape reaches the file within `FLUSH_PERIOD_S` and a sleep of the syncer's loop."""
REST: Final = 20.0
"""Time between two readings, in multiples of what the first one took."""
PORTION_BYTES: Final = 8 << 20
"""A long tape is read in portions."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The figures of one moment.

    Args:
        summary: the content of `summary.json`.
        learners: what every learner that joined is doing, by id.
        refused: contributions refused so far, by reason.
        num_members: learners that have joined and not left.
        epoch: of the syncer that wrote the last line.
        is_final: the summary is the last one.
    """

    summary: dict[str, Any]
    learners: dict[int, PresentLearner]
    refused: dict[str, int]
    num_members: int
    epoch: int
    is_final: bool = False


class LiveSummary:
    """Folds the tape of a run directory as far as it goes; any thread may ask.

    Args:
        run_dir: the run directory; its tape need not exist yet.
    """

    def __init__(self, run_dir: Path) -> None:
        self._lock = threading.Lock()
        self._tail = TapeTail(run_dir / TAPE_NAME)
        self._fold: SummaryFold = SummaryFold()
        self._present = PresentFold()
        self._last: Reading | None = None
        self._due_s = 0.0

    @property
    def has_run_record(self) -> bool:
        """Whether the supervisor's last word is on the tape."""
        return self._fold.has_run_record

    def feed(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Fold what is new on the tape.

        Args:
            give_up: asked between two portions: whether to leave the rest.

        Raises:
            TapeError: a line is no record.
            OSError: the file cannot be read.
        """
        with self._lock:
            self._feed(give_up)

    def result(self, status: str | None = None, *, is_strict: bool = True) -> dict[str, Any]:
        """The content of `summary.json` as of what was fed; see `SummaryFold.result`.

        Raises:
            LedgerError: the accounts of a job that has ended do not add up.
        """
        with self._lock:
            return self._fold.result(status, is_strict=is_strict)

    def read(self, give_up: Callable[[], bool] = lambda: False, *, at_once: bool = False) -> Reading:
        """The figures of about now; after `settle`, the last ones.

        Args:
            give_up: asked between two portions of a long tape: whether to do with what has been read.
            at_once: read what is new, however young the last reading is.

        Raises:
            TapeError: a line is no record.
            OSError: the file cannot be read.
        """
        with self._lock:
            start_s = time.monotonic()
            if self._last is not None and (self._last.is_final or (start_s < self._due_s and not at_once)):
                return self._last
            self._feed(give_up)
            self._last = self._reading(self._fold.result("running", is_strict=False), is_final=False)
            now_s = time.monotonic()
            self._due_s = now_s + max(FRESH_S, REST * (now_s - start_s))
            return self._last

    def settle(self, summary: dict[str, Any]) -> None:
        """The job has ended with this summary."""
        with self._lock:
            self._last = self._reading(summary, is_final=True)

    def _feed(self, give_up: Callable[[], bool]) -> None:
        is_done = False
        while not is_done:
            for line in self._tail.read_new(PORTION_BYTES):
                self._fold.feed(line)
                self._present.feed(line)
            is_done = not self._tail.has_more or give_up()

    def _reading(self, summary: dict[str, Any], *, is_final: bool) -> Reading:
        present = self._present
        return Reading(summary, present.learners(), dict(present.refused), present.num_members, present.epoch, is_final)
