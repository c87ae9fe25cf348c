"""Every figure of `summary.json` once more, in the slowest and most literal way, from plain JSON events.

It imports nothing of the package, so a mistake in the folds cannot hide here. `tape_checker` compares the two.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from typing import Any

from tests.tape_leases import lease_figures

REASONS = ["overwritten", "died", "fenced", "nonfinite", "norm", "rollback", "drain"]
Event = dict[str, Any]


def of(tape: list[Event], *names: str) -> list[Event]:
    """The events with one of these names, in order."""
    return [e for e in tape if e["event"] in names]


def parameter_fragments(tape: list[Event]) -> list[Event]:
    return [f for f in of(tape, "job")[-1]["fragments"] if f.get("kind", "parameters") == "parameters"] if of(tape, "job") else []


def surviving_merges(tape: list[Event]) -> list[Event]:
    """Merges of parameter fragments that no restart took back."""
    ids = [f["fragment_id"] for f in parameter_fragments(tape)]
    order = [f["fragment_id"] for f in of(tape, "job")[-1]["fragments"]] if of(tape, "job") else []
    merges: list[Event] = []
    for e in of(tape, "merge", "restart"):
        if e["event"] == "merge":
            merges += [e] if e["fragment_id"] in ids else []
        else:
            kept = dict(zip(order, e["versions"], strict=True))
            merges = [m for m in merges if m["version"][1] <= kept[m["fragment_id"]][1]]
    return merges


def merged_tokens(tape: list[Event]) -> Counter[tuple[int, int]]:
    merged: Counter[tuple[int, int]] = Counter()
    if any(e.get("is_rebuilt") for e in of(tape, "job")):
        # What was merged before the loss of the tape: the first versions say it.
        for p, through in enumerate(of(tape, "restart")[0]["merged_through"]):
            merged.update({(int(m), p): tokens for m, (_, tokens) in through.items()})
    for e in surviving_merges(tape):
        for m in e["members"]:
            merged[m["learner_id"], e["fragment_id"]] += m["tokens"]
    return merged


def discarded_tokens(tape: list[Event]) -> Counter[tuple[int, int, str]]:
    ids = [f["fragment_id"] for f in parameter_fragments(tape)]
    discarded: Counter[tuple[int, int, str]] = Counter()
    for e in of(tape, "discard"):
        if e["fragment_id"] in ids:
            discarded[e["learner_id"], e["fragment_id"], e["reason"]] += e["tokens"]
    return discarded


def weighted(tape: list[Event], per_fragment: dict[int, int]) -> int:
    fragments = parameter_fragments(tape)
    total = sum(f["num_params"] for f in fragments)
    return sum(f["num_params"] * per_fragment[f["fragment_id"]] for f in fragments) // total if total else 0


def life_totals(tape: list[Event]) -> dict[tuple[int, int], tuple[int, int]]:
    """(inner steps, tokens) of each incarnation: the largest that was reported or read."""
    totals: dict[tuple[int, int], tuple[int, int]] = {}
    for e in of(tape, "progress", "counters"):
        key = (e["learner_id"], e["incarnation"])
        steps, tokens = totals.get(key, (0, 0))
        totals[key] = (max(steps, e["inner_steps"]), max(tokens, e["tokens"]))
    return totals


def recompute(tape: list[Event]) -> dict[str, Any]:
    """Every figure of `summary.json`."""
    job = of(tape, "job")[-1] if of(tape, "job") else {}
    run = of(tape, "run")[-1] if of(tape, "run") else None
    restarts = of(tape, "restart")
    ends = [e for e in of(tape, "end") if not restarts or e["seq"] > restarts[-1]["seq"]]
    end = ends[-1] if ends else None
    joins, merges = of(tape, "join"), surviving_merges(tape)
    t0 = joins[0]["t_s"] if joins else None
    t1 = end["t_s"] if end else tape[-1]["t_s"]
    ids = sorted({e["learner_id"] for e in joins})
    learners = [learner_figures(tape, m, is_ended=end is not None) for m in ids]
    merged, discarded = merged_tokens(tape), discarded_tokens(tape)
    fragments = []
    for f in parameter_fragments(tape):
        p = f["fragment_id"]
        in_it, lost = sum(merged[m, p] for m in ids), sum(discarded[m, p, r] for m in ids for r in REASONS)
        pending = sum(x["tokens"] for x in learners) - in_it - lost
        account = {"merged": in_it, "pending": pending, "discarded": lost}
        fragments.append({"fragment_id": p, "version": version_of(tape, p), "num_params": f["num_params"]} | account)
    tokens = sum(x["tokens"] for x in learners)
    tokens_merged = weighted(tape, {f["fragment_id"]: f["merged"] for f in fragments})
    tokens_discarded = weighted(tape, {f["fragment_id"]: f["discarded"] for f in fragments})
    by_reason = {
        r: weighted(tape, {f["fragment_id"]: sum(discarded[m, f["fragment_id"], r] for m in ids) for f in fragments}) for r in REASONS
    }
    arrived = [e for e in of(tape, "contribution") if e["outcome"] in ("folded", "carried")]
    return {
        "schema": 1,
        "status": run["status"] if run else end["status"] if end else "running",
        "job_id": job.get("job_id"),
        "config": job.get("config", {}),
        "versions": job.get("versions", {}),
        "startup_s": next((e["startup_s"] for e in reversed(of(tape, "run")) if e["startup_s"] is not None), t0),
        "wall_s": None if t0 is None else t1 - t0,
        "merges": len(merges),
        "mean_members": statistics.fmean(len({m["learner_id"] for m in e["members"]}) for e in merges) if merges else None,
        "tokens": tokens,
        "tokens_merged": tokens_merged,
        "tokens_discarded": tokens_discarded,
        "tokens_pending": tokens - tokens_merged - tokens_discarded,
        "discarded_by_reason": by_reason,
        "fragments": fragments,
        "bytes_up": job.get("founding_bytes", 0) + sum(e["payload_bytes"] for e in arrived),
        "bytes_down": sum(e["payload_bytes"] * len(e["learners"]) for e in of(tape, "publish")),
        **busy_figures(tape, t0, t1, learners),
        "val": run["val"] if run else None,
        "global_sha256": end["global_sha256"] if end else None,
        "restarts": run["restarts"] if run else {"learners": 0, "syncer": 0},
        "steps_lost": steps_lost(tape),
        "leases": lease_figures(tape)[0],
        "learners": learners,
    }


def version_of(tape: list[Event], fragment_id: int) -> int:
    n = 0
    for e in of(tape, "job", "merge", "restart"):
        if e["event"] == "merge":
            n = e["version"][1] if e["fragment_id"] == fragment_id else n
            continue
        order = [f["fragment_id"] for f in of(tape, "job")[-1]["fragments"]]
        at = order.index(fragment_id)
        n = e["founded_n"][at] if e["event"] == "job" else e["versions"][at][1]
    return n


def learner_figures(tape: list[Event], learner: int, *, is_ended: bool) -> dict[str, Any]:
    mine = [e for e in tape if e.get("learner_id") == learner]
    reports = of(mine, "progress")
    totals = [v for (m, _), v in life_totals(tape).items() if m == learner]
    merges, merged, discarded = surviving_merges(tape), merged_tokens(tape), discarded_tokens(tape)
    members = [{m["learner_id"] for m in e["members"]} for e in merges]
    eligible = sum(learner in e["eligible"] or learner in ms for e, ms in zip(merges, members, strict=True))
    stalls = sorted(s for e in reports for s in e["stalls_s"])
    steps = [s for e in reports for s in net_steps(e)]
    sizes = [e["batch_size"] for e in mine if e.get("batch_size")]
    fields = ("inner_step", "batch_size", "accumulate", "lr_factor", "reason")
    chosen = [{name: e[name] for name in fields} for e in mine if e["event"] == "batch"]
    fragment_ids = [f["fragment_id"] for f in parameter_fragments(tape)]
    lost = {p: sum(discarded[learner, p, r] for r in REASONS) for p in fragment_ids}
    tokens = sum(t for _, t in totals)
    if not is_ended:
        tokens = max([tokens, *(merged[learner, p] + lost[p] for p in fragment_ids)])
    rounds = sum(learner in ms for ms in members)
    return {
        "learner_id": learner,
        "incarnations": len({e["incarnation"] for e in of(mine, "join", "progress")}),
        "inner_steps": sum(s for s, _ in totals),
        "tokens": tokens,
        "stall_s": math.fsum(stalls),
        "stall_p99_s": stalls[math.ceil(0.99 * len(stalls)) - 1] if stalls else None,
        "step_median_s": statistics.median(steps) if steps else None,
        "rounds_merged": rounds,
        "rounds_eligible": eligible,
        "participation": rounds / eligible if eligible else None,
        "batch_size": sizes[-1] if sizes else 0,
        "batches": chosen if len(chosen) <= 20 else [chosen[0], *chosen[-19:]],
        "discarded": weighted(tape, lost),
        "samples": lease_figures(tape)[1].get(learner, 0) if lease_figures(tape)[0] is not None else None,
    }


def net_steps(report: Event) -> list[float]:
    gaps, paused = report["step_gaps_s"], report["paused_s"]
    return [max(g - (paused[i] if i < len(paused) else 0.0), 0.0) for i, g in enumerate(gaps)]


def busy_figures(tape: list[Event], t0: float | None, t1: float, learners: list[dict[str, Any]]) -> dict[str, Any]:
    if t0 is None or t1 <= t0:
        return {"goodput": None, "goodput_alive": None, "uptime": None}
    slots = (of(tape, "job")[-1] if of(tape, "job") else {}).get("num_slots") or 0
    first = {m: t0 for m in range(slots)}
    useful = alive = 0.0
    for x in learners:
        m = x["learner_id"]
        mine = [e for e in tape if e.get("learner_id") == m]
        first[m] = of(mine, "join")[0]["t_s"]
        time = math.fsum(s for e in of(mine, "progress") for s in net_steps(e))
        useful += time * (1 - x["discarded"] / x["tokens"] if x["tokens"] else 1)
        alive += covered(presence(mine, t1), t0, t1)
    whole = sum(t1 - max(t0, at) for at in first.values())
    return {
        "goodput": min(useful / whole, 1.0) if whole else None,
        "goodput_alive": min(useful / alive, 1.0) if alive else None,
        "uptime": covered(short_gaps(tape), t0, t1) / (t1 - t0),
    }


def presence(mine: list[Event], t1: float) -> list[tuple[float, float]]:
    here, spans = {}, []
    for e in of(mine, "join", "leave"):
        if e["event"] == "join":
            here.setdefault(e["incarnation"], e["t_s"])
        elif e["incarnation"] in here:
            spans.append((here.pop(e["incarnation"]), e["t_s"]))
    return spans + [(at, t1) for at in here.values()]


def short_gaps(tape: list[Event]) -> list[tuple[float, float]]:
    lives: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for e in of(tape, "join", "progress"):
        lives[e["learner_id"], e["incarnation"]].append(e)
    spans = []
    for events in lives.values():
        steps = [s for e in of(events, "progress") for s in net_steps(e)]
        limit = max(3 * statistics.median(steps), 1.0) if steps else 1.0
        previous, told = None, 0
        for e in events:
            if e["event"] == "join":
                previous = e["t_s"] if previous is None else previous
                continue
            gaps, last = e["step_gaps_s"], e["t_s"] - e["last_step_age_s"]
            is_next = previous is not None and e["first_gap"] == told
            ends = [last - math.fsum(gaps[i + 1 :]) for i in range(len(gaps))]
            for i, (gap, end) in enumerate(zip(gaps, ends, strict=True)):
                start = ends[i - 1] if i else previous if is_next else end - gap
                if gap <= limit:
                    spans.append((start, end))
            if gaps:
                previous, told = last, e["first_gap"] + len(gaps)
    return spans


def covered(spans: list[tuple[float, float]], low: float, high: float) -> float:
    """Length of the union, by cutting [low, high] at every end and asking of each piece whether any span holds it."""
    spans = [(max(a, low), min(b, high)) for a, b in spans]
    spans = [(a, b) for a, b in spans if a < b]
    marks = sorted([(a, 1) for a, _ in spans] + [(b, -1) for _, b in spans])
    total, depth, at = 0.0, 0, low
    for mark, change in marks:
        total += mark - at if depth else 0.0
        depth, at = depth + change, mark
    return total


def steps_lost(tape: list[Event]) -> int:
    """Per life: parameter-weighted discarded(died) tokens x steps / tokens, rounded half to even."""
    num_params = {f["fragment_id"]: f["num_params"] for f in parameter_fragments(tape)}
    totals, lost = life_totals(tape), Counter[tuple[int, int]]()
    for e in of(tape, "discard"):
        if e["reason"] == "died" and e["fragment_id"] in num_params:
            before = life_totals(tape[: e["seq"]])
            lives = [i for (m, i), (_, tokens) in before.items() if m == e["learner_id"] and tokens > 0]
            if lives:
                lost[e["learner_id"], max(lives)] += num_params[e["fragment_id"]] * e["tokens"]
    result = 0
    for life, tokens in lost.items():
        above, below = tokens * totals[life][0], sum(num_params.values()) * totals[life][1]
        whole, rest = divmod(above, below)
        result += whole + (2 * rest > below or (2 * rest == below and whole % 2 == 1))
    return result
