"""Notes the byte counters of the hub's links, ten times a second, until its standard input ends.

    ip netns exec HUB python -m benchmarks.wan.sampler OUT

One line a look: monotonic time, then for each link its name, bytes that its node has sent, bytes that it was sent.
"""

from __future__ import annotations

import select
import sys
import time
from pathlib import Path

__all__ = ["peak_bytes_per_s"]

PERIOD_S = 0.1


def main() -> None:
    """Look until the end."""
    out, links = Path(sys.argv[1]), sorted(path for path in Path("/sys/class/net").iterdir() if path.name.startswith("v"))
    with out.open("w") as file:
        while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
            # What the hub receives on a link is what the node has sent.
            cells = [f"{link.name} {_read(link, 'rx')} {_read(link, 'tx')}" for link in links]
            file.write(f"{time.monotonic()} {' '.join(cells)}\n")
            file.flush()


def _read(link: Path, direction: str) -> str:
    return (link / "statistics" / f"{direction}_bytes").read_text().strip()


def peak_bytes_per_s(path: Path, begin_s: float, end_s: float, window_s: float = 1.0) -> dict[str, tuple[float, float]]:
    """By link, the highest rates (up, down) over windows of about `window_s` between two moments.

    Args:
        path: what `main` wrote.
        begin_s: monotonic time.
        end_s: the same.
        window_s: seconds.
    """
    looks: list[tuple[float, dict[str, tuple[int, int]]]] = []
    for line in path.read_text().splitlines():
        cells = line.split()
        if len(cells) % 3 == 1 and begin_s <= float(cells[0]) <= end_s:
            looks.append((float(cells[0]), {cells[i]: (int(cells[i + 1]), int(cells[i + 2])) for i in range(1, len(cells), 3)}))
    step = max(1, round(window_s / PERIOD_S))
    peaks: dict[str, tuple[float, float]] = {}
    for (t0, before), (t1, after) in zip(looks, looks[step:], strict=False):
        for link, counts in before.items():
            up, down = ((new - old) / (t1 - t0) for new, old in zip(after[link], counts, strict=True))
            peaks[link] = max(up, peaks.get(link, (0.0, 0.0))[0]), max(down, peaks.get(link, (0.0, 0.0))[1])
    return peaks


if __name__ == "__main__":
    main()
