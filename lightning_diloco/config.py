"""Configuration as data: keyword-only, frozen, validated on construction, never overridden by the environment.

`SyncConfig` is what one job agrees on: it is the founder's, travels in the join handshake, and a joiner whose values differ
is refused with the field's name. Choices of one process (addresses, folders, restarts) are not here.

What a wire dtype costs (`payload_bytes`) stands here too, because layers without tensors have to know it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from lightning_diloco.errors import ConfigurationError

__all__ = ["INT4_GROUP", "MAX_SHARDS", "SyncConfig", "WireDtype", "need_int", "payload_bytes"]

WireDtype = Literal["fp32", "bf16", "int4"]

INT4_GROUP = 64
"""Elements of an int4 payload that share one scale, which has two bytes."""
MAX_SHARDS = 64
"""Processes of one syncer."""


def payload_bytes(num_elements: int, wire_dtype: str) -> int:
    """Bytes of an encoded fragment: values and scales.

    Args:
        num_elements: N, at least 0.
        wire_dtype: "fp32", "bf16" or "int4".

    Raises:
        ConfigurationError: the wire dtype is unknown.
    """
    if wire_dtype == "int4":
        return 2 * math.ceil(num_elements / INT4_GROUP) + math.ceil(num_elements / 2)
    if wire_dtype not in ("fp32", "bf16"):
        raise ConfigurationError(f"wire_dtype={wire_dtype!r}: must be one of {', '.join(map(repr, get_args(WireDtype)))}.")
    return num_elements * (4 if wire_dtype == "fp32" else 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How learners and syncer exchange fragments.

    Raises:
        ConfigurationError: a field breaks its rule; the sentence names the field, the value, the rule and the remedy.

    References:
        Decoupled DiLoCo, arXiv 2604.21428. Outer learning rate, momentum and their warm-up are not published there: our choice.
    """

    num_fragments: int = 24
    """P: parts into which the parameters are cut. Effective value: at most the number of tensors."""
    sync_interval_steps: int = 24
    """H: inner steps between two openings of one fragment's round."""
    overlap_steps: int = 2
    """tau: inner steps that a round may take from opening to adoption. It budgets the grace window and nothing else."""
    min_quorum: int = 1
    """K: contributions that a merge needs (never more than there are active learners)."""
    grace_fraction: float = 0.8
    """gamma: the share of the remaining slack that the grace window may use, in [0, 1)."""
    grace_cap_steps: float = 1.0
    """Upper limit of the grace window, in inner steps of the fastest active learner."""
    merge: Literal["rda", "mean"] = "rda"
    """Radial-directional averaging per tensor, or the weighted mean."""
    mean_patterns: tuple[str, ...] = ("lm_head", "head", "classifier", "fc_out")
    """Tensors with one of these as a dotted part of their name are averaged plainly under ``rda``, beside embeddings, tensors tied to
    one, and tensors of fewer than two dimensions."""
    adopt: Literal["rebase", "overwrite"] = "rebase"
    """``rebase`` keeps the local progress that is not merged yet; ``overwrite`` is the paper's rule."""
    outer_lr: float = 0.7
    """Outer learning rate."""
    outer_momentum: float = 0.8
    """Nesterov momentum of the outer optimizer, in [0, 1)."""
    outer_momentum_warmup: int = 10
    """Momentum of a fragment's v-th merge (v from 1) is min(outer_momentum, v / (v + warmup)); 0 = constant."""
    wire_dtype: WireDtype = "bf16"
    """What contributions and publications are encoded as."""
    token_budget: int | None = None
    """End the job when so many tokens were trained over all learners (None: no limit)."""
    norm_gate: float | None = 10.0
    """Refuse a contribution whose norm per step exceeds this many times the running median (None: off)."""
    tape_payloads: bool = False
    """Also keep the founding and every contribution on the disk, as they came over the wire; `lightning-diloco replay` needs them."""
    drain_timeout_s: float = 10.0
    """Seconds that a leaving learner waits for its last contributions to be accepted; then they are discarded(`drain`)."""
    heartbeat_s: float = 1.0
    """Seconds between two full reports of a learner; one that is silent for ten of them (10 s at least) may be replaced by another process,
    and a syncer started by hand does not wait for it at the end."""
    snapshot_interval_s: float = 30.0
    """Seconds between two snapshots of the syncer."""
    rejoin_every_steps: int = 50
    """Inner steps in which a learner saves its whole inner optimizer state once, a fragment at a time, for a life after this one.
    Who joins a job that is so many steps old, and finds none, asks a peer."""
    max_offline_steps: int | None = None
    """A learner whose syncer was silent for ten heartbeats (10 s at least) ends when it has done so many inner steps since the last word
    (None: it goes on to its own limit)."""
    lr_clock: Literal["job", "local"] = "job"
    """Whether a late joiner's schedules start at the job's step or at its own zero."""
    include_frozen: bool = False
    """Cut frozen parameters into fragments too (for models that unfreeze later); otherwise they are static state."""

    def __post_init__(self) -> None:
        """Check every rule that does not need another object."""
        if isinstance(self.mean_patterns, str) or not isinstance(self.mean_patterns, Sequence):
            raise ConfigurationError(f"mean_patterns={self.mean_patterns!r}: must be a list of strings, for example ['lm_head'].")
        object.__setattr__(self, "mean_patterns", tuple(self.mean_patterns))
        self._check_choices()
        for name in ("num_fragments", "sync_interval_steps", "min_quorum", "rejoin_every_steps"):
            need_int(name, getattr(self, name), 1)
        for name in ("overlap_steps", "outer_momentum_warmup"):
            need_int(name, getattr(self, name), 0)
        for name in ("token_budget", "max_offline_steps"):
            if getattr(self, name) is not None:
                need_int(name, getattr(self, name), 1)
        self._need_number("grace_fraction", 0.0, 1.0, open_top=True)
        self._need_number("outer_momentum", 0.0, 1.0, open_top=True)
        self._need_number("grace_cap_steps", 0.0, math.inf)
        self._need_number("outer_lr", 0.0, math.inf, open_bottom=True)
        for name in ("drain_timeout_s", "heartbeat_s", "snapshot_interval_s"):
            self._need_number(name, 0.0, math.inf, open_bottom=True)
        if self.norm_gate is not None:
            self._need_number("norm_gate", 1.0, math.inf, open_bottom=True)

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SyncConfig:
        """Build from a mapping, with a sentence for an unknown name.

        Raises:
            ConfigurationError: a name is not a field; the nearest field is suggested.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the options are: {', '.join(names)}."
                raise ConfigurationError(f"Unknown option {name!r}: {hint}")
        return cls(**options)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def first_difference(self, other: SyncConfig) -> str | None:
        """The name of the first field in which the two differ, or None."""
        return next((f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)), None)

    def _check_choices(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("merge", "adopt", "wire_dtype", "lr_clock"):
            value, choices = getattr(self, name), get_args(hints[name])
            if value not in choices:
                raise ConfigurationError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}.")
        for name in ("tape_payloads", "include_frozen"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name}={getattr(self, name)!r}: must be True or False.")
        if not all(isinstance(p, str) and p for p in self.mean_patterns):
            raise ConfigurationError(f"mean_patterns={self.mean_patterns!r}: must be non-empty strings.")

    def _need_number(self, name: str, low: float, high: float, *, open_bottom: bool = False, open_top: bool = False) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if good:
            good = (low < value if open_bottom else low <= value) and (value < high if open_top else value <= high)
        if not good:
            rule = f"{'above' if open_bottom else 'of at least'} {low:g}"
            if high != math.inf:
                rule += f" and {'below' if open_top else 'at most'} {high:g}"
            raise ConfigurationError(f"{name}={value!r}: must be a finite number {rule}{_if_text(value, 'a number')}.")


def need_int(name: str, value: Any, at_least: int) -> None:
    """Check a whole number.

    Raises:
        ConfigurationError: it is none, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigurationError(f"{name}={value!r}: must be a whole number of at least {at_least}{_if_text(value, 'an int')}.")


def _if_text(value: Any, needed: str) -> str:
    return f"; this is text, {needed} is needed" if isinstance(value, str) else ""
