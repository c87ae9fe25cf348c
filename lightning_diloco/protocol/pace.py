"""When a fragment's round is due, and how many rounds may open (PROTOCOL.md section 4).

A fragment is due when a quorum of active learners did H inner steps since its previous round *opened*. Counting from what was
last received instead would let rounds fire back to back behind one late learner. Two things keep the whole model from going out at
once: the first round of fragment p comes floor(p * H / P) steps after founding (or after an outage), and at most ceil(P / H)
rounds open per inner step of the fastest active learner, one more to catch up, most overdue first. Shard k of S counts its fragments so
that those of all shards take turns: its p-th of P is the (p S + k)-th of P S.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Pace"]


class Pace:
    """The due times of all fragments, in the learners' own step counters.

    Args:
        num_fragments: P.
        sync_interval_steps: H.
        shard: k, if these are the fragments of a shard.
        num_shards: S.
    """

    def __init__(self, *, num_fragments: int, sync_interval_steps: int, shard: int = 0, num_shards: int = 1) -> None:
        self._interval = sync_interval_steps
        self._per_step = -(-num_fragments // sync_interval_steps)
        places = [p * num_shards + shard for p in range(num_fragments)]
        self._offsets = [place * sync_interval_steps // (num_fragments * num_shards) for place in places]
        # Inner step of each learner at which its count towards a fragment's next round began.
        self._since: list[dict[int, int]] = [{} for _ in range(num_fragments)]
        # Newest step of every learner that was admitted, active or resting.
        self._steps: dict[int, int] = {}
        # Counters of the active ones on one common scale: a newcomer starts at the fastest one's place, so that its lead or lag of
        # another life is neither time nor work.
        self._shift: dict[int, int] = {}
        self._fastest = 0
        self._allowance = 0
        # Most events are no steps, and most steps make nothing due: what `due` was asked last, the answer while it holds, and for each
        # fragment the sum of all counters before which it cannot be due.
        self._asked: tuple[dict[int, int], int] = ({}, 0)
        self._answer: list[int] | None = None
        self._not_before = [0] * num_fragments

    def admit(self, learner_id: int, inner_step: int, *, staggered: bool) -> None:
        """A learner became active at this step.

        Args:
            learner_id: whose counter.
            inner_step: its inner step now.
            staggered: nobody else is active (founding, or after an outage): spread the rounds over the interval. Otherwise the newcomer
                takes the place of the most advanced of the others: due times belong to fragments, and a quorum that had to
                wait for H steps of the newcomer would make all of them due at one step.
        """
        self._forget()
        for fragment_id, since in enumerate(self._since):
            others = [self._steps[i] - since.get(i, self._steps[i]) for i in self._shift if i != learner_id]
            staggered_lead = self._interval - self._offsets[fragment_id]
            since[learner_id] = inner_step - (staggered_lead if staggered or not others else max(others))
        # Its first step is the one that the fastest is in: a newcomer grants no rounds of its own.
        self._shift[learner_id] = self._fastest - inner_step - (0 if staggered or not self._shift else 1)
        self._steps[learner_id] = inner_step

    def remove(self, learner_id: int) -> None:
        """A learner's counter does not count any more."""
        self._forget()
        for since in self._since:
            since.pop(learner_id, None)
        self._steps.pop(learner_id, None)
        self._rest(learner_id)

    def opened(self, fragment_id: int, steps: Mapping[int, int]) -> None:
        """A round of this fragment opened (or was cancelled at once), with these inner steps of the active learners."""
        self._answer, self._not_before[fragment_id] = None, 0
        since = self._since[fragment_id]
        for learner_id, step in (self._steps | dict(steps)).items():
            # Who is short of H is in the middle of a step that began before this opening. If it counted, two equal learners whose
            # reports alternate would open a round every H - 1 steps, twice as many as wanted at H = 1.
            is_midway = learner_id in steps and step - since.get(learner_id, step) < self._interval
            since[learner_id] = step + 1 if is_midway else step
        self._allowance -= 1

    def due(self, steps: Mapping[int, int], quorum: int) -> list[int]:
        """Fragments whose round may open now, most overdue first; at most as many as the allowance leaves.

        Args:
            steps: inner step of each active learner.
            quorum: how many of them must have done H steps.
        """
        before, quorum_before = self._asked
        if self._answer is None or before != steps:
            self._advance(steps)
        if self._allowance <= 0:
            return []
        if before.keys() != steps.keys() or quorum_before != quorum:
            self._forget()
        if self._answer is None or before != steps:
            self._asked, self._answer = (dict(steps), quorum), self._overdue(steps, quorum)
        return self._answer

    def _overdue(self, steps: Mapping[int, int], quorum: int) -> list[int]:
        total = sum(steps.values())
        overdue: list[tuple[int, int]] = []
        for fragment_id, since in enumerate(self._since):
            if total < self._not_before[fragment_id]:
                continue
            done = sorted([step - since.setdefault(learner, step) for learner, step in steps.items()], reverse=True)
            lacking = self._interval - (done[quorum - 1] if len(done) >= quorum else 0)
            if lacking <= 0:
                overdue.append((lacking, fragment_id))
            else:
                # For the quorum-th of them to do what is lacking, one of them at least has to.
                self._not_before[fragment_id] = total + lacking
        return [fragment_id for _, fragment_id in sorted(overdue)]

    def _forget(self) -> None:
        self._answer, self._not_before = None, [0] * len(self._since)

    @property
    def allowance(self) -> int:
        """Rounds that may still open before the fastest learner's next step."""
        return self._allowance

    def _advance(self, steps: Mapping[int, int]) -> None:
        """Grant rounds for the steps that the fastest active learner did since the last look; unused ones do not pile up."""
        for learner_id in [i for i in self._shift if i not in steps]:
            self._rest(learner_id)
        for learner_id, step in steps.items():
            if learner_id not in self._shift:
                moved = step > self._steps.get(learner_id, step)
                self._shift[learner_id] = self._fastest - step + (1 if moved and not self._shift else 0)
            self._steps[learner_id] = step
        fastest = max((step + self._shift[i] for i, step in steps.items()), default=self._fastest)
        done = fastest - self._fastest
        if done > 0:
            # A whole interval that nobody saw is an outage: what is overdue goes out at the pace of one step, never all at once.
            self._allowance = (done if done < self._interval else 1) * self._per_step + 1
            self._fastest = fastest

    def _rest(self, learner_id: int) -> None:
        """Take a learner off the common scale; the next fastest leads from where it is."""
        # Waiting until it has reached the gone one's place would stop all rounds for so long.
        self._shift.pop(learner_id, None)
        self._fastest = max((self._steps[i] + shift for i, shift in self._shift.items()), default=self._fastest)
