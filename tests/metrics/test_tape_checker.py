"""The independent checker passes a good run and fails on any figure or record that was touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.metrics.tape_builder import TapeBuilder, two_learner_run
from tests.tape_checker import check_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    two_learner_run().write(tmp_path)
    return tmp_path


def rewrite(run_dir: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the tape's events and number them anew."""
    path = run_dir / "tape.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    change(events)
    path.write_text("".join(json.dumps(e | {"seq": i}) + "\n" for i, e in enumerate(events)))


def find(events: list[dict[str, Any]], name: str, nth: int = 0) -> dict[str, Any]:
    return [e for e in events if e["event"] == name][nth]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found = [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    return found or [path]


def test_a_good_run_passes(run_dir: Path):
    assert check_run(run_dir)["merges"] == 5


def test_a_running_job_passes(tmp_path: Path):
    tape = two_learner_run()
    while not hasattr(tape.lines.pop().record, "global_sha256"):
        pass
    tape.write(tmp_path)
    assert check_run(tmp_path, is_ended=False)["status"] == "running"
    with pytest.raises(AssertionError, match="no end record"):
        check_run(tmp_path)


def test_a_restart_passes(tmp_path: Path):
    tape = TapeBuilder()
    tape.job((30, 10))
    tape.join(0)
    tape.now_s = 4.0
    tape.progress(0, 10, 100, (0.4,) * 10)
    tape.merge(0, [tape.contribute(0, 0, 4, 40)], (0,))
    tape.merge(0, [tape.contribute(0, 0, 6, 60)], (0,))
    tape.open(1)
    tape.contribute(0, 1, 4, 40)
    tape.restart((1, 0))
    tape.discard(0, 0, 60, "rollback")
    tape.seqs[0, 1] = 0  # what was held went with the syncer and is sent again
    tape.merge(1, [tape.contribute(0, 1, 4, 40)], (0,))
    tape.now_s = 5.0
    tape.end("stopped")
    tape.write(tmp_path)
    assert check_run(tmp_path)["merges"] == 2


def test_any_changed_figure_is_found(run_dir: Path):
    path = run_dir / "summary.json"
    good = json.loads(path.read_text())
    changed = 0
    for leaf in leaves(good):
        bad = json.loads(path.read_text())
        place = bad
        for key in leaf[:-1]:
            place = place[key]
        old = place[leaf[-1]]
        place[leaf[-1]] = old + 1 if isinstance(old, (int, float)) else f"{old} "
        path.write_text(json.dumps(bad))
        with pytest.raises(AssertionError):
            check_run(run_dir)
        path.write_text(json.dumps(good))
        changed += 1
    assert changed > 60
    check_run(run_dir)


def test_a_missing_and_an_extra_figure_are_found(run_dir: Path):
    path = run_dir / "summary.json"
    good = json.loads(path.read_text())
    for bad in ({k: v for k, v in good.items() if k != "uptime"}, good | {"speed": 1}, good | {"learners": good["learners"][:1]}):
        path.write_text(json.dumps(bad))
        with pytest.raises(AssertionError):
            check_run(run_dir)


def _merge_twice(events: list[dict[str, Any]]) -> None:
    first, third = find(events, "merge", 0), find(events, "merge", 3)
    third["members"][0] = first["members"][0]


def _invent_a_member(events: list[dict[str, Any]]) -> None:
    find(events, "merge", 0)["members"][0]["seq"] = 99


TAMPERINGS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "a merge under its quorum": (lambda e: find(e, "merge", 0).update(quorum=3), "under its quorum"),
    "a version that jumps": (lambda e: find(e, "merge", 3).update(version=[0, 7]), "version"),
    "a contribution merged twice": (_merge_twice, "merged twice"),
    "a member that never arrived": (_invent_a_member, "never arrived"),
    "a round that never ended": (lambda e: e.remove(find(e, "round_cancel")), "is open"),
    "a round that ended twice": (lambda e: e.insert(e.index(find(e, "merge")), dict(find(e, "merge"))), "was not open"),
    "a last round that never ended": (lambda e: e.insert(-2, find(e, "round_open") | {"round_id": 99, "t_s": 30.0}), "never ended"),
    "an end with other versions": (lambda e: find(e, "end").update(versions=[2, 3, 2]), "end names versions"),
    "a publication from the future": (lambda e: find(e, "publish", 1).update(version=[0, 9]), "before it was merged"),
    "a refusal without a reason": (lambda e: find(e, "contribution", 3).update(reason=None), "disagree"),
    "a contribution accepted twice": (lambda e: e.insert(8, dict(find(e, "contribution"))), "accepted twice"),
    "a total that is too small": (lambda e: find(e, "progress", 3).update(tokens=150), "pending is -10"),
    "tokens without an account": (lambda e: find(e, "progress", 3).update(tokens=170), " 10 tokens pending"),
    "time that goes back": (lambda e: find(e, "end").update(t_s=1.0), "time goes back"),
    "a gap that grew": (lambda e: find(e, "progress", 1).update(step_gaps_s=[1.5]), "summary"),
    "bytes that vanished": (lambda e: find(e, "publish", 1).update(payload_bytes=1), "bytes_down"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_tape_is_found(run_dir: Path, name: str):
    change, sentence = TAMPERINGS[name]
    rewrite(run_dir, change)
    with pytest.raises(AssertionError, match=sentence):
        check_run(run_dir)


def test_a_lost_line_is_found(run_dir: Path):
    path = run_dir / "tape.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5] + lines[6:]))
    with pytest.raises(AssertionError, match="has seq"):
        check_run(run_dir)
