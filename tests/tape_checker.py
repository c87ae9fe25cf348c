"""An independent check of a run directory: `summary.json` against `tape.jsonl`, and the tape against the protocol's invariants.

It reads plain JSON and imports nothing of the package. `tape_figures` recomputes the figures; the invariants of the protocol stand here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.tape_figures import REASONS, Event, discarded_tokens, merged_tokens, of, parameter_fragments, recompute


def check_run(run_dir: Path, *, is_ended: bool = True) -> dict[str, Any]:
    """Recompute every figure of `summary.json` and hold the tape to its invariants.

    Args:
        run_dir: the run directory.
        is_ended: the run has ended, so there is an end record, every round is closed, and the ledger is complete.

    Returns:
        The summary, as read.
    """
    tape = load_tape(run_dir / "tape.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    check_rounds(tape, is_ended=is_ended)
    check_versions(tape)
    check_contributions(tape)
    expected = recompute(tape)
    check_ledger(tape, expected, is_ended=is_ended)
    compare(expected, summary, "summary")
    check_ranges(summary)
    return summary


def load_tape(path: Path) -> list[Event]:
    """The complete lines, which must be numbered from 0 and ordered in time."""
    lines = path.read_bytes().split(b"\n")[:-1]
    tape = [json.loads(line) for line in lines]
    for i, event in enumerate(tape):
        assert event["seq"] == i, f"line {i} has seq {event['seq']}"
        assert i == 0 or event["t_s"] >= tape[i - 1]["t_s"], f"time goes back at seq {i}"
    return tape


# ---- invariants -------------------------------------------------------------------------------------------------------------


def check_rounds(tape: list[Event], *, is_ended: bool) -> None:
    """At most one open round a fragment; each ends once; no merge under its quorum."""
    is_open: dict[int, int] = {}
    for e in of(tape, "round_open", "merge", "round_cancel", "restart"):
        if e["event"] == "restart":
            is_open.clear()
            continue
        p, r = e["fragment_id"], e["round_id"]
        if e["event"] == "round_open":
            assert p not in is_open, f"fragment {p}: round {r} opened while round {is_open[p]} is open"
            is_open[p] = r
            continue
        assert is_open.get(p) == r, f"fragment {p}: round {r} ended and was not open"
        del is_open[p]
        if e["event"] == "merge":
            assert len(e["members"]) >= max(e["quorum"], 1), f"fragment {p} round {r}: merge of {len(e['members'])} under its quorum"
            processes = [(m["learner_id"], m["incarnation"]) for m in e["members"]]
            assert len(set(processes)) == len(processes), f"fragment {p} round {r}: one process is averaged with itself"
    if is_ended:
        assert of(tape, "end"), "the tape has no end record"
        assert not is_open, f"rounds never ended: {is_open}"


def check_versions(tape: list[Event]) -> None:
    """(epoch, n) of a fragment grows by one merge at a time; the end names the last ones; publications name existing ones."""
    epoch, now = 0, {}
    for e in tape:
        if e["event"] == "job":
            epoch = e["epoch"]
            now = {f["fragment_id"]: n for f, n in zip(e["fragments"], e["founded_n"], strict=True)}
        elif e["event"] == "restart":
            assert e["epoch"] > epoch, f"restart into epoch {e['epoch']} after {epoch}"
            epoch = e["epoch"]
            for p, (_, n) in zip(list(now), e["versions"], strict=True):
                assert n <= now[p], f"fragment {p}: restart goes on from version {n} above {now[p]}"
                now[p] = n
        elif e["event"] == "merge":
            p = e["fragment_id"]
            assert list(e["version"]) == [epoch, now[p] + 1], f"fragment {p}: version {e['version']} after {[epoch, now[p]]}"
            now[p] += 1
        elif e["event"] == "publish" and e["fragment_id"] in now:
            published = tuple(e["version"])
            assert published <= (epoch, now[e["fragment_id"]]), f"version {published} of {e['fragment_id']} published before it was merged"
        elif e["event"] == "end":
            assert list(e["versions"]) == list(now.values()), f"end names versions {e['versions']}, the merges give {list(now.values())}"


def check_contributions(tape: list[Event]) -> None:
    """Each key is accepted once and merged at most once, only after it was accepted, with the same steps and tokens."""
    accepted: dict[tuple[int, int, int], tuple[int, int]] = {}
    merged: set[tuple[int, int, int]] = set()
    for e in of(tape, "contribution", "merge", "restart"):
        if e["event"] == "restart":  # what was held and not merged is lost with the syncer, and sent again under the same key
            accepted = {key: value for key, value in accepted.items() if key in merged}
        elif e["event"] == "contribution":
            key = (e["learner_id"], e["fragment_id"], e["contribution_seq"])
            assert (e["outcome"] == "refused") == (e.get("reason") is not None), f"contribution {key}: outcome and reason disagree"
            if e["outcome"] in ("folded", "carried"):
                assert key not in accepted, f"contribution {key} was accepted twice"
                accepted[key] = (e["steps"], e["tokens"])
        else:
            for m in e["members"]:
                key = (m["learner_id"], e["fragment_id"], m["seq"])
                assert key not in merged, f"contribution {key} was merged twice"
                assert accepted.get(key) == (m["steps"], m["tokens"]), f"contribution {key} was merged as something that never arrived"
                merged.add(key)


def check_ledger(tape: list[Event], expected: dict[str, Any], *, is_ended: bool) -> None:
    """tokens = merged + pending + discarded for each learner and fragment, with nothing negative; nothing pends after a clean end."""
    if not of(tape, "job"):
        return
    merged, discarded = merged_tokens(tape), discarded_tokens(tape)
    tokens = {x["learner_id"]: x["tokens"] for x in expected["learners"]}
    for f in parameter_fragments(tape):
        p = f["fragment_id"]
        for m, total in tokens.items():
            pending = total - merged[m, p] - sum(discarded[m, p, r] for r in REASONS)
            assert pending >= 0, f"learner {m}, fragment {p}: pending is {pending}"
            if is_ended and expected["status"] == "finished":
                assert pending == 0, f"learner {m}, fragment {p}: {pending} tokens pending after a clean end"


def check_ranges(summary: dict[str, Any]) -> None:
    """Shares are in [0, 1] and counts are integers."""
    for name in ("goodput", "goodput_alive", "uptime"):
        assert summary[name] is None or 0 <= summary[name] <= 1, f"{name} = {summary[name]}"
    for name in ("merges", "tokens", "tokens_merged", "tokens_pending", "tokens_discarded", "bytes_up", "bytes_down", "steps_lost"):
        assert type(summary[name]) is int and summary[name] >= 0, f"{name} = {summary[name]}"
    assert summary["tokens"] == summary["tokens_merged"] + summary["tokens_pending"] + summary["tokens_discarded"]
    for f in summary["fragments"]:
        assert f["merged"] + f["pending"] + f["discarded"] == summary["tokens"], f"fragment {f['fragment_id']}"
    for x in summary["learners"]:
        assert x["participation"] is None or 0 <= x["participation"] <= 1
        assert x["rounds_merged"] <= x["rounds_eligible"] <= summary["merges"]


def compare(expected: Any, found: Any, where: str) -> None:
    """Equal in structure and value; floats to 1e-6."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and set(expected) == set(found), f"{where}: {sorted(expected)} against {found}"
        for name in expected:
            compare(expected[name], found[name], f"{where}.{name}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(expected) == len(found), f"{where}: {expected} against {found}"
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            compare(a, b, f"{where}[{i}]")
    elif isinstance(expected, float) and isinstance(found, (int, float)):
        assert math.isclose(expected, found, rel_tol=1e-6, abs_tol=1e-6), f"{where}: the tape gives {expected}, found {found}"
    else:
        assert expected == found, f"{where}: the tape gives {expected!r}, found {found!r}"
