"""Tables and aims of `benchmarks/wan.py`, from the rows of its jobs."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.recipe_rows import table

__all__ = ["TORCHFT", "ddp_bytes", "our_bytes", "p99", "ratio", "share_of_alone", "single"]

MIN_SPEED_UP = 20.0
MIN_SHARE = 0.97
MIN_RATIO, MAX_RATIO = 24.0, 58.0
"""DDP's communication time over its computing time, between which the comparison is what it says."""
FEWER_BYTES = {("bf16", 2): 45, ("int4", 2): 165, ("bf16", 4): 68, ("int4", 4): 250}
"""By wire and learners: a learner's bytes of a step are at most DDP's over this, at H = P = 24."""
ANSWER_S = 0.25
MIN_MERGES = 0.95
"""Of those due: who merges less sends less."""
TORCHFT = {"torchft_diloco": "torchft's DiLoCo", "torchft_streaming": "torchft's streaming DiLoCo"}
"""By name of the job: title."""


def ddp_bytes(num_params: int, num_learners: int) -> float:
    """What a learner sends, and is sent, in a step of DDP: a ring of all-reduce over float32 gradients."""
    return 2 * (num_learners - 1) / num_learners * 4 * num_params


def our_bytes(num_params: int, wire: str, interval_steps: int = 24) -> float:
    """What a learner sends, and is sent, in a step of ours: every parameter once in H steps, scales included."""
    from lightning_diloco.outer import payload_bytes

    return payload_bytes(num_params, wire) / interval_steps


def p99(values: list[float]) -> float:
    """99th percentile: the smallest value that 99 of 100 do not exceed."""
    return sorted(values)[-(-99 * len(values) // 100) - 1]


def share_of_alone(row: dict[str, Any], *alone: dict[str, Any]) -> float:
    """Tokens per second over those of the same learners without communication, in the jobs before and after."""
    return float(row["tokens_per_s"] / statistics.mean(other["tokens_per_s"] for other in alone))


def ratio(jobs: dict[str, dict[str, Any]], wires: list[str], rounds: int, num_params: int, num_learners: int) -> list[str]:
    """Print the headline's tables; returns what was missed.

    Args:
        jobs: rows by name, as `benchmarks/wan.py` gives them.
        wires: of our jobs.
        rounds: jobs of each wire.
        num_params: of the model.
        num_learners: M.
    """
    ddp, missed = jobs.get("ddp"), []
    alone_s = statistics.mean(jobs[f"alone {i}"]["step_s"] for i in range(rounds * len(wires) + 1))
    lines = [_line("`alone`", [jobs[f"alone {i}"] for i in range(rounds * len(wires) + 1)], ddp)]
    if ddp is not None:
        communication = (ddp["step_s"] - alone_s) / alone_s
        print(f"Communication of `ddp` over its computing: {communication:.1f} (valid from {MIN_RATIO:g} to {MAX_RATIO:g})")
        lines += [_line("`ddp`", [ddp], ddp), _line("post-local SGD, H = 24", [jobs["post_local_sgd"]], ddp)]
        if not MIN_RATIO <= communication <= MAX_RATIO:
            missed.append(f"the ratio of {communication:.1f} is not one of those for which the aims hold")
    before = jobs.get("alone torchft")
    for name, title in TORCHFT.items():
        if name in jobs and before is not None:
            after = jobs[f"alone {name}"]
            lines.append(_line(title, [jobs[name]], ddp, [share_of_alone(jobs[name], before, after)]))
            before = after
    for number, wire in enumerate(wires):
        places = [round_ * len(wires) + number for round_ in range(rounds)]
        ours = [jobs[f"{wire} {i}"] for i in range(rounds)]
        shares = [share_of_alone(row, jobs[f"alone {place}"], jobs[f"alone {place + 1}"]) for row, place in zip(ours, places, strict=True)]
        lines.append(_line(f"ours, {wire}", ours, ddp, shares))
        if statistics.mean(shares) < MIN_SHARE:
            missed.append(f"{wire}: {statistics.mean(shares):.3f} of the learners without communication, aim {MIN_SHARE}")
        if ddp is not None:
            missed += _against_ddp(wire, ours, ddp, num_params, num_learners)
    header = ["method", "jobs", "tokens/s", "over `ddp`", "of `alone`", "up + down a step, kB", "of it payload", "`ddp` over it"]
    print("\n" + table([*header, "peak, of the link", "merges, of those due", "syncer's CPU a step, ms", "loss at the end (steps)"], lines))
    return missed + _losses(jobs, wires)


def _line(title: str, rows: list[dict[str, Any]], ddp: dict[str, Any] | None, shares: list[float] | None = None) -> list[str]:
    speed = statistics.mean(row["tokens_per_s"] for row in rows)
    link, payload = link_bytes(rows), statistics.mean(_payload(row) for row in rows)
    is_linked = link > 100.0  # namespaces that say nothing still look for their neighbours
    peaks = [max(pair) / row["bytes_per_s"] for row in rows if row["bytes_per_s"] for pair in learners_peaks(row)]
    merges = [row["merges"] / row["due"] for row in rows if "due" in row]
    losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    return [
        title,
        str(len(rows)),
        f"{speed:,.0f}",
        "-" if ddp is None else f"{speed / ddp['tokens_per_s']:.1f}",
        "-" if shares is None else f"{statistics.mean(shares):.3f} ({min(shares):.3f}, {max(shares):.3f})",
        f"{link / 1e3:.1f}" if is_linked else "-",
        f"{payload / 1e3:.1f}" if payload else "-",
        f"{link_bytes([ddp]) / link:.1f}" if is_linked and ddp else "-",
        f"{max(peaks):.2f}" if peaks else "-",
        f"{statistics.mean(merges):.2f}" if merges else "-",
        f"{1e3 * statistics.mean(row['syncer_s_per_step'] for row in rows):.1f}" if merges else "-",
        f"{statistics.mean(losses):.3f} ({rows[0]['max_steps']})" if losses else "-",
    ]


def learners_peaks(row: dict[str, Any]) -> list[tuple[float, float]]:
    """The highest rates of the learners' links, up and down; the syncer's (`vs`) is wider."""
    return [pair for link, pair in row.get("peak_bytes_per_s", {}).items() if link != "vs"]


def link_bytes(rows: list[dict[str, Any]]) -> float:
    """Of a learner and step, both directions, frames; 0.0 where it was not counted."""
    return statistics.mean(row["per_step"].get("link_up", 0.0) + row["per_step"].get("link_down", 0.0) for row in rows)


def _payload(row: dict[str, Any]) -> float:
    return float(row["per_step"].get("payload_up", 0.0) + row["per_step"].get("payload_down", 0.0))


def _against_ddp(wire: str, ours: list[dict[str, Any]], ddp: dict[str, Any], num_params: int, num_learners: int) -> list[str]:
    theirs, expected = 2 * ddp_bytes(num_params, num_learners), 2 * our_bytes(num_params, wire)
    print(
        f"{wire}, bytes of a learner and step by formula: `ddp` 2 x 2 (M - 1) / M x 4 N = {theirs / 1e3:.1f} kB, "
        f"ours 2 x payload(N) / H = {expected / 1e3:.1f} kB: 1 / {theirs / expected:.1f}"
    )
    missed = []
    speed_up = statistics.mean(row["tokens_per_s"] for row in ours) / ddp["tokens_per_s"]
    if speed_up < MIN_SPEED_UP:
        missed.append(f"{wire}: {speed_up:.1f} times the tokens per second of ddp, aim {MIN_SPEED_UP:g}")
    fewer, aim = link_bytes([ddp]) / link_bytes(ours), FEWER_BYTES.get((wire, num_learners))
    if aim is not None and fewer < aim:
        missed.append(f"{wire}: 1 / {fewer:.1f} of ddp's bytes, aim 1 / {aim}")
    done = statistics.mean(row["merges"] / row["due"] for row in ours)
    if done < MIN_MERGES:
        missed.append(f"{wire}: {done:.2f} of the merges that were due, so that fewer bytes say nothing (aim {MIN_MERGES})")
    return missed


def _losses(jobs: dict[str, dict[str, Any]], wires: list[str]) -> list[str]:
    """Print the losses at equal tokens and equal time; returns which wires are not ahead of all others at equal time."""
    found = {
        "equal tokens": [name for name in jobs if name.startswith("ddp, equal tokens")],
        "equal wall time": [name for name in jobs if name.startswith("ddp, equal time")],
    }
    if not all(found.values()):
        return []
    # A job of torchft behind its limited links is as long as ours: equal tokens.
    theirs = {title: (name, f"{name}, equal time") for name, title in TORCHFT.items()}
    theirs = {"post-local SGD": ("post_local_sgd, equal tokens", "post_local_sgd, equal time"), **theirs}
    theirs = {title: names for title, names in theirs.items() if all(name in jobs for name in names)}
    ours = [statistics.mean(row["val_loss"] for name, row in jobs.items() if name.startswith(f"{wire} ")) for wire in wires]
    cells, best = [], 0.0
    for place, (title, names) in enumerate(found.items()):
        rows = [min((jobs[name] for name in names), key=lambda row: row["val_loss"]), *(jobs[names[place]] for names in theirs.values())]
        cells.append([title, *(f"{row['val_loss']:.3f} ({row['max_steps']} steps)" for row in rows), *(f"{loss:.3f}" for loss in ours)])
        best = min(row["val_loss"] for row in rows)
    print("\nValidation loss of the one model, nats per byte:\n")
    print(table(["at", "`ddp`, the better of two rates", *theirs, *(f"ours, {wire}" for wire in wires)], cells))
    behind = [(wire, loss) for wire, loss in zip(wires, ours, strict=True) if loss >= best]
    return [f"{wire}: a loss of {loss:.3f} at equal wall time, where another row has {best:.3f}" for wire, loss in behind]


def answers_text(answers_s: list[float]) -> str:
    """How many there were in the time that counts, and how long they took."""
    times = f", {1e3 * statistics.median(answers_s):.0f} ms, {1e3 * p99(answers_s):.0f} ms" if answers_s else ""
    return f"{len(answers_s)}{times}"


def single(title: str, row: dict[str, Any], alone: list[dict[str, Any]]) -> list[str]:
    """Print the table of a part with one job of ours; returns what was missed of what holds for every such part."""
    share, summary = share_of_alone(row, *alone), row["summary"]
    up, down = (row["per_step"].get(f"link_{way}", 0.0) / row["step_s"] for way in ("up", "down"))
    rate = row["counted_bytes_per_s"]
    lines = [
        ["tokens/s, of `alone`", f"{row['tokens_per_s']:,.0f}, {share:.3f}"],
        ["link: limit; up, down of it", f"{8e-6 * rate:.2f} Mbit/s; {up / rate:.2f}, {down / rate:.2f}"],
        ["merges, of those due, mean members", f"{row['merges']:.0f}, {row['merges'] / row['due']:.2f}, {summary['mean_members']}"],
        ["participation", ", ".join("-" if p is None else f"{p:.3f}" for p in row["participation"])],
        ["most contributions of a fragment on their way", str(max(row["most_on_way"]))],
        ["answers to control: number, median, p99", answers_text(row["answers_s"])],
        ["without an answer", str(sum(row["unanswered"]))],
        [
            "tokens: all, merged, pending, discarded",
            ", ".join(f"{summary[f'tokens{x}']:,}" for x in ("", "_merged", "_pending", "_discarded")),
        ],
        ["loss at the end", f"{row['val_loss']:.3f}"],
    ]
    print(table([title, ""], lines))
    missed = []
    if share < MIN_SHARE:
        missed.append(f"{title}: {share:.3f} of the learners without communication, aim {MIN_SHARE}")
    if max(row["most_on_way"]) > 1:
        missed.append(f"{title}: {max(row['most_on_way'])} contributions of a fragment on their way")
    # The weighted total of what is pending may be 1 by rounding.
    if summary["tokens_discarded"] or summary["tokens_pending"] > 1:
        missed.append(f"{title}: {summary['tokens_pending']} tokens pending, {summary['tokens_discarded']} discarded")
    return missed
