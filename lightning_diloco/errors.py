"""The error tree: whose fault, which value, which rule, what to do.

Errors of the caller are ``ValueError``/``TypeError`` as well, so that ordinary handlers work. Errors at the wire say which
side broke the rule: `LocalProtocolError` (this program did something that its own state forbids: a bug here) or
`RemoteProtocolError` (the peer sent what the rules forbid: the peer is dropped, this process goes on). ``assert`` is kept
for invariants of a single function.
"""

from __future__ import annotations

__all__ = [
    "CannotListenError",
    "ConfigurationError",
    "DiLoCoError",
    "DiskError",
    "FencedError",
    "JoinRefusedError",
    "LearnerIdInUseError",
    "LearnerFailedError",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "SyncerUnavailableError",
    "not_there_yet",
]


class DiLoCoError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(DiLoCoError, ValueError):
    """A value given by the user breaks a rule; the sentence names the value, the rule and the remedy."""


class CannotListenError(ConfigurationError):
    """An address cannot be listened at: it is taken, or none of this machine. It may be free again in a while."""


class DiskError(ConfigurationError):
    """A folder takes nothing: its disk is full, can only be read, or fails. It may take it again in a while."""


class ProtocolError(DiLoCoError):
    """A message or a call broke a rule of the protocol."""


class LocalProtocolError(ProtocolError):
    """This program asked its own machine for something that the state forbids."""


class RemoteProtocolError(ProtocolError):
    """The peer broke a rule.

    Args:
        reason: a word of the closed list of refusals (`lightning_diloco.protocol.messages.Refusal`).
        detail: one sentence with the value and the rule.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class JoinRefusedError(DiLoCoError):
    """The syncer refused this learner; the sentence names the field that differs or the rule that was broken."""


class LearnerIdInUseError(JoinRefusedError):
    """The syncer refused this learner because a process that it was hearing of lately has its id; in a while that may be over."""


class ShardedSyncerError(DiLoCoError):
    """The syncer that was dialled has several shards, and each wants to be joined; `runtime.sharded_client.join_job` does that.

    Args:
        endpoints: control endpoints of the shards from 1 on, as shard 0 has told them, which was dialled.
    """

    def __init__(self, endpoints: tuple[str, ...]) -> None:
        super().__init__(
            f"This syncer has {len(endpoints) + 1} shards, each for its part of the model. Join by join_job, which joins them all."
        )
        self.endpoints = endpoints


class FencedError(DiLoCoError):
    """Another process has taken over this learner's id; this one must end and never rejoin."""


class SyncerUnavailableError(DiLoCoError):
    """No syncer answered before a stated deadline."""


class LearnerFailedError(DiLoCoError):
    """A learner process ended in a way that a restart cannot mend."""


def not_there_yet(what: str, remedy: str) -> ConfigurationError:
    """The error for a value that the design has and this release has not: one wording everywhere.

    Args:
        what: the option with the value that was passed, or what was asked for.
        remedy: what to do instead, a sentence.
    """
    return ConfigurationError(f"{what} is not there yet. {remedy}")
