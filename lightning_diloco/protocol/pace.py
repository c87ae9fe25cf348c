"""When a fragment's round is due, and how many rounds may open (PROTOCOL.md section 4).

A fragment is due when a quorum of active learners did H inner steps since its previous round *opened*. Counting from what was
last received instead would let rounds fire back to back behind one late learner. Two things keep the whole model from going out at
once: the first round of fragment p comes floor(p * H / P) steps after founding (or after an outage), and at most ceil(P / H)
rounds open per inner step of the fastest active learner, one more to catch up, most overdue first.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Pace"]


class Pace:
    """The due times of all fragments, in the learners' own step counters.

    Args:
        num_fragments: P.
        sync_interval_steps: H.
    """

    def __init__(self, *, num_fragments: int, sync_interval_steps: int) -> None:
        self._interval = sync_interval_steps
        self._per_step = -(-num_fragments // sync_interval_steps)
        self._offsets = [p * sync_interval_steps // num_fragments for p in range(num_fragments)]
        # Inner step of each learner at which its count towards a fragment's next round began.
        self._since: list[dict[int, int]] = [{} for _ in range(num_fragments)]
        # Learners' counters on one common scale: a joiner starts at the fastest one's place, so that its lead or lag of another
        # life is neither time nor work.
        self._shift: dict[int, int] = {}
        self._steps: dict[int, int] = {}
        self._fastest = 0
        self._allowance = 0

    def admit(self, learner_id: int, inner_step: int, *, staggered: bool) -> None:
        """A learner became active at this step.

        Args:
            learner_id: whose counter.
            inner_step: its inner step now.
            staggered: nobody else is active (founding, or after an outage): spread the rounds over the interval.
        """
        for fragment_id, since in enumerate(self._since):
            lead = self._interval - self._offsets[fragment_id] if staggered else 0
            since[learner_id] = inner_step - lead
        self._shift[learner_id] = self._fastest - inner_step
        self._steps[learner_id] = inner_step

    def remove(self, learner_id: int) -> None:
        """A learner's counter does not count any more."""
        for since in self._since:
            since.pop(learner_id, None)
        self._shift.pop(learner_id, None)
        self._steps.pop(learner_id, None)
        # The next fastest leads from where it is; waiting for it to reach the gone one's place would stop all rounds.
        self._fastest = max((self._steps[i] + shift for i, shift in self._shift.items()), default=self._fastest)

    def opened(self, fragment_id: int, steps: Mapping[int, int]) -> None:
        """A round of this fragment opened (or was cancelled at once), with these inner steps of the active learners."""
        self._since[fragment_id].update(steps)
        self._allowance -= 1

    def due(self, steps: Mapping[int, int], quorum: int) -> list[int]:
        """Fragments whose round may open now, most overdue first; at most as many as the allowance leaves.

        Args:
            steps: inner step of each active learner.
            quorum: how many of them must have done H steps.
        """
        self._advance(steps)
        if self._allowance <= 0:
            return []
        overdue: list[tuple[int, int]] = []
        for fragment_id, since in enumerate(self._since):
            done = sorted((step - since.setdefault(learner, step) for learner, step in steps.items()), reverse=True)
            if len(done) >= quorum and done[quorum - 1] >= self._interval:
                overdue.append((self._interval - done[quorum - 1], fragment_id))
        return [fragment_id for _, fragment_id in sorted(overdue)]

    @property
    def allowance(self) -> int:
        """Rounds that may still open before the fastest learner's next step."""
        return self._allowance

    def _advance(self, steps: Mapping[int, int]) -> None:
        """Grant rounds for the steps that the fastest active learner did since the last look; unused ones do not pile up."""
        self._steps.update({i: step for i, step in steps.items() if i in self._shift})
        fastest = max((step + self._shift[i] for i, step in steps.items() if i in self._shift), default=self._fastest)
        if fastest > self._fastest:
            self._allowance = (fastest - self._fastest) * self._per_step + 1
            self._fastest = fastest
