"""What one process is told about its part in a job, checked before anything starts.

`SyncConfig` is what all learners of a job agree on. The rest of the strategy's keyword arguments is here: who starts whom, where files
go, how work is counted. Options of the stable surface that are not there yet raise and say so, rather than being ignored.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from lightning_diloco.config import SyncConfig, need_int
from lightning_diloco.errors import ConfigurationError, not_there_yet
from lightning_diloco.runtime.addresses import is_loopback, split
from lightning_diloco.runtime.keys import SiteKeys

__all__ = ["INSECURE", "LaunchMode", "ProcessOptions", "Role", "name_sync_fields", "read_keys", "refuse_what_is_not_there_yet"]

LaunchMode = Literal["supervised", "inline"]
"""Who runs the learner: processes started by a supervisor, or this process."""

Role = Literal["supervisor", "learner", "inline", "island"]
"""`supervisor` starts learners and does not train; `learner` was started by one; `inline` is learner and syncer in one process; `island`
is one learner of a syncer that someone else started."""

_Init = TypeVar("_Init", bound=Callable[..., None])

INSECURE = "insecure"
"""The word that takes the place of a folder of keys where a link beyond loopback shall have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions:
    """The strategy's own options beside `SyncConfig`.

    Raises:
        ConfigurationError: a value breaks a rule; the sentence names it and the remedy.
    """

    syncer: str | None = None
    """Endpoint of a syncer that runs already, ``tcp://HOST:PORT``; None: this process brings its own."""
    keys: Path | None = None
    """With `syncer`: folder of this site's keys. None: the link is not encrypted, which needs ``is_insecure`` beyond loopback."""
    is_insecure: bool = False
    """With `syncer`: go without keys beyond loopback."""
    launch: LaunchMode = "supervised"
    """Whether learners are processes of their own (with `syncer` it has no meaning)."""
    learner_id: int | None = None
    """With `syncer`: which learner this is; None: the syncer gives the next free id."""
    num_learners: int | None = None
    """With `syncer`: how many learners share the training data; None: this learner reads all of it."""
    max_restarts: int = 3
    """How often the supervisor starts one learner again after a signal, or memory that ran out, has ended it."""
    hang_timeout_s: float | None = 1800.0
    """The supervisor kills a learner that hangs for so long, and starts it again; the syncer too, after 300 s at most (None: neither). See
    `strategy.hang_watch`."""
    run_dir: Path | None = None
    """Directory of the run; None: ``outputs/DATE_TIME`` under the working directory."""
    token_counter: Callable[[Any], int] | None = None
    """Tokens of a batch; None: see `lightning_diloco.strategy.counting`."""
    data: Literal["shard", "lease"] = "shard"
    """Whether each learner trains on its own part of the data, or the syncer hands out samples."""

    def __post_init__(self) -> None:
        """Check each field, then what they say together."""
        if self.launch not in ("supervised", "inline"):
            raise ConfigurationError(f"launch={self.launch!r}: must be 'supervised' or 'inline'.")
        if self.data not in ("shard", "lease"):
            raise ConfigurationError(f"data={self.data!r}: must be 'shard' or 'lease'.")
        need_int("max_restarts", self.max_restarts, 0)
        value = self.hang_timeout_s
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf):
            raise ConfigurationError(
                f"hang_timeout_s={value!r}: must be a finite number of seconds, at least 1; pass None to wait for a hung process for ever."
            )
        if self.token_counter is not None and not callable(self.token_counter):
            raise ConfigurationError(f"token_counter={self.token_counter!r}: must be a function of a batch that returns its tokens.")
        if self.syncer is None:
            for name in ("learner_id", "num_learners"):
                if getattr(self, name) is not None:
                    raise ConfigurationError(
                        f"{name}={getattr(self, name)!r} without syncer=: it numbers learners that are started by hand. In local mode "
                        "devices=N of the Trainer says how many learners there are."
                    )
            if self.keys is not None or self.is_insecure:
                raise ConfigurationError(
                    f"keys={str(self.keys or INSECURE)!r} without syncer=: in local mode everything stays on this machine. Leave it out."
                )
            return
        self._check_link(_check_endpoint(self.syncer))
        if self.launch == "inline":
            raise ConfigurationError(
                f"launch='inline' with syncer={self.syncer!r}: an inline run has its own syncer. Leave out one of the two."
            )
        self._check_numbering()

    def _check_link(self, host: str) -> None:
        if self.keys is not None:
            SiteKeys.read(self.keys)
        elif not is_loopback(host) and not self.is_insecure:
            raise ConfigurationError(
                f"syncer={self.syncer!r} without keys=: beyond loopback the model would travel for everybody to read and change. Give "
                "keys=DIR (lightning-diloco keygen DIR --syncer KEY makes it; the syncer prints KEY), or keys='insecure' in a network in "
                "which you trust everybody."
            )

    def _check_numbering(self) -> None:
        if self.learner_id is not None:
            need_int("learner_id", self.learner_id, 0)
        if self.num_learners is not None:
            need_int("num_learners", self.num_learners, 1)
            if self.num_learners > 1 and self.learner_id is None:
                raise ConfigurationError(
                    f"num_learners={self.num_learners} without learner_id=: say which share of the data this learner has."
                )
            if self.learner_id is not None and self.learner_id >= self.num_learners:
                raise ConfigurationError(f"learner_id={self.learner_id}: must be below num_learners={self.num_learners}.")


def name_sync_fields(init: _Init) -> _Init:
    """Show the fields of `SyncConfig` in a constructor's signature in the place of ``**sync``: to `help`, editors and LightningCLI.

    Args:
        init: takes the fields as its last, variable keyword argument.

    Returns:
        The same function; only what `inspect.signature` says of it has changed.
    """
    signature, hints = inspect.signature(init), get_type_hints(SyncConfig)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    sync = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(SyncConfig)
    ]
    vars(init)["__signature__"] = signature.replace(parameters=[*own, *sync])
    return init


def refuse_what_is_not_there_yet(
    *,
    devices_per_learner: Any,
) -> None:
    """Refuse options of the stable surface that are not there yet.

    Raises:
        ConfigurationError: one of them has another value than its default.
    """
    later = (("devices_per_learner", devices_per_learner, 1, "Leave it 1: every learner has one device."),)
    for name, value, default, remedy in later:
        if value != default:
            raise not_there_yet(f"{name}={value!r}", remedy)


def read_keys(keys: Any) -> tuple[Path | None, bool]:
    """The strategy's `keys`: a folder, and whether it is the word for none.

    Raises:
        ConfigurationError: it is neither.
    """
    if keys is None or keys == INSECURE:
        return None, keys is not None
    if not isinstance(keys, str | Path):
        raise ConfigurationError(f"keys={type(keys).__name__}: must be the folder that lightning-diloco keygen made, or 'insecure'.")
    return Path(keys).expanduser(), False


def _check_endpoint(endpoint: Any) -> str:
    """The host that is meant."""
    rule = "must be an endpoint such as 'tcp://127.0.0.1:5555'"
    if not isinstance(endpoint, str):
        raise ConfigurationError(f"syncer={endpoint!r}: {rule}.")
    address = split(endpoint)
    if address is None or not address[1]:
        raise ConfigurationError(f"syncer={endpoint!r}: {rule}; the syncer prints its own when it starts.")
    return address[0]
