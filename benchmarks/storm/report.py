"""What a storm has shown: the aims with their figures, tables, and a plot as SVG."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.storm.faults import KINDS, Fault
from benchmarks.storm.steps import longest_gap_s

__all__ = ["Result", "aims", "gaps_of_others", "plot", "stepping", "tables"]

GAP_WINDOW_S = 10.0
COLORS = dict(zip(KINDS, ("#c00", "#e80", "#06c", "#088", "#a0a", "#000", "#090", "#666"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Result:
    """A storm that is over.

    Args:
        faults: in their order.
        summary: of the storm.
        reference: summary of the run without faults; None: there was none.
        loss: nats per byte of the storm's model on the held-out text, and the same of the reference.
        steps: by (learner, life) the monotonic ends of steps.
        begin_s: monotonic, of the storm.
        end_s: of the last step.
        checked: what `tests/tape_checker.py` found wrong ("": nothing).
        replayed: what the replay said; None: it is not there yet.
        least_faults: how many have to be confirmed.
        least_of_a_kind: and of each kind.
        kinds: that were in the deck.
    """

    faults: list[Fault]
    summary: dict[str, Any]
    reference: dict[str, Any] | None
    loss: float
    reference_loss: float | None
    steps: dict[tuple[int, int], list[float]]
    begin_s: float
    end_s: float
    checked: str
    replayed: str | None
    least_faults: int
    least_of_a_kind: int
    kinds: tuple[str, ...] = KINDS


def aims(result: Result) -> list[tuple[str, str, bool]]:
    """(aim, figure, whether it is reached)."""
    summary = result.summary
    confirmed = Counter(fault.kind for fault in result.faults if fault.is_confirmed)
    fewest = min(confirmed[kind] for kind in result.kinds)
    lost = [fault for fault in result.faults if not fault.recovered]
    rows = [
        (f"at least {result.least_faults} faults confirmed", str(confirmed.total()), confirmed.total() >= result.least_faults),
        (f"each kind at least {result.least_of_a_kind} times", str(fewest), fewest >= result.least_of_a_kind),
        ("every fault is over: its victim is merged again, or has left", f"{len(lost)} are not", not lost),
        ("uptime 1.0 from the first step to the last", f"{stepping(result):.5f}", stepping(result) == 1.0),
        ("`goodput_alive` at least 0.95", f"{summary['goodput_alive']:.4f}", summary["goodput_alive"] >= 0.95),
        ("accounts exact, by `tests/tape_checker.py`", result.checked or "exact", not result.checked),
    ]
    if result.reference_loss is not None:
        share = result.loss / result.reference_loss - 1.0
        figure = f"{result.loss:.4f} against {result.reference_loss:.4f}: {100 * share:+.2f} %"
        rows.append(("loss within 2 % of the run without faults", figure, share <= 0.02))
    if result.replayed is not None:
        rows.append(("the replay ends at `global_sha256`", result.replayed, result.replayed == "equal"))
    return rows


def stepping(result: Result) -> float:
    """Share of the time from the first end of a step to the last in which no more than a second passed without one, of any learner."""
    ends = sorted(end_s for life in result.steps.values() for end_s in life)
    gaps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return 1.0 - sum(gap for gap in gaps if gap > 1.0) / sum(gaps)


def gaps_of_others(result: Result, fault: Fault) -> float | None:
    """The longest distance between two ends of steps of any learner that is not the victim, within 10 s of the fault, in seconds.

    A learner in another fault at that time is not left out: what it shows is then that fault.
    """
    gaps = [
        longest_gap_s(ends, fault.at_s, fault.at_s + GAP_WINDOW_S)
        for (learner, _), ends in result.steps.items()
        if learner != fault.learner_id
    ]
    return max((gap for gap in gaps if gap is not None), default=None)


def tables(result: Result) -> str:
    """Aims, kinds, learners and accounts as Markdown."""
    lines = ["| aim | figure | |", "|---|---|---|"]
    lines += [f"| {aim} | {figure} | {'reached' if is_reached else '**missed**'} |" for aim, figure, is_reached in aims(result)]
    lines += ["", "| kind | hit | confirmed | over | median until merged again, s | longest, s |", "|---|---|---|---|---|---|"]
    for kind in result.kinds:
        faults = [fault for fault in result.faults if fault.kind == kind]
        times = [fault.outcome.get("ended_s" if kind == "leave" else "merged_s") for fault in faults if fault.recovered]
        known = [time for time in times if time is not None]
        middle, longest = (f"{statistics.median(known):.2f}", f"{max(known):.2f}") if known else ("", "")
        confirmed, over = sum(fault.is_confirmed for fault in faults), sum(fault.recovered for fault in faults)
        lines.append(f"| {kind} | {len(faults)} | {confirmed} | {over} | {middle} | {longest} |")
    lines += ["", "| learner | lives | alive, share | steps | participation | tokens | discarded |", "|---|---|---|---|---|---|---|"]
    length_s = result.end_s - result.begin_s
    for row in result.summary["learners"]:
        lives = [ends for (learner, _), ends in result.steps.items() if learner == row["learner_id"] and ends]
        alive = sum(ends[-1] - ends[0] for ends in lives) / length_s
        participation = "" if row["participation"] is None else f"{row['participation']:.3f}"
        lines.append(
            f"| {row['learner_id']} | {row['incarnations']} | {alive:.3f} | {row['inner_steps']:,} | {participation} "
            f"| {row['tokens']:,} | {row['discarded']:,} |"
        )
    return "\n".join([*lines, "", *_accounts(result)])


def _accounts(result: Result) -> list[str]:
    keys = ("wall_s", "merges", "mean_members", "tokens", "tokens_merged", "tokens_discarded", "goodput", "goodput_alive", "uptime")
    rows = [("storm", result.summary)] + ([("without faults", result.reference)] if result.reference is not None else [])
    lines = ["| run | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, summary in rows:
        cells = [f"{summary[key]:.4g}" if isinstance(summary[key], float) else f"{summary[key]:,}" for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    reasons = {reason: tokens for reason, tokens in result.summary["discarded_by_reason"].items() if tokens}
    lines += ["", "Discarded tokens by reason: " + (", ".join(f"{name} {tokens:,}" for name, tokens in reasons.items()) or "none") + "."]
    return lines


def plot(result: Result) -> str:
    """Who stepped when, with the faults, as SVG: a row for each learner, a mark for each fault, the steps per second of all below."""
    left, width, row = 90, 900, 26
    learners = sorted({learner for learner, _ in result.steps})
    length_s = result.end_s - result.begin_s
    bottom = 30 + row * (len(learners) + 1)

    def x(t_s: float) -> float:
        return left + width * min(max((t_s - result.begin_s) / length_s, 0.0), 1.0)

    parts = [f'<text x="4" y="{46 + row * i}">learner {learner}</text>' for i, learner in enumerate(learners)]
    parts.append(f'<text x="4" y="{46 + row * len(learners)}">syncer</text>')
    for (learner, _), ends in result.steps.items():
        y = 34 + row * learners.index(learner)
        for begin_s, end_s in _runs(ends):
            parts.append(f'<rect x="{x(begin_s):.1f}" y="{y}" width="{max(x(end_s) - x(begin_s), 0.5):.1f}" height="16" fill="#cde"/>')
    for fault in result.faults:
        place = learners.index(fault.learner_id) if fault.learner_id in learners else len(learners)
        y, color = 32 + row * place, COLORS[fault.kind]
        long = max(x(fault.at_s + fault.seconds) - x(fault.at_s), 2.0)
        title = f"<title>{fault.number} {fault.kind} {fault.outcome}</title>".replace('"', "'")
        parts.append(
            f'<rect x="{x(fault.at_s):.1f}" y="{y}" width="{long:.1f}" height="20" fill="{color}" fill-opacity="0.7">{title}</rect>'
        )
    parts += [f'<text x="{left + 105 * i}" y="16" fill="{COLORS[kind]}">{kind}</text>' for i, kind in enumerate(KINDS)]
    parts += _rate(result, x, bottom)
    parts += [f'<text x="{x(result.begin_s + t):.0f}" y="{bottom + 100}">{t} s</text>' for t in range(0, int(length_s) + 1, 30)]
    size = f'width="{left + width + 50}" height="{bottom + 110}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _runs(ends: list[float]) -> list[tuple[float, float]]:
    """Stretches without a gap of more than a second."""
    runs: list[tuple[float, float]] = []
    for end_s in ends:
        if runs and end_s - runs[-1][1] <= 1.0:
            runs[-1] = (runs[-1][0], end_s)
        else:
            runs.append((end_s, end_s))
    return runs


def _rate(result: Result, x: Any, bottom: int) -> list[str]:
    """Steps per second of all learners together."""
    counts = Counter(
        int(end_s - result.begin_s) for ends in result.steps.values() for end_s in ends if result.begin_s <= end_s <= result.end_s
    )
    most = max(counts.values(), default=1)
    seconds = range(int(result.end_s - result.begin_s))
    points = " ".join(f"{x(result.begin_s + t + 0.5):.1f},{bottom + 84 - 76 * counts[t] / most:.1f}" for t in seconds)
    return [f'<polyline points="{points}" fill="none" stroke="#246"/>', f'<text x="4" y="{bottom + 20}">steps/s, {most}</text>']
