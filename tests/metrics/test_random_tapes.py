"""Random valid tapes keep the ledger's identity and the ranges of the shares, and fold to what the independent checker computes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_diloco.protocol.records import Member
from tests.metrics.tape_builder import TapeBuilder
from tests.tape_checker import check_run

NUM_LEARNERS = 3


class Model:
    """A job in miniature: what each learner has trained and not yet had merged or discarded, per parameter fragment."""

    def __init__(self, num_params: tuple[int, ...], *, has_buffers: bool, num_slots: int | None) -> None:
        self.tape = TapeBuilder()
        self.fragments = list(range(len(num_params)))
        self.tape.job(num_params, buffers=3 if has_buffers else 0, num_slots=num_slots)
        self.loose = {(m, p): [0, 0] for m in range(NUM_LEARNERS) for p in self.fragments}
        self.held: dict[int, list[Member]] = {p: [] for p in self.fragments}
        self.lives = dict.fromkeys(range(NUM_LEARNERS), -1)
        self.alive: set[int] = set()
        self.totals = {m: [0, 0] for m in range(NUM_LEARNERS)}

    def join(self, m: int) -> None:
        if m not in self.alive:
            self.alive.add(m)
            self.lives[m] += 1
            self.totals[m] = [0, 0]
            self.tape.join(m, self.lives[m], batch_size=m)

    def step(self, m: int, gaps: list[float], tokens: int, paused: float, age: float) -> None:
        if m not in self.alive:
            return
        self.totals[m][0] += len(gaps)
        self.totals[m][1] += tokens * len(gaps)
        for p in self.fragments:
            self.loose[m, p][0] += len(gaps)
            self.loose[m, p][1] += tokens * len(gaps)
        self.tape.now_s += sum(gaps) / 2
        stalls = tuple(g / 100 for g in gaps)
        pauses = (paused,) * min(1, len(gaps))
        self.tape.progress(m, *self.totals[m], tuple(gaps), self.lives[m], stalls_s=stalls, paused_s=pauses, last_step_age_s=age)

    def contribute(self, m: int, p: int, outcome: str) -> None:
        p %= len(self.fragments)
        steps, tokens = self.loose[m, p]
        if m in self.alive and steps and tokens and not any(h.learner_id == m for h in self.held[p]):
            self.held[p].append(self.tape.contribute(m, p, steps, tokens, outcome, self.lives[m]))
            self.loose[m, p] = [0, 0]

    def merge(self, p: int) -> None:
        p %= len(self.fragments)
        if self.held[p]:
            members, self.held[p] = self.held[p], []
            self.tape.merge(p, members, tuple(sorted(self.alive)), quorum=len(members))
            self.tape.publish(p, tuple(sorted(self.alive)))

    def die(self, m: int) -> None:
        if m in self.alive:
            self.alive.discard(m)
            self.tape.counters(m, *self.totals[m], self.lives[m])
            self.tape.leave(m, self.lives[m], "died")
            self.discard(m, "died")

    def discard(self, m: int, reason: str) -> None:
        for p in self.fragments:
            if self.loose[m, p][1]:
                self.tape.discard(m, p, self.loose[m, p][1], reason)
            self.loose[m, p] = [0, 0]

    def finish(self) -> None:
        for p in self.fragments:
            for m in sorted(self.alive):
                self.contribute(m, p, "carried")
            self.merge(p)
        for m in range(NUM_LEARNERS):
            self.discard(m, "drain")
        self.tape.now_s += 1.0
        self.tape.end()
        self.tape.run()


LEARNER = st.integers(0, NUM_LEARNERS - 1)
OPERATION = st.one_of(
    st.tuples(st.just("join"), LEARNER),
    st.tuples(
        st.just("step"),
        LEARNER,
        st.lists(st.floats(0.01, 4.0), max_size=5),
        st.integers(0, 9),
        st.floats(0, 1),
        st.floats(0, 2),
    ),
    st.tuples(st.just("contribute"), LEARNER, st.integers(0, 3), st.sampled_from(["folded", "carried"])),
    st.tuples(st.just("merge"), st.integers(0, 3)),
    st.tuples(st.just("die"), LEARNER),
    st.tuples(st.just("discard"), LEARNER, st.sampled_from(["nonfinite", "norm", "overwritten"])),
)


@st.composite
def models(draw: st.DrawFn) -> Model:
    num_params = tuple(draw(st.lists(st.integers(1, 50), min_size=1, max_size=4)))
    model = Model(num_params, has_buffers=draw(st.booleans()), num_slots=draw(st.none() | st.just(NUM_LEARNERS)))
    for name, *arguments in [("join", 0), *draw(st.lists(OPERATION, max_size=40))]:
        getattr(model, name)(*arguments)
    return model


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models())
def test_every_fragment_accounts_for_every_token(model: Model):
    summary = model.tape.summary()
    for fragment in summary["fragments"]:
        assert min(fragment["merged"], fragment["pending"], fragment["discarded"]) >= 0
        assert fragment["merged"] + fragment["pending"] + fragment["discarded"] == summary["tokens"]
    assert summary["tokens_pending"] >= 0
    assert sum(summary["discarded_by_reason"].values()) <= summary["tokens_discarded"]
    assert sum(x["discarded"] for x in summary["learners"]) <= summary["tokens_discarded"]
    assert sum(x["tokens"] for x in summary["learners"]) == summary["tokens"]
    shares = [summary[name] for name in ("goodput", "goodput_alive", "uptime")] + [x["participation"] for x in summary["learners"]]
    assert all(share is None or 0 <= share <= 1 for share in shares)
    assert summary["steps_lost"] <= sum(x["inner_steps"] for x in summary["learners"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(models(), st.booleans())
def test_the_independent_checker_agrees(model: Model, is_ended: bool):
    if is_ended:
        model.finish()
    with tempfile.TemporaryDirectory() as folder:
        written = model.tape.write(Path(folder))
        checked = check_run(Path(folder), is_ended=is_ended)
    assert checked["tokens"] == written["tokens"]
    if is_ended:
        assert [f["pending"] for f in written["fragments"]] == [0] * len(model.fragments)
        assert written["tokens_pending"] <= 1
