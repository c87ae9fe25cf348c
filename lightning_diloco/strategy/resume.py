"""What a Lightning checkpoint carries for the next job: versions, outer momentum, and what a sole learner had not merged yet.

It stands under one key of the checkpoint beside Lightning's own, as tensors and numbers by parameter name: plain Lightning ignores it,
``torch.load(weights_only=True)`` reads it. ``fit(ckpt_path=...)`` of this strategy gives it to the learner that founds the new job; its
``state_dict`` is the global model, as always.

| entry | what | where it comes from |
|---|---|---|
| ``versions`` | merges that each parameter's fragment has seen: the warm-up of the momentum goes on from there | the versions received |
| ``momentum`` | outer momentum, float32; absent if ``outer_momentum=0`` | recovered by learner 0; in ``last.ckpt`` the syncer's own |
| ``local`` | the learner's parameters where they are not the global ones; only in a job of one learner | the module |

With several learners ``local`` would be one of many, and each has the global model to go on from. With one it makes a resumed fit equal
to one that was never stopped.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_diloco.outer import Layout
from lightning_diloco.runtime.global_state import OUTER_NAME, FoundingState, GlobalState, by_name

__all__ = ["CHECKPOINT_KEY", "Resumed", "outer_state", "put_final_outer_state", "read_resumed"]

CHECKPOINT_KEY = "decoupled_diloco"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a checkpoint said; empty if it was written by another strategy."""

    founding: FoundingState = field(default_factory=FoundingState)
    local: dict[str, Tensor] = field(default_factory=dict)


def outer_state(layout: Layout, state: GlobalState, local: dict[str, Tensor]) -> dict[str, Any]:
    """The entry of one checkpoint.

    Args:
        layout: of the job.
        state: what the checkpoint's ``state_dict`` holds.
        local: the learner's own parameters by name; empty to leave them out.
    """
    versions = {part.name: n for fragment, n in zip(layout.fragments, state.versions, strict=True) for part in fragment.slices}
    entry: dict[str, Any] = {"versions": versions}
    if state.momentum:
        entry["momentum"] = by_name(layout, state.momentum)
    if local:
        entry["local"] = local
    return entry


def read_resumed(checkpoint: dict[str, Any]) -> Resumed:
    """Take the entry out of a checkpoint; what is not as it should be is left out with a warning."""
    entry = checkpoint.get(CHECKPOINT_KEY)
    if entry is None:
        return Resumed()
    if not isinstance(entry, dict):
        _log.warning("checkpoint[%r] is no dict: the job begins without outer momentum", CHECKPOINT_KEY)
        return Resumed()
    versions = {k: v for k, v in _items(entry, "versions") if isinstance(v, int) and v >= 0}
    momentum = {k: v.float() for k, v in _items(entry, "momentum") if isinstance(v, Tensor)}
    local = {k: v for k, v in _items(entry, "local") if isinstance(v, Tensor)}
    return Resumed(founding=FoundingState(versions=versions, momentum=momentum), local=local)


def _items(entry: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    part = entry.get(name, {})
    if isinstance(part, dict):
        return list(part.items())
    _log.warning("checkpoint[%r][%r] is no dict and was ignored", CHECKPOINT_KEY, name)
    return []


def put_final_outer_state(checkpoint: dict[str, Any], run_dir: Path) -> None:
    """Put the syncer's own versions and momentum into the checkpoint that is written after the drain, if it has left any."""
    path = run_dir / OUTER_NAME
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # noqa: SIM118 - no mapping
            momentum = {name: file.get_tensor(name) for name in names}
            entry: dict[str, Any] = {"versions": json.loads(file.metadata()["versions"])}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be read, last.ckpt has the momentum that learner 0 knew: %s", path, error)
        return
    if momentum:
        entry["momentum"] = momentum
    checkpoint[CHECKPOINT_KEY] = entry
