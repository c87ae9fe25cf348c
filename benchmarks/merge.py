"""How fast the syncer merges: from encoded contributions to the encoded publication, against a plain copy of memory in the same run.

    .venv/bin/python benchmarks/merge.py [--mb 1 5 20 100 500] [--learners 1 2 4 8 16] [--wire bf16] [--threads 1] [--json FILE]

One fragment, in a process that is pinned to one core, through the syncer's own `SyncerStore`: check and measure every contribution, fold it
in, close the merge (outer step, publication, checksums). A fragment's size is that of its float32 values, 4 N bytes for N elements; a
payload has w N bytes. Nothing is sent, and no rule is asked. Numbers of learners take turns, so that the machine's slow drift falls out.

| figure | what |
|---|---|
| bound | M w N + 24 N bytes: the M contributions read once, Theta, momentum and shadow read once and written once |
| copy | bytes read and written per second by `copy_` of as many bytes as those three have, between the merges |
| factor | time of a merge over that of the bound at the copy's speed; aim: at most 2 |
| line | a time's distance from the straight line through those of two learners and more (one is not folded); aim: at most 10 % of it |
| peak | resident memory above that before the founding, without waiting payloads; aim: within 10 % of the formula, (28 + 2 w) N or less |

The formula of the peak: Theta, momentum and shadow before and after the step, 24 N; the payload that is published and the one before it,
2 w N; the accumulator, 4 N, from two learners on. More learners are not in it. It is an aim from `FORMULA_MB` on. The last table says
where the time goes, each stage without those that it calls.

The exit code is 1 if an aim is missed. Sizes that the JSON file holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.recipe_rows import table  # noqa: E402
from benchmarks.row_file import read_rows, write_rows  # noqa: E402

MAX_FACTOR, MAX_DISTANCE, MEMORY_MARGIN = 2.0, 0.1, 0.1
FORMULA_MB = 40
"""Below 32 MiB the C library keeps what was freed, so that resident memory says little of what is in use."""
MATRIX_COLUMNS = 512
TENSORS = 4
"""A fragment is so many matrices of equal size, merged by RDA."""
DISTINCT_BYTES = 1 << 28
"""Contributions have memory of their own up to so much of it, and take turns with two payloads above."""


def main() -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mb", nargs="*", type=int, default=[1, 5, 20, 100, 500], help="fragment's float32 values (default 1 5 20 100 500)"
    )
    parser.add_argument("--learners", nargs="*", type=int, default=[1, 2, 4, 8, 16], metavar="M", help="default 1 2 4 8 16")
    parser.add_argument("--wire", default="bf16", help="wire_dtype (default bf16)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, each with its core (default 1, as a syncer has)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of merges of one size, at least three of each (default 10)")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "merge.json", metavar="FILE", help="rows so far")
    parser.add_argument("--process", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(*arguments.mb, *arguments.learners, arguments.threads) < 1:
        parser.error("--mb, --learners, --threads: at least 1 each.")
    if arguments.process:
        arguments.process.write_text(json.dumps(measure(arguments)))
        return 0
    rows: dict[str, Any] = read_rows(arguments.json, {})
    names = {mb: [name_of(arguments, mb, m) for m in arguments.learners] for mb in arguments.mb}
    for mb in arguments.mb:
        if any(name not in rows for name in names[mb]):
            print(f"... {mb} MB", flush=True)
            rows |= run(arguments, mb)
            write_rows(arguments.json, rows)
    return report([[rows[name] for name in names[mb]] for mb in arguments.mb])


def name_of(arguments: argparse.Namespace, mb: int, learners: int) -> str:
    """What a row is known by."""
    return f"{mb} MB, {learners} learners, {arguments.wire}, {arguments.threads} threads"


def run(arguments: argparse.Namespace, mb: int) -> dict[str, Any]:
    """All rows of one size, in a process of their own."""
    cores = sorted(os.sched_getaffinity(0))[-arguments.threads :]
    if len(cores) < arguments.threads:
        raise SystemExit(f"--threads {arguments.threads}: this process may use {len(cores)} cores.")
    with tempfile.TemporaryDirectory(prefix="lightning_diloco_merge_") as folder:
        out = Path(folder) / "rows.json"
        command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, __file__, "--process", str(out), "--mb", str(mb)]
        command += ["--learners", *map(str, arguments.learners), "--wire", arguments.wire, "--threads", str(arguments.threads)]
        command += ["--seconds", str(arguments.seconds)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)})
        rows: dict[str, Any] = json.loads(out.read_text())
    return rows


# ---- the process that merges ------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of one size."""
    import torch

    torch.set_num_threads(arguments.threads)
    clock = Clock()
    clock.wrap_stages()
    (mb,) = arguments.mb
    bench = Bench(mb, max(arguments.learners), arguments.wire)
    return {name_of(arguments, mb, m): row for m, row in bench.rows(arguments.learners, arguments.seconds, clock).items()}


class Clock:
    """The time of every stage, without the stages that it calls.

    Args:
        now: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.spent_s: defaultdict[str, float] = defaultdict(float)
        self._now = now
        self._inner_s = [0.0]

    def wrap(self, owner: Any, name: str, title: str) -> None:
        """Put a clock around a function where its caller looks it up."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            """Add the time of this call to its title."""
            start_s = self._now()
            self._inner_s.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                all_s = self._now() - start_s
                self.spent_s[title] += all_s - self._inner_s.pop()
                self._inner_s[-1] += all_s

        setattr(owner, name, timed)

    def wrap_stages(self) -> None:
        """Around all stages of a merge."""
        from lightning_diloco.outer import Encoded, MergeAccumulator, Merged, codec, norms, publishing
        from lightning_diloco.runtime import store

        self.wrap(store, "crc32", "checksums")
        self.wrap(Encoded, "part", "decode")
        self.wrap(norms.Meter, "add", "norms")
        self.wrap(MergeAccumulator, "_add_waiting", "add up")
        self.wrap(Merged, "part", "scale")
        self.wrap(publishing, "step_block", "outer step")
        self.wrap(publishing, "publish_block", "encode")
        self.wrap(codec, "is_finite", "look for what is not finite")


class Bench:
    """One fragment and what is sent to it.

    Args:
        mb: size of its float32 values.
        max_learners: of the rows to come.
        wire: of contributions and publications.
    """

    def __init__(self, mb: int, max_learners: int, wire: str) -> None:
        import torch

        from lightning_diloco.config import SyncConfig
        from lightning_diloco.outer import Fragment, Layout, TensorSlice, encode, payload_bytes
        from lightning_diloco.runtime.checksum import crc32
        from lightning_diloco.runtime.store import SyncerStore

        rows = max(1, round(mb * 1e6 / 4 / TENSORS / MATRIX_COLUMNS))
        shape, length = (rows, MATRIX_COLUMNS), rows * MATRIX_COLUMNS
        parts = [TensorSlice(name=f"t{i}", dtype="float32", global_shape=shape, offset=0, length=length) for i in range(TENSORS)]
        layout = Layout(fragments=(Fragment(fragment_id=0, kind="parameters", slices=tuple(parts)),))
        self.num_params = layout.num_params
        self.payload_bytes = payload_bytes(self.num_params, wire)
        generator = torch.Generator().manual_seed(0)
        distinct = max_learners if max_learners * self.payload_bytes <= DISTINCT_BYTES else min(2, max_learners)
        payloads = [encode(torch.randn(self.num_params, generator=generator), wire).numpy().data for _ in range(distinct)]
        self._payloads = [(payload, crc32(payload)) for payload in payloads]
        self._copies = torch.zeros(3 * self.num_params), torch.ones(3 * self.num_params)
        self._before_bytes = resident("VmRSS")
        values = torch.randn(self.num_params, generator=generator)  # gone when the fragment is founded
        self._store = SyncerStore(layout, SyncConfig(num_fragments=1, sync_interval_steps=24, wire_dtype=wire))  # type: ignore[arg-type]
        raw = values.numpy().view("uint8").data
        self._store.found_fragment(0, "values", raw, crc32(raw))
        self._merges = 0
        self._published: Any = None

    def merge(self, learners: int) -> float:
        """One merge; returns its seconds."""
        self._merges += 1
        start_s = time.perf_counter()
        for learner in range(learners):
            payload, crc = self._payloads[learner % len(self._payloads)]
            d = self._store.measure_contribution(0, payload, crc)
            assert d.crc_ok
            self._store.fold(0, d, 24.0 + learner)
            del d
        self._published = self._store.close(0, self._merges)
        return time.perf_counter() - start_s

    def copy(self) -> float:
        """A plain copy of as much as Theta, momentum and shadow are; returns its seconds."""
        start_s = time.perf_counter()
        self._copies[1].copy_(self._copies[0])
        return time.perf_counter() - start_s

    def rows(self, learners: list[int], seconds: float, clock: Clock) -> dict[int, dict[str, Any]]:
        """The figures by number of learners, which take turns."""
        merges: dict[int, list[float]] = {m: [] for m in learners}
        stages: dict[int, Counter[str]] = {m: Counter() for m in learners}
        peaks, copies = {}, []
        for m in learners:
            self.merge(m)
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory begins anew
            self.merge(m)
            self.merge(m)
            peaks[m] = resident("VmHWM") - self._before_bytes
        begin_s = time.perf_counter()
        while time.perf_counter() - begin_s < seconds or len(copies) < 3 * len(learners):
            for m in learners:
                copies.append(self.copy())
                clock.spent_s.clear()
                merges[m].append(self.merge(m))
                stages[m].update(clock.spent_s)
        fixed = {"num_params": self.num_params, "payload_bytes": self.payload_bytes}
        return {
            m: {
                **fixed,
                "learners": m,
                "merges": len(merges[m]),
                "merge_s": statistics.median(merges[m]),
                "copy_bytes_per_s": 24 * self.num_params / statistics.median(copies),
                "peak_bytes": peaks[m],
                "stages_s": {title: spent_s / len(merges[m]) for title, spent_s in stages[m].items()},
                "stages_of_s": statistics.mean(merges[m]),
            }
            for m in learners
        }


def resident(field: str) -> int:
    """Resident memory of this process in bytes, now (VmRSS) or at most (VmHWM)."""
    found = re.search(field + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


# ---- the report -------------------------------------------------------------------------------------------------------------


def bound_s(row: dict[str, Any]) -> float:
    """What a merge takes that touches every byte once, at the copy's speed."""
    return float((row["learners"] * row["payload_bytes"] + 24 * row["num_params"]) / row["copy_bytes_per_s"])


def formula_bytes(row: dict[str, Any]) -> int:
    """The peak."""
    return int((28 if row["learners"] > 1 else 24) * row["num_params"] + 2 * row["payload_bytes"])


def distances(rows: list[dict[str, Any]]) -> dict[int, float]:
    """By learners, a time's distance from the line through all those of two learners and more, over it; {} for fewer than three."""
    rows = [row for row in rows if row["learners"] > 1]
    if len(rows) < 3:
        return {}
    slope, start = statistics.linear_regression([row["learners"] for row in rows], [row["merge_s"] for row in rows])
    return {row["learners"]: abs(start + slope * row["learners"] - row["merge_s"]) / row["merge_s"] for row in rows}


def report(sizes: list[list[dict[str, Any]]]) -> int:
    """Print the tables; 1 if an aim is missed."""
    lines, stages, missed = [], [], []
    titles = list(dict.fromkeys(title for rows in sizes for row in rows for title in row["stages_s"]))
    for rows in sizes:
        far = distances(rows)
        for row in rows:
            name = f"{4e-6 * row['num_params']:.0f} MB, {row['learners']}"
            factor, distance = row["merge_s"] / bound_s(row), far.get(row["learners"])
            memory = row["peak_bytes"] / formula_bytes(row)
            is_large = 4e-6 * row["num_params"] >= FORMULA_MB * 0.99
            speed = bound_s(row) * row["copy_bytes_per_s"] / row["merge_s"]
            lines.append(
                [
                    name,
                    f"{1e3 * row['merge_s']:.1f}",
                    f"{speed / 1e9:.2f}",
                    f"{row['copy_bytes_per_s'] / 1e9:.2f}",
                    f"{factor:.1f}",
                    "-" if distance is None else f"{distance:.1%}",
                    f"{row['peak_bytes'] / 1e6:.0f}",
                    f"{formula_bytes(row) / 1e6:.0f} ({memory:.2f})",
                ]
            )
            stages.append([name, *(f"{row['stages_s'].get(title, 0.0) / row['stages_of_s']:.0%}" for title in titles)])
            misses = {
                "factor": factor > MAX_FACTOR,
                "line": distance is not None and distance > MAX_DISTANCE,
                "peak": is_large and abs(memory - 1) > MEMORY_MARGIN,
            }
            missed += [f"{name}: {title}" for title, is_missed in misses.items() if is_missed]
    header = [
        "fragment, learners",
        "merge, ms",
        "GB/s of the bound",
        "copy, GB/s",
        "factor",
        "line",
        "peak, MB",
        "formula, MB (peak over it)",
    ]
    print(table(header, lines))
    print("\nShare of a merge:\n\n" + table(["fragment, learners", *titles], stages))
    if missed:
        print(f"\nMISSED: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
