"""What a simulated job is made of: learners with their links, what happens to them and when, and how long things take.

All are frozen and validated on construction with a sentence. Times are seconds of the virtual clock, which starts at 0 with the syncer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError

__all__ = ["Cut", "Freeze", "Happening", "Kill", "Link", "Pause", "SimLearner", "SimOptions", "Takeover"]

UNTIL_S = 1e7
"""The end of a simulation that states none, in seconds."""


def _need(
    owner: str, name: str, value: float, *, above: float | None = None, at_least: float | None = None, below: float = math.inf
) -> None:
    """Check one number; exactly one of `above` and `at_least` is given."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    low = at_least if above is None else above
    if not is_number or low is None or not (low <= value < below) or (above is not None and value == above):
        rule = f"of at least {at_least:g}" if above is None else f"above {above:g}"
        rule += "" if below == math.inf else f" and below {below:g}"
        raise ConfigurationError(f"{owner}: {name}={value!r}: must be a finite number {rule}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A learner's connection to the syncer; both directions of bulk and control are independent of one another."""

    latency_s: float = 0.02
    """One way, of control messages (which take nothing else) and of payloads."""
    up_bytes_per_s: float = 125e6
    """Payloads to the syncer, one after the other."""
    down_bytes_per_s: float = 125e6
    """Payloads to the learner, one after the other."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        _need("Link", "latency_s", self.latency_s, at_least=0.0)
        for name in ("up_bytes_per_s", "down_bytes_per_s"):
            _need("Link", name, getattr(self, name), above=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimLearner:
    """One learner: how fast it steps, when it comes and when it goes."""

    step_s: float = 1.0
    """Seconds per inner step."""
    jitter: float = 0.0
    """Each step takes step_s * (1 + u), u uniform in [-jitter, jitter]."""
    tokens_per_step: int = 1024
    """Tokens of one inner step; also reported as its batch size."""
    join_at_s: float = 0.0
    """When its process starts. The founder's, learner 0, may start after others: they wait in line."""
    max_steps: int | None = None
    """It leaves at this step of the job (`lr_clock="job"`: a late joiner starts at the job's step) or of its own (None: never)."""
    link: Link = field(default_factory=Link)
    """Its connection."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        _need("SimLearner", "step_s", self.step_s, above=0.0)
        _need("SimLearner", "jitter", self.jitter, at_least=0.0, below=1.0)
        _need("SimLearner", "join_at_s", self.join_at_s, at_least=0.0)
        for name in ("tokens_per_step", "max_steps"):
            value = getattr(self, name)
            if not (value is None and name == "max_steps") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"SimLearner: {name}={value!r}: must be a whole number of at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _At:
    learner_id: int
    at_s: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        _need(type(self).__name__, "at_s", self.at_s, at_least=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _During(_At):
    for_s: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        _At.__post_init__(self)
        _need(type(self).__name__, "for_s", self.for_s, above=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause(_During):
    """From its next boundary on the learner does something else than steps (validation), and says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freeze(_During):
    """The learner's process stands still (SIGSTOP, a suspended machine): no step, no message; what arrives waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(_During):
    """The learner's link carries nothing; the learner steps on. Messages wait, running totals newest only; payloads go on afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill(_At):
    """The learner's process ends at once. What it had not sent completely is lost."""

    is_noticed: bool = True
    """A supervisor sees it `notice_s` later and tells the syncer, with the counters of the dead process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover(_At):
    """A new process with this learner's id and the takeover token starts, whether the old one lives or not."""


Happening = Pause | Freeze | Cut | Kill | Takeover
"""What may happen to a learner at a stated time."""

_H = TypeVar("_H", Pause, Freeze, Cut, Kill, Takeover)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimOptions:
    """A job to simulate.

    Raises:
        ConfigurationError: a value breaks its rule; the sentence names it.
    """

    learners: tuple[SimLearner, ...]
    """By learner id; learner 0 is the founder."""
    config: SyncConfig = field(default_factory=SyncConfig)
    """The job's configuration, as on the real runtime."""
    happenings: tuple[Happening, ...] = ()
    """What happens to whom; in any order."""
    seed: int = 0
    """Of the jitter; everything else is without chance."""
    params_per_fragment: int = 1_000_000
    """Elements of each fragment: payload sizes follow from it and from the wire dtype."""
    stop_at_s: float | None = None
    """Learner 0 asks for the end of the job at this time (None: learners end at their own `max_steps`)."""
    until_s: float = UNTIL_S
    """The simulation ends here whatever happens."""
    encode_s: float = 0.01
    """Learner's background: one snapshot encoded."""
    decode_s: float = 0.01
    """Learner's background: one publication decoded."""
    stall_s: float = 0.0
    """Learner's training thread: one adoption or snapshot at a boundary."""
    fold_s: float = 0.005
    """Syncer: one contribution folded."""
    merge_s: float = 0.02
    """Syncer: one merge and outer step, after its folds."""
    notice_s: float = 1.0
    """From a process's end to the supervisor's word about it."""

    def __post_init__(self) -> None:
        """Check every rule."""
        for name in ("learners", "happenings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.learners:
            raise ConfigurationError("SimOptions: learners=(): must hold at least one SimLearner.")
        for name in ("encode_s", "decode_s", "stall_s", "fold_s", "merge_s", "notice_s"):
            _need("SimOptions", name, getattr(self, name), at_least=0.0)
        _need("SimOptions", "until_s", self.until_s, above=0.0)
        for name in ("seed", "params_per_fragment"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (name != "seed" and value < 1):
                raise ConfigurationError(f"SimOptions: {name}={value!r}: must be a whole number{'' if name == 'seed' else ', at least 1'}.")
        if self.stop_at_s is not None:
            _need("SimOptions", "stop_at_s", self.stop_at_s, above=0.0)
        elif all(learner.max_steps is None for learner in self.learners) and self.until_s == UNTIL_S:
            raise ConfigurationError("SimOptions: the job would not end. Set stop_at_s, until_s, or max_steps of a learner.")
        for happening in self.happenings:
            if not 0 <= happening.learner_id < len(self.learners):
                raise ConfigurationError(
                    f"{type(happening).__name__}: learner_id={happening.learner_id!r}: there are {len(self.learners)} learners, from 0 on."
                )

    def of(self, kind: type[_H], learner_id: int | None = None) -> list[_H]:
        """Happenings of one kind (to one learner), by time."""
        found = [h for h in self.happenings if isinstance(h, kind) and learner_id in (None, h.learner_id)]
        return sorted(found, key=lambda h: h.at_s)
