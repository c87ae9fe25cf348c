"""One layout cut into parts, one for each shard of a syncer, and put together again.

Fragments are merged independently of one another, so a shard is a set of fragments and nothing else. Of S shards, shard k has the
fragments p with p mod S = k, and numbers them from 0: its fragment i is fragment i S + k of the whole. Fragments are balanced, and those
that are due one after the other are in different shards, so each shard has its share of the bytes at any time. Static state belongs to
the model and not to a fragment: it is in the first part alone.

Invariants: parts are disjoint, complete, and not empty; the only part of one is the layout itself, bytes and fingerprint included; `whole`
undoes `parts_of`; the parts' fingerprints say which part they are, so that a syncer knows it before it has read any layout.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from lightning_diloco.config import MAX_SHARDS
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer.spec import Layout

__all__ = ["global_id", "part_of", "parts_of", "whole"]

_PART = re.compile(r"(\d{1,3})/(\d{1,3})/[0-9a-f]{64}", re.ASCII)


def global_id(fragment_id: int, shard: int, num_shards: int) -> int:
    """The number in the whole layout of a part's fragment.

    Args:
        fragment_id: in the part.
        shard: number of the part.
        num_shards: S.
    """
    return fragment_id * num_shards + shard


def part_of(fingerprint: str) -> tuple[int, int]:
    """(k, S) of a part, told by its fingerprint; (0, 1) of a whole, and of what is no fingerprint at all.

    Args:
        fingerprint: of a layout, as a peer has sent it.
    """
    match = _PART.fullmatch(fingerprint)
    return (int(match[1]), int(match[2])) if match is not None else (0, 1)


def parts_of(layout: Layout, num_shards: int) -> tuple[Layout, ...]:
    """Cut a layout.

    Args:
        layout: a whole one.
        num_shards: S, at least 1.

    Returns:
        S layouts.

    Raises:
        ConfigurationError: a shard would have no parameters to merge.
    """
    count = sum(not f.holds_values for f in layout.fragments)
    if not 1 <= num_shards <= min(count, MAX_SHARDS):
        raise ConfigurationError(
            f"--shards {num_shards}: each shard of a syncer needs a fragment, and this model has {count} "
            f"(at most {MAX_SHARDS} shards). Start the syncer with at most {min(count, MAX_SHARDS)} shards, or raise num_fragments."
        )
    if num_shards == 1:
        return (layout,)
    return tuple(
        Layout(
            fragments=tuple(replace(f, fragment_id=i) for i, f in enumerate(layout.fragments[shard::num_shards])),
            static=layout.static if shard == 0 else (),
            shard=shard,
            num_shards=num_shards,
        )
        for shard in range(num_shards)
    )


def whole(parts: Sequence[Layout]) -> Layout:
    """Put parts together.

    Args:
        parts: all of one layout, by number.

    Raises:
        ConfigurationError: they are not that.
    """
    count = len(parts)
    if not parts or [(p.shard, p.num_shards) for p in parts] != [(k, count) for k in range(count)]:
        raise ConfigurationError("These are not the parts of one layout. Give the run directory as its syncer has left it.")
    found = {global_id(f.fragment_id, p.shard, count): f for p in parts for f in p.fragments}
    if sorted(found) != list(range(len(found))):
        raise ConfigurationError("Fragments of this layout are missing. Give the run directory as its syncer has left it.")
    return Layout(fragments=tuple(replace(found[p], fragment_id=p) for p in range(len(found))), static=parts[0].static)
