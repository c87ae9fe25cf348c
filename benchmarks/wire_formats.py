"""Formats of four bits on real pseudo-gradients, what their errors add up to, and the speed of the codecs.

    .venv/bin/python benchmarks/wire_formats.py errors [--steps N]
    .venv/bin/python benchmarks/wire_formats.py feedback
    .venv/bin/python benchmarks/wire_formats.py speed [--elements N]

`errors`: two learners of `emulate.py` (recipe `quality`, H = 24) are trained, and every contribution of theirs, a whole fragment, is
rounded by every format. Of each it prints the bits of an element, scales included, and ||d^ - d|| / ||d||: the median of all contributions,
the largest, and that of normally distributed numbers. Scales are bf16 numbers; "-8..7" is what `wire_dtype="int4"` does with groups of 64
(`outer/int4.py`), and the others have their last level at the largest value of the group.

`feedback`: one learner moves at random for 100 rounds, outer SGD with learning rate 1; how far the global model is from where the same
moves lead without rounding, as a share of the way, with each wire dtype (both ways) and each adoption.

`speed`: on one thread, GB of float32 per second of that thread, the best of many. For comparison `copy_` of the same tensor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from emulate import Outer, Run, Settings
from torch import Tensor

from lightning_diloco.outer import (
    decode,
    decode_publication,
    encode,
    encode_in_place,
    encode_publication,
    flat,
    payload_bytes,
    pseudo_gradient,
    rebase_delta,
)
from lightning_diloco.outer.memory import raw

INT = [float(i) for i in range(-7, 8)]
E2M1 = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E3M0 = [2.0**i for i in range(-6, 1)]
LEVELS = {
    "-7..7": INT,
    "float E2M1": [-x for x in reversed(E2M1)] + [0.0, *E2M1],
    "float E3M0": [-x for x in reversed(E3M0)] + [0.0, *E3M0],
}
REPEATS = 15


def rounded(d: Tensor, group: int, *, levels: list[float]) -> Tensor:
    """A fragment as a format with these levels gives it back."""
    rows = torch.nn.functional.pad(d, (0, -d.numel() % group)).view(-1, group)
    scales = (rows.abs().amax(1, keepdim=True) / levels[-1]).to(torch.bfloat16).float()
    table = torch.tensor(levels)
    nearest = table[torch.bucketize(rows / scales.masked_fill(scales == 0, 1.0), (table[1:] + table[:-1]) / 2)]
    return (nearest * scales).flatten()[: d.numel()]


def rounded_to_eight(d: Tensor, group: int) -> Tensor:
    """Whole numbers from -8 to 7, where the sign of the scale gives the longer side the 8, and the shorter one ends at 7.4 levels."""
    rows = torch.nn.functional.pad(d, (0, -d.numel() % group)).view(-1, group)
    down, up = -rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    upright, flipped = torch.maximum(down / 8, up / 7.4), torch.maximum(up / 8, down / 7.4)
    scales = torch.where(flipped < upright, -flipped, upright).to(torch.bfloat16).float()
    whole = (rows / scales.masked_fill(scales == 0, 1.0)).round().clamp(-8, 7)
    return (whole * scales).flatten()[: d.numel()]


def formats() -> dict[str, tuple[float, Callable[[Tensor], Tensor]]]:
    """Bits of an element and the rounding, by name."""
    found: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {}
    for group in (16, 32, 64, 128, 256):
        roundings: dict[str, Callable[[Tensor, int], Tensor]] = {
            **{name: partial(rounded, levels=levels) for name, levels in LEVELS.items()},
            "-8..7": rounded_to_eight,
        }
        for name, rounding in roundings.items():
            found[f"{name}, groups of {group}"] = (4 + 16 / group, partial(rounding, group=group))
    for wire in ("int4", "bf16"):
        bits = 8 * payload_bytes(1 << 20, wire) / (1 << 20)
        found[f'`wire_dtype="{wire}"`'] = (bits, lambda d, wire=wire: decode(encode(d, wire), d.numel(), wire))
    return found


class Recording(Outer):
    """Keeps every contribution."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.seen: list[Tensor] = []

    def _merge(self, p: int, contributions: list[Tensor]) -> Tensor:
        self.seen += contributions
        return super()._merge(p, contributions)


def error(d: Tensor, y: Tensor) -> float:
    """||y - d|| / ||d||."""
    return float((y - d).norm() / d.norm())


def errors(steps: int) -> None:
    """The table of all formats."""
    outer = Recording(Run(Settings(learners=2, steps=steps, batch=16, lr=2.0)))
    outer.train()
    seen = [d for d in outer.seen if float(d.norm()) > 0]
    normal = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    print(f"{len(seen)} contributions of {min(d.numel() for d in seen)} to {max(d.numel() for d in seen)} elements, {steps} steps")
    print("| format | bits | median error | largest | of normal numbers |\n|---|---|---|---|---|")
    for name, (bits, rounding) in formats().items():
        found = [error(d, rounding(d)) for d in seen]
        print(f"| {name} | {bits:.3f} | {statistics.median(found):.4f} | {max(found):.4f} | {error(normal, rounding(normal)):.4f} |")


def feedback() -> None:
    """The table of what is left of the errors."""
    print("| wire_dtype | rebase | overwrite |\n|---|---|---|")
    for wire in ("bf16", "int4"):
        print(f"| {wire} | {after_rounds(wire, is_rebase=True):.2%} | {after_rounds(wire, is_rebase=False):.2%} |")


def after_rounds(wire: str, *, is_rebase: bool) -> float:
    """The distance at the end, as a share of the way."""
    size, random = 1 << 16, torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=random)
    moved, local, theta, shadow = torch.zeros(size, dtype=torch.float64), start, start, start
    for _ in range(100):
        move = 1e-2 * torch.randn(size, generator=random)
        moved, local = moved + move, local + move
        d = decode(encode(pseudo_gradient(shadow, local), wire), size, wire)
        theta, base = theta - d, shadow
        _, shadow = encode_publication(theta, shadow, wire)
        local = local + rebase_delta(shadow, base, d) if is_rebase else shadow
    return float((shadow - (start + moved)).norm() / moved.norm())


def speed(size: int) -> None:
    """The table of all codecs."""
    x, shadow, values = torch.randn(size), torch.randn(size), flat(size)
    copied_s = seconds(lambda: values.copy_(x))
    print(f"{size} elements; copy_ {4e-9 * size / copied_s:.2f} GB/s")
    print("| wire_dtype | encode in place | decode | encode a publication | decode it |\n|---|---|---|---|---|")
    for wire in ("fp32", "bf16", "int4"):
        payload, out = encode(x, wire), (raw(payload_bytes(size, wire)), flat(size))
        times_s = [
            seconds(lambda wire=wire: encode_in_place(values, wire), before=lambda: values.copy_(x)),
            seconds(lambda payload=payload, wire=wire: decode(payload, size, wire, out=values)),
            seconds(lambda wire=wire, out=out: encode_publication(x, shadow, wire, out=out)),
            seconds(lambda payload=payload, wire=wire: decode_publication(payload, shadow, size, wire, out=values)),
        ]
        print(f"| {wire} | " + " | ".join(f"{4e-9 * size / s:.2f}" for s in times_s) + " |")


def seconds(work: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> float:
    """Of this thread's time, the least of many."""
    found = []
    for _ in range(REPEATS):
        before()
        start_s = time.thread_time()
        work()
        found.append(time.thread_time() - start_s)
    return min(found)


def main() -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "feedback", "speed"])
    parser.add_argument("--steps", type=int, default=192, help="inner steps of each learner")
    parser.add_argument("--elements", type=int, default=4_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "errors":
        errors(arguments.steps)
    elif arguments.what == "feedback":
        feedback()
    else:
        speed(arguments.elements)
    return 0


if __name__ == "__main__":
    sys.exit(main())
