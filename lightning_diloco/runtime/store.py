"""The syncer's tensors: what `Fold`, `Close` and the founding do to them.

One thread (the numerics thread of `SyncerService`) calls everything here, in the order in which the machine decided it, so no lock is
needed. Published tensors are never changed in place: a transfer may still be reading them.

Memory per fragment of N elements: Theta, momentum and shadow in float32 (12 N bytes), the newest difference in the wire dtype, and while
contributions are folded an accumulator (4 N), if there are two or more, and less than 4 N of payloads that wait to be added. A contribution
is never decoded as a whole. A pool keeps what a merge frees for the next one: what the largest fragment's merge needs, for each fragment
that is due in a step, and the scratch of a block.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.outer import (
    BLOCK_ELEMENTS,
    Encoded,
    Fragment,
    FragmentState,
    Layout,
    MergeAccumulator,
    Norms,
    OuterStep,
    decode_full,
    is_finite,
    measure,
    momentum_at,
    payload_bytes,
    sha256_of,
    static_bytes,
    take_step,
)
from lightning_diloco.outer.static import unpack_static
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.global_state import by_name
from lightning_diloco.runtime.memory import Pool

__all__ = ["Closed", "Measured", "SyncerStore"]

_log = logging.getLogger(__name__)

MAX_LAYOUT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """A contribution that has arrived; it keeps the payload's memory."""

    contribution: Encoded
    norms: Norms
    crc_ok: bool
    """Whether the payload has its checksum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """What one merge produced."""

    fragment_id: int
    difference: Tensor
    shadow: Tensor
    crc: int
    merge_s: float
    outer_momentum: float
    norms: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]
    state: FragmentState
    """All of the fragment after it."""


class SyncerStore:
    """Theta, momentum, shadow and open merges of all fragments of one job.

    Args:
        layout: the founder's, validated.
        config: the founder's.
        has_momentum: whether the founder brings the outer momentum of an earlier job.
    """

    def __init__(self, layout: Layout, config: SyncConfig, *, has_momentum: bool = False) -> None:
        self.layout = layout
        self.founding_parts = ("values", "momentum") if has_momentum else ("values",)
        """What the founder sends of every fragment."""
        self._founding: list[dict[str, Tensor]] = [{} for _ in layout.fragments]
        self.config = config
        self.static = torch.empty(0, dtype=torch.uint8)
        self._states: list[FragmentState | None] = [None] * len(layout.fragments)
        due = math.ceil(len(layout.fragments) / config.sync_interval_steps)
        largest = sum(sorted(f.num_params for f in layout.fragments)[-due:])
        # A merge takes Theta, momentum, shadow, accumulator, a difference, and a block of scratch at a time.
        self._memory = Pool(4 * 4 * largest + payload_bytes(largest, config.wire_dtype) + 4 * BLOCK_ELEMENTS)
        self._accumulators = [MergeAccumulator(f, allocate=self._memory.flat) for f in layout.fragments]
        self._norms: list[list[tuple[float, ...]]] = [[] for _ in layout.fragments]

    def found_fragment(self, fragment_id: int, part: str, payload: memoryview, crc: int) -> None:
        """Take one of the `founding_parts` of one fragment, float32; with the last one the fragment is founded.

        Raises:
            RemoteProtocolError: wrong length or checksum, or values that are not finite.
        """
        if self._states[fragment_id] is not None:
            return  # a copy: the founder said it again
        # In the pool's memory from the beginning: what malloc gives for a whole model does not go back when the merges replace it.
        size = self.layout.fragments[fragment_id].num_params
        values = decode_full(payload, size, out=self._memory.flat(size))
        if crc32(values) != crc:
            raise RemoteProtocolError("bad_checksum", f"Fragment {fragment_id} of the founding state does not have its checksum.")
        if not torch.isfinite(values).all():
            raise RemoteProtocolError("nonfinite", f"Fragment {fragment_id} of the founding state is not finite. Check the initialization.")
        parts = self._founding[fragment_id]
        parts[part] = values
        if len(parts) == len(self.founding_parts):
            momentum = parts["momentum"] if "momentum" in parts else self._memory.flat(size).zero_()
            self._states[fragment_id] = FragmentState(theta=parts["values"], momentum=momentum, shadow=parts["values"])
            self._founding[fragment_id] = {}

    def restore(self, founding: Tensor, states: Sequence[FragmentState | None]) -> None:
        """Take a snapshot: the static state of the founding, and of each fragment what there is."""
        self.static, self._states = founding, list(states)

    def recalled(self, fragment_id: int, payload: memoryview, crc: int, n: int) -> FragmentState | None:
        """The state with the values of version `n` from a learner; the momentum is that of the snapshot, or zero. Changes nothing.

        Returns:
            None if the values are not what they should be.
        """
        size = self.layout.fragments[fragment_id].num_params
        values, before = decode_full(payload, size, out=self._memory.flat(size)), self._states[fragment_id]
        if crc32(values) != crc or not is_finite(values):
            return None
        if before is None:
            _log.warning(
                "Fragment %d is taken from a learner at version %d; its outer momentum is lost and begins at zero.", fragment_id, n
            )
        else:
            _log.info("Fragment %d is taken from a learner at version %d; its outer momentum is the snapshot's.", fragment_id, n)
        return FragmentState.recalled(values, before, n)

    def put_recalled(self, fragment_id: int, state: FragmentState) -> None:
        """The rules have taken what `recalled` made."""
        self._states[fragment_id] = state

    def found_static(self, payload: memoryview, crc: int) -> None:
        """Take the founder's static state.

        Raises:
            RemoteProtocolError: wrong length or checksum.
        """
        static = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if len(payload) else self.static
        if static.numel() != static_bytes(self.layout) or crc32(static) != crc:
            raise RemoteProtocolError("bad_checksum", "The static state of the founding does not have its length or checksum.")
        self.static = static

    @property
    def founding_bytes(self) -> int:
        """Payload bytes of a founding: float32 values, momentum if there is one, and the static state."""
        return 4 * len(self.founding_parts) * sum(f.num_params for f in self.layout.fragments) + static_bytes(self.layout)

    @property
    def is_complete(self) -> bool:
        """Whether every fragment and the static state are here."""
        return all(s is not None for s in self._states) and self.static.numel() == static_bytes(self.layout)

    def state(self, fragment_id: int) -> FragmentState:
        """The state of a founded fragment."""
        state = self._states[fragment_id]
        if state is None:
            raise RemoteProtocolError("wrong_layout", f"Fragment {fragment_id} has not been founded.")
        return state

    def crcs(self) -> tuple[int, ...]:
        """Checksum of every fragment's shadow."""
        return tuple(crc32(self.state(i).shadow) for i in range(len(self._states)))

    def measure_contribution(self, fragment_id: int, payload: memoryview, crc: int) -> Measured:
        """Check and measure one contribution, whose memory is kept and must stay as it is.

        Raises:
            RemoteProtocolError: the payload has another length.
        """
        fragment, found = self.layout.fragments[fragment_id], 0

        def look(where: slice) -> None:
            """Add a block to the checksum."""
            nonlocal found
            found = crc32(payload[where], found)

        contribution = Encoded.of(payload, fragment.num_params, self._dtype(fragment))
        norms = measure(fragment, contribution, allocate=self._memory.flat, look=look)
        return Measured(contribution=contribution, norms=norms, crc_ok=found == crc)

    def _dtype(self, fragment: Fragment) -> str:
        return fragment.wire_dtype(self.config.wire_dtype)

    def fold(self, fragment_id: int, d: Measured | Tensor, weight: float) -> None:
        """Fold one contribution into the fragment's open merge: what `measure_contribution` returned, or a flat float32 [N]."""
        accumulator = self._accumulators[fragment_id]
        if isinstance(d, Measured):
            record = accumulator.fold(d.contribution, weight, norms=d.norms.of_slices)
        else:
            record = accumulator.fold(d, weight)
        self._norms[fragment_id].append(record.norms)

    def close(self, fragment_id: int, merge_index: int, *, last_share: float | None = None) -> Closed:
        """Merge, take the outer step, and encode the publication; merged buffers are the new ones."""
        start_s = time.monotonic()
        config, before, fragment = self.config, self.state(fragment_id), self.layout.fragments[fragment_id]
        merged, record = self._accumulators[fragment_id].close()
        step = OuterStep(
            lr=config.outer_lr,
            momentum=momentum_at(merge_index, config.outer_momentum, config.outer_momentum_warmup),
            last_share=last_share,
            wire_dtype=config.wire_dtype,
        )
        published = take_step(fragment, before, merged, step, merge_index, checksum=crc32, flat=self._memory.flat, raw=self._memory.raw)
        if not published.is_finite:
            _log.error("The outer step of fragment %d is not finite; the fragment stays as it was, without momentum.", fragment_id)
        state = self._states[fragment_id] = published.state
        norms, self._norms[fragment_id] = tuple(self._norms[fragment_id]), []
        self._accumulators[fragment_id] = MergeAccumulator(fragment, allocate=self._memory.flat)
        return Closed(
            fragment_id=fragment_id,
            difference=published.difference,
            shadow=state.shadow,
            crc=published.crc,
            merge_s=time.monotonic() - start_s,
            outer_momentum=published.momentum,
            norms=norms,
            scales=record.scales,
            state=state,
        )

    def global_sha256(self) -> str:
        """SHA-256 of all published fragments in layout order, float32 little endian."""
        return sha256_of(self.state(i).shadow for i in range(len(self._states)))

    def save_global(self, path: Path) -> None:
        """Write the published fragments and the frozen parameters under the module's names, atomically.

        Running statistics are a fragment; other buffers are not here, because each learner has its own. A tensor stored below float32
        by the module stands here in float32; tied tensors stand under their first name.
        """
        static = unpack_static(self.layout, self.static)
        tensors: dict[str, Tensor] = {spec.name: static[spec.name] for spec in self.layout.static if spec.kind == "parameter"}
        for fragment in self.layout.fragments:
            shadow = self.state(fragment.fragment_id).shadow
            for part, flat in zip(fragment.slices, shadow.split_with_sizes([s.length for s in fragment.slices]), strict=True):
                tensors[part.name] = flat.reshape(part.global_shape).clone()
        _write(tensors, path)

    def save_outer(self, path: Path, versions: tuple[int, ...]) -> None:
        """Write versions and momentum, for a checkpoint to go on from, under the module's names, atomically.

        Without outer momentum there are only the versions, in the file's metadata: JSON, n by parameter name.
        """
        numbers = {p.name: n for f, n in zip(self.layout.fragments, versions, strict=True) for p in f.slices}
        momenta = tuple(self.state(f.fragment_id).momentum for f in self.layout.fragments)
        tensors = by_name(self.layout, momenta) if self.config.outer_momentum > 0 else {}
        _write(tensors, path, {"versions": json.dumps(numbers)})


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    temporary.replace(path)
