"""The figures of a running job: one fold for all who ask, read in portions, the last ones for ever after the end."""

from __future__ import annotations

import pytest

from lightning_diloco.protocol.records import encode_line
from lightning_diloco.runtime.live_summary import LiveSummary
from lightning_diloco.runtime.summary import SummaryKeeper
from lightning_diloco.runtime.tape import TapeError, TapeTail
from tests.metrics.tape_builder import two_learner_run


def test_portions_of_any_size_are_the_same_lines(tmp_path):
    tape = two_learner_run()
    tape.write(tmp_path)
    path = tmp_path / "tape.jsonl"
    whole = TapeTail(path).read_new()
    for max_bytes in (1, 100, 4096):
        tail, lines, reads = TapeTail(path), [], 0
        while reads == 0 or tail.has_more:
            lines += tail.read_new(max_bytes)
            reads += 1
        assert lines == whole == tape.lines and (reads > 1 or max_bytes == 4096)


def test_a_long_line_that_is_not_complete_is_not_waited_for(tmp_path):
    tape = two_learner_run()
    lines = [encode_line(line) for line in tape.lines]
    (tmp_path / "tape.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:-1])
    tail = TapeTail(tmp_path / "tape.jsonl")
    found = []
    while found == [] or tail.has_more:
        found += tail.read_new(10)
    assert found == tape.lines[:5] and tail.read_new(10) == [] and not tail.has_more


def test_what_is_read_is_what_the_summary_says(tmp_path):
    tape = two_learner_run()
    tape.write(tmp_path)
    reading = LiveSummary(tmp_path).read()
    assert reading.summary == tape.summary(status="running") and not reading.is_final
    assert set(reading.learners) == {0, 1} and reading.num_members == 0


def test_who_asks_again_at_once_gets_the_same_reading_unless_it_must_be_new(tmp_path):
    tape = two_learner_run()
    lines = [encode_line(line) for line in tape.lines]
    (tmp_path / "tape.jsonl").write_bytes(b"".join(lines[:4]))
    live = LiveSummary(tmp_path)
    first = live.read()
    (tmp_path / "tape.jsonl").write_bytes(b"".join(lines))
    assert live.read() is first
    assert live.read(at_once=True).summary["tokens"] > first.summary["tokens"]


def test_a_long_tape_can_be_given_up_and_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_diloco.runtime.live_summary.PORTION_BYTES", 300)
    tape = two_learner_run()
    tape.write(tmp_path)
    live = LiveSummary(tmp_path)
    live.feed(give_up=lambda: True)
    assert live.result("running")["tokens"] < tape.summary()["tokens"]
    live.feed()
    assert live.result() == tape.summary()


def test_after_the_end_everybody_gets_the_last_summary(tmp_path):
    two_learner_run().write(tmp_path)
    live = LiveSummary(tmp_path)
    summary = SummaryKeeper(tmp_path, live=live).finish()
    assert live.read().is_final and live.read().summary == summary and live.read(at_once=True).summary == summary


def test_a_line_that_is_no_record_is_an_error(tmp_path):
    (tmp_path / "tape.jsonl").write_bytes(b"{}\n")
    with pytest.raises(TapeError, match="line 1"):
        LiveSummary(tmp_path).read()
